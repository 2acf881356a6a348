"""Ctrl-C: a clean end that says what is kept, and nothing half-written."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from nf4_pipeline.build_folder import Build

from tests.support.folder_state import leftovers
from tests.support.held import Moment
from tests.support.interrupts import interrupt_held, interrupt_in_stage
from tests.support.jobs import download
from tests.support.tiny import content_of, copy_of, listen_to_interrupts, nf4, write_falcon

pytestmark = pytest.mark.usefixtures("workers_here")


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    model = write_falcon(folder / "model", hidden=768, layers=4, shards=6)
    build, *_ = download(model, folder / "artifacts")
    return build.root


def test_quantize_ends_clean_and_goes_on(downloaded: Path, tmp_path: Path) -> None:
    build = Build(copy_of(downloaded, tmp_path / "build"))
    command = ("quantize", "--build-dir", build.root)
    found = interrupt_held(
        *command, cwd=tmp_path, at=Moment("os.rename", r"/quantized/[^/]+\.facts\.json$", 3)
    )
    assert found.status == 130
    assert re.fullmatch(
        rf"(quantize: .+\n)+\nStopped in quantize\. Kept in {re.escape(str(build.root))}: "
        r"download, and \d quantized files\. Run the same command again to continue there\.\n",
        found.err,
    )
    assert leftovers(build) == []
    kept = {p.name: p.stat().st_ino for p in build.quantized.glob("*.safetensors")}
    assert len(kept) >= 2
    assert nf4(*command, cwd=tmp_path).status == 0
    same = [n for n, inode in kept.items() if (build.quantized / n).stat().st_ino == inode]
    assert len(same) >= len(kept) - 1
    whole = Build(copy_of(downloaded, tmp_path / "whole"))
    assert nf4("quantize", "--build-dir", whole.root, cwd=tmp_path).status == 0
    assert content_of(build.quantized) == content_of(whole.quantized)


STAGES = (
    ("download", 3.0),
    ("quantize", 0.3),
    ("serialize", 0.05),
    ("verify", 1.0),
    ("verify", 4.0),
)
"""With how long each takes, or a part of it that is long enough."""


def test_at_any_moment_of_a_build(tiny_falcon: Path, quick_recipe: Path, tmp_path: Path) -> None:
    """From the first stage to the two models that verify loads; each run goes on with the last."""
    root = tmp_path / "build"
    command = (tiny_falcon, "--recipe", quick_recipe, "--build-dir", root)
    dice = random.Random(0)
    stopped = 0
    for stage, within in STAGES:
        found = interrupt_in_stage(
            stage,
            *command,
            cwd=tmp_path,
            seconds=dice.uniform(0, within),
            by_force=stage == "verify",  # which waits for its processes to import, else
        )
        assert "Traceback" not in found.err
        assert leftovers(Build(root)) == []
        if found.status == 0:  # it was over before
            continue
        assert found.status == 130, found.err
        lines = [line for line in found.err.splitlines() if line.strip()]
        assert lines[-1].startswith("Stopped"), found.err
        assert "again to continue" in lines[-1]
        stopped += 1
    assert stopped >= 3


PROGRAM = """
import signal, sys, time
from nf4_pipeline import cli
class Deaf:
    def __getattr__(self, name):
        print("ready", flush=True)
        while True:
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                pass
cli.import_module = lambda name: Deaf()
cli.main(["build", "x"])
"""


@pytest.mark.parametrize("signals", [1, 2])
def test_work_that_does_not_listen_is_ended_all_the_same(signals: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listen_to_interrupts,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for _ in range(signals):
        process.send_signal(2)
        time.sleep(0.2)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.count("Stopped.") == 1
