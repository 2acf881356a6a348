"""Finished files, sent to the Hub while others are made; seen by nobody until `push` names them.

Where the source is streamed, too, a file goes away here once the Hub has received it: first it is
noted in sent.json. Then what cannot be sent ends the build, since the next file would find no room.
Otherwise it is no failure: `push` sends whatever is missing, or says why not.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from nf4_pipeline.build_folder import Build
from nf4_pipeline.build_folder.sent import forget_sent, note_sent
from nf4_pipeline.checkpoint.digest import FileDigest, FileStamp
from nf4_pipeline.errors import HubError, PipelineError
from nf4_pipeline.progress import Reporter
from nf4_pipeline.records import DOWNLOAD
from nf4_pipeline.stages.outgoing import fitting, room_for
from nf4_pipeline.stages.remade import check_room

if TYPE_CHECKING:
    from nf4_pipeline.hub import Target


@dataclass
class UploadAhead:
    """Sends files, one after the other, from a thread of its own; a context manager.

    Attributes:
        target: where they go.
        largest: bytes beyond which a file is cut before it is published, and is not sent.
        reporter: told of what could not be sent.
    """

    target: Target
    largest: int
    reporter: Reporter
    _pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "upload"), init=False, repr=False
    )
    _changed: threading.Condition = field(
        default_factory=threading.Condition, init=False, repr=False
    )
    _taken: set[Path] = field(default_factory=set, init=False, repr=False)
    _sending: list[Future[None]] = field(default_factory=list, init=False, repr=False)
    _build: Build | None = field(default=None, init=False, repr=False)
    _makes_room: bool = field(default=False, init=False, repr=False)
    _room: int | None = field(default=None, init=False, repr=False)  # None: nothing goes away
    _lying: int = field(default=0, init=False, repr=False)
    _failure: BaseException | None = field(default=None, init=False, repr=False)

    def __enter__(self) -> UploadAhead:
        """Finds the repo or makes it: what is refused is known before hours of work.

        Raises:
            HubError: the Hub does not take files there.
        """
        from nf4_pipeline import hub

        hub.prepare(self.target, self.reporter)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Waits for the files; after a failure, for the one that is under way."""
        self._pool.shutdown(cancel_futures=error is not None)

    def follow(self, build: Build, *, makes_room: bool) -> None:
        """Learns whose files will come; what was sent to another repo counts no more.

        Args:
            build: whose `download` is done.
            makes_room: files go away here once the Hub has them, if the source is streamed, too.
        """
        from nf4_pipeline import hub

        self._build, self._makes_room = build, makes_room
        sent = build.sent
        if sent.files and sent.url != hub.repo_url(self.target.repo_id):
            self.reporter.note(
                f"{len(sent.files)} files of this build are in {sent.url} alone; they are made "
                f"again for {self.target.repo_id}."
            )
            forget_sent(build.root)

    def begin(self, sizes: Collection[int], missing: Collection[int]) -> int:
        """Decides whether files go away here, and says how many bytes more lie here at most.

        Args:
            sizes: of all files.
            missing: of those that do not lie here yet.

        Raises:
            ResourceError: verify would have no room for them in memory.
        """
        build = self._build
        goes = build is not None and build.need(DOWNLOAD).facts.streamed is not None
        if not (self._makes_room and goes) or max(sizes, default=0) > self.largest:
            self._room = None
            return sum(missing)
        check_room(sum(sizes))
        self._room = room_for(sizes)
        # What lies here already is part of the room, and goes before anything takes its place.
        lying = sum(sizes) - sum(missing)
        return min(sum(missing), max(0, self._room - lying))

    def restart(self) -> None:
        """Waits until no file is on its way; any may be made anew then, and be told of again.

        Raises:
            HubError: a file cannot be sent.
        """
        self.drain()
        with self._changed:
            self._raise_failure()
            self._taken.clear()
            self._lying = 0

    def fitting(self, sizes: Sequence[int]) -> int:
        """How many of these files, from the first on, may lie here at a time."""
        return len(sizes) if self._room is None else fitting(sizes, self._room)

    def reserve(self, nbytes: int) -> None:
        """Waits until there is room for a file; where files stay, there is.

        Raises:
            HubError: a file cannot be sent.
        """
        if self._room is None:
            return
        with self._changed:
            while self._lying and self._lying + nbytes > self._room:
                self._raise_failure()
                self._changed.wait()
            self._raise_failure()
            self._lying += nbytes

    def release(self, nbytes: int) -> None:
        """Takes back what was reserved for a file that went, or never came to be."""
        if self._room is None:
            return
        with self._changed:
            self._lying -= nbytes
            self._changed.notify_all()

    def add(self, path: Path, digest: FileDigest) -> None:
        """Sends a file, unless it is on its way, or the Hub is known to have it.

        Args:
            path: a file that is finished, and for which room was reserved.
            digest: of it.
        """
        if not self._is_to_send(path, digest):
            self.release(digest.size)
        elif self._room is not None and self._build is not None and self._build.sent.has(digest):
            self._go(path, digest)
        else:
            self._submit(path, digest)

    def add_staying(self, files: Mapping[Path, FileDigest]) -> None:
        """Sends those of finished files that lie here and are not on their way.

        Args:
            files: digest of each; no room was reserved for them.
        """
        for path, digest in files.items():
            if self._room is None and self._is_to_send(path, digest):
                self._submit(path, digest)

    def settle(self) -> None:
        """Waits until all that goes away is gone.

        Raises:
            HubError: a file cannot be sent.
        """
        with self._changed:
            while self._room is not None and self._lying:
                self._raise_failure()
                self._changed.wait()
            self._raise_failure()

    def drain(self) -> None:
        """Waits until no file is on its way any more."""
        wait(self._sending)

    def find_lost(self) -> int:
        """Asks the Hub for the files that lie there alone; how many of them it has no more.

        They are made again by the next `quantize`.

        Raises:
            HubError: the Hub does not answer.
        """
        from nf4_pipeline import hub

        if self._build is None or not (sent := self._build.sent).files:
            return 0
        lost = hub.lost(sent.files, self.target, self.reporter)
        forget_sent(self._build.root, lost)
        return len(lost)

    def _is_to_send(self, path: Path, digest: FileDigest) -> bool:
        return digest.size <= self.largest and path not in self._taken and path.exists()

    def _submit(self, path: Path, digest: FileDigest) -> None:
        self._taken.add(path)
        self._sending.append(self._pool.submit(self._send, path, digest))

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _send(self, path: Path, digest: FileDigest) -> None:
        from nf4_pipeline import hub

        try:
            file = hub.LocalFile(path, digest.size, digest.sha256, FileStamp.of(path))
            unsent = hub.send_ahead({path.name: file}, self.target, self.reporter)
            if self._room is not None and self._build is not None:
                if unsent:
                    raise HubError(
                        f"{path.name} cannot be sent before it is committed: "
                        f"{self.target.repo_id} keeps it in git, not in LFS, so it may not go "
                        "away here. Have the repo keep *.safetensors in LFS (add the line "
                        "'*.safetensors filter=lfs diff=lfs merge=lfs -text' to its "
                        ".gitattributes), then run this again; or leave --stream-output out, and "
                        "`nf4 push` at the end."
                    )
                note_sent(self._build.root, hub.repo_url(self.target.repo_id), digest)
                self._go(path, digest)
        except BaseException as error:  # whatever it is: somebody may wait for the room
            if self._room is None:
                expected = isinstance(error, (PipelineError, OSError))
                why = str(error) if expected else f"{type(error).__name__}: {error}"
                self.reporter.note(
                    f"{path.name} was not sent ahead, and will be sent at the end: {why}"
                )
                return
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _go(self, path: Path, digest: FileDigest) -> None:
        path.unlink()
        self._taken.discard(path)
        self.release(digest.size)
