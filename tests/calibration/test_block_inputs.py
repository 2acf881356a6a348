"""What is kept of inputs, what is summed behind the quantized part, and what it asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nf4_pipeline.calibration import block_inputs
from nf4_pipeline.calibration.block_inputs import (
    BlockCall,
    ExactInputs,
    InputMoments,
    LayerInputs,
    inputs_behind,
    inputs_of,
)
from nf4_pipeline.gptq.config import GptqConfig
from nf4_pipeline.gptq.device_group import DeviceGroup
from nf4_pipeline.gptq.hessian import corrected, factorize
from torch import nn


class Block(nn.Module):
    """q and k read the same tensor, o another, and `never` none at all; it spoils its input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 5), nn.Linear(6, 3)
        self.o, self.never = nn.Linear(5, 6), nn.Linear(6, 6)
        self.runs = 0

    def forward(self, x: torch.Tensor) -> Any:
        y = x * 2
        self.k(y)
        z = self.q(y)
        x.zero_()
        y.zero_()
        given = self.o(z)
        self.runs += 1
        return given


class Experts(nn.Module):
    """Tokens go to one of two experts, by the sign of their first number."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(6, 5), "down": nn.Linear(5, 6)}) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> Any:
        for number, expert in enumerate(self.experts):
            chosen: Any = expert
            chosen["down"](chosen["up"](x[(x[:, 0] > 0) == bool(number)]))


def watched(block: nn.Module, names: list[str], batches: list[torch.Tensor]) -> ExactInputs:
    running: list[int | None] = [None]
    exact = ExactInputs([{n: block.get_submodule(n) for n in names}], lambda: running[0])
    for number, batch in enumerate(batches):
        running[0] = number
        block(batch.clone())
    running[0] = None
    block(batches[0].clone())  # is none of them
    exact.close()
    running[0] = 0
    block(batches[0].clone())  # after the end
    return exact


CPU = DeviceGroup([torch.device("cpu")])


def means_of(found: LayerInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    moments = InputMoments(found, CPU)
    hessian = moments.hessian()
    moments.add_drift(0)
    return hessian, moments.drift()


def joined(found: dict[int, dict[str, LayerInputs]], name: str) -> LayerInputs:
    """What came to one layer in all batches."""
    return LayerInputs([pair for number in sorted(found) for pair in found[number][name].calls])


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


BATCHES = [(2, 7, 6), (1, 4, 6), (3, 6)]


@torch.inference_mode()
def test_inputs_are_kept_as_they_came_and_shared() -> None:
    block, batches = Block(), [inputs(*shape) for shape in BATCHES]
    exact = watched(block, ["q", "k", "o", "never"], batches)
    assert exact.steps() == [{"k": ["k", "q"]}, {"o": ["o"]}]
    for number, batch in enumerate(batches):
        (kept,) = exact.of("k", number)
        assert torch.equal(kept, batch.reshape(-1, 6) * 2)
    found = inputs_of(exact, "k", len(batches))
    x = torch.cat([batch.reshape(-1, 6) for batch in batches]).double() * 2
    hessian, drift = means_of(found)
    assert found.tokens == len(x) == 21
    torch.testing.assert_close(hessian.double(), x.T @ x / len(x), rtol=1e-5, atol=1e-5)
    assert drift is None
    exact.let_go("k")
    assert exact.of("k", 0) == []
    assert len(exact.of("o", 0)) == 1


@torch.inference_mode()
def test_the_same_block_behind_others() -> None:
    """Inputs differ; the run ends where the last layer is watched, and begins from what came."""
    block, batches = Block(), [inputs(*shape) for shape in BATCHES]
    exact = watched(block, ["q", "k", "o"], batches)
    other = [
        batch + 0.1 * inputs(*batch.shape[::-1]).permute(*reversed(range(batch.ndim)))
        for batch in batches
    ]
    calls = {number: BlockCall(b[..., 0].numel(), (b,), {}) for number, b in enumerate(other)}
    block.runs = 0
    found = joined(inputs_behind(block, calls, {"k": block.k}, exact), "k")
    assert block.runs == 0
    hessian, drift = means_of(found)
    x = torch.cat([batch.reshape(-1, 6) for batch in batches]).double() * 2
    y = torch.cat([batch.reshape(-1, 6) for batch in other]).double() * 2
    assert drift is not None
    torch.testing.assert_close(hessian.double(), y.T @ y / len(y), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drift.double(), (x - y).T @ y / len(y), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        block.q.weight.mul_(0.9)  # as if it were rounded
    again = joined(inputs_behind(block, calls, {"o": block.o}, exact), "o")
    z = (y.float() @ block.q.weight.T + block.q.bias).double()
    behind, _ = means_of(again)
    torch.testing.assert_close(behind.double(), z.T @ z / len(z), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_tokens_behind_a_router_are_not_paired() -> None:
    block, batches = Experts(), [inputs(40, 6)]
    names = [f"experts.{i}.{kind}" for i in range(2) for kind in ("up", "down")]
    exact = watched(block, names, batches)
    ups, downs = exact.steps()
    assert list(ups) == ["experts.0.up", "experts.1.up"]
    assert list(downs) == ["experts.0.down", "experts.1.down"]
    layers = {name: block.get_submodule(name) for name in ups}
    found = inputs_behind(block, {0: BlockCall(40, (-batches[0],), {})}, layers, exact)[0]
    assert sum(kept.tokens for kept in found.values()) == 40
    assert [means_of(kept)[1] for kept in found.values()] == [None, None]


@torch.inference_mode()
def test_an_expert_that_gets_every_token_is_paired() -> None:
    block, batches = Experts(), [inputs(40, 6).abs()]
    exact = watched(block, ["experts.0.up", "experts.1.up"], batches)
    layers = {"experts.1.up": block.get_submodule("experts.1.up")}
    found = inputs_behind(block, {0: BlockCall(40, (batches[0] + 0.1,), {})}, layers, exact)
    assert means_of(found[0]["experts.1.up"])[1] is not None


@torch.inference_mode()
def test_tokens_in_parts_are_the_same_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = inputs(50, 6), inputs(49, 6)[:49]
    found = []
    for rows in (4096, 7):
        monkeypatch.setattr(block_inputs, "_ROWS", rows)
        found.append(means_of(LayerInputs([(y, x[:49])])))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_half_precision_is_summed_in_float32() -> None:
    """256 x 256 x 3 tokens are more than float16 holds."""
    large = torch.full((3, 6), 256.0, dtype=torch.float16)
    found, _ = means_of(LayerInputs([(large, None)]))
    assert found.dtype == torch.float32
    assert (found == 65536.0).all()


@torch.inference_mode()
def test_a_layer_that_is_called_by_keyword() -> None:
    layer = nn.Linear(6, 5)
    exact = ExactInputs([{"w": layer}], lambda: 0)
    layer(input=inputs(4, 6))
    exact.close()
    assert len(exact.of("w", 0)[0]) == 4


@pytest.mark.parametrize("columns", [64, 101, 256])
@torch.inference_mode()
def test_the_corrected_weight_gives_what_the_exact_one_gave(columns: int) -> None:
    x = inputs(4000, columns)
    y = x + 0.3 * inputs(columns, 4000).T
    weight = inputs(48, columns)
    factor = factorize(y.T @ y / 4000, 4000, GptqConfig(shrinkage=0.0, percdamp=1e-6))
    drift = (x - y).T @ y / 4000
    best = torch.linalg.lstsq(y.double(), x.double() @ weight.double().T).solution.T
    whole = corrected(weight, drift, factor, 1.0)
    torch.testing.assert_close(whole.double(), best, rtol=1e-2, atol=2e-3)
    losses = [
        float((x @ weight.T - y @ corrected(weight, drift, factor, share).T).norm())
        for share in (0.0, 0.5, 1.0)
    ]
    assert losses[0] > losses[1] > losses[2]


@torch.inference_mode()
def test_a_correction_that_is_not_finite_is_not_taken() -> None:
    x = inputs(200, 64)
    factor = factorize(x.T @ x / 200, 200, GptqConfig())
    drift = torch.full((64, 64), float("inf"))
    weight = inputs(8, 64)
    assert torch.equal(corrected(weight, drift, factor, 0.5), weight)
