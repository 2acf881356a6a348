"""Checks, and what the workers replied -> verification.json. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from nf4_pipeline.fidelity.metrics import is_right
from nf4_pipeline.fidelity.verdict import Check, accuracy_check, fidelity_checks, verdict
from nf4_pipeline.manifest.manifest import Manifest
from nf4_pipeline.readers.document import ReaderResult, reader_checks
from nf4_pipeline.recipe import VerifyRecipe
from nf4_pipeline.verification.check_model import check_kept, check_reloaded, check_weights
from nf4_pipeline.verification.document import (
    SCHEMA_VERSION,
    Accuracy,
    AnswerPair,
    MeasuredVerification,
    Models,
    Sizes,
    Thresholds,
    Verification,
    WeightGroup,
)
from nf4_pipeline.verification.generation import TimedAnswer, find_first_difference, questions
from nf4_pipeline.verification.messages import ArtifactReply, SourceReply
from nf4_pipeline.verification.prompts import Prompt


def assemble_stopped(
    checks: Sequence[Check], recipe: VerifyRecipe, versions: Mapping[str, str]
) -> Verification:
    """The verification of an artifact that did not come as far as being compared.

    Args:
        checks: what was checked; one of them failed.
        recipe: its limits.
        versions: of what was used, by name.
    """
    return Verification(
        schema_version=SCHEMA_VERSION,
        verdict=verdict(checks),
        thresholds=_thresholds(recipe),
        checks=tuple(checks),
        versions=dict(versions),
    )


def assemble_measured(
    manifest: Manifest,
    file_checks: Sequence[Check],
    prompts: Sequence[Prompt],
    source: SourceReply,
    artifact: ArtifactReply,
    recipe: VerifyRecipe,
    versions: Mapping[str, str],
    readers: Sequence[ReaderResult] = (),
) -> MeasuredVerification:
    """The verification of an artifact that was held against its source.

    Args:
        manifest: of the artifact.
        file_checks: of its files, all passed.
        prompts: that both models were asked.
        source: what the worker replied of the 16-bit model.
        artifact: what it replied of the 4-bit one.
        recipe: the limits.
        versions: of what was used, by name.
        readers: what each reader of the export found.
    """
    answers = _pair_answers(prompts, source.answers, artifact.answers)
    accuracy = _accuracy(answers)
    checks = [
        *file_checks,
        *check_reloaded(manifest, artifact),
        check_weights(manifest, artifact.blocks, artifact.outside, artifact.malformed),
        check_kept(artifact.kept, artifact.changed),
        *reader_checks(readers),
        *fidelity_checks(artifact.fidelity, recipe),
    ]
    if accuracy is not None:
        checks.append(
            accuracy_check(accuracy.asked, accuracy.right_16bit, accuracy.right_4bit, recipe)
        )
    return MeasuredVerification(
        schema_version=SCHEMA_VERSION,
        verdict=verdict(checks),
        thresholds=_thresholds(recipe),
        checks=tuple(checks),
        versions=dict(versions),
        device=artifact.device,
        sizes=_sizes(manifest, artifact.costs.footprint_bytes),
        text=artifact.text,
        fidelity=artifact.fidelity,
        domains=artifact.domains,
        kl_by_position=artifact.kl_by_position,
        kl_histogram=artifact.kl_histogram,
        worst_tokens=artifact.worst_tokens,
        nearest=artifact.nearest,
        before_learning=artifact.before_learning,
        blocks=artifact.blocks,
        outside=artifact.outside,
        accuracy=accuracy,
        models=Models(in_16_bit=source.costs, in_4_bit=artifact.costs),
        comparison=artifact.comparison,
        answers=answers,
        readers=tuple(readers) or None,
    )


def _thresholds(recipe: VerifyRecipe) -> Thresholds:
    return Thresholds(
        max_mean_kl=recipe.max_mean_kl,
        min_sure_agreement=recipe.min_sure_agreement,
        max_perplexity_ratio=recipe.max_perplexity_ratio,
        max_accuracy_drop=recipe.max_accuracy_drop,
    )


def _pair_answers(
    prompts: Sequence[Prompt], before: Sequence[TimedAnswer], after: Sequence[TimedAnswer]
) -> tuple[AnswerPair, ...]:
    pairs = []
    for question, one, other in zip(questions(prompts), before, after, strict=True):
        prompt, expect = question.prompt, question.prompt.expect
        pairs.append(
            AnswerPair(
                prompt=prompt.prompt,
                expect=expect,
                seed=question.seed,
                answer_16bit=one.text,
                answer_4bit=other.text,
                same=one.text == other.text,
                first_difference=find_first_difference(one, other),
                right_16bit=None if expect is None else is_right(one.text, expect),
                right_4bit=None if expect is None else is_right(other.text, expect),
            )
        )
    return tuple(pairs)


def _accuracy(answers: Sequence[AnswerPair]) -> Accuracy | None:
    asked = [answer for answer in answers if answer.expect is not None]
    if not asked:
        return None
    return Accuracy(
        asked=len(asked),
        right_16bit=sum(answer.right_16bit is True for answer in asked),
        right_4bit=sum(answer.right_4bit is True for answer in asked),
    )


def _sizes(manifest: Manifest, footprint: int) -> Sizes:
    totals = manifest.totals
    return Sizes(
        original_bytes=totals.original_bytes,
        artifact_bytes=totals.artifact_bytes,
        quantized_bytes=totals.quantized_bytes,
        kept_bytes=totals.kept_bytes,
        dropped_bytes=totals.dropped_bytes,
        ratio=totals.ratio,
        bits_per_weight=totals.bits_per_weight,
        bits_per_quantized_weight=totals.bits_per_quantized_weight,
        kept_bytes_by_reason=dict(totals.kept_bytes_by_reason),
        layers=totals.tensors.quantized,
        disk_bytes=sum(digest.size for digest in manifest.files.values()),
        footprint_bytes=footprint,
        groups=_group_weights(manifest),
    )


def _group_weights(manifest: Manifest) -> tuple[WeightGroup, ...]:
    """Tensors that differ only in the number of their layer, together; the largest first.

    If a recipe skips some of them, those that are quantized and those that are not are two groups.
    """
    sizes: dict[tuple[str, bool], list[int]] = {}
    entries = [(t.name, t.source_bytes, t.bytes, t.quantized) for t in manifest.tensors]
    entries += [(t.name, t.bytes, 0, False) for t in manifest.dropped]
    for name, before, after, quantized in entries:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        group = sizes.setdefault((pattern, quantized), [0, 0])
        group[0] += before
        group[1] += after
    groups = [
        WeightGroup(name=name, before=before, after=after, quantized=quantized)
        for (name, quantized), (before, after) in sizes.items()
    ]
    return tuple(sorted(groups, key=lambda group: (-group.before, group.name)))
