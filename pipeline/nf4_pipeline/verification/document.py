"""verification.json: what was measured of an artifact against its source, and the verdict.

Each class is one object of the file, its attributes are the keys. The published JSON Schema beside
this module is the contract with other programs. None for a number means that it is not finite.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from nf4_pipeline.documents import Document, key, optional
from nf4_pipeline.fidelity.metrics import (
    Difference,
    DomainScore,
    Fidelity,
    KlHistogram,
    PositionScore,
)
from nf4_pipeline.fidelity.verdict import Check, Verdict
from nf4_pipeline.readers.document import ReaderResult

SCHEMA_VERSION: Final = 3
VERIFICATION_FILE: Final = "verification.json"
SCHEMA: Final = Path(__file__).with_name("verification.schema.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds(Document):
    """The limits of the recipe's [verify] table that the verdict depends on."""

    max_mean_kl: float
    min_sure_agreement: float
    max_perplexity_ratio: float
    max_accuracy_drop: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Device(Document):
    """Where the 4-bit model ran.

    Attributes:
        kind: of device.
        name: of the GPU, or of the processor and how many cores of it could be used.
        dtype: what both models compute in, such as "bfloat16".
    """

    kind: Literal["cpu", "cuda"]
    name: str
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightGroup(Document):
    """Tensors that differ only in the number of their layer, together.

    Attributes:
        name: of the tensors, with "*" for the number.
        before: bytes in the source.
        after: bytes in the artifact; 0 if they were dropped.
        quantized: whether they are 4 bit.
    """

    name: str
    before: int
    after: int
    quantized: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes(Document):
    """Bytes before and after; all but two of them stand in the manifest's totals as well.

    Attributes:
        original_bytes: of the source's tensors.
        artifact_bytes: of all stored tensors.
        quantized_bytes: of those that hold 4-bit weights.
        kept_bytes: of those that were copied.
        dropped_bytes: of redundant tensors that the artifact lacks.
        ratio: artifact_bytes over original_bytes.
        bits_per_weight: of all stored tensors.
        bits_per_quantized_weight: of the 4-bit ones, their scales included.
        kept_bytes_by_reason: reason for not quantizing -> bytes.
        layers: how many are quantized.
        disk_bytes: of all files that the manifest lists.
        footprint_bytes: what `get_memory_footprint()` of the loaded model says.
        groups: the largest first.
    """

    original_bytes: int
    artifact_bytes: int
    quantized_bytes: int
    kept_bytes: int
    dropped_bytes: int
    ratio: float
    bits_per_weight: float
    bits_per_quantized_weight: float
    kept_bytes_by_reason: dict[str, int]
    layers: int
    disk_bytes: int
    footprint_bytes: int
    groups: tuple[WeightGroup, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedText(Document):
    """On what both models were compared.

    Attributes:
        name: where it is from.
        sha256: of the text; None if there is none and token ids were drawn.
        sequences: into which it was cut.
        tokens: on which both models were asked for the next one.
        length: of the longest sequence, in tokens.
    """

    name: str
    sha256: str | None
    sequences: int
    tokens: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError(Document):
    """How far a 4-bit layer is from the 16-bit one.

    Attributes:
        name: of the layer; within its block, if it is in one.
        relative_error: of its output, for the input that the 16-bit layer gets; None also if the
            output was not looked at.
        weight_error: relative RMSE of its weight.
        worst: the largest error of a weight, as a share of the largest of its 64.
        worst_at: the number of those 64.
        scale: the largest error of a scale, as a share of the nested scale that it is stored by.
        scale_at: the number of the 64 that it belongs to.
        reach: the largest scale, whatever its sign, as a share of the largest of its 64 weights.
        reach_at: the number of those 64.
    """

    name: str
    relative_error: float | None
    weight_error: float | None
    worst: float | None
    worst_at: int
    scale: float | None = 0.0
    scale_at: int = 0
    reach: float | None = 0.0
    reach_at: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockError(Document):
    """How far a block is from the 16-bit one.

    Attributes:
        name: of the block.
        relative_error: of its output, the errors of the blocks before it included.
        modules: its 4-bit layers.
    """

    name: str
    relative_error: float | None
    modules: tuple[LayerError, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy(Document):
    """How many of the questions with one right answer each model answered so."""

    asked: int
    right_16bit: int
    right_4bit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCosts(Document):
    """What loading and asking a model took.

    Attributes:
        load_seconds: until it could be asked.
        tokens_per_second: of all answers, which are written many at a time; None if no time can be
            told.
        sequence_tokens_per_second: of one answer among others, the median; None likewise.
        answered_together: questions of the largest batch; None if nothing was asked.
        first_token_seconds: the median over the answers; None likewise.
        footprint_bytes: what `get_memory_footprint()` says.
        streamed: it did not fit the device, and was read block by block for every token.
        peak_memory_bytes: of the process.
        peak_device_memory_bytes: of the device; 0 on a CPU.
    """

    load_seconds: float
    tokens_per_second: float | None
    sequence_tokens_per_second: float | None = optional()
    answered_together: int | None = optional()
    first_token_seconds: float | None
    footprint_bytes: int
    streamed: bool
    peak_memory_bytes: int
    peak_device_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Models(Document):
    """The costs of both models."""

    in_16_bit: ModelCosts = field(metadata=key("16bit"))
    in_4_bit: ModelCosts = field(metadata=key("4bit"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonCosts(Document):
    """What running both models over the text took; `peak_device_memory_bytes` is 0 on a CPU."""

    seconds: float
    peak_memory_bytes: int
    peak_device_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstDifference(Document):
    """Where two answers part: index of the first token, and of the first character, that differ."""

    token: int
    character: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPair(Document):
    """A prompt, and what both models wrote after it.

    Attributes:
        prompt: the text.
        expect: the one right answer; None if there is none.
        seed: of the draws; None if both answered greedily.
        answer_16bit: of the source.
        answer_4bit: of the artifact.
        same: whether the two are the same text.
        first_difference: None if they are.
        right_16bit: whether the source's is what was expected; None if nothing was.
        right_4bit: whether the artifact's is.
    """

    prompt: str
    expect: str | None
    seed: int | None
    answer_16bit: str
    answer_4bit: str
    same: bool
    first_difference: FirstDifference | None
    right_16bit: bool | None = optional()
    right_4bit: bool | None = optional()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChance(Document):
    """A token that might come next, and how likely each model took it to be.

    Attributes:
        id: of the token.
        text: of it alone; empty for one that stands for no text.
        in_16_bit: its probability in the 16-bit model.
        in_4_bit: its probability in the 4-bit model.
    """

    id: int
    text: str
    in_16_bit: float = field(metadata=key("16bit"))
    in_4_bit: float = field(metadata=key("4bit"))


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstToken(Document):
    """One of the tokens on which the two models differ most.

    Attributes:
        kl: of the distributions of the next token.
        domain: of the text.
        sequence: the number of its sequence, from 0.
        position: how many tokens of the sequence both models had read.
        before: the last of what they had read; None if the text is not quoted, because it is the
            user's own, or because there is none.
        actual: the id of the token that does come next; None if the text is not quoted.
        chances: the likeliest tokens of both models, and the actual one; empty if the text is not
            quoted.
    """

    kl: float
    domain: str
    sequence: int
    position: int
    before: str | None
    actual: int | None
    chances: tuple[TokenChance, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredBaseline(Document):
    """Other codes for the same layers on the same text, and how this artifact differs."""

    fidelity: Fidelity
    domains: tuple[DomainScore, ...]
    difference: Difference


@dataclass(frozen=True, slots=True, kw_only=True)
class Against(Document):
    """Another artifact of the same source on the same text, and how this one differs from it.

    Attributes:
        name: of its folder.
        manifest_sha256: which artifact it is.
        rounding: how its codes were chosen.
        fidelity: its distance from the source.
        domains: the same by domain.
        difference: this artifact's mean KL minus, and over, that one's.
        not_checked: what its manifest says of its source and nobody could confirm here; None if it
            says the same as this build.
    """

    name: str
    manifest_sha256: str
    rounding: str
    fidelity: Fidelity
    domains: tuple[DomainScore, ...]
    difference: Difference
    not_checked: str | None = optional()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification(Document):
    """What every verification.json says; all that it says if a check stopped the measurement.

    Attributes:
        schema_version: of verification.schema.json.
        verdict: "pass" if every check passed.
        thresholds: that measurements were held against.
        checks: in the order they were made.
        versions: of everything that a figure may depend on, by name.
        date: the day it was verified, in UTC, such as "2026-11-26"; None in an older one.
    """

    schema_version: Literal[3]
    verdict: Verdict
    thresholds: Thresholds
    checks: tuple[Check, ...]
    versions: dict[str, str]
    date: str | None = optional()

    @property
    def failed_checks(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredVerification(Verification):
    """A verification that came as far as comparing the two models.

    Attributes:
        device: where the 4-bit model ran.
        sizes: before and after.
        text: on which both were compared.
        fidelity: the chief figures of the comparison.
        domains: the same by domain of the text.
        kl_by_position: KL along the sequence.
        kl_histogram: tokens by their KL.
        worst_tokens: those with the largest KL; None in an older one.
        nearest: round to nearest beside it; None if that is what the artifact is.
        before_learning: the codes that learning began with beside it; None if no codes learned, or
            those of before are not here any more.
        blocks: errors of each block and of the layers in it.
        outside: 4-bit layers that no block holds; their output is not looked at.
        accuracy: None if no prompt has one right answer.
        models: what each of them costs.
        comparison: what comparing them took.
        answers: of both, to every prompt.
        against: another artifact; None if none was named.
        readers: what each reader of the export found; None if none was tried.
    """

    device: Device
    sizes: Sizes
    text: ComparedText
    fidelity: Fidelity
    domains: tuple[DomainScore, ...]
    kl_by_position: tuple[PositionScore, ...]
    kl_histogram: KlHistogram
    worst_tokens: tuple[WorstToken, ...] | None = optional()
    nearest: MeasuredBaseline | None = optional()
    before_learning: MeasuredBaseline | None = optional()
    blocks: tuple[BlockError, ...]
    outside: tuple[LayerError, ...] = ()
    accuracy: Accuracy | None
    models: Models
    comparison: ComparisonCosts
    answers: tuple[AnswerPair, ...]
    against: Against | None = optional()
    readers: tuple[ReaderResult, ...] | None = optional()


def parse_verification(value: Any) -> Verification:
    """What stands in a verification.json.

    Args:
        value: as `json.loads` gives it.

    Returns:
        A `MeasuredVerification` if the two models were compared.

    Raises:
        DocumentError: the JSON has another shape.
    """
    measured = isinstance(value, dict) and "fidelity" in value
    return (MeasuredVerification if measured else Verification).from_json(value)
