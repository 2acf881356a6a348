"""Sizes in config.json against the weights, before a model is built from them.

Building a model of 10,000,000 layers takes hours and all memory, even without weights. A layer has
at least one tensor, and a width is a dimension of one; what goes far beyond that is refused.
"""

from __future__ import annotations

import re
from math import isnan
from typing import Any, Final

from nf4_pipeline.checkpoint.source import Checkpoint
from nf4_pipeline.errors import ArchitectureError, CheckpointError
from nf4_pipeline.model.config import CONFIG_FILE

_COUNTS: Final = re.compile(
    r"(^|_)(layers?|depths?|blocks?|stages?|experts?|heads?|groups|models|codebooks)(_|$)"
)
_SIZES: Final = re.compile(
    r"(^|_)(sizes?|dims?|hidden|width|embd|inner|rank|channels?|features?|kernel|state|model|ffn|"
    r"vocab)(_|$)"
)
_NEITHER: Final = re.compile(r"(^|_)(ids?|theta|positions?|tokens?|window|step|eps)(_|$)")
_LAYERS: Final = re.compile(r"(^|_)layers?(_|$)")
_INDEX: Final = re.compile(r"\[\d+\]")

_FREE_COUNT: Final = 1024
"""A number of layers, heads or experts that is believed without any weight that shows it."""

_FREE_SIZE: Final = 2**20
"""A width that is believed without any weight that shows it."""


def check_config_limits(config: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Holds every count and width of a config against the headers of its weights.

    Raises:
        CheckpointError: a count or width is larger than the weights beside the config allow.
        ArchitectureError: `architectures` is no list of class names.
    """
    where = checkpoint.folder / CONFIG_FILE
    names = config.get("architectures")
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        raise ArchitectureError(
            f"{where} gives architectures as {str(names)[:80]!r}; expected a list of class names."
        )
    tensors = len(checkpoint.tensors)
    widest = max((n for t in checkpoint.tensors for n in t.header.shape), default=0)
    limits = {"count": max(tensors, widest, _FREE_COUNT), "size": max(4 * widest, _FREE_SIZE)}
    layers = max(tensors, _FREE_COUNT)
    for path, value in _numbers(config, ""):
        name = _INDEX.sub("", path).rpartition(".")[2]
        if isnan(value) or _NEITHER.search(name):
            continue
        if _LAYERS.search(name):
            limit, evidence = layers, f"{tensors:,} tensors"
        elif _COUNTS.search(name):
            limit, evidence = limits["count"], f"{tensors:,} tensors, at most {widest:,} wide"
        elif _SIZES.search(name):
            limit, evidence = limits["size"], f"no tensor wider than {widest:,}"
        else:
            continue
        if abs(value) > limit:
            raise CheckpointError(
                f"{where} says {path[:200]} = {value:,}; the weights beside it have {evidence}. "
                "The weights and the config do not belong together."
            )


def _numbers(value: Any, path: str) -> list[tuple[str, int | float]]:
    """Every number in a config with where it stands; parsed JSON is not nested deep."""
    if isinstance(value, bool):
        return []
    if isinstance(value, int | float):
        return [(path, value)]
    numbers: list[tuple[str, int | float]] = []
    if isinstance(value, dict):
        for key, item in value.items():
            numbers += _numbers(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            numbers += _numbers(item, f"{path}[{index}]")
    return numbers
