"""The command line, run in this process: what it prints, and how it ends."""

from __future__ import annotations

import io
import re
import signal
import unicodedata
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout

from nf4_pipeline.cli import main
from nf4_pipeline.errors import PipelineError
from nf4_pipeline.processes.in_process import in_process

from tests.support.tiny import Done

_MAY_STAND = "\n\t\u200c\u200d"
_PROGRESS = re.compile(
    r"^(([1-5]/5 )?(download|quantize|serialize|verify|attest): |"
    # Of a task, whichever is slow on this machine: "hash source 0.5/1.0 MB, 9 s".
    r"[a-z][^:;]*[ :;].*\b(\d+(\.\d)? s|\d+:\d\d)\b).*\n",
    re.MULTILINE,
)


def without_progress(err: str) -> str:
    """What stands on stderr beside lines of progress; how many there are depends on the machine."""
    return _PROGRESS.sub("", err)


def run_nf4(*args: object) -> Done:
    """Runs `nf4 ARGS` here; workers, too, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    status: object = None
    try:
        with redirect_stdout(out), redirect_stderr(err), in_process():
            main([str(arg) for arg in args])
    except SystemExit as ended:
        status = ended.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert isinstance(status, int)
    return Done(status, out.getvalue(), err.getvalue())


def refusal(call: Callable[[], object]) -> str:
    """The message with which a call is refused; nothing if it goes well."""
    try:
        call()
    except PipelineError as error:
        return str(error)
    return ""


def controls(text: str) -> list[str]:
    """What stands in a text and may do something to a terminal, or turn what stands beside it."""
    return [
        char
        for char in text
        if not char.isprintable() and char not in _MAY_STAND and unicodedata.category(char) != "Zs"
    ]


def check_ending(done: Done) -> None:
    """Fine, or refused with one message; nothing that nobody expected, no control character."""
    assert controls(done.out + done.err) == []
    assert "Traceback" not in done.err
    assert "bug in nf4-pipeline" not in done.err, done.err
    assert done.status in (0, 1, 2, 3), done.err
    if done.status:
        errors = [line for line in done.err.splitlines() if line.startswith("Error: ")]
        assert len(errors) <= 1
