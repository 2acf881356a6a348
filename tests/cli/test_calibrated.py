"""`nf4 quantize --calibrate` as processes: killed, with other threads, on files of no use."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.processes.in_process import in_process
from nf4_pipeline.records import QUANTIZE

from tests.support import warm
from tests.support.calibrated import shorten_context
from tests.support.command_line import run_nf4
from tests.support.failures import check_message, check_nothing_written
from tests.support.held import Moment, held
from tests.support.jobs import download
from tests.support.tiny import content_of, copy_of, environment, nf4, write_falcon

LAYERS = 4
OPTIONS = ("--calibrate", "self", "--recipe", "recipe.toml")
RECIPE = "[quantize]\ncalibration_tokens = 256\n"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of four blocks, whose matrices are large enough to be shared among threads."""
    folder = tmp_path_factory.mktemp("calibrated")
    model = write_falcon(folder / "model", hidden=256, layers=LAYERS, shards=3)
    shorten_context(model)
    with in_process():
        build, *_ = download(model, folder / "artifacts")
    return build.root


def command_of(build: Build) -> tuple[str, ...]:
    """What calibrates a build, in the folder above it."""
    (build.root.parent / "recipe.toml").write_text(RECIPE)
    return ("quantize", "--build-dir", build.root.name, *OPTIONS)


def start(
    build: Build, *options: str, threads: int = 1, cores: set[int] | None = None
) -> subprocess.Popen[str]:
    """Starts to calibrate with so many threads for torch, on some of the processors."""

    def here() -> None:
        if cores is not None:
            os.sched_setaffinity(0, cores)

    return subprocess.Popen(
        [sys.executable, "-m", "nf4_pipeline", *command_of(build), *options],
        cwd=build.root.parent,
        env=warm.variables({**environment(build.root.parent), "OMP_NUM_THREADS": str(threads)}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=here,
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


def weights(build: Build) -> dict[str, bytes]:
    return {n: c for n, c in content_of(build.quantized).items() if n.endswith(".safetensors")}


@pytest.fixture(scope="module")
def whole(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build after a run that nobody disturbed, on one processor."""
    build = Build(copy_of(fresh, tmp_path_factory.mktemp("whole") / "build"))
    finish(start(build, threads=1, cores={min(os.sched_getaffinity(0))}))
    return build.root


def blocks_of(build: Build) -> list[Path]:
    return sorted(build.root.glob("calibration/*/*.safetensors"))


BLOCK = r"/calibration/[^/]+/[^/]+\.safetensors$"
MOMENTS = {
    "with tokens": (Moment("os.rename", BLOCK, 1), 0),
    "with three blocks": (Moment("os.rename", BLOCK, 4), 3),
    "with one shard": (Moment("os.rename", r"/quantized/[^/.]+\.safetensors$", 2), LAYERS),
}
"""Each with how many blocks are done then."""


def test_killed_again_and_again(fresh: Path, whole: Path, tmp_path: Path) -> None:
    """It goes on where it stopped, with other threads each time, and ends with the same bytes.

    For the same tokens; which ones are sampled may depend on the number of threads.
    """
    build = Build(copy_of(fresh, tmp_path / "build"))
    tokens = build.root / "calibration" / "tokens.json"
    kept: dict[Path, tuple[int, bytes]] = {}
    for threads, (moment, blocks) in zip((1, 4, 3), MOMENTS.values(), strict=True):
        variables = {"OMP_NUM_THREADS": str(threads)}
        with held(*command_of(build), cwd=tmp_path, at=moment, variables=variables) as command:
            command.process.kill()
            assert command.process.wait() == -signal.SIGKILL
        assert build.record(QUANTIZE) is None
        for path, state in kept.items():
            assert (path.stat().st_mtime_ns, path.read_bytes()) == state, path.name
        assert len(blocks_of(build)) == blocks
        kept = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tokens, *blocks_of(build))}
    finish(start(build, "--memory-budget", "2MiB", "--workers", "1"))
    assert tokens.read_bytes() == (whole / "calibration" / "tokens.json").read_bytes()
    assert weights(build) == weights(Build(whole))
    assert [path.name for path in (build.root / "calibration").iterdir()] == ["tokens.json"]
    assert not list(build.root.rglob("*.partial"))


def text_of(content: bytes | None, name: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        if content is not None:
            (folder / name).write_bytes(content)
        return name

    return write


LINES = b'{"text": "' + b"x" * 300 + b'"}\n{"text": "y"\n'
BAD_TEXTS: dict[str, tuple[Callable[[Path], str], tuple[str, ...]]] = {
    "missing": (text_of(None, "none.txt"), (r"none\.txt cannot be read", "No such file", '"self"')),
    "too short": (text_of(b"x" * 255, "short.txt"), (r"short\.txt has 255 tokens", "least 256")),
    "a broken line": (text_of(LINES, "talk.jsonl"), (r"talk\.jsonl, line 2: expected",)),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_a_text_of_no_use(
    downloaded_falcon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    build = Build(copy_of(downloaded_falcon, tmp_path / "build"))
    write, patterns = BAD_TEXTS[case]
    done = run_nf4("quantize", "--build-dir", build.root, "--calibrate", write(tmp_path))
    check_message(done, 2, *patterns)
    assert build.record(QUANTIZE) is None
    assert not build.quantized.exists()


def test_a_text_that_is_not_there_is_known_before_anything_is_fetched(
    tiny_falcon: Path, tmp_path: Path
) -> None:
    done = nf4("build", tiny_falcon, "--calibrate", "none.txt", cwd=tmp_path)
    check_message(done, 2, r"none\.txt cannot be read")
    check_nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("options", "patterns"),
    [
        (
            ("--extra-bytes", "5%"),
            ("--extra-bytes needs --calibrate, which", "Write: --calibrate self --extra-bytes 5%"),
        ),
        (
            ("--effort", "high"),
            ("--effort needs --calibrate, which", "Write: --calibrate self --effort high"),
        ),
        (("--calibrate", "self", "--effort", "most"), ("--effort is 'most'", 'expected "high"')),
        (("--calibrate", "self", "--extra-bytes", "lots"), ("'lots'", 'such as "5%"')),
        (("--calibrate", "self", "--extra-bytes", "-5%"), ("'-5%'", "percentage")),
        (("--calibrate", "self", "--extra-bytes", "101%"), ("'101%'", "percentage")),
    ],
)
def test_options_that_make_no_sense(
    tiny_falcon: Path, tmp_path: Path, options: tuple[str, ...], patterns: tuple[str, ...]
) -> None:
    done = nf4("build", tiny_falcon, *options, cwd=tmp_path)
    check_message(done, 2, *(re.escape(pattern) for pattern in patterns))
    check_nothing_written(tmp_path)
