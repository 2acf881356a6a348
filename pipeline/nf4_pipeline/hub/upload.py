"""Puts files into a model repo in one commit, or one pull request, and proves that they are there.

    look ──► create? ──► compare ──► send the bytes ──► commit ──► compare again: the proof
    prepare                          send_ahead: before all else is known

Sending bytes changes nothing that anybody sees; the one commit does, so a repo holds either all of
an export or none of it. That is why `create_commit` is used: where Xet is on, `upload_folder` may
cut a folder into several commits, and does so after a failure (docs/decisions/0006-one-commit.md).

A commit whose answer is lost may have been made. So nothing is committed without looking at the
repo first, and each commit names the parent that was seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from nf4_pipeline.errors import ConflictError, HubError, NotFoundError
from nf4_pipeline.hub import client, limits, local, publisher
from nf4_pipeline.hub.errors import Request, may_pass, was_not_answered
from nf4_pipeline.hub.local import LocalFile, Proof
from nf4_pipeline.hub.lookup import resolve
from nf4_pipeline.hub.remote import RemoteFile, RemoteModel
from nf4_pipeline.progress import Reporter

T = TypeVar("T")

MAIN = "main"
_MOST_LOOKED_AT = 10  # pull requests of the same title, the newest first
_ASKED_AT_A_TIME = 100  # files, of those that were sent ahead
_FORCED_TRIES = 3  # commits over other people's, if they keep on pushing


@dataclass(frozen=True)
class Earlier:
    """What an earlier push left: the head that it made of a branch, and its files' checksums."""

    branch: str
    commit: str
    files: Mapping[str, str]


@dataclass(frozen=True)
class Target:
    """Where files go, and how.

    Attributes:
        repo_id: ORG/NAME.
        private: visibility of the repo; None for private if it is created, else as it is.
        pull_request: propose the change instead of making it.
        force: also over what somebody else pushed since the earlier push.
    """

    repo_id: str
    private: bool | None = None
    pull_request: bool = False
    force: bool = False


@dataclass(frozen=True)
class CommitMessage:
    """What is said of a commit.

    Attributes:
        title: also of the pull request, by which it is found again.
        description: the rest of the message.
    """

    title: str
    description: str = ""


@dataclass(frozen=True)
class Published:
    """What came of it.

    Attributes:
        commit: the commit that holds the files.
        branch: main, or refs/pr/N.
        parent: the commit before it, if one was made now.
        pull_request: its number, if it is one.
        private: visibility of the repo.
        created: the repo was made now.
        proof: what the Hub lists for each file beside what was expected.
    """

    commit: str
    branch: str
    parent: str | None
    pull_request: int | None
    private: bool
    created: bool
    proof: Proof = field(repr=False)


@dataclass(frozen=True)
class _Head:
    """A commit, and the branch that it was made on."""

    commit: str
    branch: str

    @property
    def number(self) -> int | None:
        """Of the pull request, if that is what the branch belongs to."""
        return None if self.branch == MAIN else int(self.branch.rpartition("/")[2])


