"""Which modules are the repeated blocks of a model."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def find_blocks(model: Any) -> dict[str, nn.Module]:
    """The blocks of a causal LM by name, in the order in which they stand.

    These are the members of the outermost module lists: what is repeated holds nearly all weights.

    Args:
        model: a transformers model; may live on the meta device.
    """
    from torch import nn

    blocks: dict[str, nn.Module] = {}

    def visit(prefix: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if isinstance(child, nn.ModuleList):
                for number, block in enumerate(child):
                    # A list of bare layers is none of blocks, and small.
                    bare = not any(True for _ in block.children())
                    if not bare and any(True for _ in block.parameters()):
                        blocks[f"{path}.{number}"] = block
            else:
                visit(f"{path}.", child)

    visit("", model)
    return blocks


def block_of(name: str, blocks: Container[str]) -> str:
    """The block that a module, a parameter or a buffer is in; "" if it is in none.

    Args:
        name: in the model.
        blocks: the names of the blocks.
    """
    parts = name.split(".")
    paths = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((path for path in paths if path in blocks), "")
