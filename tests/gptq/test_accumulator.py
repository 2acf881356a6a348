"""The Hessian of layers' inputs: what is summed, what is shared, what is let go."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from nf4_pipeline.gptq import hessian as hessians
from nf4_pipeline.gptq.hessian import HessianAccumulator
from torch import nn


class Block(nn.Module):
    """q and k read the same tensor, o another, and `never` none at all."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 5), nn.Linear(6, 3)
        self.o, self.never = nn.Linear(5, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> Any:
        y = x * 2
        self.k(y)
        return self.o(self.q(y))


def watched(block: nn.Module, *names: str) -> HessianAccumulator:
    return HessianAccumulator(
        {f"{name}.weight": block.get_submodule(name) for name in names}, block
    )


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@torch.inference_mode()
def test_the_mean_over_all_tokens_of_all_runs() -> None:
    block = Block()
    accumulator = watched(block, "q", "k", "o", "never")
    texts = [inputs(2, 7, 6), inputs(1, 4, 6), inputs(3, 6)]
    for text in texts:
        block(text)
    accumulator.close()
    x = torch.cat([text.reshape(-1, 6) for text in texts]).double() * 2
    assert accumulator.groups() == {
        "k.weight": ["q.weight", "k.weight"],
        "o.weight": ["o.weight"],
        "never.weight": ["never.weight"],
    }
    assert accumulator.tokens("q.weight") == accumulator.tokens("k.weight") == len(x) == 21
    found = accumulator.take("k.weight")
    assert found is not None
    torch.testing.assert_close(found.double(), x.T @ x / len(x), rtol=1e-5, atol=1e-5)
    y = (x / 2 * 2).float() @ block.q.weight.T + block.q.bias
    other = accumulator.take("o.weight")
    assert other is not None
    torch.testing.assert_close(other, y.T @ y / len(y), rtol=1e-4, atol=1e-4)
    assert accumulator.take("k.weight") is None  # it was let go
    assert accumulator.take("never.weight") is None
    assert accumulator.tokens("never.weight") == 0


@torch.inference_mode()
def test_nothing_is_watched_after_the_end() -> None:
    block = Block()
    accumulator = watched(block, "q")
    block(inputs(4, 6))
    accumulator.close()
    block(inputs(9, 6))
    assert accumulator.tokens("q.weight") == 4


@torch.inference_mode()
def test_tokens_in_parts_are_the_same_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(50, 6)
    found = []
    for rows in (4096, 7):
        monkeypatch.setattr(hessians, "_ROWS", rows)
        block = Block()
        accumulator = watched(block, "q")
        block(x)
        found.append(accumulator.take("q.weight"))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_half_precision_is_summed_in_float32() -> None:
    """256 x 256 x 3 tokens are more than float16 holds."""
    layer = nn.Linear(6, 5).half()
    accumulator = HessianAccumulator({"w": layer}, layer)
    layer(torch.full((3, 6), 256.0, dtype=torch.float16))
    found = accumulator.take("w")
    assert found is not None
    assert found.dtype == torch.float32
    assert (found == 65536.0).all()


@torch.inference_mode()
def test_layers_that_once_shared_and_then_did_not() -> None:
    """Each still has one Hessian; that of the leader counts what the leader saw."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5)

        def forward(self, x: torch.Tensor, apart: bool) -> Any:
            return self.a(x) + self.b(x[:1] if apart else x)

    block = Routed()
    accumulator = watched(block, "a", "b")
    block(inputs(8, 6), False)
    block(inputs(8, 6), True)
    assert accumulator.tokens("a.weight") == accumulator.tokens("b.weight") == 16


@torch.inference_mode()
def test_inputs_are_let_go_when_the_scope_is_passed() -> None:
    block = Block()
    accumulator = watched(block, "o")
    seen: list[weakref.ref[torch.Tensor]] = []
    remember = block.o.register_forward_pre_hook(
        lambda module, given: seen.append(weakref.ref(given[0]))
    )
    block(inputs(4, 6))
    remember.remove()
    gc.collect()
    assert seen[0]() is None
    assert accumulator.tokens("o.weight") == 4


@torch.inference_mode()
def test_a_layer_that_is_called_by_keyword() -> None:
    layer = nn.Linear(6, 5)
    accumulator = HessianAccumulator({"w": layer}, layer)
    layer(input=inputs(4, 6))
    assert accumulator.tokens("w") == 4
