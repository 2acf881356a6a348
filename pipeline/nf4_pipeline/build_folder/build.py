"""The build folder: where things are, and its lock."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Final

from nf4_pipeline.build_folder.freshness import Inputs, State, check_outputs, find_state
from nf4_pipeline.build_folder.makers import Makers, begin_making, owner_of, read_makers
from nf4_pipeline.build_folder.record import (
    F,
    Facts,
    Record,
    RecordKind,
    now,
    read_record,
    record_json,
    write_record,
)
from nf4_pipeline.build_folder.remote import Remote, Upload, read_url, shown_place
from nf4_pipeline.build_folder.sent import Sent, read_sent
from nf4_pipeline.build_folder.spec import BuildSpec, write_spec
from nf4_pipeline.checkpoint.atomic import (
    json_bytes,
    make_folder,
    recover_folder,
    remove_leftovers,
    sync_folder,
)
from nf4_pipeline.checkpoint.digest import FileDigest, FileStamp
from nf4_pipeline.errors import BuildError
from nf4_pipeline.progress import SILENT, Reporter

_LOCK: Final = ".lock"
"""A file in the build folder; with the name of a file of quantized/ behind it, that file's."""
_PATIENCE: Final = 60.0
"""Seconds that helpers may take to end once their work is done."""
_PAUSE: Final = 0.05


