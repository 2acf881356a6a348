"""What a mean KL compares with: figures that others published of well-known quantizations. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SOURCE: Final = "https://github.com/ggml-org/llama.cpp/blob/master/tools/perplexity/README.md"
"""The table "LLaMA 3 8b Scoreboard": KL from FP16 on the test set of Wikitext-2."""


@dataclass(frozen=True)
class Known:
    """A quantization, and what is known of it.

    Attributes:
        name: how the source calls it; of an artifact, what it is here.
        kl: mean, in nats per token.
        size: of the model, as the source says it; "" for an artifact.
        is_own: it is the artifact that the page is about.
    """

    name: str
    kl: float
    size: str
    is_own: bool = False


_KNOWN: Final = (
    Known("Q8_0", 0.001355, "7.96 GiB"),
    Known("Q6_K", 0.005452, "6.14 GiB"),
    Known("Q5_K_M", 0.010762, "5.33 GiB"),
    Known("Q4_K_M", 0.031273, "4.58 GiB"),
    Known("Q4_0", 0.071940, "4.34 GiB"),
    Known("Q3_K_M", 0.101913, "3.74 GiB"),
    Known("Q2_K, importance matrix", 0.331393, "2.96 GiB"),
)


def scale(kl: float) -> list[Known]:
    """The known quantizations with this artifact among them, the closest to 16 bit first.

    Args:
        kl: of the artifact.
    """
    return sorted((*_KNOWN, Known("this artifact", kl, "", is_own=True)), key=lambda row: row.kl)
