"""What shows how far a command is: on terminals of several widths, and in a log."""

from __future__ import annotations

import io
import re
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4_pipeline.cli.reporting import Log, Row, Screen, draw, make_reporter
from nf4_pipeline.progress import LOADING, Reporter

from tests.support.recorded_screen import Recording, record
from tests.support.tiny import environment

WIDTHS: Final = (60, 80, 120)
SLOW_JOB: Final = """
import threading, time
from nf4_pipeline.cli.reporting import make_reporter
from nf4_pipeline.cli.terminal import guarded
with guarded():
    reporter = make_reporter()
    with reporter.task("load libraries", None):
        time.sleep(0.3)
    with reporter.stage("download", 1, 3) as stage:
        stage.finish(ran=False, nbytes=14_434_000_000)
    with reporter.stage("quantize", 2, 3) as stage:
        with reporter.task("quantize", 13_800_000_000) as task:
            for _ in range(6):
                time.sleep(0.1)
                task.advance(2_300_000_000)
        stage.finish(ran=True, nbytes=13_800_000_000, has_rate=True)
    with reporter.stage("verify", 3, 3) as stage:
        reporter.note("Warning: 27% of this model (0.1 MB) stays in 16 bit: transformers merges "
                      "these weights on loading, which 4-bit weights cannot be.")
        def answer(bits):
            with reporter.task(f"load the {bits}-bit model", None):
                time.sleep(2.3)  # nothing is heard of it
            title = f"answer in {bits} bit, streamed"
            with reporter.task(title, 1_000_000, unit="answers") as task:
                for _ in range(5):
                    time.sleep(0.1)
                    task.advance(200_000)
        threads = [threading.Thread(target=answer, args=(bits,)) for bits in (4, 16)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        stage.finish(ran=True, verdict=VERDICT)
"""


def screen_of(
    code: str, columns: int, home: Path, variables: Mapping[str, str] = {}, *, plain: bool = False
) -> Recording:
    own = environment(home) | {"TERM": "xterm-256color", "NO_COLOR": ""}
    command = [sys.executable, "-c", code]
    recording = record(command, columns, plain=plain, environment={**own, **variables})
    assert recording.status == 0, recording.text
    return recording


# On a terminal


def verdict_at(columns: int) -> str:
    return "fail" if columns == 60 else "pass"


@pytest.fixture(scope="module")
def slow_jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Recording]:
    """The same job, at the same time, on a terminal of each width."""
    home = tmp_path_factory.mktemp("home")

    def run(columns: int) -> Recording:
        code = SLOW_JOB.replace("VERDICT", repr(verdict_at(columns)))
        return screen_of(code, columns, home)

    with ThreadPoolExecutor() as pool:
        return dict(zip(WIDTHS, pool.map(run, WIDTHS), strict=True))


@pytest.mark.parametrize("columns", WIDTHS)
def test_a_terminal_is_never_silent_and_no_line_wraps(
    columns: int, slow_jobs: dict[int, Recording]
) -> None:
    seen, verdict = slow_jobs[columns], verdict_at(columns)
    later = [gap for gap, begin in seen.gaps() if begin > 0]  # not the start of Python
    assert max(later) < 2.0
    assert len(seen.pieces) > 15
    lines = seen.lines()
    assert [line for line in lines if len(line) > columns] == []
    text = "\n".join(lines)
    assert re.search(r"^1/3 download    14\.4 GB  unchanged$", text, re.MULTILINE)
    assert re.search(r"^2/3 quantize    13\.8 GB +0\.\d s  \d\d\.\d GB/s$", text, re.MULTILINE)
    assert re.search(rf"^3/3 verify +{verdict} +\d\.\d s$", text, re.MULTILINE)
    assert re.search(r"^  load the 4-bit model +2 s$", text, re.MULTILINE)
    assert re.search(r"^  answer in .* \d+,\d+/1,000,000 .*s$", text, re.MULTILINE)
    assert ("GB/s" in re.findall(r"^  quantize .*", text, re.MULTILINE)[-1]) == (columns >= 80)
    # What is drawn is taken away; the cursor is there again.
    assert seen.text.rindex("\x1b[?25h") > seen.text.rindex("\x1b[?25l")
    assert f"\x1b[1;3{2 if verdict == 'pass' else 1}m{verdict}\x1b[0m" in seen.text


