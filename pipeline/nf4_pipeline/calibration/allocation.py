"""What layers lose by 4 bits, and which of them to leave in 16 bit for a byte budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from nf4_pipeline.documents import Document

NOT_FINITE: Final = 1e300
"""Nats; stands for a loss that is not finite."""
_UNITS: Final = 1 << 14
"""Parts of a budget that are counted; a layer takes whole ones."""


@dataclass(frozen=True)
class LayerLoss(Document):
    """What one layer loses.

    Attributes:
        module: its name.
        kl: KL from the 16-bit model if only this layer is in 4 bit, nats per token.
        bytes: what it takes more in 16 bit than in 4.
    """

    module: str
    kl: float
    bytes: int


def select_within_budget(losses: Sequence[LayerLoss], budget: int) -> list[LayerLoss]:
    """The layers to leave in 16 bit: those that together lose most, and fit.

    The 0/1 knapsack problem, by dynamic programming over the budget. Taking what loses most per
    byte, one after the other, leaves room that no layer fits where a model has few.

    Args:
        losses: of all layers.
        budget: bytes for all of them together.

    Returns:
        Those that lose most per byte first.
    """
    if budget < 1:
        return []
    ordered = sorted(losses, key=lambda loss: (-loss.kl / max(1, loss.bytes), loss.module))
    units = min(_UNITS, budget)
    sizes = [max(1, -(-loss.bytes * units // budget)) for loss in ordered]
    taken = _pack(sizes, _values(ordered), units)
    left = budget - sum(loss.bytes for loss, takes in zip(ordered, taken, strict=True) if takes)
    selected = []
    for loss, takes in zip(ordered, taken, strict=True):
        if not takes and loss.kl > 0 and loss.bytes <= left:  # sizes were rounded up
            takes, left = True, left - loss.bytes
        if takes:
            selected.append(loss)
    return selected


def _pack(sizes: Sequence[int], values: Sequence[float], room: int) -> list[bool]:
    """Which things to put into a room so that they are worth most together."""
    best = np.zeros(room + 1)  # worth of what so much room can hold of the things so far
    gains: list[NDArray[np.uint8]] = []  # where a thing is part of that, a bit for each room
    for size, value in zip(sizes, values, strict=True):
        with_it = best[:-size] + value  # empty if it is larger than all of the room
        gains.append(np.packbits(with_it > best[size:]))
        best[size:] = np.maximum(with_it, best[size:])
    taken = []
    for size, gain in zip(reversed(sizes), reversed(gains), strict=True):
        at = room - size
        taken.append(at >= 0 and bool(gain[at // 8] >> (7 - at % 8) & 1))
        room = at if taken[-1] else room
    return taken[::-1]


def _values(losses: Sequence[LayerLoss]) -> list[float]:
    """What each loses; if that is not finite, more than all that are finite together."""
    most = sum(loss.kl for loss in losses if loss.kl < NOT_FINITE)
    return [min(loss.kl, most + 1.0) for loss in losses]
