"""SIGKILL at several moments: what stands is whole, and the next run ends with the same bytes."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.safetensors_header import read_header
from nf4_pipeline.records import QUANTIZE

from tests.campaigns import kills
from tests.support.jobs import download
from tests.support.tiny import content_of, copy_of, nf4, start_nf4, write_falcon

pytestmark = pytest.mark.usefixtures("workers_here")

SHARDS = 6


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of a Falcon large enough to be killed in the middle: 50 million weights."""
    folder = tmp_path_factory.mktemp("killed")
    model = write_falcon(folder / "model", hidden=1024, layers=4, shards=SHARDS)
    build, *_ = download(model, folder / "artifacts")
    return build.root


@pytest.fixture(scope="module")
def whole(downloaded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run that nobody disturbs leaves in quantized/."""
    build = Build(copy_of(downloaded, tmp_path_factory.mktemp("whole") / "build"))
    done = nf4("quantize", "--build-dir", build.root, cwd=build.root.parent)
    assert done.status == 0, done.err
    return content_of(build.quantized)


def weights(build: Build) -> list[Path]:
    return sorted(build.quantized.glob("*.safetensors"))


MOMENTS: dict[str, Callable[[Build], bool]] = {
    "as soon as it writes": lambda build: any(build.quantized.glob(".*.partial")),
    "with one shard done": lambda build: len(weights(build)) >= 1,
    "with some shards done": lambda build: len(weights(build)) >= 3,
}


def kill_when(process: subprocess.Popen[str], build: Build, moment: Callable[[Build], bool]) -> int:
    """Kills a process as soon as `moment` comes; returns its status."""
    end = time.monotonic() + 60
    while process.poll() is None and not moment(build):
        assert time.monotonic() < end
        time.sleep(0.0005)
    process.kill()
    process.communicate()
    return process.returncode


def test_killed_again_and_again(downloaded: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    build = Build(copy_of(downloaded, tmp_path / "build"))
    statuses = []
    for moment in MOMENTS.values():
        process = start_nf4("quantize", "--build-dir", build.root, cwd=tmp_path)
        statuses.append(kill_when(process, build, moment))
        assert build.record(QUANTIZE) is None
        for path in weights(build):  # complete or absent
            assert path.read_bytes() == whole[path.name]
            assert read_header(path)
    assert statuses == [-signal.SIGKILL] * 3
    finished = {path.name: path.stat().st_ino for path in weights(build)}
    assert len(finished) >= 3
    done = nf4("quantize", "--build-dir", build.root, cwd=tmp_path)
    assert done.status == 0, done.err
    assert content_of(build.quantized) == whole
    assert not list(build.root.rglob("*.partial"))
    kept = [
        name for name, inode in finished.items() if (build.quantized / name).stat().st_ino == inode
    ]
    assert len(kept) >= len(finished) - 1  # the last may lack the note that says it is done


@pytest.mark.parametrize("stage", kills.STAGES)
def test_killed_at_random_moments(downloaded: Path, tmp_path: Path, stage: str) -> None:
    """A few rounds of the campaign whose hundred stand in docs/reliability.md."""
    campaign = kills.prepare(downloaded, tmp_path / "campaign", stage)
    dice = random.Random(stage)
    rounds = [kills.kill_once(campaign, number, dice, tmp_path) for number in range(4)]
    assert [found.faults for found in rounds] == [[]] * 4


def test_a_second_live_process_is_refused_and_a_dead_one_is_not(
    downloaded: Path, tmp_path: Path
) -> None:
    build = Build(copy_of(downloaded, tmp_path / "build"))
    with build.locked():
        done = nf4("quantize", "--build-dir", build.root, cwd=tmp_path)
        assert done.status == 1
        assert "in use by another nf4 process (pid" in done.err
        assert not build.quantized.exists()
    assert nf4("quantize", "--build-dir", build.root, cwd=tmp_path).status == 0
