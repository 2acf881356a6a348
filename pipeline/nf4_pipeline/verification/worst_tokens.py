"""The tokens on which two models differ most, with what each of them expected there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from nf4_pipeline.fidelity.token_scores import TokenScores
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer
from nf4_pipeline.verification.document import TokenChance, WorstToken
from nf4_pipeline.verification.eval_text import TokenSequence

if TYPE_CHECKING:
    import torch

_KEPT: Final = 8
_LIKELIEST: Final = 4  # of each model
_CONTEXT: Final = 40  # tokens that are quoted before one


@dataclass(frozen=True)
class Place:
    """A token, and what both models gave those that either thought likeliest.

    Attributes:
        kl: of the two distributions there.
        sequence: its number.
        position: how many tokens of the sequence stand before it.
        chances: token -> its probability in 16 bit and in 4 bit.
    """

    kl: float
    sequence: int
    position: int
    chances: dict[int, tuple[float, float]]


class WorstTokens:
    """Keeps the worst of the tokens that it is shown."""

    def __init__(self) -> None:
        self._places: list[Place] = []

    def add(
        self,
        sequence: int,
        scores: TokenScores,
        reference: torch.Tensor,
        model: torch.Tensor,
        targets: torch.Tensor,
    ) -> None:
        """Looks at a sequence.

        Args:
            sequence: its number.
            scores: of its tokens.
            reference: logits of the 16-bit model, [tokens, vocabulary].
            model: of the 4-bit model.
            targets: the actual next tokens, [tokens].
        """
        kl = np.where(np.isfinite(scores.kl), scores.kl, -1.0)
        least = self._places[-1].kl if len(self._places) == _KEPT else 0.0
        for row in np.argsort(-kl, kind="stable")[:_KEPT].tolist():
            if kl[row] <= least:
                break
            chances = _chances(reference[row], model[row], int(targets[row]))
            self._places.append(Place(float(kl[row]), sequence, row + 1, chances))
        self._places = sorted(self._places, key=lambda place: -place.kl)[:_KEPT]

    @property
    def places(self) -> list[Place]:
        """The worst first."""
        return self._places

    def take(self, places: Sequence[Place]) -> None:
        """Looks at what others kept, of sequences behind those that were looked at."""
        self._places = sorted([*self._places, *places], key=lambda place: -place.kl)[:_KEPT]

    def quoted(
        self, sequences: Sequence[TokenSequence], tokenizer: LimitedTokenizer | None
    ) -> tuple[WorstToken, ...]:
        """The worst first, as verification.json holds them.

        Args:
            sequences: what was read, by number.
            tokenizer: makes text of tokens; None to say where they are, and nothing of the text.

        Raises:
            ArtifactError: the tokenizer fails, or takes more than any real one.
        """
        return tuple(_quoted(place, sequences[place.sequence], tokenizer) for place in self._places)


def _chances(
    reference: torch.Tensor, model: torch.Tensor, target: int
) -> dict[int, tuple[float, float]]:
    import torch

    both = [torch.softmax(logits.float(), dim=-1) for logits in (reference, model)]
    likeliest = (row.topk(min(_LIKELIEST, len(row))).indices.tolist() for row in both)
    ids = dict.fromkeys([*(i for row in likeliest for i in row), target])
    return {i: (float(both[0][i]), float(both[1][i])) for i in ids}


def _quoted(
    place: Place, sequence: TokenSequence, tokenizer: LimitedTokenizer | None
) -> WorstToken:
    before, chances = None, tuple[TokenChance, ...]()
    if tokenizer is not None:
        begin = max(0, place.position - _CONTEXT)
        before = tokenizer.decode(sequence.ids[begin : place.position].tolist())
        chances = tuple(_named(place.chances, tokenizer))
    return WorstToken(
        kl=float(f"{place.kl:.6g}"),
        domain=sequence.domain,
        sequence=place.sequence,
        position=place.position,
        before=before,
        actual=None if tokenizer is None else int(sequence.ids[place.position]),
        chances=chances,
    )


def _named(
    chances: dict[int, tuple[float, float]], tokenizer: LimitedTokenizer
) -> Iterator[TokenChance]:
    """The likeliest of the 16-bit model first."""
    for number, (before, after) in sorted(chances.items(), key=lambda item: -item[1][0]):
        yield TokenChance(
            id=number,
            text=tokenizer.decode([number]),
            in_16_bit=float(f"{before:.6g}"),
            in_4_bit=float(f"{after:.6g}"),
        )
