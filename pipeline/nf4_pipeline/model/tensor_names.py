"""Checkpoint names -> names in the model, and tensors that transformers merges on loading."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class NameMap:
    """Where each tensor of a checkpoint goes, by the rules that transformers loads by.

    Args:
        model: a causal LM; may live on the meta device.
        names: of all tensors in the checkpoint.

    Attributes:
        mapped: name in the checkpoint -> name in the model, or None if the model has no such
            tensor. Tensors that are merged map to the first parameter that comes out of the merge.
        merged: names in the checkpoint of tensors that are merged with others, such as the experts
            of a mixture, which become one parameter.
    """

    def __init__(self, model: Any, names: Iterable[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        conversions = get_model_conversion_mapping(model)
        renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        state = model.state_dict()
        self.mapped: dict[str, str | None] = {}
        self._model = model
        self._patterns: dict[str, str] = {}
        self._converters = {
            pattern: entry for entry in converters for pattern in entry.source_patterns
        }
        for name in names:
            target, pattern = rename_source_key(
                name, renamings, converters, model.base_model_prefix, state
            )
            if pattern is not None:
                self._patterns[name] = pattern
            self.mapped[name] = target if target in state else None

    @property
    def merged(self) -> frozenset[str]:
        return frozenset(self._patterns)

    def merge(self, target: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Merges tensors as transformers does.

        Args:
            target: the name in the model that they all map to.
            tensors: checkpoint name -> torch tensor, every one that maps to it, in natural order.

        Returns:
            Name in the model -> tensor.
        """
        converter: Any = None
        for name, tensor in tensors.items():
            pattern = self._patterns[name]
            converter = converter or deepcopy(self._converters[pattern])
            converter.add_tensor(target, name, pattern, lambda tensor=tensor: tensor)
        converted = converter.convert(target, model=self._model, config=self._model.config)
        return {
            name: value[0] if isinstance(value, list) else value
            for name, value in converted.items()
        }
