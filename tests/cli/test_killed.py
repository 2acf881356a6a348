"""SIGKILL at several moments: what stands is whole, and the next run ends with the same bytes."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.safetensors_header import read_header
from nf4_pipeline.records import QUANTIZE

from tests.campaigns import kills
from tests.support.held import Moment, held
from tests.support.jobs import download
from tests.support.tiny import content_of, copy_of, nf4, write_falcon

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


SHARD = r"/quantized/[^/.]+\.safetensors$"
MOMENTS = {
    "while it writes": (Moment("os.pwrite", r"/\.[^/]+\.partial$", 3), 0),
    "with one shard done": (Moment("os.rename", SHARD, 2), 1),
    "with some shards done": (Moment("os.rename", SHARD, 4), 3),
}
"""Each with how many shards are complete then, at least."""


def test_killed_again_and_again(downloaded: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    build = Build(copy_of(downloaded, tmp_path / "build"))
    for moment, done_then in MOMENTS.values():
        with held("quantize", "--build-dir", build.root, cwd=tmp_path, at=moment) as command:
            command.process.kill()
            assert command.process.wait() == -signal.SIGKILL
        assert len(weights(build)) >= done_then
        assert list(build.root.rglob("*.partial"))
        assert build.record(QUANTIZE) is None
        for path in weights(build):  # complete or absent
            assert path.read_bytes() == whole[path.name]
            assert read_header(path)
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
    count = 2 if stage == "quantize" else 4  # each kind of moment, and serialize's also again
    rounds = [kills.kill_once(campaign, number, dice, tmp_path) for number in range(count)]
    assert [found.faults for found in rounds] == [[]] * count


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
