"""What verification asks of a worker process, and what the worker replies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nf4_pipeline.documents import Document, optional
from nf4_pipeline.fidelity.metrics import DomainScore, Fidelity, KlHistogram, PositionScore
from nf4_pipeline.verification.document import (
    BlockError,
    ComparedText,
    ComparisonCosts,
    Device,
    LayerError,
    MeasuredBaseline,
    ModelCosts,
    WorstToken,
)
from nf4_pipeline.verification.eval_text import Text
from nf4_pipeline.verification.generation import TimedAnswer
from nf4_pipeline.verification.prompts import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRequest(Document):
    """Load the 16-bit model and ask it.

    Attributes:
        source: the checkpoint folder.
        artifact: the export folder, whose tokenizer is used for both models.
        device: "cpu" or "cuda:N".
        device_memory: bytes of the device that may be used; 0 for all that is free.
        prompts: what is asked.
        max_new_tokens: of each answer.
        served: the socket where the bytes of the source's weights are served, if its files are
            headers alone; None if they are there.
    """

    source: Path
    artifact: Path
    device: str
    device_memory: int
    prompts: tuple[Prompt, ...]
    max_new_tokens: int
    served: Path | None = optional()


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedCodes(Document):
    """Where other codes for a layer stand; see `nf4_pipeline.gptq.saved_codes`.

    Attributes:
        file: that holds them.
        weight: what they are called there.
    """

    file: Path
    weight: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Baselines(Document):
    """What an artifact is measured beside, on the same text.

    Attributes:
        nearest: round to nearest, with these modules in 4 bit, too, which the artifact leaves in
            16 bit for what they would lose; None not to.
        before_learning: the codes that learning began with, by module; None not to.
    """

    nearest: tuple[str, ...] | None = optional()
    before_learning: Mapping[str, SavedCodes] | None = optional()


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactRequest(SourceRequest):
    """Load the 4-bit model, compare it with its source on a text, and ask it.

    Attributes:
        text: on which both are compared; random token ids if it has no domains.
        tokens: of it, at most.
        scores: where the scores of all tokens are left (.npz).
        baselines: what it is measured beside.
        logits: where the logits that other readers are held against are left (.npy); None for no
            such file.
        shares: what came of comparing all of the text, if others have done that (`Share`).
    """

    text: Text
    tokens: int
    scores: Path
    baselines: Baselines = field(default_factory=Baselines)
    logits: Path | None = None
    shares: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceReply(Document):
    """The 16-bit model's answers, in the order of the questions, and what they cost."""

    answers: tuple[TimedAnswer, ...]
    costs: ModelCosts


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel(Document):
    """What a loaded model is made of.

    Attributes:
        linear4bit: names of its `Linear4bit` modules.
        code_bytes: of their packed codes.
        kept_weights: numbers in all other parameters and persistent buffers.
    """

    linear4bit: tuple[str, ...]
    code_bytes: int
    kept_weights: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactReply(Document):
    """What the 4-bit model is, how far it is from its source, what it answers and costs.

    Attributes:
        device: where it ran.
        missing: names that the loader looked for and did not find.
        unexpected: names in the files that the model has no place for.
        memory: what came back from disk.
        text: on which it was compared.
        fidelity: see `MeasuredVerification` for this and all up to `outside`.
        domains: by domain.
        kl_by_position: by position.
        kl_histogram: by KL.
        worst_tokens: those with the largest KL.
        blocks: errors of blocks and their layers.
        outside: errors of layers outside of blocks.
        kept: how many tensors that are not 4 bit were held against the source.
        changed: the names of those that differ.
        malformed: 4-bit weights whose files are not what the format says, each with why.
        nearest: round to nearest beside it; None if it was not measured.
        before_learning: the codes that learning began with, likewise.
        comparison: what comparing took.
        answers: in the order of the questions.
        costs: of loading and asking.
    """

    device: Device
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    memory: LoadedModel
    text: ComparedText
    fidelity: Fidelity
    domains: tuple[DomainScore, ...]
    kl_by_position: tuple[PositionScore, ...]
    kl_histogram: KlHistogram
    worst_tokens: tuple[WorstToken, ...] = ()
    blocks: tuple[BlockError, ...]
    outside: tuple[LayerError, ...]
    kept: int
    changed: tuple[str, ...]
    malformed: tuple[str, ...] = ()
    nearest: MeasuredBaseline | None = optional()
    before_learning: MeasuredBaseline | None = optional()
    comparison: ComparisonCosts
    answers: tuple[TimedAnswer, ...]
    costs: ModelCosts
