"""`Manifest` and its parts: manifest.json as documents. Attributes are called as the keys are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.documents import Document, optional
from nf4_pipeline.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE

SCHEMA_VERSION: Final = 1


def format_name(quant_type: str) -> str:
    """What the format of weights is called, such as "bitsandbytes NF4, block 64, …"."""
    return (
        f"bitsandbytes {quant_type.upper()}, block {BLOCK_SIZE}, double quantization in blocks of "
        f"{NESTED_BLOCK_SIZE}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Source(Document):
    """The checkpoint that an artifact was made from.

    Attributes:
        repo: Hub id, or the name of the local folder.
        commit: 40 hex digits; None for a local folder.
        content_sha256: over the sorted lines `sha256  name` of all files, as sha256sum writes them.
        files: every file that was taken from it, by path.
        unchecked: those that the Hub listed without a hash; None for none.
    """

    repo: str
    commit: str | None
    content_sha256: str
    files: dict[str, FileDigest]
    unchecked: tuple[str, ...] | None = optional()

    @property
    def version(self) -> str:
        """What pins it: the commit, or the hash of its content."""
        return self.commit or self.content_sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensorEntry(Document):
    """One tensor in one of the artifact's files.

    Attributes:
        name: such as "lm_head.weight" or "h.0.mlp.dense.weight.absmax".
        file: that holds it.
        dtype: as safetensors call it, such as "U8".
        shape: as it is stored.
        bytes: of its data.
        sha256: of its data.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor(Document):
    """A tensor of the model: what became of it, and what stands for it in the files.

    Attributes:
        name: in the artifact.
        quantized: whether it is NF4; else it was copied exactly, or cast if its stored dtype is
            not that of the source.
        reason: why, in words for people.
        shape: of the weight, [out, in] of a linear layer.
        dtype: in the source, such as "BF16".
        source_name: in the source.
        source_bytes: in the source.
        bytes: in the artifact, all that stands for it together.
        stored: six tensors of a quantized weight, one of any other.
        module: the module that it is the weight of, if that module multiplies by it.
        transposed: the source holds [in, out]; None unless it is quantized.
        relative_rmse: of the weight against its source; None unless it is quantized.
    """

    name: str
    quantized: bool
    reason: str
    shape: tuple[int, ...]
    dtype: str
    source_name: str
    source_bytes: int
    bytes: int
    stored: tuple[StoredTensorEntry, ...]
    module: str | None = optional()
    transposed: bool | None = optional()
    relative_rmse: float | None = optional()


@dataclass(frozen=True, slots=True, kw_only=True)
class DroppedTensor(Document):
    """A tensor of the source that the artifact does not hold, and why. `bytes` in the source."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorCounts(Document):
    """How many tensors of the source were quantized, kept or dropped."""

    quantized: int
    kept: int
    dropped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals(Document):
    """Sizes and counts. "Original" is every tensor of the source, those that are tied included.

    Attributes:
        original_bytes: of all tensors of the source.
        artifact_bytes: of all tensors of the artifact.
        quantized_bytes: of those that stand for quantized weights.
        kept_bytes: of those that were copied.
        dropped_bytes: of those that the artifact does not hold.
        ratio: artifact over original bytes.
        weights: how many numbers the artifact's tensors stand for.
        quantized_weights: how many of them in NF4.
        bits_per_weight: over all weights.
        bits_per_quantized_weight: over those in NF4.
        tensors: counts.
        kept_bytes_by_reason: reason -> bytes.
    """

    original_bytes: int
    artifact_bytes: int
    quantized_bytes: int
    kept_bytes: int
    dropped_bytes: int
    ratio: float
    weights: int
    quantized_weights: int
    bits_per_weight: float
    bits_per_quantized_weight: float
    tensors: TensorCounts
    kept_bytes_by_reason: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptModule(Document):
    """A module that calibration left in 16 bit.

    Attributes:
        module: its name.
        kl: nats per token that 4 bits in this module alone cost.
        bytes: what it takes more in 16 bit.
    """

    module: str
    kl: float
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningSummary(Document):
    """How calibrated codes learned, end to end, from the 16-bit model.

    Attributes:
        sequences: that they learned from.
        tokens: in all of these together.
        held_back: sequences that were measured and not learned.
        tokens_sha256: of all ids. Those of the model itself are not part of the artifact: they are
            drawn again.
        steps: that were taken.
        rate: of the largest one, as a share of a block's scale.
        halvings: how often learning did harm, and went on with half the rate.
        kl_before: KL from the 16-bit model on what is held back, nats per token, before the first
            step.
        kl_after: the same of the codes that were taken.
    """

    sequences: int
    tokens: int
    held_back: int
    tokens_sha256: str
    steps: int
    rate: float
    halvings: int
    kl_before: float
    kl_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSummary(Document):
    """How codes and scales were chosen, if not by rounding to nearest.

    Attributes:
        source: who wrote the tokens, the model itself or a text.
        sequences: how many of them there are.
        tokens: in all sequences together.
        tokens_sha256: of the ids in calibration.json.
        device: the kind of device on which the model ran.
        fallbacks: weight -> why it was rounded to nearest after all.
        kept: modules left in 16 bit for what they would lose.
        extra_bytes: what all of them take more.
        learning: how codes learned behind it; None if they did not.
    """

    source: Literal["self", "text"]
    sequences: int
    tokens: int
    tokens_sha256: str
    device: Literal["cpu", "cuda"]
    fallbacks: dict[str, str]
    kept: tuple[KeptModule, ...]
    extra_bytes: int
    learning: LearningSummary | None = optional()


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(Document):
    """What an artifact holds and what it was made from.

    Attributes:
        schema_version: of manifest.schema.json.
        format: of the weights, in words.
        model_class: the causal LM class.
        source: the checkpoint.
        recipe: the tables that shape the bytes, for `recipe.parse_recipe`, which says what of a
            later version it does not know.
        totals: sizes and counts.
        files: every file that serialize writes besides this one, by path.
        skip_modules: modules that are not 4 bit, as config.json tells readers.
        hidden_modules: quantized modules that stock transformers >= 5.5 does not recognise.
        tensors: all that the artifact holds, by name.
        dropped: those of the source that it does not hold.
        calibration: None where weights are rounded to nearest.
    """

    schema_version: Literal[1]
    format: str
    model_class: str
    source: Source
    recipe: dict[str, dict[str, Any]]
    totals: Totals
    files: dict[str, FileDigest]
    skip_modules: tuple[str, ...]
    hidden_modules: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    dropped: tuple[DroppedTensor, ...]
    calibration: CalibrationSummary | None = optional()

    @property
    def codebook(self) -> str:
        """What the format calls its codebook: "NF4"."""
        return self.format.split()[1].rstrip(",")

    @property
    def rounding(self) -> Literal["nearest", "calibrated"]:
        """How codes and scales were chosen."""
        rounding: Literal["nearest", "calibrated"] = self.recipe["quantize"]["rounding"]
        return rounding

    @property
    def relative_rmse(self) -> dict[str, float]:
        """The error of each quantized tensor, by its name."""
        return {
            tensor.name: tensor.relative_rmse
            for tensor in self.tensors
            if tensor.relative_rmse is not None
        }

    @property
    def quantized_modules(self) -> frozenset[str]:
        """The modules whose weight is NF4."""
        return frozenset(
            tensor.module
            for tensor in self.tensors
            if tensor.quantized and tensor.module is not None
        )
