"""What layers lose by 4 bits, and which of them to leave in 16 bit for a byte budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nf4_pipeline.documents import Document


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
    """The layers to leave in 16 bit: those that lose most per byte, as long as they fit.

    Args:
        losses: of all layers.
        budget: bytes for all of them together.
    """
    selected: list[LayerLoss] = []
    for loss in sorted(losses, key=lambda loss: (-loss.kl / max(1, loss.bytes), loss.module)):
        if loss.bytes <= budget:
            selected.append(loss)
            budget -= loss.bytes
    return selected
