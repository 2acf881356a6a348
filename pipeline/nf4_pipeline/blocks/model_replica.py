"""A streamed model's copy on another device, for batches that are dealt to several of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from nf4_pipeline.blocks.find_blocks import find_blocks
from nf4_pipeline.blocks.streamed_model import StreamedModel, assign


class ModelReplica:
    """The same model; its blocks take their weights from those of the original, while it is open.

    Args:
        original: has no block open yet.
        device: where the copy computes.

    Attributes:
        model: the transformers model.
        blocks: by name, in order.
        device: where they are while they are open.
    """

    def __init__(self, original: StreamedModel, device: torch.device) -> None:
        self._original = original
        self.device = device
        # What deepcopy finds here it takes as the copy, whatever points to it, and how often.
        there: dict[int, Any] = {}
        for module in original.model.modules():
            # Tensors beside parameters and buffers, too.
            for held in (*module._parameters.values(), *vars(module).values()):
                self._copy(held, there)
            for held in module._buffers.values():
                self._copy(held, there)
        self.model = copy.deepcopy(original.model, there)
        self.blocks = find_blocks(self.model)
        self._empty: dict[str, dict[str, torch.Tensor]] = {}

    def _copy(self, held: object, there: dict[int, Any]) -> None:
        if not isinstance(held, torch.Tensor) or held.is_meta:
            return
        moved: torch.Tensor = held.detach().to(self.device)
        if isinstance(held, nn.Parameter):
            moved = nn.Parameter(moved, requires_grad=False)
        there.setdefault(id(held), moved)

    def open(self, block: str) -> None:
        """Gives a block the weights that it has in the original, where it was just opened."""
        self._empty[block] = {
            name: assign(self.model, name, value.to(self.device))
            for name, value in self._original.opened(block).items()
        }

    def close(self, block: str) -> None:
        """Takes a block's weights away again."""
        for name, meta in self._empty.pop(block).items():
            assign(self.model, name, meta)
