"""A build at a URL, of which the build folder is the local copy.

What stands at the URL counts. It gets each finished file of quantized/ with its facts, build.json
(first of all), and the record of each finished stage with its outputs before it; so what a record
or a file of facts speaks of stands there, and what a kill or a lost store left behind is spoken of
by none. The source stays where it is: build.json says which one it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.checkpoint.atomic import json_bytes, make_folder, write_bytes, write_json
from nf4_pipeline.checkpoint.digest import FileDigest, FileStamp
from nf4_pipeline.checkpoint.plain_file import read_plain
from nf4_pipeline.errors import BuildError, StoreError
from nf4_pipeline.object_store import ObjectStore, Uploads
from nf4_pipeline.object_store.store import read_json
from nf4_pipeline.progress import SILENT, Reporter

REMOTE_FILE: Final = "remote.json"
"""In the build folder: of which URL it is the local copy."""

SPEC_FILE: Final = "build.json"
_VERSION: Final = 1
_LARGEST: Final = 256 * 2**20  # bytes
_SMALL: Final = re.compile(
    r"build\.json|records/[\w.-]+\.json|quantized/[^/]+\.facts\.json|calibration/[\w.-]+\.json"
)
"""What is taken over as soon as a build is worked on; the rest is fetched when it is needed."""

_OWN: Final = re.compile(r"(quantized|export|calibration)(/[^/\0]+)+")
_OF_MACHINE: Final = ("mtime_ns", "ctime_ns", "inode")
_HERE_ONLY: Final = "records/download.json"
_AT_A_TIME: Final = 8

Upload = Callable[[Mapping[str, FileDigest]], None]
"""Puts files of the build folder to the URL, in their order; it need not have happened yet."""


def read_url(root: Path) -> str | None:
    """The URL of which a folder is the local copy; None if it is none."""
    value = _read_local(root / REMOTE_FILE)
    url = value.get("url") if isinstance(value, dict) else None
    return url if isinstance(url, str) else None


def shown_place(root: Path) -> str:
    """For people: where a build is; its URL, if the folder is the local copy of one there."""
    return read_url(root) or str(root)


def _read_local(path: Path) -> Any:
    try:
        return read_json(read_plain(path, _LARGEST))
    except OSError:
        return None


class Remote:
    """A build at a URL.

    Args:
        root: the build folder.
        url: of the build.
        takes: the files that `pull` takes over; None for all.

    Raises:
        UsageError: no build can be kept at that URL.
    """

    def __init__(self, root: Path, url: str, takes: Collection[str] | None = None) -> None:
        self.root = root
        self._takes = takes
        self.store = ObjectStore(url)
        self.url = self.store.url
        self.reporter: Reporter = SILENT
        self._held: dict[str, FileDigest] = {}  # what this process put there, or found

    def report_to(self, reporter: Reporter) -> None:
        """Has transfers and outages told to somebody from now on."""
        self.reporter = reporter
        self.store.say = reporter.note

    def pull(self, *, begins: bool = False) -> None:
        """Takes over what stands at the URL: build.json, records, facts, tokens.

        A record that stands here alone is dropped: its stage has not been done there.

        Args:
            begins: a build may begin there now; whether that is allowed is tried.

        Raises:
            BuildError: the folder is the local copy of another URL.
            StoreError: the store refuses or does not answer, or something else stands there.
        """
        if (own := read_url(self.root)) not in (None, self.url):
            raise BuildError(f"{self.root} is the local copy of {own}, not of {self.url}.")
        sizes = self.store.names()
        if SPEC_FILE not in sizes:
            if sizes:
                raise StoreError(
                    f"{self.url} holds {len(sizes):,} objects and no {SPEC_FILE}, such as "
                    f"{min(sizes)}: they are of no build. Nothing was touched. Name a folder of "
                    "its own as --build-dir."
                )
            if begins:
                self.store.check_writable()
            elif own is None:
                return
        small = [name for name in sizes if _SMALL.fullmatch(name) and self._is_taken(name)]
        with ThreadPoolExecutor(_AT_A_TIME, "pull") as pool:
            contents = dict(zip(small, pool.map(self._read, small), strict=True))
        if SPEC_FILE in sizes:
            self._check_spec(contents.get(SPEC_FILE))
        else:
            (self.root / SPEC_FILE).unlink(missing_ok=True)
        make_folder(self.root)
        if own is None:
            write_json(self.root / REMOTE_FILE, {"version": _VERSION, "url": self.url})
        for name, content in contents.items():
            path = self.root / name
            if content is not None and _shared(name, _read_local(path)) != read_json(content):
                write_bytes(path, content)
        for path in (self.root / "records").glob("*.json"):
            name = f"records/{path.name}"
            if self._is_taken(name) and contents.get(name) is None:
                path.unlink()

    def _is_taken(self, name: str) -> bool:
        return name != _HERE_ONLY and (self._takes is None or name in {SPEC_FILE, *self._takes})

    def _read(self, name: str) -> bytes | None:
        return self.store.read(name, _LARGEST)

    def _check_spec(self, content: bytes | None) -> None:
        value = read_json(content)
        if not isinstance(value, dict) or not {"version", "source", "recipe"} <= value.keys():
            raise StoreError(
                f"{self.url}/{SPEC_FILE} is not what a build notes there. Nothing was touched. "
                "Name another folder as --build-dir, or delete that one."
            )
        if value["version"] != _VERSION:
            raise StoreError(
                f"{self.url}/{SPEC_FILE} is of version {str(value['version'])[:20]}; this program "
                f"knows version {_VERSION}. Use the version that began that build, or name another "
                "--build-dir."
            )

    def holds(self, name: str, digest: FileDigest) -> bool:
        """Whether a file of the build stands at the URL, as it was put there."""
        if not _OWN.fullmatch(name) or ".." in name.split("/"):
            return False
        if self._held.get(name) != digest:
            if not self.store.holds(name, digest):
                return False
            self._held[name] = digest
        return True

    def put(self, files: Mapping[str, FileDigest]) -> None:
        """Puts files of the build folder there, in their order, as far as they do not stand there.

        A file whose bytes stand there under another name is copied by the store.
        """
        for name, digest in files.items():
            if not self.holds(name, digest):
                same = self._other_name(name, digest)
                copied = same is not None and self.store.copy(same, name)
                if not copied or not self.store.holds(name, digest):
                    self.store.put(name, self.root / name, digest)
                self._held[name] = digest

    def _other_name(self, name: str, digest: FileDigest) -> str | None:
        known = self._recorded() | self._held
        same = [other for other, theirs in known.items() if theirs == digest and other != name]
        return next((other for other in same if self.holds(other, digest)), None)

    def _recorded(self) -> dict[str, FileDigest]:
        """What the records that stand here say of all outputs."""
        known = {}
        for path in (self.root / "records").glob("*.json"):
            with suppress(TypeError, LookupError, AttributeError, ValueError):
                for name, entry in _read_local(path)["outputs"].items():
                    known[name] = FileDigest(int(entry["size"]), str(entry["sha256"]))
        return known

    @contextmanager
    def uploading(self, reporter: Reporter) -> Iterator[Upload]:
        """Files are put there while others are made; at its end, they all stand there."""
        with Uploads(self.store, reporter) as uploads:

            def begin(files: Mapping[str, FileDigest]) -> None:
                size = sum(digest.size for digest in files.values())
                uploads.begin(lambda: self.put(files), size)

            yield begin

    def put_record(
        self, name: str, content: bytes, outputs: Mapping[str, FileDigest], owns: str
    ) -> None:
        """Puts a record there, after the files that it speaks of.

        Args:
            name: of the record, in the build folder.
            content: of the record.
            outputs: of its stage.
            owns: the folder that is this stage's: of earlier runs, nothing stays in it; none if
                empty.
        """
        if name == _HERE_ONLY or self.store.read(name, _LARGEST) == content:
            return
        files = {file: digest for file, digest in outputs.items() if _OWN.fullmatch(file)}
        if size := sum(digest.size for digest in files.values()):
            with self.reporter.task("upload", size) as task:
                for file, digest in files.items():
                    self.put({file: digest})
                    task.advance(digest.size)
        if owns:
            self._prune(owns, {*files, *self._recorded()})
        self.store.write(name, content)

    def _prune(self, folder: str, files: Collection[str]) -> None:
        for name in self.store.names():
            own = name in files or name.removesuffix(".facts.json") in files
            if name.startswith(f"{folder}/") and not own:
                self._held.pop(name, None)
                self.store.delete(name)

    def forget(self, name: str) -> None:
        """Deletes a record there, before the outputs of its stage change."""
        if name != _HERE_ONLY:
            self.store.delete(name)

    def put_spec(self, spec: Mapping[str, Any]) -> None:
        """Puts build.json there.

        Raises:
            BuildError: another machine put one there since `pull`.
        """
        here, said = _read_local(self.root / SPEC_FILE), _shared(SPEC_FILE, spec)
        if _shared(SPEC_FILE, here) == said:  # as it was pulled
            return
        if not self.store.write(SPEC_FILE, json_bytes(said), new=here is None):
            raise BuildError(
                f"{self.url}: another nf4 process began a build there at this moment. Run the same "
                "command again: it joins in, if both are for the same source and recipe."
            )

    def fetch(self, files: Mapping[str, FileDigest]) -> dict[str, FileStamp]:
        """Fetches files that do not stand in the build folder; those at neither place stay absent.

        Returns:
            Stamps of the fetched ones, whose bytes were hashed as they came.

        Raises:
            StoreError: the store refuses or does not answer, or a file has other bytes there.
        """
        absent = {name: digest for name, digest in files.items() if self._is_absent(name)}
        stamps = {}
        if absent:
            with self.reporter.task("fetch", sum(d.size for d in absent.values())) as task:
                for name, digest in absent.items():
                    self._held.pop(name, None)
                    if self.store.get(name, self.root / name, digest, task):
                        stamps[name] = FileStamp.of(self.root / name)
                        self._held[name] = digest
        return stamps

    def _is_absent(self, name: str) -> bool:
        """Whether a file of the build is not here; nothing is written outside of its folders."""
        if not _OWN.fullmatch(name) or ".." in name.split("/"):
            return False
        path = self.root / name
        return not path.exists() and not path.is_symlink()


def _shared(name: str, value: Any) -> Any:
    """What of a JSON file is the same on every machine."""
    if not isinstance(value, Mapping):
        return value
    shared = dict(value)
    if name == SPEC_FILE and isinstance(value.get("source"), Mapping):
        shared["source"] = {key: v for key, v in value["source"].items() if key != "folder"}
    elif name.startswith("records/") and isinstance(value.get("outputs"), Mapping):
        shared["outputs"] = {
            file: _without(entry, _OF_MACHINE) if isinstance(entry, Mapping) else entry
            for file, entry in value["outputs"].items()
        }
    return shared


def _without(entry: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in keys}
