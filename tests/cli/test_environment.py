"""Odd surroundings: streams that are closed, locales, folders gone, disks full."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Final

import pytest
from nf4_pipeline import cli
from nf4_pipeline.cli.terminal import guarded, say

from tests.support.command_line import controls
from tests.support.tiny import copy_of, environment, listen_to_interrupts

NF4: Final = f"{sys.executable} -m nf4_pipeline"
ASCII: Final = {
    "LC_ALL": "C",
    "LANG": "C",
    "PYTHONUTF8": "0",
    "PYTHONIOENCODING": "ascii",
    "PYTHONCOERCECLOCALE": "0",
}


def shell(command: str, folder: Path, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """Runs a line of bash in a folder; `nf4` stands for this package. None unsets a variable."""
    env = environment(folder) | {"LC_ALL": "C.UTF-8"}
    for name, value in variables.items():
        env.pop(name, None)
        if value is not None:
            env[name] = value
    line = f'nf4() {{ {NF4} "$@"; }}; {command}'
    return subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def build(exported_falcon: Path, tmp_path: Path) -> Path:
    return copy_of(exported_falcon, tmp_path / "artifacts" / "build")


@pytest.mark.parametrize(
    ("command", "closed", "status"),
    [
        ("status", "2>&-", 0),
        ("status --json", ">&- 2>&-", 0),
        ("inspect nothing", "2>&-", 1),
        ("nonsense", "<&- >&- 2>&-", 2),
        ("quantize", ">&-", 1),
    ],
)
def test_closed_streams_change_no_exit_code(
    tmp_path: Path, command: str, closed: str, status: int
) -> None:
    done = shell(f"nf4 {command} {closed}", tmp_path)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_closed_stderr_is_no_file_of_a_build(build: Path) -> None:
    """What is opened next must not get its number, and with it what is printed."""
    rest = "--build-dir artifacts/build --max-shard-size 40KB --replace"
    done = shell(f"nf4 serialize {rest} 2>&- >&- && nf4 status", build.parents[1])
    assert done.returncode == 0
    assert "  serialize  done     outputs hash as recorded\n" in done.stdout


def test_nobody_reads_on(tmp_path: Path) -> None:
    for into in ("", "2>&1"):
        done = shell(f"nf4 status {into} | true; echo ${{PIPESTATUS[0]}}", tmp_path)
        assert done.stdout.strip() in ("0", "1")
        assert done.stderr == ""


def test_a_full_disk_behind_stdout(tmp_path: Path) -> None:
    done = shell("nf4 status > /dev/full", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: nf4: the disk is full")
    assert done.stderr.count("\n") == 1


def test_a_locale_of_ascii(tmp_path: Path) -> None:
    done = shell("nf4 inspect $'na\\xc3\\xafve \\xe2\\x80\\xa6'", tmp_path, **ASCII)
    assert done.returncode == 2
    assert done.stderr.isascii()
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1


def test_letters_that_the_locale_does_not_have() -> None:
    code = (
        "from nf4_pipeline.cli.terminal import guarded, say, say_piece\n"
        f"with guarded():\n say({'naïve …'!a})\n say_piece({'漢字'!a} + chr(27))\n"
        f" say({'…'!a}, err=True)\n print({'é'!a})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **ASCII}, capture_output=True, check=True
    )
    assert done.stdout == b"na\\xefve \\u2026\n\\u6f22\\u5b57\\x1b\\xe9\n"
    assert done.stderr == b"\\u2026\n"


@pytest.mark.parametrize(
    "variables",
    [
        {"HOME": None, "HF_HOME": None},
        {"HOME": "/nonexistent", "HF_HOME": None},
        {"TERM": "dumb", "COLUMNS": "1"},
        {"PYTHONWARNINGS": "error", "TMPDIR": "/nonexistent"},
        {"OMP_NUM_THREADS": "none of them", "HF_ENDPOINT": "\x1b[31m", "HF_TOKEN": "\x1b"},
    ],
    ids=str,
)
def test_odd_variables(tmp_path: Path, variables: dict[str, str | None]) -> None:
    done = shell("nf4 status --json", tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert controls(done.stdout) == []


def test_the_working_folder_is_gone(tmp_path: Path) -> None:
    for command, statuses in (("status", (0, 1)), ("build sample", (1,))):
        done = shell(f"mkdir gone && cd gone && rmdir ../gone && nf4 {command}", tmp_path)
        assert done.returncode in statuses, done.stderr
        assert "Traceback" not in done.stderr
        assert "bug in nf4" not in done.stderr
    assert not list(tmp_path.glob("**/artifacts"))


def test_a_working_folder_that_is_not_utf_8(tiny_falcon: Path, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    folder.mkdir()
    done = shell(f"nf4 download {tiny_falcon}", folder)
    assert done.returncode == 0, done.stderr
    assert controls(done.stdout) == []


def test_a_disk_that_takes_no_more(exported_falcon: Path, tmp_path: Path) -> None:
    """By a limit on the size of files, as of a session."""

    def limited() -> None:
        listen_to_interrupts()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    build = copy_of(exported_falcon, tmp_path / "build")
    for command in (("serialize", "--max-shard-size", "40KB", "--replace"), ("status",)):
        done = subprocess.run(
            [sys.executable, "-m", "nf4_pipeline", *command, "--build-dir", str(build)],
            cwd=tmp_path,
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            preexec_fn=limited,
            timeout=300,
            check=False,
        )
        assert done.returncode in (0, 1), done.stderr
        assert "Traceback" not in done.stderr
        assert "bug in nf4" not in done.stderr, done.stderr


BUG: Final = """
import sys
from nf4_pipeline import cli
class Broken:
    def __getattr__(self, name):
        {raises}
