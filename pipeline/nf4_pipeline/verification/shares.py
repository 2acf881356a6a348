"""What came of comparing both models on a share of the sequences; shares make one comparison.

Each sequence is computed by itself, and what is summed is kept sequence by sequence. So it does not
matter to any figure how sequences were dealt out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from nf4_pipeline.fidelity.token_scores import TokenScores
from nf4_pipeline.verification.worst_tokens import Place

Sums = list[tuple[float, float]]
"""Of each sequence: squared differences, and squares."""


@dataclass(frozen=True)
class BlockSums:
    """What was looked at in a block: its hidden states, and the outputs of its layers by name."""

    hidden: Sums
    layers: Mapping[str, Sums]


@dataclass(frozen=True)
class Share:
    """What came of some sequences.

    Attributes:
        scores: of their tokens.
        beside: the same of other codes that were measured beside the artifact's, by name.
        worst: the tokens on which the models differ most.
        blocks: by name.
        seconds: that it took.
        memory: that the process took at most, in bytes.
        device_memory: the same of the device.
    """

    scores: TokenScores
    beside: Mapping[str, TokenScores]
    worst: Sequence[Place]
    blocks: Mapping[str, BlockSums]
    seconds: float
    memory: int
    device_memory: int

    def save(self, path: Path) -> None:
        """Leaves it in a file (.npz)."""
        found = {"own": self.scores, **self.beside}
        arrays = {
            f"{whose}_{field.name}": getattr(scores, field.name)
            for whose, scores in found.items()
            for field in fields(TokenScores)
        }
        facts = {
            "beside": [*self.beside],
            "worst": [[p.kl, p.sequence, p.position, [*p.chances.items()]] for p in self.worst],
            "blocks": {n: [b.hidden, dict(b.layers)] for n, b in self.blocks.items()},
            "costs": [self.seconds, self.memory, self.device_memory],
        }
        np.savez(path, facts=json.dumps(facts), **arrays)

    @classmethod
    def load(cls, path: Path) -> Share:
        """What `save` left."""
        with np.load(path) as arrays:
            facts = json.loads(str(arrays["facts"]))
            seconds, memory, device_memory = facts["costs"]
            return cls(
                scores=_scores(arrays, "own"),
                beside={name: _scores(arrays, name) for name in facts["beside"]},
                worst=[
                    Place(kl, sequence, position, {i: (p, q) for i, (p, q) in chances})
                    for kl, sequence, position, chances in facts["worst"]
                ],
                blocks={
                    name: BlockSums(_sums(hidden), {n: _sums(one) for n, one in layers.items()})
                    for name, (hidden, layers) in facts["blocks"].items()
                },
                seconds=seconds,
                memory=memory,
                device_memory=device_memory,
            )


def share_of(number: int, of: int, count: int) -> range:
    """The sequences of a share: neighbours, as many as of any other, or one more.

    Args:
        number: of the share, from 0 on.
        of: how many shares there are.
        count: how many sequences.
    """
    return range(number * count // of, (number + 1) * count // of)


def _scores(arrays: Any, whose: str) -> TokenScores:
    return TokenScores(*(arrays[f"{whose}_{field.name}"] for field in fields(TokenScores)))


def _sums(values: Sequence[Sequence[float]]) -> Sums:
    return [(error, energy) for error, energy in values]
