"""Progress on stderr: what runs now at the foot of a terminal, lines in a log elsewhere.

What runs is kept by a `Board`, which any thread may change. Two displays show it: `Screen` draws it
some times a second with one live display of rich, `Log` says a line at the start of a stage, one
every ten seconds, and one at its end. Of a stage that is done, one line stays.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from nf4_pipeline.cli.pace import Pace, default_file
from nf4_pipeline.cli.terminal import say, terminal_of
from nf4_pipeline.printable import printable
from nf4_pipeline.progress import Reporter, SilentReporter, Stage, Task

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

Clock = Callable[[], float]

_LOG_EVERY: Final = 9.5
"""Seconds between two lines of a log while something runs, so that ten are never silent."""

_WORTH_A_LINE: Final = 1.0
"""Seconds that a task of known size, outside of any stage, must take for a log to say its end."""

_DRAWS_PER_SECOND: Final = 5
_TICK: Final = 0.2
_PACE_OVER: Final = 20  # samples, one a second at most
_SOME: Final = 0.01  # share of the work before which nothing is promised of the rest
_MOST_ROWS: Final = 8
_MOST_IN_A_LINE: Final = 4
_LONGEST_TITLE: Final = 80
_WARNING: Final = "Warning:"
_VERDICTS: Final = {"pass": "bold green", "fail": "bold red"}


def make_reporter(*, quiet: bool = False, verbose: bool = False) -> Reporter:
    """A live display if stderr is a terminal that can have one, else lines.

    Args:
        quiet: only warnings are said.
        verbose: details are said, too.
    """
    if quiet:
        return _Warnings()
    if sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return Screen(verbose=verbose)
    return Log(verbose=verbose)


class _Warnings(SilentReporter):
    def note(self, text: str) -> None:
        if text.startswith(_WARNING):
            say(text, err=True)


# What runs


@dataclass(eq=False)
class Row:
    """A task that is open.

    Attributes:
        title: printable, like the unit.
        total: bytes or items; None if nobody can say.
        unit: of the total.
        start: when it was opened.
        done: of the total.
    """

    title: str
    total: int | None
    unit: str
    start: float
    done: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _samples: deque[tuple[float, int]] = field(default_factory=deque, repr=False)

    def advance(self, amount: int) -> None:
        """Adds to what is done."""
        with self._lock:
            self.done += amount

    def rate(self, now: float) -> float:
        """Of the last seconds, in units a second; 0 if nothing can be said yet."""
        with self._lock:
            samples = self._samples
            if not samples or now - samples[-1][0] >= 1.0:
                samples.append((now, self.done))
            if len(samples) > _PACE_OVER:
                samples.popleft()
            first, before = samples[0] if len(samples) > 1 else (self.start, 0)
            seconds = now - first
            return (self.done - before) / seconds if seconds > 0 else 0.0

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return min(1.0, self.done / self.total) if self.total else 0.0

    def amount(self, room: int = 80) -> str:
        """Such as "4.21/14.43 GB" or "12/50 answers", or a share where these have no room."""
        if self.total is None:
            return ""
        if self.unit != "bytes":
            counts = f"{self.done:,}/{self.total:,}"
            said = [f"{counts} {self.unit}", counts]
        else:
            unit, scale, digits = _scale(self.total)
            said = [f"{self.done / scale:.{digits}f}/{self.total / scale:.{digits}f} {unit}"]
        return next((text for text in said if len(text) <= room), f"{self.share:.0%}")

    def left(self, now: float) -> str:
        """Time left, or time gone where that cannot be said."""
        rate = self.rate(now)
        if self.total is None or not rate or now - self.start < 1.0 or self.share < _SOME:
            return _duration(now - self.start)
        return f"{_duration(max(0, self.total - self.done) / rate)} left"

    def speed(self, now: float) -> str:
        """Such as "0.9 GB/s"; only of bytes."""
        if self.unit != "bytes" or self.total is None:
            return ""
        rate = self.rate(now)
        return _speed(rate) if rate else ""


@dataclass(eq=False)
class _Running:
    """A stage that runs.

    Attributes:
        name: of the stage.
        number: its place in the job.
        of: how many stages the job has.
        start: when it began.
        clock: says what time it is.
        result: once it has said what came of it: its verdict or size, its time, its rate.
        ran: as it said.
        nbytes: as it said.
    """

    name: str
    number: int
    of: int
    start: float
    clock: Clock
    result: tuple[str, str, str] | None = None
    ran: bool = True
    nbytes: int = 0

    @property
    def head(self) -> str:
        """Such as "2/5 quantize"; without its place if it is the only one."""
        return f"{self.number}/{self.of} {self.name}" if self.of > 1 else self.name

    def finish(
        self, *, ran: bool, nbytes: int = 0, has_rate: bool = False, verdict: str = ""
    ) -> None:
        seconds = self.clock() - self.start
        self.ran, self.nbytes = ran, nbytes
        size = _size(nbytes) if nbytes else ""
        took = _duration(seconds, exact=True) if ran else "unchanged"
        rate = _speed(nbytes / seconds) if has_rate and ran and nbytes and seconds > 0 else ""
        self.result = verdict or size, took, rate

    def line(self, *, aligned: bool) -> str:
        """What stays of it; in columns, or as a line of a log."""
        assert self.result is not None
        what, took, rate = self.result
        if not aligned:
            return f"{self.head}: {_joined(*self.result)}"
        width = 9 + (4 if self.of > 1 else 0)
        return f"{self.head:<{width}}  {what:>8}  {took:>9}  {rate}".rstrip()


class Board:
    """What runs now. Any thread may change it; whoever draws it never waits for one that works."""

    def __init__(self, clock: Clock, pace: Pace | None = None) -> None:
        self.clock = clock
        self.start = clock()
        self._pace = pace
        self._lock = threading.Lock()
        self._rows: list[Row] = []
        self._stage: _Running | None = None

    def open(self, title: str, total: int | None, unit: str) -> Row:
        """Adds a task."""
        row = Row(printable(title, _LONGEST_TITLE), total, printable(unit, 20), self.clock())
        with self._lock:
            self._rows.append(row)
        return row

    def close(self, row: Row) -> None:
        """Takes a task away."""
        with self._lock:
            self._rows.remove(row)

    def begin(self, name: str, number: int, of: int) -> _Running:
        """Begins a stage."""
        stage = _Running(name, number, of, self.clock(), self.clock)
        with self._lock:
            self._stage = stage
        return stage

    def end(self) -> None:
        """Ends the stage."""
        with self._lock:
            stage, self._stage = self._stage, None
        if self._pace and stage and stage.of > 1 and stage.result is not None:
            seconds = self.clock() - stage.start
            self._pace.ended(stage.number, stage.of, seconds, ran=stage.ran, nbytes=stage.nbytes)

    def left(self, stage: _Running | None, now: float) -> float | None:
        """Seconds that the whole job still needs; None if nobody can say."""
        if self._pace is None or stage is None or stage.of == 1:
            return None
        return self._pace.left(stage.number, stage.of, now - stage.start)

    def now(self) -> tuple[_Running | None, list[Row]]:
        """The stage, and the tasks in the order in which they were opened."""
        with self._lock:
            return self._stage, list(self._rows)

    @property
    def is_empty(self) -> bool:
        """Nothing runs that was announced."""
        stage, rows = self.now()
        return stage is None and not rows


# On a terminal


class Screen:
    """Draws what runs at the foot of the terminal, and keeps lines above it."""

    def __init__(self, clock: Clock = time.monotonic, *, verbose: bool = False) -> None:
        from rich.console import Console

        self._verbose = verbose
        self._board = Board(clock, Pace(default_file()))
        stream = terminal_of(sys.stderr)
        self._console = Console(file=stream)
        self._look = _Look.of(stream.encoding)
        self._switch = threading.RLock()
        """Held while the display begins or ends; never by whoever draws."""
        self._live: Live | None = None

    def note(self, text: str) -> None:
        self._keep(printable(text))

    def detail(self, text: str) -> None:
        if self._verbose:
            self.note(text)

    @contextmanager
    def task(self, title: str, total: int | None, *, unit: str = "bytes") -> Iterator[Task]:
        row = self._board.open(title, total, unit)
        try:
            self._show()
            yield row
        finally:
            self._board.close(row)
            self._hide()

    @contextmanager
    def stage(self, name: str, number: int = 1, of: int = 1) -> Iterator[Stage]:
        stage = self._board.begin(name, number, of)
        try:
            self._show()
            yield stage
        finally:
            self._board.end()
            if stage.result is not None:
                self._keep(stage.line(aligned=True), stage.result[0])
            self._hide()

    def _keep(self, text: str, verdict: str = "") -> None:
        """Prints what stays, above what is drawn."""
        from rich.text import Text

        shown = Text(text)
        if (style := _VERDICTS.get(verdict)) is not None:
            shown.highlight_words([verdict], style)
        self._console.print(shown)

    def _show(self) -> None:
        from rich.live import Live

        with self._switch:
            if self._live is not None:
                return
            self._live = Live(
                console=self._console,
                refresh_per_second=_DRAWS_PER_SECOND,
                transient=True,
                # What others print meanwhile passes the filter of `terminal.guarded`, not rich.
                redirect_stdout=False,
                redirect_stderr=False,
                get_renderable=self._draw,
            )
            self._live.start(refresh=True)

    def _hide(self) -> None:
        """Takes the display away if nothing runs any more."""
        with self._switch:
            if self._board.is_empty and self._live is not None:
                live, self._live = self._live, None
                live.stop()

    def _draw(self) -> Text:
        from rich.text import Text

        now = self._board.clock()
        stage, rows = self._board.now()
        left = self._board.left(stage, now)
        lines = draw(stage, rows, now, self._console.width, self._look, self._board.start, left)
        return Text("\n".join(lines), no_wrap=True, overflow="ellipsis")


@dataclass(frozen=True)
class _Look:
    """The characters of bars and spinners."""

    full: str
    empty: str
    turns: str

    @classmethod
    def of(cls, encoding: str) -> _Look:
        """Those that the terminal's encoding has."""
        look = cls("━", "╌", "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏")
        try:
            f"{look.full}{look.empty}{look.turns}".encode(encoding)
        except (LookupError, UnicodeEncodeError):
            return cls("#", ".", "|/-\\")
        return look


