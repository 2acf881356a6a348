"""On a CUDA device: codes learn, and the same ones whether a run was stopped or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from nf4_pipeline.calibration.learning_state import Progress
from nf4_pipeline.progress import SILENT

from tests.support.learning import QUICK, Start, content, small_device

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("workers_here"),
]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Start]:
    return cache(lambda kind: Start(tmp_path_factory.mktemp(kind), kind, "cuda:0"))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["falcon-7b", "falcon-whole", "llama", "qwen2", "gpt2", "opt"])
def test_codes_learn_and_a_stopped_run_ends_with_the_same_bytes(
    start: Callable[[str], Start], tmp_path: Path, kind: str, recompute: bool
) -> None:
    how = replace(QUICK, sequences=64, steps=32, recompute=recompute)
    whole = start(kind).learning(tmp_path / "whole", how)
    found = whole.run(SILENT)
    assert found.kl_after < found.kl_before
    again = start(kind).learning(tmp_path / "again", how)
    again.run(SILENT)
    assert content(again) == content(whole)

    class Stopped(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.step % 10 == 0:
            raise Stopped

    stopped = start(kind).learning(tmp_path / "stopped", how)
    for _ in range(3):
        with pytest.raises(Stopped):
            stopped.run(SILENT, seconds=0.0, saved=stop)
    stopped.run(SILENT, seconds=0.0, saved=stop)
    assert content(stopped) == content(whole)


@pytest.mark.parametrize("small_host", [False, True])
@pytest.mark.parametrize(
    "kind", ["falcon-7b", "falcon-rw", "llama", "qwen2", "gpt2", "opt", "gemma2", "mixtral"]
)
def test_block_by_block_the_same_bytes_come_of_it(
    start: Callable[[str], Start], tmp_path: Path, kind: str, small_host: bool
) -> None:
    whole = start(kind).learning(tmp_path / "whole")
    found = whole.run(SILENT)
    by_block = start(kind).learning(tmp_path / "by block")
    with small_device(small_host=small_host):
        assert by_block.run(SILENT) == found
    assert content(by_block) == content(whole)
