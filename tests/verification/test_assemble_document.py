"""What replies become: it fits the schema, its sums add up, and what fails is told."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, Final

import jsonschema
import numpy as np
import pytest
from nf4_pipeline.fidelity.metrics import by_domain, by_position, compare, histogram
from nf4_pipeline.fidelity.token_scores import TokenScores
from nf4_pipeline.fidelity.verdict import Check
from nf4_pipeline.manifest.manifest import Manifest
from nf4_pipeline.manifest.read import read_manifest
from nf4_pipeline.recipe import VerifyRecipe
from nf4_pipeline.verification.assemble_document import assemble_measured, assemble_stopped
from nf4_pipeline.verification.document import (
    SCHEMA,
    Accuracy,
    BlockError,
    ComparedText,
    ComparisonCosts,
    Device,
    FirstDifference,
    LayerError,
    MeasuredVerification,
    ModelCosts,
    Verification,
)
from nf4_pipeline.verification.generation import TimedAnswer
from nf4_pipeline.verification.messages import ArtifactReply, LoadedModel, SourceReply
from nf4_pipeline.verification.prompts import Prompt

FILES: Final = Check("files as in the manifest", True, "6 files hash right", "6 files")
VERSIONS: Final = {"nf4-pipeline": "0.1.0", "torch": "2.13.0"}
LENGTHS: Final = [60, 40, 28]
PROMPTS: Final = (
    Prompt("Tell me."),
    Prompt("1 + 1 =", expect="2"),
    Prompt("2 + 2 =", expect="4"),
    Prompt("3 + 3 =", expect="6"),
)


@pytest.fixture(scope="module")
def manifest(exported_falcon: Path) -> Manifest:
    return read_manifest(exported_falcon / "export")


def scores(kl: float = 0.02) -> TokenScores:
    count = sum(LENGTHS)
    rng = np.random.default_rng(0)
    return TokenScores(
        kl=rng.exponential(kl, count),
        agrees=rng.random(count) < 0.95,
        sure=np.ones(count, np.bool_),
        reference_nll=np.full(count, 2.0),
        nll=np.full(count, 2.01),
    )


def said(text: str, *ids: int) -> TimedAnswer:
    return TimedAnswer(text, ids, 1.0, 0.1)


def costs(footprint: int) -> ModelCosts:
    return ModelCosts(
        load_seconds=1.5,
        tokens_per_second=30.0,
        first_token_seconds=0.05,
        footprint_bytes=footprint,
        streamed=False,
        peak_memory_bytes=1_000_000,
        peak_device_memory_bytes=0,
    )


def source(*answers: TimedAnswer) -> SourceReply:
    """What the worker says of the 16-bit model."""
    return SourceReply(answers=answers, costs=costs(205_696))


def artifact(
    manifest: Manifest, *answers: TimedAnswer, scored: TokenScores | None = None
) -> ArtifactReply:
    """What it says of the 4-bit one, if all is well."""
    some = scored or scores()
    quantized = [tensor for tensor in manifest.tensors if tensor.quantized]
    kept = [tensor for tensor in manifest.tensors if not tensor.quantized]
    return ArtifactReply(
        device=Device(kind="cpu", name="some CPU, 2 cores", dtype="bfloat16"),
        missing=(),
        unexpected=(),
        memory=LoadedModel(
            linear4bit=tuple(str(tensor.module) for tensor in quantized),
            code_bytes=sum(prod(tensor.shape) // 2 for tensor in quantized),
            kept_weights=sum(prod(tensor.shape) for tensor in kept),
        ),
        text=ComparedText(name="a", sha256=None, sequences=3, tokens=len(some), length=61),
        fidelity=compare(some, LENGTHS),
        domains=by_domain(some, LENGTHS, ["a", "b", "a"]),
        kl_by_position=by_position(some, LENGTHS),
        kl_histogram=histogram(some),
        blocks=tuple(
            BlockError(
                name=name,
                relative_error=0.1,
                modules=tuple(
                    LayerError(
                        name=str(tensor.module).removeprefix(f"{name}."),
                        relative_error=0.09,
                        weight_error=tensor.relative_rmse,
                        worst=0.12,
                        worst_at=0,
                    )
                    for tensor in quantized
                    if str(tensor.module).startswith(f"{name}.")
                ),
            )
            for name in ("transformer.h.0", "transformer.h.1")
        ),
        outside=(),
        kept=7,
        changed=(),
        comparison=ComparisonCosts(
            seconds=3.0, peak_memory_bytes=2_000_000, peak_device_memory_bytes=0
        ),
        answers=answers,
        costs=costs(76_736),
    )


RIGHT: Final = (said("Yes", 1), said("Yes", 1), said(" 2", 2), said("4", 4), said("6", 6))


def verify(
    manifest: Manifest,
    before: tuple[TimedAnswer, ...] = RIGHT,
    after: tuple[TimedAnswer, ...] = RIGHT,
    prompts: tuple[Prompt, ...] = PROMPTS,
    **changes: Any,
) -> MeasuredVerification:
    """Assembles it; what is written fits the schema."""
    reply = replace(artifact(manifest, *after), **changes)
    verification = assemble_measured(
        manifest, [FILES], prompts, source(*before), reply, VerifyRecipe(), VERSIONS
    )
    written = json.loads(json.dumps(verification.to_json(), allow_nan=False))
    jsonschema.validate(written, json.loads(SCHEMA.read_text("utf-8")))
    return verification


def failed(verification: Verification) -> list[str]:
    return [check.name for check in verification.failed_checks]


def test_a_good_verify(manifest: Manifest) -> None:
    found = verify(manifest)
    assert (found.verdict, failed(found)) == ("pass", [])
    assert found.checks[0] == FILES
    assert [check.name for check in found.checks[1:]] == [
        "Linear4bit modules after reloading",
        "names that the loader looked for",
        "what is in memory",
        "weights near those of the source",
        "what stays in 16 bit equals the source",
        "mean KL from the 16-bit model",
        "same next token where the 16-bit model is sure",
        "perplexity in 4 bit over 16 bit",
        "right answers",
    ]
    assert found.thresholds.to_json() == {
        "max_mean_kl": 0.5,
        "min_sure_agreement": 0.8,
        "max_perplexity_ratio": 1.5,
        "max_accuracy_drop": 0.1,
    }
    assert found.versions == VERSIONS
    assert found.models.in_16_bit.footprint_bytes == 205_696
    assert found.models.in_4_bit.footprint_bytes == 76_736


def test_sizes_add_up(manifest: Manifest) -> None:
    sizes = verify(manifest).sizes
    totals = manifest.totals
    assert sum(group.before for group in sizes.groups) == sizes.original_bytes
    assert sum(group.after for group in sizes.groups) == sizes.artifact_bytes
    quantized = [group for group in sizes.groups if group.quantized]
    assert sum(group.after for group in quantized) == sizes.quantized_bytes
    kept = sum(group.after for group in sizes.groups if not group.quantized)
    assert kept == sizes.kept_bytes == sum(sizes.kept_bytes_by_reason.values())
    gone = [group for group in sizes.groups if not group.after]
    assert sum(group.before for group in gone) == sizes.dropped_bytes
    assert sizes.disk_bytes == sum(file.size for file in manifest.files.values())
    assert sizes.footprint_bytes == 76_736
    assert sizes.layers == totals.tensors.quantized == 8
    names = [group.name for group in sizes.groups]
    assert "transformer.h.*.mlp.dense_h_to_4h.weight" in names
    assert len(set(names)) == len(names)
    before = [group.before for group in sizes.groups]
    assert before == sorted(before, reverse=True)


def test_layers_of_one_name_of_which_some_are_skipped(manifest: Manifest) -> None:
    """With skip_modules one of two layers stays in 16 bit: the group must not claim both."""
    skipped = "transformer.h.1.self_attention.dense.weight"
    (entry,) = (tensor for tensor in manifest.tensors if tensor.name == skipped)
    tensors = tuple(
        replace(tensor, quantized=False, bytes=tensor.source_bytes) if tensor is entry else tensor
        for tensor in manifest.tensors
    )
    totals = replace(
        manifest.totals,
        quantized_bytes=manifest.totals.quantized_bytes - entry.bytes,
        kept_bytes=manifest.totals.kept_bytes + entry.source_bytes,
    )
    sizes = verify(replace(manifest, tensors=tensors, totals=totals)).sizes
    for quantized, total in ((True, sizes.quantized_bytes), (False, sizes.kept_bytes)):
        assert total == sum(group.after for group in sizes.groups if group.quantized is quantized)


def test_answers_stand_side_by_side(manifest: Manifest) -> None:
    after = (said("Yes", 1), said("Yes, no", 1, 7), said("2.", 2), said("5", 5), said("6", 6))
    answers = verify(manifest, after=after).answers
    assert [(a.prompt, a.seed) for a in answers] == [
        ("Tell me.", None),
        ("Tell me.", 0),
        ("1 + 1 =", None),
        ("2 + 2 =", None),
        ("3 + 3 =", None),
    ]
    greedy, drawn, two, four, six = answers
    assert (greedy.same, greedy.first_difference) == (True, None)
    assert (drawn.same, drawn.first_difference) == (False, FirstDifference(token=1, character=3))
    assert (drawn.answer_16bit, drawn.answer_4bit) == ("Yes", "Yes, no")
    assert greedy.right_4bit is None
    assert (two.same, two.right_16bit, two.right_4bit) == (False, True, True)
    assert (four.right_16bit, four.right_4bit) == (True, False)
    assert (six.expect, six.right_16bit, six.right_4bit) == ("6", True, True)


def test_too_many_right_answers_lost(manifest: Manifest) -> None:
    after = (*RIGHT[:2], said("2", 2), said("5", 5), said("6", 6))
    found = verify(manifest, after=after)
    assert found.accuracy == Accuracy(asked=3, right_16bit=3, right_4bit=2)
    assert (found.verdict, failed(found)) == ("fail", ["right answers"])
    # What the 16-bit model does not know either is not lost.
    assert verify(manifest, before=after, after=after).verdict == "pass"


def test_no_prompts(manifest: Manifest) -> None:
    found = verify(manifest, (), (), ())
    assert (found.accuracy, found.answers, found.verdict) == (None, (), "pass")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_that_gives_no_numbers_fails(manifest: Manifest, bad: float) -> None:
    spoiled = scores()
    spoiled.kl[5] = spoiled.nll[5] = bad
    reply = artifact(manifest, *RIGHT, scored=spoiled)
    first, last = reply.blocks
    layer = replace(last.modules[0], relative_error=None, weight_error=None, worst=None)
    last = replace(last, relative_error=None, modules=(layer, *last.modules[1:]))
    found = verify(
        manifest,
        fidelity=reply.fidelity,
        domains=reply.domains,
        kl_by_position=reply.kl_by_position,
        kl_histogram=reply.kl_histogram,
        blocks=(first, last),
    )  # valid JSON, or this fails
    assert found.verdict == "fail"
    assert found.to_json()["fidelity"]["mean_kl"]["value"] is None
    assert failed(found) == [
        "weights near those of the source",
        "mean KL from the 16-bit model",
        "perplexity in 4 bit over 16 bit",
    ]


def test_a_stopped_verification() -> None:
    bad = Check("files as in the manifest", False, "x is missing", "6 files")
    found = assemble_stopped([bad], VerifyRecipe(), VERSIONS)
    assert found.verdict == "fail"
    assert set(found.to_json()) == {
        "schema_version",
        "verdict",
        "thresholds",
        "checks",
        "versions",
    }
