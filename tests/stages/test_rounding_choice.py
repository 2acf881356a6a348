"""Where weights are rounded: a rule of sizes and processors."""

from __future__ import annotations

import itertools

import pytest
from nf4_pipeline.nf4.rounding import NearestOnCpu
from nf4_pipeline.progress import SilentReporter
from nf4_pipeline.stages import rounding_choice
from nf4_pipeline.stages.rounding_choice import estimate, rounding_for

GB = 10**9
SIZES = (0, GB // 1000, 2 * GB, 14 * GB, 140 * GB, 1400 * GB)
PROCESSORS = (1, 2, 4, 8, 16, 32, 128)


@pytest.mark.parametrize(("size", "processors"), list(itertools.product(SIZES, PROCESSORS)))
def test_what_is_chosen_is_what_takes_less(size: int, processors: int) -> None:
    for begun in (False, True):
        both = estimate(size, processors, cuda_begun=begun)
        assert both.cpu >= 0
        assert both.cuda >= 0
        assert both.cuda_pays == (both.cuda < both.cpu)


@pytest.mark.parametrize("size", SIZES)
def test_more_processors_never_take_longer(size: int) -> None:
    times = [estimate(size, processors, cuda_begun=False) for processors in PROCESSORS]
    for few, many in itertools.pairwise(times):
        assert many.cpu <= few.cpu
        assert many.cuda <= few.cuda


@pytest.mark.parametrize("processors", PROCESSORS)
def test_larger_checkpoints_turn_to_the_gpu_once_and_stay_there(processors: int) -> None:
    chosen = [
        estimate(size, processors, cuda_begun=False).cuda_pays
        for size in range(GB, 3000 * GB, 10 * GB)
    ]
    assert chosen == sorted(chosen)


@pytest.mark.parametrize(
    ("size", "processors", "begun", "pays"),
    [
        (2 * GB, 2, False, False),  # over before CUDA has started
        (14 * GB, 16, False, False),  # likewise: falcon-7b on many processors
        (140 * GB, 2, False, True),  # a large model beside few processors
        (14 * GB, 2, True, True),  # nothing to wait for
        (0, 1, True, False),  # nothing to do: nothing to move
    ],
)
def test_known_cases(size: int, processors: int, begun: bool, pays: bool) -> None:
    assert estimate(size, processors, cuda_begun=begun).cuda_pays == pays


class _Details(SilentReporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def detail(self, text: str) -> None:
        self.said.append(text)


def test_the_decision_is_told_with_both_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding_choice, "may_have_cuda", lambda: True)
    monkeypatch.setattr(rounding_choice, "cuda_has_begun", lambda: False)
    heard = _Details()
    assert isinstance(rounding_for("auto", GB // 1000, heard), NearestOnCpu)
    (said,) = heard.said
    assert "on the CPU" in said
    assert "on the GPU" in said


def test_nothing_is_weighed_where_there_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding_choice, "may_have_cuda", lambda: False)
    heard = _Details()
    for device in ("cpu", "auto"):
        assert isinstance(rounding_for(device, 1000 * GB, heard), NearestOnCpu)
    assert heard.said == []
