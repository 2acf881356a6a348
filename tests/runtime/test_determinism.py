"""What torch leaves to chance is off while a model runs, and as it was afterwards.

That it helps is shown where there is a GPU, in tests/gpu; flags can be looked at anywhere.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import permutations
from typing import Any

import pytest
import torch
from nf4_pipeline.runtime.determinism import deterministic, deterministic_on_gpu


def flags() -> dict[str, object]:
    backends: Any = torch.backends.cuda
    fill: Any = torch.utils.deterministic
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fills": fill.fill_uninitialized_memory,
        "cudnn": backends.cudnn_sdp_enabled(),
        "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "threads": torch.get_num_threads(),
    }


INSIDE = {"deterministic": True, "fills": False, "cudnn": False}


@pytest.fixture(params=[None, ":16:8"], ids=["as found", "a workspace of the user's"])
def before(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if request.param is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    else:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", request.param)
    known = flags()
    yield known
    assert flags() == known


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("device", ["cuda:1", torch.device("cuda")])
def test_on_a_gpu(
    device: Any, outer: bool, inner: bool, fails: bool, before: dict[str, object]
) -> None:
    """Each within another, and whatever happens in them."""
    threads = before["threads"]
    workspace = before["cublas"] or ":4096:8"
    with suppress(ZeroDivisionError), deterministic(device, strict=outer):
        around = flags()
        assert around == INSIDE | {"warns": not outer, "threads": threads, "cublas": workspace}
        with suppress(ZeroDivisionError), deterministic_on_gpu(device, strict=inner):
            assert flags() == around | {"warns": not (outer or inner)}
            if fails:
                _ = 1 / 0
        assert flags() == around
        if fails:
            _ = 1 / 0


def test_on_a_cpu_one_thread_computes_and_nothing_else_changes(before: dict[str, object]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with suppress(ZeroDivisionError), deterministic("cpu"):
            assert flags() == before | {"threads": 1}
            _ = 1 / 0
        assert torch.get_num_threads() == 3
        with deterministic_on_gpu(torch.device("cpu"), strict=True):
            assert flags() == before | {"threads": 3}
    finally:
        torch.set_num_threads(threads)


def test_those_that_take_turns_may_leave_in_any_order(before: dict[str, object]) -> None:
    """As texts of different lengths that a model writes block by block."""
    for order in permutations(range(3)):
        entered = [ExitStack() for _ in order]
        for one in entered:
            one.enter_context(deterministic_on_gpu("cuda:0"))
        for number in order:
            inside = flags()
            assert inside == before | INSIDE | {"warns": True, "cublas": inside["cublas"]}
            assert inside["cublas"]
            entered[number].close()
        assert flags() == before


def test_threads_may_enter_and_leave_as_they_like(before: dict[str, object]) -> None:
    def enter(_: int) -> bool:
        with deterministic_on_gpu("cuda:0"):
            time.sleep(0.001)
            return flags() | {"threads": 0} == before | INSIDE | {
                "warns": True,
                "cublas": os.environ["CUBLAS_WORKSPACE_CONFIG"],
                "threads": 0,
            }

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(enter, range(200)))


def test_what_has_no_deterministic_kernel_is_computed_without_a_word() -> None:
    said = "op does not have a deterministic implementation, but you set warn_only"
    with deterministic_on_gpu("cuda"):
        warnings.warn(said, UserWarning, stacklevel=1)
        with pytest.warns(UserWarning, match="another"):
            warnings.warn("another word", UserWarning, stacklevel=1)
    with pytest.warns(UserWarning, match="op does not"):
        warnings.warn(said, UserWarning, stacklevel=1)