def test_no_color_is_respected(tmp_path: Path) -> None:
    code = """
from nf4_pipeline.cli.reporting import make_reporter
from nf4_pipeline.cli.terminal import say, say_brief
with make_reporter().stage("verify") as stage:
    stage.finish(ran=True, verdict="pass")
say("  ok  one", highlight=("ok", "green"))
say_brief("  FAIL  two " + "x" * 100, highlight=("FAIL", "red"))
"""
    plain, coloured = (screen_of(code, 60, tmp_path, {"NO_COLOR": value}) for value in ("1", ""))
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", plain.text)
    assert len(re.findall(r"\x1b\[[0-9;]*3[12]m", coloured.text)) == 3
    assert max(map(len, plain.lines())) == 60
    kept = ["  ok  one", "  FAIL  two " + "x" * 47 + "…", ""]
    assert plain.lines()[-3:] == coloured.lines()[-3:] == kept
    piped = screen_of(code, 60, tmp_path, plain=True)
    assert "\x1b" not in piped.text
    assert "x" * 100 in piped.text


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"PYTHONIOENCODING": "ascii"}])
def test_terminals_that_can_do_less(variables: dict[str, str], tmp_path: Path) -> None:
    code = """
import time
from nf4_pipeline.cli.reporting import make_reporter
from nf4_pipeline.cli.terminal import guarded
with guarded():
    reporter = make_reporter()
    with reporter.stage("verify", 4, 5) as stage, reporter.task("check files", 10) as task:
        task.advance(5)
        time.sleep(0.3)
        stage.finish(ran=True)
"""
    seen = screen_of(code, 80, tmp_path, variables)
    assert seen.text.isascii()
    assert "\\u" not in seen.text
    assert ("\x1b" in seen.text) == (variables.get("TERM") != "dumb")
    assert "4/5 verify" in seen.text


def overlap(reporter: Reporter, threads: int, rounds: int) -> None:
    """Tasks that open, nest and end in any order, in several threads, with stages meanwhile."""
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(rounds):
                with ExitStack() as stack:
                    outer = stack.enter_context(reporter.task(f"outer {number}", 10))
                    inner = stack.enter_context(reporter.task(LOADING, None))
                    third = stack.enter_context(reporter.task("third", 3, unit="things"))
                    for task in (outer, inner, third):
                        task.advance(turn)
                    if turn % 5 == 0:
                        reporter.note(f"note {number}.{turn}")
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for number in range(1, 4):
        with reporter.stage(f"stage {number}", number, 3) as stage:
            stage.finish(ran=True, nbytes=number)
    for worker in workers:
        worker.join(60)
    assert failures == []
    assert not any(worker.is_alive() for worker in workers)


class Terminal(io.StringIO):
    """A terminal that keeps what reaches it."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise io.UnsupportedOperation

    encoding = "utf-8"


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """To be called in the test itself: pytest sets stderr after the fixtures."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    return terminal


