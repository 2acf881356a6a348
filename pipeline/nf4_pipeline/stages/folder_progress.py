"""How far several processes are that make files of one quantized/, as the folder itself shows it.

What is whole has its facts beside it; of what is being made, the file system says how much of it is
written; who makes it stands in its lock file. So nobody has to tell anybody anything, on whatever
machine and however the processes were started.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.atomic import partial_of
from nf4_pipeline.progress import Reporter, Task
from nf4_pipeline.stages.quantize import FACTS_SUFFIX, read_facts

_EVERY: Final = 1.0  # seconds
_BLOCK: Final = 512  # bytes; of st_blocks
_AT_REST: Final = 60.0  # seconds after which nobody writes a file any more


@dataclass(frozen=True)
class Seen:
    """What a look into the folder showed.

    Attributes:
        whole: files that are done.
        nbytes: of these, and of what is written of others.
        workers: processes that make a file now.
        retries: times that a file was begun again, since its maker had ended in the midst.
    """

    whole: frozenset[str]
    nbytes: int
    workers: int
    retries: int

    @property
    def at_work(self) -> str:
        """Such as "2 workers, 1 retry"."""
        return f"{_counted(self.workers, 'worker')}, {_counted(self.retries, 'retry', 'retries')}"


class FolderView:
    """Looks at files of quantized/.

    Args:
        build: where.
        key: of the stage that makes them.
        sizes: in bytes, of all of them by name.
        done: files that are known to be whole, wherever they are.
    """

    def __init__(
        self, build: Build, key: str, sizes: Mapping[str, int], done: Collection[str] = ()
    ) -> None:
        self._build = build
        self._key = key
        self._sizes = sizes
        self._done = done
        self._keys: dict[str, tuple[int, str]] = {}  # name -> time of change of the facts, key

    def look(self) -> Seen:
        """What there is now."""
        done = {*self._done}
        whole = frozenset(n for n in self._sizes if n in done or self._key_of(n) == self._key)
        makers = {n: m for n, m in self._build.makers().items() if n in self._sizes}
        return Seen(
            whole=whole,
            nbytes=sum(
                size if name in whole else min(size, self._written(name))
                for name, size in self._sizes.items()
            ),
            workers=len(
                {(m.host, m.pid) for n, m in makers.items() if n not in whole and m.may_live}
            ),
            retries=sum(m.begun - 1 for m in makers.values()),
        )

    def _key_of(self, name: str) -> str:
        target = self._build.quantized / name
        try:
            changed = target.with_name(name + FACTS_SUFFIX).stat().st_mtime_ns
        except OSError:
            return ""
        if self._keys.get(name, (0, ""))[0] != changed:
            facts = read_facts(target)
            self._keys[name] = changed, facts.key if facts else ""
        return self._keys[name][1]

    def _written(self, name: str) -> int:
        """Bytes of an unfinished file that are there: it has its whole length from the start."""
        with suppress(OSError):
            found = partial_of(self._build.quantized / name).stat()
            if time.time() - found.st_mtime < _AT_REST:
                return found.st_blocks * _BLOCK
        return 0


@contextmanager
def watched(
    build: Build,
    key: str,
    sizes: Mapping[str, int],
    reporter: Reporter,
    *,
    own: Collection[str] = (),
    done: Collection[str] = (),
) -> Iterator[Callable[[], None]]:
    """Shows how far all files are while the body runs.

    Gives what raises, if whoever is told of it wants the work to end; so does the end of the body.

    Args:
        build: where.
        key: as in `FolderView`.
        sizes: as in `FolderView`.
        reporter: told of bytes, of files, and of who is at work.
        own: files that the body makes and shows itself; nothing is shown before one of the others
            is begun.
        done: as in `FolderView`; more may come.
    """
    view = FolderView(build, key, sizes, done)
    ended = threading.Event()
    refused: list[BaseException] = []

    def watch() -> None:
        with ExitStack() as stack:
            shown: _Shown | None = None
            last = False
            while True:
                seen = view.look()
                others = seen.whole - set(own) or build.makers().keys() - set(own)
                if shown is None and (not own or others):
                    shown = stack.enter_context(_opened(sizes, reporter))
                if shown is not None:
                    shown.update(seen, says_who=seen.workers > 0 or not build.is_copy)
                if last:
                    return
                last = ended.wait(_EVERY)

    def watch_on() -> None:
        try:
            watch()
        except BaseException as error:
            refused.append(error)

    def check() -> None:
        if refused:
            raise refused[0]

    thread = threading.Thread(target=watch_on, name="folder progress", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        ended.set()
        thread.join()
    check()


class _Shown:
    """Three rows: bytes, files, workers."""

    def __init__(self, written: Task, files: Task, reporter: Reporter) -> None:
        self._written, self._files, self._reporter = written, files, reporter
        self._nbytes = self._count = 0
        self._said = ""
        self.at_work = ExitStack()

    def update(self, seen: Seen, *, says_who: bool = True) -> None:
        """Shows what was seen; what a killed worker had written is made again before it counts.

        Args:
            seen: now.
            says_who: show workers, too; of those elsewhere, nothing is seen here.
        """
        for task, before, now in (
            (self._written, self._nbytes, seen.nbytes),
            (self._files, self._count, len(seen.whole)),
        ):
            if now > before:
                task.advance(now - before)
        self._nbytes = max(self._nbytes, seen.nbytes)
        self._count = max(self._count, len(seen.whole))
        if says_who and seen.at_work != self._said:
            self.at_work.close()
            self.at_work.enter_context(self._reporter.task(seen.at_work, None))
            self._said = seen.at_work


@contextmanager
def _opened(sizes: Mapping[str, int], reporter: Reporter) -> Iterator[_Shown]:
    with (
        reporter.task("write quantized files", sum(sizes.values())) as written,
        reporter.task("whole files", len(sizes), unit="files") as files,
    ):
        shown = _Shown(written, files, reporter)
        with shown.at_work:
            yield shown


def _counted(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
