"""Both models block by block, side by side, against both models whole."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from nf4_pipeline.blocks.streamed_model import StreamedModel
from nf4_pipeline.fidelity.token_scores import TokenScores, score_tokens
from nf4_pipeline.job import run_stage
from nf4_pipeline.progress import SILENT
from nf4_pipeline.quiet_libraries import quiet_loading
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.runtime.bnb_cpu_fixes import dequantized
from nf4_pipeline.runtime.loader import load
from nf4_pipeline.verification import compare_models as compare
from nf4_pipeline.verification.compare_models import Comparison
from nf4_pipeline.verification.eval_text import TokenSequence
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tests.support.checkpoints import make_checkpoint
from tests.support.decoders import write_decoder
from tests.support.jobs import CPU, download
from tests.support.sequences import FIELDS, LENGTHS, sequences

pytestmark = pytest.mark.usefixtures("workers_here")


def whole(folder: Path) -> Any:
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return model.requires_grad_(False)


def in_4_bit(folder: Path) -> Any:
    return load(folder, device="cpu")


def exported(folder: Path, where: Path) -> Path:
    """The artifact of a checkpoint."""
    build, *_ = download(folder, where / "artifacts")
    for stage in ("quantize", "serialize"):
        run_stage(build, stage, Recipe(), CPU, SILENT)
    return build.export


def compared(
    folder: Path, model: Any, read: Sequence[TokenSequence], artifact: Path | None = None
) -> tuple[Comparison, Any]:
    done: list[int] = []
    with StreamedModel(folder, "cpu") as streamed:
        comparison = Comparison(streamed, model, artifact)
        scores = comparison.run(read, done.append)
    assert done == [len(sequence.ids) for sequence in read]
    return comparison, scores


def scored_whole(reference: Any, model: Any, read: Sequence[TokenSequence]) -> TokenScores:
    parts = []
    for sequence in read:
        ids = torch.from_numpy(sequence.ids)[None]
        with torch.inference_mode():
            before, after = (m(ids, use_cache=False).logits[0, :-1] for m in (reference, model))
        parts.append(score_tokens(before, after, ids[0, 1:]))
    return TokenScores.joined(parts)


def assert_same(found: TokenScores, expected: TokenScores, within: float = 0.0) -> None:
    assert len(found) == len(expected) > 0
    for name in FIELDS:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=within), name


@pytest.mark.parametrize("kind", ["falcon-7b", "falcon-rw", "llama", "gpt2", "gemma2", "opt"])
def test_block_by_block_is_whole(kind: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / kind, kind)
    model = in_4_bit(folder)
    _, scores = compared(folder, model, sequences())
    assert len(scores) == sum(LENGTHS) - len(LENGTHS)
    assert scores.kl.mean() > 1e-3  # what is compared is not zero
    assert_same(scores, scored_whole(whole(folder), model, sequences()), within=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "gptj", "rwkv"])
def test_other_decoders(name: str, tmp_path: Path) -> None:
    write_decoder(tmp_path / name, name)
    model = in_4_bit(tmp_path / name)
    _, scores = compared(tmp_path / name, model, sequences())
    assert_same(scores, scored_whole(whole(tmp_path / name), model, sequences()), within=1e-6)


@pytest.mark.parametrize("kind", ["falcon-7b", "gpt2"])
def test_a_model_is_at_no_distance_from_itself(kind: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / kind, kind)
    comparison, scores = compared(folder, whole(folder), sequences())
    assert (scores.kl == 0.0).all()
    assert scores.agrees.all()
    assert np.array_equal(scores.nll, scores.reference_nll)
    assert [block.hidden.value for block in comparison.blocks.values()] == [0.0, 0.0]
    assert [block.layers for block in comparison.blocks.values()] == [{}, {}]


def test_a_text_that_is_read_in_several_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "llama", "llama")
    model = in_4_bit(folder)
    once, scores = compared(folder, model, sequences())
    monkeypatch.setattr(compare, "TOGETHER", 40)
    again, passes = compared(folder, in_4_bit(folder), sequences())
    assert_same(passes, scores)
    for name, block in once.blocks.items():
        assert again.blocks[name].hidden.value == pytest.approx(block.hidden.value)
        for layer, error in block.layers.items():
            other = again.blocks[name].layers[layer]
            assert other.output.value == pytest.approx(error.output.value)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """sqrt(sum of squared differences / sum of squares), in float64."""
    wanted = expected.double()
    return sqrt(float((found.double() - wanted).square().sum() / wanted.square().sum()))


def weight_of(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    return weight


def outputs(model: Any, names: Sequence[str], read: Sequence[TokenSequence]) -> dict[str, Any]:
    """Inputs and outputs of some modules while a model reads."""
    seen: dict[str, Any] = {name: [] for name in names}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            seen[name].append((inputs[0].clone(), states.clone()))  # some are added to in place

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.inference_mode():
        for sequence in read:
            model(torch.from_numpy(sequence.ids)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def flat(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("kind", ["falcon-7b", "gpt2"])
def test_the_error_of_each_layer_and_block(kind: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / kind, kind)
    artifact = exported(folder, tmp_path)
    reference, model = whole(folder), in_4_bit(artifact)
    layers = [name for name, m in model.named_modules() if isinstance(m, Linear4bit)]
    weights = {name: dequantized(model.get_submodule(name)).clone() for name in layers}
    comparison, _ = compared(folder, model, sequences(), artifact)
    named = {
        f"{block}.{layer}": error
        for block, errors in comparison.blocks.items()
        for layer, error in errors.layers.items()
    }
    assert sorted(named) == sorted(layers)
    seen = outputs(reference, [*layers, *comparison.blocks], sequences())
    own = outputs(model, list(comparison.blocks), sequences())
    for name, error in named.items():
        expected = weight_of(reference.get_submodule(name))
        # The file is compared in float32, and the loaded model has the weight in bfloat16.
        assert error.weight == pytest.approx(relative(weights[name], expected), rel=1e-3)
        assert 0.05 < error.weight < 0.15
        layer = model.get_submodule(name)
        with torch.inference_mode():
            answers = [layer(read) for read, _ in seen[name]]
        wanted = [output for _, output in seen[name]]
        assert error.output.value == pytest.approx(relative(flat(answers), flat(wanted)), rel=1e-3)
    for name, block in comparison.blocks.items():
        found = relative(*(flat([o for _, o in side[name]]) for side in (own, seen)))
        assert block.hidden.value == pytest.approx(found, rel=1e-3)
        assert block.hidden.value > 0


def test_layers_outside_of_the_blocks_are_compared_as_well(tmp_path: Path) -> None:
    """OPT projects its narrow embedding before the first block, and back after the last."""
    folder = make_checkpoint(tmp_path / "opt", "opt")
    artifact = exported(folder, tmp_path)
    model = in_4_bit(artifact)
    layers = {name for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    assert {"model.decoder.project_in", "model.decoder.project_out"} <= layers
    comparison, _ = compared(folder, model, sequences((5,)), artifact)
    found = {f"{name}.{layer}" for name, e in comparison.blocks.items() for layer in e.layers}
    assert found | comparison.outside.keys() == layers
    assert all(0 < error.worst < 0.2 for error in comparison.outside.values())
