"""Finished files, sent to the Hub while others are made; seen by nobody until `push` names them.

What goes wrong here is no failure of the build: `push` sends whatever is missing, or says why not.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from nf4_pipeline.checkpoint.digest import FileDigest, FileStamp
from nf4_pipeline.errors import PipelineError
from nf4_pipeline.progress import Reporter

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
    _taken: set[str] = field(default_factory=set, init=False, repr=False)

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

    def add(self, path: Path, digest: FileDigest) -> None:
        """Sends a file, unless one with the same bytes is on its way.

        Args:
            path: a file that is finished.
            digest: of it.
        """
        if digest.size <= self.largest and digest.sha256 not in self._taken:
            self._taken.add(digest.sha256)
            self._pool.submit(self._send, path, digest)

    def _send(self, path: Path, digest: FileDigest) -> None:
        from nf4_pipeline import hub

        try:
            file = hub.LocalFile(path, digest.size, digest.sha256, FileStamp.of(path))
            hub.send_ahead({path.name: file}, self.target, self.reporter)
        except (PipelineError, OSError) as error:
            self.reporter.note(
                f"{path.name} was not sent ahead, and will be sent at the end: {error}"
            )
