"""A model's forward in pieces: the same numbers, and models of which that is not so are told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from nf4_pipeline.blocks.block_row import BlockRow, NotInARowError
from nf4_pipeline.blocks.find_blocks import find_blocks

from tests.support.checkpoints import KINDS, make_model
from tests.support.decoders import DECODERS, write_decoder

IDS: Final = torch.arange(24).reshape(3, 8) * 7 % 250


def ignore(block: str) -> None:
    """Blocks of a model that is whole are neither opened nor closed."""


def row_of(model: Any) -> BlockRow:
    return BlockRow(model, find_blocks(model))


@pytest.mark.parametrize("kind", [*KINDS, *DECODERS])
def test_the_pieces_give_what_the_model_gives(kind: str, tmp_path: Path) -> None:
    model = write_decoder(tmp_path, kind) if kind in DECODERS else make_model(kind)
    model = model.float().eval()
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
    row = row_of(model)
    opened: list[str] = []
    if kind == "rwkv":  # it halves hidden states between two of its blocks
        with pytest.raises(NotInARowError, match=r"blocks.3 is not given what"):
            row.check(IDS, ignore, ignore)
        return
    row.check(IDS, opened.append, ignore)
    assert opened == 3 * list(find_blocks(model))
    with torch.no_grad():
        hidden, calls = row.arrive(IDS)
        for block in find_blocks(model):
            hidden = row.through(block, calls[block], hidden)
        assert torch.equal(row.logits(IDS, hidden), expected)
        assert torch.equal(model(IDS, use_cache=False).logits, expected)


@pytest.mark.parametrize("kind", ["falcon-7b", "gpt2", "gemma2", "mixtral"])
def test_gradients_go_backward_block_by_block(kind: str, tmp_path: Path) -> None:
    model = write_decoder(tmp_path, kind) if kind in DECODERS else make_model(kind)
    model = model.float().eval()
    blocks = find_blocks(model)
    parameters = [p for block in blocks.values() for p in block.parameters()]
    logits = model(IDS, use_cache=False).logits
    gradient = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad(logits, parameters, gradient, allow_unused=True)
    row = BlockRow(model, blocks)
    row.check(IDS, ignore, ignore)
    given: list[torch.Tensor] = []
    with torch.no_grad():
        hidden, calls = row.arrive(IDS)
        for block in blocks:
            given.append(hidden)
            hidden = row.through(block, calls[block], hidden)
    origin = hidden.requires_grad_()
    (back,) = torch.autograd.grad(row.logits(IDS, origin), origin, gradient)
    found: list[torch.Tensor | None] = []
    for block, hidden in reversed(list(zip(blocks, given, strict=True))):
        origin = hidden.detach().requires_grad_()
        own = list(blocks[block].parameters())
        output = row.through(block, calls[block], origin)
        back, *mine = torch.autograd.grad(output, [origin, *own], back, allow_unused=True)
        found = [*mine, *found]
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)


def twice(model: Any) -> None:
    """The first block is passed again behind the last one."""
    layers, forward = model.model.layers, model.model.layers[1].forward

    def both(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        return layers[0](forward(hidden, *args, **kwargs), *args, **kwargs)

    layers[1].forward = both


def skipped(model: Any) -> None:
    """The model does not pass its first block."""
    model.model.layers[0].__class__ = type(
        "Skipped", (type(model.model.layers[0]),), {"__call__": lambda self, hidden, **_: hidden}
    )


def by_the_way(model: Any) -> None:
    """The second block takes something from the first that is not among the hidden states."""
    first, second = model.model.layers
    kept: list[torch.Tensor] = []
    forwards = first.forward, second.forward

    def leave(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        kept[:] = [hidden]
        return forwards[0](hidden, *args, **kwargs)

    def take(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        return forwards[1](hidden, *args, **kwargs) + kept.pop() if kept else hidden

    first.forward, second.forward = leave, take


def doubled(model: Any) -> None:
    """Hidden states are doubled between two blocks."""
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))


def in_words(model: Any) -> None:
    """A block gives no tensor."""
    model.model.layers[0].forward = lambda hidden, **_: "hidden states"


@pytest.mark.parametrize("fault", [twice, skipped, by_the_way, doubled, in_words])
def test_blocks_that_are_no_row_are_told(fault: Callable[[Any], None]) -> None:
    model = make_model("llama")
    fault(model)
    with pytest.raises(NotInARowError):
        row_of(model).check(IDS, ignore, ignore)


def test_threads_do_not_disturb_each_other() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = make_model("llama").float()
    row = row_of(model)
    row.check(IDS, ignore, ignore)

    def logits(ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return row.logits(ids, hidden)

    with torch.no_grad():
        all_hidden = [row.arrive(IDS + shift)[0] for shift in range(4)]
    expected = [logits(IDS, hidden) for hidden in all_hidden]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(partial(logits, IDS), all_hidden))
            assert all(map(torch.equal, found, expected))