class Build:
    """A build folder. Creating the object touches nothing on disk.

    Args:
        root: the folder.
        url: of which it is, or shall be, the local copy; None for the one that is noted in it.
        takes: the files that are taken over from there, for whoever works at a few of them; None
            for all.
    """

    def __init__(
        self, root: Path, url: str | None = None, takes: Collection[str] | None = None
    ) -> None:
        self.root = root
        self._url = url
        self._takes = takes
        self._written: dict[str, FileStamp] = {}  # outputs that this process hashed as it made them
        self._lock: int | None = None  # descriptor of the lock file, while it is `locked`

    @cached_property
    def _remote(self) -> Remote | None:
        url = self._url or read_url(self.root)
        return None if url is None else Remote(self.root, url, self._takes)

    @property
    def is_copy(self) -> bool:
        """Whether the folder is the local copy of a build at a URL."""
        return self._remote is not None

    @property
    def url(self) -> str | None:
        """Of which the folder is the local copy; None if it is none."""
        return None if self._remote is None else self._remote.url

    @property
    def shown(self) -> str:
        """For people: where it is; the URL, if the folder is the local copy of a build there."""
        return self._url or shown_place(self.root)

    def pull(self, reporter: Reporter = SILENT, *, begins: bool = False) -> None:
        """Takes over what stands at the URL of which the folder is a copy, if it is one.

        Args:
            reporter: told of all transfers from now on.
            begins: a build may begin there now.

        Raises:
            UsageError: no build can be kept at that URL.
            StoreError: the store refuses or does not answer, or something else stands there.
        """
        if self._remote is not None:
            self._remote.report_to(reporter)
            self._remote.pull(begins=begins)

    def holds(self, name: str, digest: FileDigest) -> bool:
        """Whether a file of the build is kept elsewhere, so that it need not lie here.

        It stands at the URL of which the folder is a copy, or the Hub received it.

        Args:
            name: its path in the build folder.
            digest: what it was put there with.
        """
        at_url = self._remote is not None and self._remote.holds(name, digest)
        return at_url or self.sent.has(digest)

    @property
    def sent(self) -> Sent:
        """What a Hub has received of the build."""
        return read_sent(self.root)

    def only_sent(self, kind: RecordKind[Facts]) -> dict[str, FileDigest]:
        """Outputs of a stage that a Hub has received and that are not here, by their path here."""
        record, sent = self.record(kind), self.sent
        return {
            name: digest
            for name, digest in (record.outputs.items() if record else ())
            if sent.has(digest) and not (self.root / name).exists()
        }

    def put(self, files: Mapping[str, FileDigest]) -> None:
        """Puts files of the build to the URL, if there is one, before any record speaks of them."""
        if self._remote is not None:
            self._remote.put(files)

    @contextmanager
    def uploading(self, reporter: Reporter) -> Iterator[Upload]:
        """Gives what puts finished files to the URL while others are made; without one, nothing.

        Args:
            reporter: told how much is still to go at the end.

        Raises:
            StoreError: the store refuses, or does not answer.
        """
        remote = self._remote
        with (
            nullcontext(lambda files: None)
            if remote is None
            else remote.uploading(reporter) as upload
        ):
            yield upload

    def fetch(self, *kinds: RecordKind[Facts]) -> None:
        """Fetches outputs of stages that stand at the URL and not here.

        Args:
            kinds: of the stages.

        Raises:
            StoreError: the store refuses or does not answer, or a file has other bytes there.
        """
        for kind in kinds if self._remote is not None else ():
            record = self.record(kind)
            if record is not None and self._remote is not None:
                self._written |= self._remote.fetch(record.outputs)

    @property
    def source(self) -> Path:
        return self.root / "source"

    @property
    def quantized(self) -> Path:
        return self.root / "quantized"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def calibration(self) -> Path:
        """Where quantize keeps the tokens that it calibrates on, and its choices."""
        return self.root / "calibration"

    def _record_path(self, kind: RecordKind[Facts]) -> Path:
        return self.root / "records" / f"{kind.file or kind.stage}.json"

    def record(self, kind: RecordKind[F]) -> Record[F] | None:
        """The record of a stage, or None if there is none that can be read."""
        return read_record(self._record_path(kind), kind)

    def need(self, kind: RecordKind[F]) -> Record[F]:
        """The record of a stage that must be done.

        Raises:
            BuildError: the stage has no record that can be read.
        """
        record = self.record(kind)
        if record is None:
            raise BuildError(
                f"{self.shown} is not finished: its {kind.stage} stage is not done. Run "
                "`nf4 build` with its model and --build-dir, which does all that is missing."
            )
        return record

    def check_inputs(self, kind: RecordKind[Facts], *, claimed: bool = False) -> Inputs:
        """Refuses to build on outputs of a stage that changed since it wrote them.

        A file whose stamp is the recorded one is not hashed again; any other is.

        Args:
            kind: of the stage.
            claimed: what follows says what these files hold, so that no record is believed: all of
                them are hashed, but for those that this process hashed as it wrote them.

        Returns:
            What to hold them against once they have been read.

        Raises:
            BuildError: the stage has no record, or a file that it left is gone, has other bytes, or
                has become a link.
        """
        self.fetch(kind)
        record = self.need(kind)
        hashed = self._written if claimed else record.stamps
        return check_outputs(self.root, record, hashed, self.only_sent(kind))

    def write_record(self, record: Record[Facts]) -> None:
        """Writes a record; the last thing that a stage does."""
        remote, path = self._remote, self._record_path(record.kind)
        kept = self.sent
        names = [
            name
            for name, digest in record.outputs.items()
            if (remote is None and not kept.has(digest)) or (self.root / name).exists()
        ]
        stamps = {name: FileStamp.of(self.root / name) for name in names} | record.stamps
        record = replace(record, stamps=stamps, finished=record.finished or now())
        if remote is not None:  # first: what stands there counts
            content = json_bytes(record_json(replace(record, stamps={})))
            name = path.relative_to(self.root).as_posix()
            remote.put_record(name, content, record.outputs, record.kind.owns)
        write_record(path, record)
        self._written |= stamps

    def write_spec(self, spec: BuildSpec) -> None:
        """Notes what the build is for.

        Raises:
            BuildError: another machine began a build at the same URL meanwhile.
        """
        if self._remote is not None:
            self._remote.put_spec(spec.to_json())
        write_spec(self.root, spec)

    def renew_stamps(self, kind: RecordKind[Facts], stamps: Mapping[str, FileStamp]) -> None:
        """Notes how the outputs of a stage look that are known to hold what it left there.

        A hard link to a file, or a touch, changes its stamp and not what it holds.

        Args:
            kind: of the stage.
            stamps: by path in the build folder, from before the hashes were confirmed.
        """
        record = self.need(kind)
        if record.stamps != (renewed := {**record.stamps, **stamps}):
            self.write_record(replace(record, stamps=renewed))

    def forget(self, kind: RecordKind[Facts]) -> None:
        """Deletes a stage's record, before its outputs change."""
        path = self._record_path(kind)
        if path.exists():
            if self._remote is not None:
                self._remote.forget(path.relative_to(self.root).as_posix())
            path.unlink()
            sync_folder(path.parent)

    def state(
        self, kind: RecordKind[Facts], key: str, reporter: Reporter = SILENT, *, check: bool = True
    ) -> State:
        """Whether a stage with this key is done; see `find_state`."""
        return find_state(
            self.root, self.record(kind), key, reporter, check=check, holds=self.holds
        )

    def _refuse_links(self) -> None:
        """Stages empty their folders: where one is a link, they would empty somebody else's."""
        inside = [Path(parent, name) for parent, names, _ in os.walk(self.root) for name in names]
        for path in (self.root / _LOCK, *inside):
            if path.is_symlink():
                raise BuildError(
                    f"{path} is a link, and a build works only in its own folder: nothing was "
                    "touched. Remove the link; for another disk, name a --build-dir there."
                )

    @contextmanager
    def locked(self, patience: float = 0.0) -> Iterator[None]:
        """Holds the build folder for this process; the lock of a dead process does not count.

        What a dead process left half done is deleted.

        Args:
            patience: seconds to wait for another process that works there.

        Raises:
            BuildError: another live process holds this build folder, nothing can be locked there,
                or a folder in it is a link.
        """
        with self._holding(fcntl.LOCK_EX, patience) as descriptor:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            self._clear()
            self._pull_again()
            self._lock = descriptor
            try:
                yield
            finally:
                self._lock = None

    def _clear(self) -> None:
        """Deletes what dead processes left half done; no other one may work here."""
        for left in self.root.glob(f"{_LOCK}.*"):
            left.unlink()
        recover_folder(self.export)
        for folder in (self.root / "records", self.quantized, self.export):
            remove_leftovers(folder)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Lets helpers work by `shared` while the body runs, in the midst of `locked`.

        Raises:
            BuildError: a helper still works here, long after the body ended.
        """
        if self._lock is None:
            raise RuntimeError("only what is locked can be lent")
        self._flock(self._lock, fcntl.LOCK_SH, self.root)
        yield  # what fails here ends the whole: no lock is needed again
        self._flock(self._lock, fcntl.LOCK_EX, self.root, patience=_PATIENCE)
        self._clear()

    @contextmanager
    def shared(self, patience: float = 0.0) -> Iterator[None]:
        """Holds the build folder together with others that do so, and against `locked`.

        Each may only write files that it holds by `making`, and records that nobody else writes.

        Args:
            patience: seconds to wait for another process that holds it alone.

        Raises:
            BuildError: another live process holds this build folder, nothing can be locked there,
                or a folder in it is a link.
        """
        with self._holding(fcntl.LOCK_SH, patience):
            self._pull_again()
            yield

    def _pull_again(self) -> None:
        if self._remote is not None:
            self.pull(self._remote.reporter)

    @contextmanager
    def making(self, names: Collection[str], patience: float = 0.0) -> Iterator[None]:
        """Holds files of quantized/ among the processes that share this build folder.

        Args:
            names: of the files.
            patience: seconds to wait for another process that makes one of them.

        Raises:
            BuildError: another live process is making one of them.
        """
        with ExitStack() as stack:
            for name in sorted(names):
                descriptor = _open_lock(self.root / f"{_LOCK}.{name}")
                stack.callback(os.close, descriptor)
                self._flock(descriptor, fcntl.LOCK_EX, self.quantized / name, patience=patience)
                begin_making(descriptor)
            yield

    def makers(self) -> dict[str, Makers]:
        """Who made and makes which file of quantized/ by `making`, since it was last `locked`."""
        return {
            path.name.removeprefix(f"{_LOCK}."): makers
            for path in self.root.glob(f"{_LOCK}.*")
            if (makers := read_makers(path)) is not None
        }

    @contextmanager
    def _holding(self, how: int, patience: float = 0.0) -> Iterator[int]:
        make_folder(self.root)
        self._refuse_links()
        descriptor = _open_lock(self.root / _LOCK)
        try:
            self._flock(descriptor, how, self.root, patience=patience)
            yield descriptor
        finally:
            os.close(descriptor)

    def _flock(self, descriptor: int, how: int, what: Path, *, patience: float = 0.0) -> None:
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(descriptor, how | fcntl.LOCK_NB)
                return
            except OSError as error:
                if not isinstance(error, BlockingIOError):
                    raise BuildError(
                        f"{self.root}: the file system there has no locks ({error.strerror}), so "
                        "that nothing would keep two processes apart. Name a --build-dir on "
                        "another one."
                    ) from error
                if time.monotonic() >= end:
                    raise BuildError(
                        f"{what} is in use by another nf4 process (pid {owner_of(descriptor)}). "
                        "Wait for it to end, or name another --build-dir."
                    ) from error
            time.sleep(_PAUSE)


def _open_lock(path: Path) -> int:
    """A file of the build's own: it is written to, and a link could lead to any file."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    if not path.is_symlink() and (path.is_file() or not path.exists()):
        return os.open(path, flags, 0o666)
    raise BuildError(f"{path} is no plain file, and no build left it so. Delete it.")