@pytest.mark.parametrize("kind", [Screen, Log])
def test_tasks_overlap_in_threads(
    kind: type[Screen | Log], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = on_terminal(monkeypatch)
    reporter = kind()
    overlap(reporter, threads=6, rounds=15)
    assert reporter._board.is_empty
    said = terminal.getvalue()
    assert [said.count(f"note {number}.5") for number in range(6)] == [1] * 6
    assert all(f"{number}/3 stage {number}" in said for number in (1, 2, 3))
    with reporter.task("once more", 1):  # it is usable after all ended
        pass
    assert reporter._board.is_empty


def test_a_failure_takes_the_display_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    reporter = Screen()
    with (
        pytest.raises(ZeroDivisionError),
        reporter.stage("quantize", 2, 5),
        reporter.task("quantize", 10),
    ):
        raise ZeroDivisionError
    assert reporter._board.is_empty
    assert reporter._live is None
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")


def test_an_end_by_force_leaves_the_cursor(tmp_path: Path) -> None:
    """A library that swallows the interrupt is left behind, and the display with it."""
    code = """
import os, signal, time
from nf4_pipeline.cli import _interruptible
from nf4_pipeline.cli.reporting import make_reporter
with _interruptible(), make_reporter().stage("verify"):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(600)
    except KeyboardInterrupt:
        time.sleep(600)
"""
    variables = {**environment(tmp_path), "TERM": "xterm"}
    seen = record([sys.executable, "-c", code], environment=variables)
    assert seen.status == 130
    assert seen.seconds < 300
    assert "Stopped." in seen.text
    assert seen.text.rindex("\x1b[?25h") > seen.text.rindex("\x1b[?25l")


@settings(max_examples=40)
@given(
    width=st.integers(20, 200),
    rows=st.lists(
        st.tuples(
            st.text(max_size=40),
            st.one_of(st.none(), st.integers(0, 10**15)),
            st.integers(0, 10**15),
            st.sampled_from(["bytes", "answers", "tokens"]),
            st.floats(0, 10**6),
        ),
        max_size=12,
    ),
)
def test_no_line_is_as_wide_as_the_terminal(width: int, rows: list[tuple[Any, ...]]) -> None:
    now = 10.0**6
    shown = [
        Row(title.replace("\n", ""), total, unit, now - age, done)
        for title, total, done, unit, age in rows
    ]
    lines = draw(None, shown, now, width)
    assert all(len(line) < width for line in lines)
    assert len(lines) <= 10


# Without one


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_log_has_a_line_at_the_start_every_ten_seconds_and_at_the_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Log(clock)
    with log.stage("quantize", 2, 5) as stage:
        with log.task("quantize", 20_000_000_000) as task:
            for _ in range(40):
                clock.now += 0.5
                task.advance(500_000_000)
                log.tick()
        stage.finish(ran=True, nbytes=20_000_000_000, has_rate=True)
    with log.stage("verify", 4, 5) as stage:
        with log.task(LOADING, None), log.task(LOADING, None):
            clock.now += 9.0
            log.tick()
            clock.now += 0.9
            log.tick()
        clock.now += 70.0
        stage.finish(ran=True, verdict="fail")
    with log.stage("attest", 5, 5) as stage:
        stage.finish(ran=False, nbytes=12_345)
    with log.stage("stopped"):
        pass
    assert capsys.readouterr().err.splitlines() == [
        "2/5 quantize: begins",
        "2/5 quantize: 9 s; quantize 9.50/20.00 GB, 1.0 GB/s, 10 s left",
        "2/5 quantize: 19 s; quantize 19.00/20.00 GB, 1.0 GB/s, 1 s left",
        "2/5 quantize: 20.0 GB, 20.0 s, 1.0 GB/s",
        "4/5 verify: begins",
        "4/5 verify: 9 s; load libraries (2) 9 s",
        "4/5 verify: fail, 79.9 s",
        "5/5 attest: begins",
        "5/5 attest: 12.3 kB, unchanged",
        "stopped: begins",
    ]


def test_a_log_outside_of_stages(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """What is over soon is not worth a line; what lasts is never silent for ten seconds."""
    log = Log(clock)
    with log.task("check export", 10):
        clock.now += 0.9
    with log.task(LOADING, None):
        clock.now += 5.0
    assert capsys.readouterr().err == ""
    with log.task("check export", 3_000_000) as task:
        clock.now += 9.6
        log.tick()
        task.advance(3_000_000)
        log.note("something")
        clock.now += 9.4
        log.tick()
    assert capsys.readouterr().err.splitlines() == [
        "check export 0.0/3.0 MB, 9 s",
        "something",
        "check export: 3.0/3.0 MB, 19.0 s",
    ]


def test_a_log_ticks_by_itself(tmp_path: Path) -> None:
    code = """
import time
from nf4_pipeline.cli import reporting
reporting._LOG_EVERY = 0.3
log = reporting.Log()
with log.stage("verify"):
    time.sleep(1.2)
"""
    seen = screen_of(code, 80, tmp_path, plain=True)
    assert 2 <= len(re.findall(r"^verify: \d s$", seen.text, re.MULTILINE)) <= 4


def test_quiet_keeps_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = make_reporter(quiet=True)
    with reporter.stage("quantize", 2, 5) as stage, reporter.task("quantize", 10) as task:
        task.advance(10)
        reporter.note("offline: as cached")
        reporter.note("Warning: 27% stay in 16 bit.\n")
        stage.finish(ran=True)
    assert capsys.readouterr().err == "Warning: 27% stay in 16 bit.\\n\n"


@pytest.mark.parametrize(
    ("quiet", "verbose", "said"),
    [(False, False, ""), (False, True, "why\n"), (True, False, ""), (True, True, "")],
)
def test_details_are_for_those_who_ask(
    quiet: bool, verbose: bool, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_reporter(quiet=quiet, verbose=verbose).detail("why")
    assert capsys.readouterr().err == said


def test_time_left_is_said_of_the_last_seconds() -> None:
    """Fast first, slow later: the first seconds promise nothing."""
    row = Row("download", 10_000, "bytes", 0.0)
    for second in range(100):
        row.advance(50 if second < 40 else 10)
        row.rate(float(second + 1))
    assert row.rate(100.0) == pytest.approx(10.0)
    assert row.left(100.0) == "12:20 left"
    assert Row("load", None, "", 0.0).left(7.0) == "7 s"
    assert Row("wait", 10, "bytes", 0.0).left(7.0) == "7 s"
