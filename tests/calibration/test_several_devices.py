"""Several devices choose what one of them does, byte for byte.

The devices are a CPU that stands there several times, whose work is cut as if it were GPUs: each
has a copy of the model, batches of its own, and pieces of each layer's work.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from nf4_pipeline.blocks.model_replica import ModelReplica
from nf4_pipeline.blocks.streamed_model import StreamedModel
from nf4_pipeline.calibration import calibration_pass as passes
from nf4_pipeline.calibration.block_inputs import InputMoments, LayerInputs
from nf4_pipeline.calibration.block_store import BlockStore
from nf4_pipeline.errors import ResourceError
from nf4_pipeline.gptq.config import GptqConfig
from nf4_pipeline.gptq.device_group import DeviceGroup, Division
from nf4_pipeline.runtime.loader import devices_alike

from tests.support.checkpoints import make_checkpoint
from tests.support.passes import DIVISION, SEVERAL, Cases, PassCase, cases

pytestmark = pytest.mark.usefixtures("workers_here")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return cases(tmp_path_factory)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five of them."""
    monkeypatch.setitem(passes.TOGETHER, "cpu", 256)


def chosen(case: PassCase, folder: Path, devices: int, **options: Any) -> dict[str, bytes]:
    """What so many devices leave in a store."""
    return case.chosen(folder, ["cpu"] * devices, **options)


@pytest.mark.parametrize("kind", SEVERAL)
def test_any_number_of_devices_chooses_the_same(kind: str, case: Cases, tmp_path: Path) -> None:
    one = chosen(case(kind), tmp_path / "one", 1)
    assert len(one) >= 2
    for devices in (2, 6) if kind == "falcon-7b" else (3,):
        assert chosen(case(kind), tmp_path / str(devices), devices) == one, devices


def test_what_was_begun_with_one_device_ends_with_two(case: Cases, tmp_path: Path) -> None:
    """Stored codes are put into each copy of the model."""
    whole = chosen(case("falcon-7b"), tmp_path / "whole", 2)
    (tmp_path / "part").mkdir()
    first = min(whole)
    (tmp_path / "part" / first).write_bytes(whole[first])
    assert chosen(case("falcon-7b"), tmp_path / "part", 2) == whole


def test_weights_that_fall_back_do_so_in_each_copy(
    case: Cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "_FEWEST", 100_000)
    one = chosen(case("falcon-7b"), tmp_path / "one", 1)
    assert chosen(case("falcon-7b"), tmp_path / "two", 2) == one
    facts = BlockStore(tmp_path / "two").fallbacks()
    assert set(facts.values()) == {"only 1280 tokens came to it"}


@pytest.mark.parametrize(
    "config", [GptqConfig(quantized_inputs=False), GptqConfig(correction=0.0)], ids=["own", "plain"]
)
def test_what_studies_vary_is_shared_too(config: GptqConfig, case: Cases, tmp_path: Path) -> None:
    one = chosen(case("falcon-7b"), tmp_path / "one", 1, config=config)
    assert chosen(case("falcon-7b"), tmp_path / "two", 2, config=config) == one


def inputs(columns: int, *, is_paired: bool, dtype: torch.dtype) -> LayerInputs:
    dice = torch.Generator().manual_seed(columns)
    ys = [torch.randn(tokens, columns, generator=dice).to(dtype) for tokens in (70, 33, 1)]
    return LayerInputs([(y, y * 1.25 if is_paired else None) for y in ys])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_paired", [True, False])
@pytest.mark.parametrize("columns", [3, 64, 101])
@torch.inference_mode()
def test_sums_do_not_depend_on_who_adds(columns: int, is_paired: bool, dtype: torch.dtype) -> None:
    found: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for devices, division in [(1, Division()), *((n, DIVISION) for n in (1, 2, 3, 5))]:
        with ThreadPoolExecutor(devices) as pool:
            group = DeviceGroup([torch.device("cpu")] * devices, division, pool)
            moments = InputMoments(inputs(columns, is_paired=is_paired, dtype=dtype), group)
            hessian = moments.hessian()
            group.each(moments.add_drift)
            found.append((hessian, moments.drift()))
    y = torch.cat([y for y, _ in inputs(columns, is_paired=is_paired, dtype=dtype).calls]).double()
    whole, one, *others = found
    for hessian, drift in (whole, one):
        torch.testing.assert_close(hessian.double(), y.T @ y / 104, rtol=1e-4, atol=1e-5)
        assert (drift is not None) == is_paired
        if drift is not None:
            exact = (y * 1.25).to(dtype).double() - y
            torch.testing.assert_close(drift.double(), exact.T @ y / 104, rtol=1e-3, atol=1e-4)
    for several in others:
        for mine, theirs in zip(several, one, strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or theirs is None or torch.equal(mine, theirs)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["falcon-7b", "bloom", "gemma2"])
def test_a_replica_computes_what_the_original_does(kind: str, tmp_path: Path) -> None:
    """Ties, computed buffers and all; its blocks are empty before and after."""
    make_checkpoint(tmp_path, kind)
    ids = torch.arange(24).reshape(2, 12)
    with StreamedModel(tmp_path, "cpu") as streamed:
        replica = ModelReplica(streamed, torch.device("cpu"))
        assert list(replica.blocks) == list(streamed.blocks)
        assert replica.model is not streamed.model
        for block in streamed.blocks:
            streamed.open(block)
            replica.open(block)
        own, other = (m.model(ids, use_cache=False).logits for m in (streamed, replica))
        assert torch.equal(own, other)
        for block in streamed.blocks:
            streamed.close(block)
            replica.close(block)
            assert all(p.is_meta for p in replica.blocks[block].parameters())


def test_what_a_choice_of_device_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """All GPUs of the first one's kind, unless a number is said."""
    names = ["H100", "A100", "H100", "H100"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(
        torch.cuda, "get_device_name", lambda device: names[int(device.partition(":")[2])]
    )
    assert devices_alike("auto") == devices_alike("cuda") == ["cuda:0", "cuda:2", "cuda:3"]
    assert devices_alike("cuda:1") == ["cuda:1"]
    assert devices_alike("cpu") == ["cpu"]
    with pytest.raises(ResourceError, match="cuda:4"):
        devices_alike("cuda:4")
