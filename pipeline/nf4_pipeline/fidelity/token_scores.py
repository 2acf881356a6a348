"""Two models' logits for the same tokens -> a few numbers for each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import log
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

_ROWS: Final = 128  # tokens at a time: a vocabulary is large, and memory need not grow with a text


@dataclass(frozen=True)
class TokenScores:
    """What is kept of each token on which both models were asked for the next one.

    Attributes:
        kl: KL(reference || model) in nats, float64 [tokens].
        agrees: both rank the same next token first, bool [tokens].
        sure: the reference's first choice is at least twice as likely as its second, bool [tokens].
            Elsewhere two near-equal choices may change places without harm.
        reference_nll: negative log-likelihood of the actual next token under the reference, in
            nats, float64 [tokens].
        nll: the same under the model.
    """

    kl: NDArray[np.float64]
    agrees: NDArray[np.bool_]
    sure: NDArray[np.bool_]
    reference_nll: NDArray[np.float64]
    nll: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.kl)

    @classmethod
    def joined(cls, parts: Sequence[TokenScores]) -> TokenScores:
        """The tokens of several texts, one after the other."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))


def score_tokens(
    reference: torch.Tensor, model: torch.Tensor, targets: torch.Tensor
) -> TokenScores:
    """Compares next-token distributions, in float32.

    Args:
        reference: logits of the 16-bit model, any float dtype, [tokens, vocabulary].
        model: of the 4-bit model, on the same device.
        targets: the actual next tokens, int64 [tokens].

    KL(p || q) = sum p (log p - log q): Kullback and Leibler, 1951. A token that cannot come under p
    adds nothing. Equal logits give exactly 0.
    """
    parts = [
        _score(reference[i : i + _ROWS], model[i : i + _ROWS], targets[i : i + _ROWS])
        for i in range(0, len(targets), _ROWS)
    ]
    return TokenScores.joined(parts)


def _score(reference: torch.Tensor, model: torch.Tensor, targets: torch.Tensor) -> TokenScores:
    import torch

    p, q = _log_softmax(reference.float()), _log_softmax(model.float())
    terms = torch.where(q == -torch.inf, torch.inf, p.exp() * (p - q))  # 0 times inf is no number
    terms = torch.where(p == -torch.inf, 0.0, terms)
    first, second = p.topk(2, dim=-1).values.unbind(-1)
    column = targets[:, None]
    return TokenScores(
        kl=_numpy(terms.sum(dim=-1, dtype=torch.float64).clamp(min=0.0)),
        agrees=(p.argmax(dim=-1) == q.argmax(dim=-1)).cpu().numpy(),
        sure=(first - second >= log(2.0)).cpu().numpy(),
        reference_nll=_numpy(-p.gather(1, column)[:, 0]),
        nll=_numpy(-q.gather(1, column)[:, 0]),
    )


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """As torch has it, but for the sum: 65,000 exponentials add up to some 1e-5 beside it there."""
    import torch

    off = logits - logits.amax(dim=-1, keepdim=True)
    return off - off.exp().sum(dim=-1, keepdim=True, dtype=torch.float64).log().float()


def _numpy(values: torch.Tensor) -> NDArray[np.float64]:
    array: NDArray[np.float64] = values.double().cpu().numpy()
    return array