ASCII: Final = _Look.of("ascii")


def draw(
    stage: _Running | None,
    rows: Sequence[Row],
    now: float,
    width: int,
    look: _Look = ASCII,
    start: float = 0.0,
    left: float | None = None,
) -> list[str]:
    """The lines that show what runs, none as wide as the terminal.

    Args:
        stage: that runs.
        rows: tasks that are open.
        now: what the clock says.
        width: of the terminal.
        look: the characters.
        start: of the job.
        left: seconds that the job still needs; None if nobody can say.
    """
    if stage is None and not rows:
        return []
    turn = look.turns[int(now * _DRAWS_PER_SECOND) % len(look.turns)]
    gone = _duration(now - (stage.start if stage else start))
    if stage is not None and stage.number > 1:
        gone += f", {_duration(now - start)} in all"
    if left is not None:
        gone += f", some {_duration(left)} left"
    lines = [f"{turn} {stage.head}  {gone}" if stage else f"{turn} {gone}"]
    shown = _grouped(rows)
    lines += [_line(title, row, now, width, look) for title, row in shown[:_MOST_ROWS]]
    if len(shown) > _MOST_ROWS:
        lines.append(f"  and {len(shown) - _MOST_ROWS} more")
    return [_fit(line, width - 1) for line in lines]