def publish(
    files: Mapping[str, LocalFile],
    target: Target,
    message: CommitMessage,
    reporter: Reporter,
    *,
    earlier: Earlier | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Published:
    """Makes a model repo hold `files`, and proves it; commits nothing if it does already.

    Args:
        files: what it shall hold, by path. Other files in it stay, weights of other builds aside.
        target: where and how.
        message: of the commit.
        reporter: told what happens.
        earlier: what an earlier push left in this repo.
        sleep: waits between tries, in seconds.

    Raises:
        ConflictError: somebody else pushed; the target does not say `force`.
        HubError: no token, no right to write, no answer, or the Hub lists other checksums than
            those of the files.
    """
    with client.quiet(), publisher.pushing(target.repo_id):
        return _Push(files, target, message, earlier, reporter, sleep).run()


def prepare(
    target: Target, reporter: Reporter, *, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Makes sure that a repo takes files: there is a token, and the repo, made if it has to be.

    Args:
        target: where files will go.
        reporter: told what happens.
        sleep: waits between tries, in seconds.

    Raises:
        HubError: no token, no right to make the repo, no answer, another visibility than the one
            that was asked for, or this is a CI job without a token of its own.
    """
    if publisher.resource() is not None or publisher.is_offered():
        from huggingface_hub import get_token

        if publisher.resource() is not None or get_token() is None:
            raise HubError(
                "--stream-output: a token that a CI job's identity is exchanged for is good for "
                "one repo, and would go with what is fetched meanwhile, too. Set HF_TOKEN, and no "
                "HF_OIDC_RESOURCE; or leave --stream-output out, and run `nf4 push` at the end."
            )
    with client.quiet():
        _Push({}, target, CommitMessage(""), None, reporter, sleep).prepare()


def send_ahead(
    files: Mapping[str, LocalFile],
    target: Target,
    reporter: Reporter,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> list[str]:
    """Sends the bytes of files that a later `publish` will name; until then nobody sees them.

    What the Hub holds already is not sent.

    Args:
        files: by the path that they may get.
        target: where; `prepare` was called for it.
        reporter: told what happens.
        sleep: waits between tries, in seconds.

    Returns:
        The paths of those that were not sent: the repo keeps them in git, not in LFS, so that their
        bytes come with the commit.

    Raises:
        HubError: no right to write, no answer, or a file changed meanwhile.
    """
    with client.quiet():
        push = _Push(files, target, CommitMessage(""), None, reporter, sleep)
        return [put.path_in_repo for put in push.upload(files, MAIN, False) if not _is_sent(put)]


def lost(
    files: Mapping[str, int],
    target: Target,
    reporter: Reporter,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> list[str]:
    """Those of the files that were sent ahead of which the Hub says that it lacks them.

    Args:
        files: size of each, by sha256.
        target: where they were sent.
        reporter: told what happens.
        sleep: waits between tries, in seconds.

    Raises:
        HubError: no right to write, or no answer.
    """
    with client.quiet():
        return _Push({}, target, CommitMessage(""), None, reporter, sleep).lacks(files)


class _Push:
    """One `publish`: what it was given, and the client."""

    def __init__(
        self,
        files: Mapping[str, LocalFile],
        target: Target,
        message: CommitMessage,
        earlier: Earlier | None,
        reporter: Reporter,
        sleep: Callable[[float], None],
    ) -> None:
        from huggingface_hub import HfApi

        self._api = HfApi(library_name=client.LIBRARY)
        self._files, self._target, self._message = files, target, message
        self._earlier, self._reporter, self._sleep = earlier, reporter, sleep
        self._repo_id = target.repo_id

    def prepare(self) -> tuple[RemoteModel, bool]:
        """The repo, and whether it was made now."""
        self._check_token()
        remote, created = self._find_or_create()
        self._check_visibility(remote)
        return remote, created

    def run(self) -> Published:
        remote, created = self.prepare()
        number = self._own_pull_request(remote) if self._target.pull_request else None
        if number is not None:
            remote = self._look(_branch(number))
        made = _Head(remote.commit, remote.revision or MAIN)
        parent = None
        if self._todo(remote):
            parent = remote.commit
            made = self._change(remote, number)
        return Published(
            commit=made.commit,
            branch=made.branch,
            parent=parent,
            pull_request=made.number,
            private=remote.private,
            created=created,
            proof=self._prove(made.commit),
        )

    # What is there.

    def _check_token(self) -> None:
        from huggingface_hub import constants, get_token

        if constants.HF_HUB_OFFLINE:
            raise HubError("HF_HUB_OFFLINE is set, and a push needs the Hub. Unset it.")
        if (named := publisher.resource()) is not None:
            self._reporter.note(f"token: of this CI job, as a trusted publisher of {named}")
        elif get_token() is None:
            raise HubError(
                f"Pushing to {self._repo_id} needs a token, and none is set. Make one with write "
                f"access at {constants.ENDPOINT}/settings/tokens, then `hf auth login` or HF_TOKEN."
                f"{publisher.WITHOUT_TOKEN if publisher.is_in_ci() else ''}"
            )

    def _look(self, revision: str = MAIN) -> RemoteModel:
        with self._reporter.task("ask the Hub", None):
            return resolve(self._repo_id, revision, offline=False, sleep=self._sleep)

    def _todo(self, remote: RemoteModel) -> local.Changes:
        earlier = self._earlier
        return local.changes(remote, self._files, earlier.files if earlier else {})

    def _find_or_create(self) -> tuple[RemoteModel, bool]:
        try:
            return self._look(), False
        except NotFoundError:
            pass
        private = self._target.private is not False
        try:
            self._attempt(
                lambda: self._api.create_repo(self._repo_id, private=private, exist_ok=True),
                f"creating {self._repo_id}",
            )
        except HubError as error:
            return self._unless_missing(error), False
        return self._look(), True

    def _unless_missing(self, error: HubError) -> RemoteModel:
        """The repo, if it is there although creating it failed."""
        try:
            return self._look()
        except HubError:
            raise error from None

    def _check_visibility(self, remote: RemoteModel) -> None:
        from huggingface_hub import constants

        if self._target.private not in (None, remote.private):
            asked, found = ("private", "public") if self._target.private else ("public", "private")
            raise HubError(
                f"{self._repo_id} exists and is {found}; --{asked} was asked. Change it at "
                f"{constants.ENDPOINT}/{self._repo_id}/settings, or leave the option out."
            )

    def _own_pull_request(self, base: RemoteModel) -> int | None:
        """The open pull request to go on with: that of an earlier push, or one that is the same.

        Whose token this is cannot be asked: one of a trusted publisher belongs to nobody. So what
        tells a pull request apart is the record of an earlier push; and, where there is none
        because its answer was lost, that it makes of `base` what would be proposed, and no more.
        """
        requests = self._attempt(
            lambda: list(
                self._api.get_repo_discussions(self._repo_id, discussion_type="pull_request")
            ),
            f"listing the pull requests of {self._repo_id}",
        )
        numbers = [
            request.num
            for request in requests
            if request.is_pull_request
            and request.title == self._message.title
            and request.status in ("open", "draft")
        ]
        earlier = self._earlier.branch if self._earlier else MAIN
        for number in sorted(numbers, reverse=True):
            if _branch(number) == earlier:
                return number
        for number in sorted(numbers, reverse=True)[:_MOST_LOOKED_AT]:
            there = self._look(_branch(number))
            if not self._todo(there) and self._others(there) == self._others(base):
                return number
        return None

    def _others(self, remote: RemoteModel) -> set[RemoteFile]:
        """The files of a branch that a push would leave as they are."""
        own = {*self._files, *self._todo(remote).delete}
        return {file for file in remote.files if file.path not in own}

    # What changes it.

    def _change(self, remote: RemoteModel, number: int | None) -> _Head:
        """Sends what differs and commits it."""
        if not self._target.force:
            self._refuse_to_overwrite(remote)
            return self._commit(remote, self._send(remote, number), number)
        for _ in range(_FORCED_TRIES):
            try:
                return self._commit(remote, self._send(remote, number), number)
            except ConflictError as error:
                last = error
                remote = self._look(remote.revision or MAIN)
                if not self._todo(remote):
                    return _Head(remote.commit, remote.revision or MAIN)
        raise last

    def _refuse_to_overwrite(self, remote: RemoteModel) -> None:
        earlier = self._earlier
        if earlier and earlier.branch == remote.revision and earlier.commit != remote.commit:
            raise ConflictError(
                f"Somebody else changed {self._repo_id}: the last push from this build made commit "
                f"{earlier.commit[:12]}, and {earlier.branch} is at {remote.commit[:12]} now. Look "
                "at what they did, then run this again with --force to put the export over it."
            )

    def _send(self, remote: RemoteModel, number: int | None) -> list[Any]:
        """Uploads the bytes of large files; gives the operations of the commit."""
        from huggingface_hub import CommitOperationDelete

        todo = self._todo(remote)
        sizes = sum(self._files[path].size for path in todo.put)
        self._reporter.note(f"uploading {len(todo.put)} files, {sizes:,} bytes, to {self._repo_id}")
        puts = self.upload(todo.put, remote.revision or MAIN, self._opens(number))
        return [*(CommitOperationDelete(path) for path in todo.delete), *puts]

    def upload(self, paths: Iterable[str], revision: str, opens: bool) -> list[Any]:
        """Uploads the bytes of large files; gives the operations that add all of them.

        Args:
            paths: of the files.
            revision: the branch that they are for.
            opens: they are for a pull request that is yet to be opened.
        """
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.utils.tqdm import are_progress_bars_disabled

        puts = []
        for path in paths:
            file = self._files[path]
            put = CommitOperationAdd(
                path, str(file.content) if isinstance(file.content, Path) else file.content or b""
            )
            put.upload_info.sha256 = bytes.fromhex(file.sha256)  # else the client hashes it again
            if file.content is None:  # as `preupload_lfs_files` leaves what it has sent
                put.upload_info.size = file.size
                put._upload_mode, put._should_ignore, put._is_uploaded = "lfs", False, True
            puts.append(put)
        self._attempt(
            lambda: self._api.preupload_lfs_files(
                self._repo_id,
                puts,
                revision=revision,
                create_pr=opens,
                free_memory=False,
                gitignore_content="",  # a .gitignore in the repo must not leave files out
            ),
            f"uploading to {self._repo_id}",
            has_bars=not are_progress_bars_disabled(),
            delays=client.ONCE_MORE,
        )
        self._check_untouched([put.path_in_repo for put in puts])
        return puts

    def lacks(self, files: Mapping[str, int]) -> list[str]:
        """Those files, by sha256, whose bytes the Hub would have sent."""
        from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # its public names
            build_hf_headers,
        )

        infos = [
            UploadInfo(size=size, sample=b"", sha256=bytes.fromhex(sha256))
            for sha256, size in files.items()
        ]
        ask = partial(
            post_lfs_batch_info,
            token=None,
            repo_type="model",
            repo_id=self._repo_id,
            revision=MAIN,
            headers=build_hf_headers(library_name=client.LIBRARY),
        )
        missing: list[str] = []
        for start in range(0, len(infos), _ASKED_AT_A_TIME):
            some = infos[start : start + _ASKED_AT_A_TIME]
            answers, errors, _ = self._attempt(
                partial(ask, upload_infos=some),
                f"asking which files {self._repo_id} has received",
            )
            missing += [answer["oid"] for answer in answers if answer.get("actions")]
            missing += [error["oid"] for error in errors]
        return missing

    def _check_untouched(self, paths: Sequence[str]) -> None:
        """Commits no bytes under a hash that may be that of others."""
        touched = [path for path in paths if self._files[path].was_touched]
        if touched:
            raise HubError(
                f"{touched[0]} changed while it was uploaded to {self._repo_id}; nothing was "
                "committed. Let whatever writes there end, then run this again."
            )

    def _commit(self, remote: RemoteModel, operations: list[Any], number: int | None) -> _Head:
        """Makes the one commit; after any fault, looks whether it was made before going on."""
        branch, opens = remote.revision or MAIN, self._opens(number)
        tries = count()

        def made() -> _Head | None:
            """The branch, if it holds the files although the commit was not acknowledged."""
            opened = self._own_pull_request(remote) if opens else number
            if opens and opened is None:
                return None
            now = self._look(_branch(opened) if opened is not None else branch)
            return None if self._todo(now) else _Head(now.commit, now.revision or MAIN)

        def once() -> _Head:
            if next(tries) and (there := made()):
                return there
            info = self._api.create_commit(
                self._repo_id,
                operations,
                commit_message=self._message.title,
                commit_description=self._message.description,
                revision=branch,
                create_pr=opens,
                parent_commit=remote.commit,
            )
            return _Head(info.oid, (info.pr_revision or branch) if opens else branch)

        def passing(error: BaseException) -> bool:
            # A pull request that is opened late has no parent to fail on: better none than two.
            return may_pass(error) and not (opens and was_not_answered(error))

        try:
            doing = f"committing to {self._repo_id}"
            return self._attempt(once, doing, commits=True, passing=passing)
        except HubError as error:
            try:
                there = made()
            except HubError:
                there = None
            if there is None:
                raise error from None
            return there

    def _opens(self, number: int | None) -> bool:
        return self._target.pull_request and number is None

    # What is there now.

    def _prove(self, commit: str) -> Proof:
        """Asks the Hub what it holds at the commit.

        Raises:
            HubError: the Hub lists another checksum for a file, lacks one, or still has one that
                was to be deleted.
        """
        remote = self._look(commit)
        wrong = self._todo(remote)
        proof = local.prove(remote, self._files)
        if wrong:
            path = (*wrong.put, *wrong.delete)[0]
            entry = proof.files.get(path)
            what = (
                f"expected {entry.algorithm} {entry.expected}, found {entry.found}"
                if entry
                else "expected no such file"
            )
            total = len(wrong.put) + len(wrong.delete)
            raise HubError(
                f"{self._repo_id} at {commit[:12]} does not hold what was sent: {total} files "
                f"differ, first {path}: {what}. Do not use that commit; run the same command again."
            )
        return proof

    def _attempt(
        self,
        call: Callable[[], T],
        doing: str,
        *,
        commits: bool = False,
        has_bars: bool = False,
        **options: Any,
    ) -> T:
        """Makes a call; the client shows by itself how far it is, if it `has_bars`."""
        request = Request(self._repo_id, MAIN, doing, writes=True, commits=commits)
        allowance = limits.for_upload()
        with nullcontext() if has_bars else self._reporter.task(doing, None):
            return client.attempt(call, request, self._sleep, allowance=allowance, **options)


def _is_sent(put: Any) -> bool:
    """Whether the Hub has the bytes of an operation; the client passes over files kept in git."""
    return bool(put._is_uploaded)


def _branch(number: int) -> str:
    return f"refs/pr/{number}"


def commit_url(repo_id: str, commit: str) -> str:
    """Where people can look at a commit."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo_id}/commit/{commit}"


def repo_url(repo_id: str) -> str:
    """Where a repo is."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo_id}"


def pull_request_url(repo_id: str, number: int) -> str:
    """Where people can look at a pull request."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo_id}/discussions/{number}"
