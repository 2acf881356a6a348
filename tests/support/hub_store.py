"""What a test Hub holds: repos as rows of commits, files as bytes, hashed as git and LFS do."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

LFS_FROM = 1_000_000  # bytes; above it a file is LFS, as is any *.safetensors


MAPPED_FROM = 1 << 26  # bytes


def git_sha1(data: bytes) -> str:
    """The id that git gives to a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def is_lfs(path: str, size: int, attributes: Blob | None = None) -> bool:
    """Whether the Hub keeps a file outside git; None for a repo without .gitattributes."""
    tracked = attributes is None or b"*.safetensors" in attributes.data
    return size > LFS_FROM or (tracked and path.endswith(".safetensors"))


@dataclass(frozen=True)
class Blob:
    """A file's bytes with what the Hub says about them."""

    data: bytes
    lfs: bool
    sha256: str = field(init=False)
    oid: str = field(init=False)  # git sha1: of the bytes, or of the LFS pointer
    pointer_size: int = field(init=False)

    def __post_init__(self) -> None:
        sha256 = hashlib.sha256(self.data).hexdigest()
        pointer = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\n"
            f"size {len(self.data)}\n"
        ).encode()
        object.__setattr__(self, "sha256", sha256)
        object.__setattr__(self, "oid", git_sha1(pointer if self.lfs else self.data))
        object.__setattr__(self, "pointer_size", len(pointer))

    @property
    def etag(self) -> str:
        """What the Hub names a file's bytes by: sha256 for LFS, git sha1 otherwise."""
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """One state of a repo."""

    sha: str
    parent: str | None
    files: Mapping[str, Blob]


@dataclass
class PullRequest:
    """A pull request; its branch is `refs/pr/<num>`."""

    num: int
    title: str
    author: str
    status: str = "open"


@dataclass
class Repo:
    """A model repo: its commits, what branches and tags point at, who may read it and write to it.

    LFS bytes come before the commit that names them: `objects` holds them by sha256, `parts` those
    of an upload in parts by sha256 and number.
    """

    repo_id: str
    gated: bool = False  # anybody sees the list, only `readers` get files
    private: bool = False  # only `readers` see that it exists
    readers: set[str] = field(default_factory=set)  # user names
    writers: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    pull_requests: list[PullRequest] = field(default_factory=list)

    @property
    def head(self) -> Commit:
        """The commit of main."""
        return self.commits[self.refs["main"]]

    def open_pull_request(self, title: str, author: str) -> PullRequest:
        """Opens one whose branch stands where main does."""
        request = PullRequest(len(self.pull_requests) + 1, title, author)
        self.pull_requests.append(request)
        self.refs[f"refs/pr/{request.num}"] = self.refs["main"]
        return request

    def commit(self, files: Mapping[str, bytes | None], branch: str = "main") -> str:
        """Puts files on a branch (None takes one away) and gives the new commit's id."""
        parent = self.refs.get(branch)
        state = dict(self.commits[parent].files) if parent else {}
        for path, data in files.items():
            if data is None:
                del state[path]
            else:
                state[path] = Blob(data, is_lfs(path, len(data), state.get(".gitattributes")))
        listing = "".join(f"{path} {blob.oid}\n" for path, blob in sorted(state.items()))
        text = f"{self.repo_id} {parent}\n{listing}".encode()
        sha = hashlib.sha1(text, usedforsecurity=False).hexdigest()
        self.commits[sha] = Commit(sha, parent, state)
        self.refs[branch] = sha
        return sha

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch, tag or commit id."""
        return self.commits.get(self.refs.get(revision, revision))


def _content(path: Path) -> bytes:
    """A file's bytes; those of a large one stay on the disk until they are looked at."""
    if path.stat().st_size < MAPPED_FROM:
        return path.read_bytes()
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # type: ignore[return-value]


class Store:
    """All repos of a test Hub, and the tokens that it takes."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.users: dict[str, str] = {}  # token → user name
        self.ends: dict[str, float] = {}  # token → when it ends, where it does
        self.organizations: dict[str, set[str]] = {}  # user name → where it may create repos

    def add(
        self,
        repo_id: str,
        files: Path | Mapping[str, bytes],
        *,
        gated: bool = False,
        private: bool = False,
        readers: frozenset[str] = frozenset(),
    ) -> Repo:
        """Makes a repo with one commit, from a folder or from bytes by path."""
        if isinstance(files, Path):
            paths = (path for path in files.rglob("*") if path.is_file())
            files = {path.relative_to(files).as_posix(): _content(path) for path in paths}
        repo = Repo(repo_id, gated, private, set(readers))
        repo.commit(files)
        self.repos[repo_id] = repo
        return repo