cli.import_module = lambda name: Broken()
cli.main(["build", "x"])
"""


@pytest.mark.parametrize(
    ("raises", "said"),
    [
        ("raise ValueError('a\\x1b[31m\\nb')", "ValueError: a\\x1b[31m b. "),
        ("raise RecursionError", "RecursionError. "),
        ("raise type('PanicException', (BaseException,), {})('regex')", "PanicException: regex. "),
        ("raise AssertionError", "AssertionError. "),
    ],
)
def test_a_bug_is_one_line_and_a_file(tmp_path: Path, raises: str, said: str) -> None:
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", BUG.format(raises=raises)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    (file,) = tmp_path.iterdir()
    assert done.returncode == 1
    assert done.stderr == (
        f"Error: {said}This is a bug in nf4-pipeline; please report it, with the traceback in "
        f"{file}.\n"
    )
    assert "Traceback" in file.read_text()
    assert "\x1b" not in file.read_text()
    env["NF4_DEBUG"] = "1"
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr
    assert controls(done.stderr) == []
    assert len(list(tmp_path.iterdir())) == 1


def test_streams_are_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    out = sys.stdout
    with guarded():
        say("to nobody", err=True)
        assert sys.stdout is not out
    assert sys.stdout is out
    assert sys.stderr is None


def test_ctrl_c_while_the_program_is_imported(tmp_path: Path) -> None:
    """At any moment from the package's own first line on."""
    code = (
        "import os, signal, sys\n"
        "after = int(sys.argv.pop(1))\n"
        "class Finder:\n"
        " def find_spec(self, name, path=None, target=None):\n"
        "  global after\n"
        "  after -= 1\n"
        "  if after == 0: os.kill(os.getpid(), signal.SIGINT)\n"
        "from nf4_pipeline.__main__ import main\n"
        "sys.meta_path.insert(0, Finder())\n"
        "main()\n"
    )
    for after in (1, 5, 40, 150):
        done = subprocess.run(
            [sys.executable, "-c", code, str(after), "status"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            preexec_fn=listen_to_interrupts,
            check=False,
        )
        assert done.returncode == 130, (after, done)
        assert done.stderr.strip().startswith("Stopped. ")
        assert done.stderr.strip().count("\n") == 0


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_library_that_fails_while_it_is_imported(
    depth: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = {depth: "int('from \x1b[31m the environment')"}
    for number in range(depth + 1):
        code = lines.get(number, f"import nf4_odd_{depth}_{number + 1}")
        (tmp_path / f"nf4_odd_{depth}_{number}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)

    def command(**_: object) -> None:
        import_module(f"nf4_odd_{depth}_0")

    monkeypatch.setattr(cli.cli, "main", command)
    assert cli._run([]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"Error: nf4_odd_{depth}_0 cannot be imported: ValueError: ")
    assert "bug" not in said
    assert controls(said) == []


def test_a_library_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.cli, "main", lambda **_: import_module("nf4_nowhere.inside"))
    assert cli._run([]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Error: nf4_nowhere is not installed, and is needed here")
