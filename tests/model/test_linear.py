"""Which subclasses of nn.Linear are plain: decided by what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nf4_pipeline.model.linear import is_plain_linear
from torch import nn
from transformers import FalconConfig, Llama4TextConfig, PhimoeConfig
from transformers.models.falcon.modeling_falcon import FalconForCausalLM, FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Renamed(nn.Linear):
    """Plain: it only has another name."""


class HandWritten(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class WithoutItsBias(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.T


class Flattening(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).flatten(0, 1)


class Pair(nn.Linear):
    def forward(self, input: torch.Tensor) -> Any:
        return super().forward(input), input


class TwoInputs(nn.Linear):
    def forward(self, input: torch.Tensor, other: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(input + other)


class WithBuffer(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("scale", torch.ones(1))


class WithParameter(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.gain = nn.Parameter(torch.ones(1))


class WithModule(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.inner = nn.Linear(2, 2)


def llama4_router() -> nn.Module:
    config = Llama4TextConfig(hidden_size=8, num_local_experts=4, num_experts_per_tok=1)
    made: nn.Module = Llama4Router(config)
    return made


def phimoe_router() -> nn.Module:
    made: nn.Module = PhimoeTopKRouter(PhimoeConfig(hidden_size=8, num_local_experts=4))
    return made


def deepseek_v4_projection() -> nn.Module:
    name = "transformers.models.deepseek_v4.modeling_deepseek_v4"
    module = pytest.importorskip(name, reason="a transformers older than this model")
    made: nn.Module = module.DeepseekV4GroupedLinear(8, 8, 2)
    return made


@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, FalconLinear, Renamed, HandWritten])
def test_plain(kind: type[nn.Linear], bias: bool, place: str) -> None:
    assert is_plain_linear(kind(8, 4, bias=bias, device=place))


@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize("kind", [Doubled, WithoutItsBias, Flattening, Pair, TwoInputs])
def test_not_plain_by_what_it_computes(kind: type[nn.Linear], place: str) -> None:
    assert not is_plain_linear(kind(8, 4, device=place))


def test_a_class_that_drops_its_bias_is_plain_without_one() -> None:
    assert is_plain_linear(WithoutItsBias(8, 4, bias=False))


@pytest.mark.parametrize("kind", [WithBuffer, WithParameter, WithModule])
def test_not_plain_by_what_it_holds(kind: type[Any]) -> None:
    assert not is_plain_linear(kind(8, 4))


@pytest.mark.parametrize("module", [nn.Embedding(4, 8), nn.LayerNorm(8), nn.Bilinear(2, 2, 2)])
def test_other_modules(module: nn.Module) -> None:
    assert not is_plain_linear(module)


@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize("make", [llama4_router, phimoe_router, deepseek_v4_projection])
def test_routers_and_grouped_projections_are_not_plain(
    make: Callable[[], nn.Module], place: str
) -> None:
    with torch.device(place):
        module = make()
    assert isinstance(module, nn.Linear)
    assert not is_plain_linear(module)


def test_inside_a_meta_context() -> None:
    class FirstSeenHere(nn.Linear):
        """A class of its own, so that no earlier answer is remembered."""

    class DoubledHere(Doubled):
        pass

    with torch.device("meta"):
        assert is_plain_linear(FirstSeenHere(8, 4))
        assert not is_plain_linear(DoubledHere(8, 4))
        assert is_plain_linear(FalconLinear(8, 4, bias=False))


def test_every_projection_of_a_falcon_is_plain_and_none_is_stock() -> None:
    config = FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    with torch.device("meta"):
        model = FalconForCausalLM(config)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    subclassed = [n for n, m in linears.items() if type(m) is not nn.Linear]
    assert len(subclassed) == 8
    assert all(is_plain_linear(module) for module in linears.values())
