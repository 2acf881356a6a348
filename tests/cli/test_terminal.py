"""Text of strangers on the terminal: what controls it is shown, whoever prints it."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Final

import nf4_pipeline
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nf4_pipeline.cli import doctor, push, summary
from nf4_pipeline.cli.reporting import make_reporter
from nf4_pipeline.cli.terminal import guarded, let_bars_through, say, say_json, say_piece
from nf4_pipeline.doctor import Disk, Finding, Gpu, HubAccess, MachineReport
from nf4_pipeline.hub import Target
from nf4_pipeline.verification.document import MeasuredVerification, parse_verification

from tests.support import made
from tests.support.command_line import controls, run_nf4
from tests.support.tiny import copy_of, environment

ROOT: Final = Path(nf4_pipeline.__file__).parent
HOSTILE: Final = (
    "\x1b[31mred\x1b[0m",
    "\x1b]8;;http://evil.example/\x07here\x1b]8;;\x07",
    "\x1b]0;title\x07",
    "\x9b2J\x9d",
    "\x07\x08\x08\x7f",
    "all good\r\x1b[2Kverdict     pass",
    "one\nverdict     pass",
    "\u202egnp.exe\u2066\u200f",
    "\x1b[?1049h\x1b[6n",
    "\x1bP+q544e\x1b\\",
    "[red]markup[/red] [link=http://evil.example]x[/link] :skull:",
    "\u2028\x85\x0b\x0c",
    "\ud800\udcff\x00",
)
ALL: Final = " ".join(HOSTILE)
SCRIPTS: Final = {"readers/stock_reader.py", "readers/numpy_decoder.py"}
"""Run as files, in processes whose output is read by this package."""

PRINTERS: Final = {"print", "print_exc", "echo", "secho", "print_exception", "confirm"}


# One place


def printing(path: Path) -> Iterator[str]:
    """What a module does to print: calls, and stdout and stderr themselves."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if name in PRINTERS:
                yield f"{name} in line {node.lineno}"
            if name in ("write", "writelines", "buffer") and "sys.std" in ast.unparse(called):
                yield f"{ast.unparse(called)} in line {node.lineno}"


def test_one_module_prints() -> None:
    found = {path.relative_to(ROOT).as_posix(): list(printing(path)) for path in ROOT.rglob("*.py")}
    others = {name: calls for name, calls in found.items() if calls}
    assert set(others) - SCRIPTS - {"cli/terminal.py"} == {"cli/reporting.py"}, others
    # rich draws bars there; its text is made printable in the same line or the next.
    assert len(others["cli/reporting.py"]) == 1