def _grouped(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """Rows and their titles; those of one title that show nothing but it are one."""
    shown: list[tuple[str, Row]] = []
    same: dict[str, int] = {}
    for row in rows:
        if row.total is not None:
            shown.append((row.title, row))
            continue
        same[row.title] = same.get(row.title, 0) + 1
        if same[row.title] == 1:
            shown.append((row.title, row))
    return [
        (f"{title} ({same[title]})" if row.total is None and same[title] > 1 else title, row)
        for title, row in shown
    ]


_AMOUNT: Final = 19
_SPEED: Final = 10
_LEFT: Final = 12
_NARROW: Final = 56  # columns without room for a bar
_MIDDLE: Final = 72  # columns without room for a rate


def _line(title: str, row: Row, now: float, width: int, look: _Look) -> str:
    """One task: title, bar, amount, rate, time left; what has no room is left out."""
    bar = 0 if width < _NARROW else min(30, 8 + max(0, width - _MIDDLE) // 3)
    speed = 0 if width < _MIDDLE else _SPEED
    taken = 2 + sum(1 + part for part in (bar, _AMOUNT, speed, _LEFT) if part)
    room = min(32, max(8, width - 1 - taken))
    if row.total is None:
        gone = _duration(now - row.start)
        return f"  {_fit(title, width - 4 - len(gone)):<{room}} {gone}"
    line = f"  {_fit(title, room):<{room}}"
    if bar:
        full = int(row.share * bar)
        line += f" {look.full * full}{look.empty * (bar - full)}"
    line += f" {row.amount(_AMOUNT):>{_AMOUNT}}"
    if speed:
        line += f" {row.speed(now):>{speed}}"
    return f"{line} {row.left(now):>{_LEFT}}"


def _fit(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


# In a log


class Log:
    """Says lines."""

    def __init__(self, clock: Clock = time.monotonic, *, verbose: bool = False) -> None:
        self._verbose = verbose
        self._board = Board(clock, Pace(default_file()))
        self._said = clock()
        self._lock = threading.Lock()
        self._ticker: threading.Thread | None = None

    def note(self, text: str) -> None:
        self._say(text)

    def detail(self, text: str) -> None:
        if self._verbose:
            self.note(text)

    @contextmanager
    def task(self, title: str, total: int | None, *, unit: str = "bytes") -> Iterator[Task]:
        row = self._open(title, total, unit)
        try:
            yield row
        finally:
            stage, _ = self._board.now()
            now = self._board.clock()
            if stage is None and row.total is not None and now - row.start >= _WORTH_A_LINE:
                took = _duration(now - row.start, exact=True)
                self._say(f"{row.title}: {_joined(row.amount(), took)}")
            self._board.close(row)

    def _open(self, title: str, total: int | None, unit: str) -> Row:
        if self._board.is_empty:
            self._said = self._board.clock()
        row = self._board.open(title, total, unit)
        self._watch()
        return row

    @contextmanager
    def stage(self, name: str, number: int = 1, of: int = 1) -> Iterator[Stage]:
        stage = self._board.begin(name, number, of)
        try:
            self._say(f"{stage.head}: begins")
            self._watch()
            yield stage
        finally:
            self._board.end()
            if stage.result is not None:
                self._say(stage.line(aligned=False))

    def tick(self) -> None:
        """Says what runs, if nothing was said for long."""
        now = self._board.clock()
        stage, rows = self._board.now()
        for row in rows:
            row.rate(now)
        if stage is None and not rows:
            return
        with self._lock:
            if now - self._said < _LOG_EVERY:
                return
            self._said = now
        say(_progress(stage, rows, now, self._board.left(stage, now)), err=True)

    def _say(self, text: str) -> None:
        with self._lock:
            self._said = self._board.clock()
        say(text, err=True)

    def _watch(self) -> None:
        """Has a thread look every moment whether something is to be said."""
        with self._lock:
            if self._ticker is None or not self._ticker.is_alive():
                self._ticker = threading.Thread(target=self._tick, daemon=True, name="nf4 log")
                self._ticker.start()

    def _tick(self) -> None:
        with suppress(OSError, ValueError):  # nobody reads on
            while not self._board.is_empty:
                self.tick()
                time.sleep(_TICK)


def _progress(
    stage: _Running | None, rows: Sequence[Row], now: float, left: float | None = None
) -> str:
    """One line of a log: the stage, and what it does."""
    shown = _grouped(rows)
    parts = []
    for title, row in shown[:_MOST_IN_A_LINE]:
        said = _joined(row.amount(), row.speed(now), row.left(now))
        parts.append(f"{title} {said}")
    if len(shown) > _MOST_IN_A_LINE:
        parts.append(f"and {len(shown) - _MOST_IN_A_LINE} more")
    head = [f"{stage.head}: {_duration(now - stage.start)}"] if stage else []
    if left is not None:
        parts.append(f"some {_duration(left)} left of the job")
    return "; ".join([*head, *parts])


# Figures


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _scale(nbytes: float) -> tuple[str, float, int]:
    if nbytes >= 1e9:
        return "GB", 1e9, 2
    return ("MB", 1e6, 1) if nbytes >= 1e6 else ("kB", 1e3, 1)


def _size(nbytes: int) -> str:
    unit, scale, _ = _scale(nbytes)
    return f"{nbytes / scale:.1f} {unit}"


def _speed(per_second: float) -> str:
    unit, scale, _ = _scale(per_second)
    return f"{per_second / scale:.1f} {unit}/s"


def _duration(seconds: float, *, exact: bool = False) -> str:
    """Such as "2.9 s" if exact, "3 s", "4:05" or "1:02:03"."""
    if seconds < 100:
        return f"{seconds:.1f} s" if exact else f"{int(seconds)} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
