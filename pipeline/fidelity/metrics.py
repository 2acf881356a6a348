"""Two models on the same tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

LogProbs = NDArray[np.float32]


@dataclass(frozen=True)
class Fidelity:
    """How far a model (4 bit) is from its reference (16 bit).

    Attributes:
        tokens: on which both were asked for the next one.
        mean_kl: of KL(reference || model) per token, in nats.
        max_kl: the largest of them.
        top1_agreement: share of tokens for which both rank the same next token first.
        sure_tokens: on which the reference's first choice is at least twice as likely as its
            second. Elsewhere two near-equal choices may change places without harm.
        sure_agreement: the agreement on those alone; 1 if there are none.
        reference_perplexity: exp of the mean negative log-likelihood of the actual next token.
        perplexity: the same for the model.
    """

    tokens: int
    mean_kl: float
    max_kl: float
    top1_agreement: float
    sure_tokens: int
    sure_agreement: float
    reference_perplexity: float
    perplexity: float

    def as_json(self) -> dict[str, float | None]:
        """Plain JSON; a number that is not finite becomes null, and no check passes on it."""
        return {name: value if np.isfinite(value) else None for name, value in asdict(self).items()}


def compare(reference: LogProbs, model: LogProbs, targets: NDArray[np.int64]) -> Fidelity:
    """Compares next-token distributions.

    Args:
        reference: log-probabilities of the 16-bit model, float32 [tokens, vocabulary].
        model: of the 4-bit model, the same shape.
        targets: the actual next tokens, [tokens].

    KL(p || q) = sum p (log p - log q): Kullback and Leibler, 1951.
    """
    tokens = len(targets)
    kl = np.empty(tokens, np.float64)
    agrees = np.empty(tokens, np.bool_)
    sure = np.empty(tokens, np.bool_)
    for i in range(tokens):  # row by row: the vocabulary is large and memory need not grow
        p = reference[i].astype(np.float64)
        q = model[i].astype(np.float64)
        likely = np.isfinite(p) | np.isnan(p)  # a token that cannot come adds nothing
        terms = np.exp(p[likely]) * (p[likely] - q[likely])
        kl[i] = np.maximum(np.sum(terms), 0.0)
        agrees[i] = np.argmax(p) == np.argmax(q)
        second, first = np.partition(p, -2)[-2:]
        sure[i] = first - second >= np.log(2.0)
    rows = np.arange(tokens)
    return Fidelity(
        tokens=tokens,
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        top1_agreement=float(agrees.mean()),
        sure_tokens=int(sure.sum()),
        sure_agreement=float(agrees[sure].mean()) if sure.any() else 1.0,
        reference_perplexity=float(np.exp(-reference[rows, targets].astype(np.float64).mean())),
        perplexity=float(np.exp(-model[rows, targets].astype(np.float64).mean())),
    )


def is_right(answer: str, expected: str) -> bool:
    """True if the first line of an answer is the expected one, but for case and a final period."""
    lines = answer.strip().splitlines()
    first = lines[0] if lines else ""
    return _plain(first) == _plain(expected)


def _plain(text: str) -> str:
    return text.strip().rstrip(".").strip().casefold()