# What is said


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_command_says(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    say(text)
    say(text, err=True)
    said = capsys.readouterr()
    assert controls(said.out + said.err) == []
    assert said.out == said.err
    assert said.out.count("\n") == 1


@given(st.text(st.characters(), max_size=200))
def test_any_text_keeps_its_line(text: str) -> None:
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        say(text)
        say_piece(text)
        say_json({text: [text]})
    line, _, rest = out.getvalue().partition("\n")
    assert line.isprintable()
    assert controls(rest) == []
    out.getvalue().encode()


@given(st.lists(st.text(st.characters(), max_size=20), max_size=8))
def test_whatever_a_library_prints_passes_the_filter(pieces: list[str]) -> None:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        with guarded():
            for piece in pieces:
                print(piece, end="")
                sys.stderr.write(piece)
            sys.stderr.writelines(pieces)
    assert controls(out.getvalue() + err.getvalue()) == []


def test_logs_and_tracebacks_pass_the_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    with guarded():
        logger = logging.Logger("a library")
        logger.addHandler(logging.StreamHandler())
        logger.error("loading %s", ALL)
        sys.__excepthook__(ValueError, ValueError(ALL), None)  # as Python shows a traceback
    assert err.getvalue().count("markup") == 2
    assert controls(err.getvalue()) == []


def test_bars_of_a_library_are_drawn_and_their_text_is_filtered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    with guarded():
        let_bars_through()
        for text in (
            "\r 10%|#   | a.safetensors",
            "\n\x1b[A",
            "\r" + ALL.replace("\r", ""),
            "x\ry",
            "\x1b[A\x07",
        ):
            sys.stderr.write(text)
    drawn = err.getvalue()
    assert drawn.startswith("\r 10%|#   | a.safetensors\n\x1b[A\r\\x1b[31mred")
    assert drawn.endswith("x\\ry\\x1b[A\\x07")
    assert controls(drawn.replace("\n\x1b[A", "", 1)) == ["\r", "\r"]


# Each command's own words, with every text in them a stranger's


def poisoned(value: Any, poison: str, kept: frozenset[str]) -> Any:
    """A document with `poison` in every text but those that only this package writes."""
    if isinstance(value, str):
        return value if value in kept else poison + value
    if is_dataclass(value) and not isinstance(value, type):
        inner = {
            f.name: poisoned(getattr(value, f.name), poison, kept) for f in fields(value) if f.init
        }
        return replace(value, **inner)
    if isinstance(value, Mapping):
        return {poisoned(k, poison, kept): poisoned(v, poison, kept) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(poisoned(item, poison, kept) for item in value)
    return value


OWN: Final = frozenset({"pass", "fail", "ok", "note", "problem", "main"})


def machine() -> MachineReport:
    return MachineReport(
        nf4_pipeline="1",
        python="3",
        system="Linux",
        processors=1,
        available_memory_bytes=1,
        libraries={"torch": "1"},
        tokenizers={},
        gpus=(Gpu("a card", 10**9, (9, 0)),),
        disks={"builds": Disk("/disk", 1)},
        hub=HubAccess("https://huggingface.co", False, False),
        findings=(Finding("ok", "fine"),),
    )


def checks(poison: str) -> None:
    for document in (made.hostile(), made.made(nearest=True, against=True)):
        verification = parse_verification(document)
        summary.show_checks(poisoned(verification, poison, OWN))
        assert isinstance(verification, MeasuredVerification)
        summary._show_answers(poisoned(verification.answers, poison, OWN))


def upload(poison: str) -> None:
    class Plan:
        target = Target(poison + "a/b", None, True, False)
        verdict = poison + "pass"
        files: Final[dict[str, Any]] = {}
        total_bytes = 1
        card = f"---\n{poison}\n---\n{poison}"

    push._show_plan(Plan())  # type: ignore[arg-type]


SHOWN: Final[dict[str, Callable[[str], None]]] = {
    "doctor": lambda poison: doctor._show(poisoned(machine(), poison, OWN)),
    "verify": checks,
    "push": upload,
}


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("poison", [ALL, *HOSTILE])
def test_a_command_with_strange_texts(
    name: str, poison: str, capsys: pytest.CaptureFixture[str]
) -> None:
    SHOWN[name](poison)
    said = capsys.readouterr().out
    assert controls(said) == []
    assert len(said) > 100
    # No text of a stranger makes a line that begins as a verdict of ours does.
    assert not any(line.startswith("verdict     pass") for line in said.splitlines())


def strings(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(inner, str):
            yield (*path, key)
        elif isinstance(inner, dict | list) and len(path) < 4:
            yield from strings(inner if isinstance(inner, dict) else inner[:1], (*path, key))


def test_a_manifest_with_strange_texts(exported_falcon: Path, tmp_path: Path) -> None:
    build = copy_of(exported_falcon, tmp_path / "build")
    path = build / "export" / "manifest.json"
    manifest = json.loads(path.read_text())
    places = list(strings(manifest))
    assert len(places) > 20
    shown = 0
    for place in places:
        changed = json.loads(json.dumps(manifest))
        inner = changed
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = ALL.replace("\ud800\udcff", "") + inner[place[-1]]
        path.write_text(json.dumps(changed))
        done = run_nf4("inspect", build / "export", *(["--json"] if shown % 4 else ["--tensors"]))
        assert controls(done.out + done.err) == [], place
        assert "bug" not in done.err
        shown += done.status == 0
    assert shown >= 10  # the schema refuses the others


def test_errors_and_usage_with_strange_texts(tmp_path: Path) -> None:
    for text in HOSTILE:
        for arguments in (
            (text,),
            ("inspect", text),
            ("inspect", ".", text),
            ("prompt", tmp_path / f"x{text}".replace("\0", "").replace("\ud800", ""), "x"),
            ("status", "--recipe", text),
            ("push", "--repo-id", text),
            ("quantize", "--device", text),
            ("quantize", "--memory-budget", text),
            (f"--{text}",),
            ("doctor", f"--{text}"),
        ):
            done = run_nf4(*arguments)
            assert done.status in (1, 2), arguments
            assert controls(done.out + done.err) == [], arguments


# On a terminal


def on_a_terminal(code: str, home: Path) -> str:
    """What reaches the terminal when a program runs on it."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=slave,
        env={**environment(home), "TERM": "xterm-256color", "COLUMNS": "400"},
        cwd=home,
    )
    os.close(slave)
    seen = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        seen += piece
    os.close(master)
    assert process.wait() == 0
    return seen.decode()


def test_notes_bars_and_verdicts_on_a_terminal(tmp_path: Path) -> None:
    seen = on_a_terminal(
        f"""
import sys, time
from nf4_pipeline.cli.reporting import make_reporter
from nf4_pipeline.cli.terminal import guarded, say
hostile = {ALL!r}
with guarded():
    reporter = make_reporter()
    reporter.note(hostile)
    with reporter.task(hostile, 10, unit=hostile) as task:
        task.advance(5)
        print(hostile, file=sys.stderr)
        time.sleep(0.3)
    say(f"  verdict     pass{{hostile}}", highlight=("pass", "green"))
    print(hostile)
""",
        tmp_path,
    )
    assert "\x1b[32m\x1b[1mpass\x1b[0m" in seen  # a terminal it is
    assert "\x1b[?25l" in seen
    assert seen.count("[red]markup[/red] [link=http://evil.example]x[/link] :skull:") >= 4
    for sent in ("\x07", "\x1b]", "\x9b", "\x1b[2J", "\x1b[31mred", "\x1bP", "\u202e", "\x1b[6n"):
        assert sent not in seen, repr(sent)
    assert "\x1b[?1049h" not in seen


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = make_reporter()
    reporter.note(ALL)
    with reporter.task(ALL, 10):
        pass
    said = capsys.readouterr().err
    assert controls(said) == []
    assert said.count("\n") == 1
