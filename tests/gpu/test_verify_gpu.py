"""On a CUDA device: the sample is verified there, in little memory, as on whole models.

Run by `scripts/campaigns/gpu_checks.py` on a machine that has one; the results stand in
docs/performance.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nf4_pipeline.machine import Machine
from nf4_pipeline.recipe import Recipe

from tests.support.jobs import download
from tests.support.verified import ask_source

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

TOKENS = 2048


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of the sample up to serialize."""
    from nf4_pipeline.job import run_stage
    from nf4_pipeline.progress import SILENT

    build, *_ = download("sample", tmp_path_factory.mktemp("sample"))
    for stage in ("quantize", "serialize"):
        run_stage(build, stage, Recipe(), Machine(device="cuda"), SILENT)
    return build.root


def test_the_sample_is_verified_on_the_gpu(sample: Path, tmp_path: Path) -> None:
    from nf4_pipeline.build_folder import Build
    from nf4_pipeline.job import run_stage
    from nf4_pipeline.progress import SILENT

    from tests.support.tiny import copy_of

    build = Build(copy_of(sample, tmp_path / "build"))
    machine = Machine(device="cuda", require_gpu=True)
    found = run_stage(build, "verify", Recipe(), machine, SILENT).record.facts.to_json()
    assert [check for check in found["checks"] if not check["passed"]] == []
    assert found["verdict"] == "pass"
    assert found["device"]["kind"] == "cuda"
    assert found["device"]["name"] == torch.cuda.get_device_name()
    assert found["accuracy"]["right_16bit"] >= 49
    assert found["accuracy"]["right_4bit"] >= 46
    assert not found["models"]["16bit"]["streamed"]
    # Two models of 10 MB: what it takes are logits and workspaces, not weights.
    for part in (*found["models"].values(), found["comparison"]):
        assert 0 < part["peak_device_memory_bytes"] < 2**30
        assert part["peak_memory_bytes"] > 0


def test_block_by_block_is_whole_on_the_gpu(sample: Path) -> None:
    from nf4_pipeline.blocks.streamed_model import StreamedModel
    from nf4_pipeline.fidelity.token_scores import TokenScores, score_tokens
    from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer
    from nf4_pipeline.quiet_libraries import quiet_loading
    from nf4_pipeline.runtime.loader import load
    from nf4_pipeline.sample import MODEL_DIR, TEXT
    from nf4_pipeline.verification.compare_models import Comparison
    from nf4_pipeline.verification.eval_text import Text, cut
    from transformers import AutoModelForCausalLM

    model = load(sample, device="cuda:0")
    dtype = model.get_input_embeddings().weight.dtype
    text = Text("any", {"any": TEXT.read_text("utf-8")})
    sequences = cut(text, LimitedTokenizer.open(MODEL_DIR), TOKENS, None)
    with StreamedModel(MODEL_DIR, "cuda:0", dtype) as streamed:
        found = Comparison(streamed, model).run(sequences, lambda count: None)
    with quiet_loading():
        reference: Any = AutoModelForCausalLM.from_pretrained(
            MODEL_DIR, dtype=dtype, device_map={"": "cuda:0"}
        ).eval()
    parts = []
    for sequence in sequences:
        ids = torch.from_numpy(sequence.ids)[None].cuda()
        with torch.inference_mode():
            before, after = (m(ids, use_cache=False).logits[0, :-1] for m in (reference, model))
        parts.append(score_tokens(before, after, ids[0, 1:]))
    expected = TokenScores.joined(parts)
    assert len(found) == len(expected) == TOKENS - len(sequences)
    assert found.kl.mean() > 1e-3
    assert np.abs(found.kl - expected.kl).max() < 1e-5
    assert found.kl.mean() == pytest.approx(expected.kl.mean(), abs=1e-6)
    assert np.array_equal(found.agrees, expected.agrees)


def test_round_to_nearest_beside_other_codes_is_the_built_artifact_on_the_gpu(sample: Path) -> None:
    from bitsandbytes.nn import Linear4bit
    from nf4_pipeline.blocks.streamed_model import StreamedModel
    from nf4_pipeline.runtime.loader import load
    from nf4_pipeline.sample import MODEL_DIR
    from nf4_pipeline.verification.compare_models import Comparison
    from nf4_pipeline.verification.eval_text import random_sequences

    found: list[Any] = []
    for nearest in (None, ()):
        model = load(sample, device="cuda:0")
        embedding = model.get_input_embeddings()
        sequences = random_sequences(embedding.num_embeddings, TOKENS, None)
        layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
        assert len(layers) == 24
        for layer in layers if nearest is not None else ():
            layer.weight.data ^= 0x11  # each code a neighbour's
        with StreamedModel(MODEL_DIR, "cuda:0", embedding.weight.dtype) as streamed:
            comparison = Comparison(streamed, model, nearest=nearest)
            found.append((comparison.run(sequences, lambda count: None), comparison.nearest))
    (built, none), (forged, beside) = found
    assert none is None
    assert np.abs(beside.kl - built.kl).max() < 1e-6
    assert forged.kl.mean() > 1.5 * built.kl.mean() > 0


def test_a_model_is_at_no_distance_from_itself_on_the_gpu() -> None:
    from nf4_pipeline.blocks.streamed_model import StreamedModel
    from nf4_pipeline.quiet_libraries import quiet_loading
    from nf4_pipeline.sample import MODEL_DIR
    from nf4_pipeline.verification.compare_models import Comparison
    from nf4_pipeline.verification.eval_text import random_sequences
    from transformers import AutoModelForCausalLM

    with StreamedModel(MODEL_DIR, "cuda:0") as streamed:
        dtype = streamed.model.get_input_embeddings().weight.dtype
        with quiet_loading():
            model: Any = AutoModelForCausalLM.from_pretrained(
                MODEL_DIR, dtype=dtype, device_map={"": "cuda:0"}
            ).eval()
        vocabulary = model.get_input_embeddings().num_embeddings
        sequences = random_sequences(vocabulary, TOKENS, None)
        found = Comparison(streamed, model).run(sequences, lambda count: None)
    assert (found.kl == 0.0).all()
    assert found.agrees.all()


def test_streamed_answers_are_those_of_the_whole_model_on_the_gpu(sample: Path) -> None:
    from nf4_pipeline.sample import MODEL_DIR, QUESTIONS
    from nf4_pipeline.verification.eval_text import Text
    from nf4_pipeline.verification.launch import Examination
    from nf4_pipeline.verification.prompts import read_prompts

    whole = Examination(
        source=MODEL_DIR,
        device="cuda:0",
        device_memory=0,
        prompts=read_prompts(QUESTIONS)[:10],
        max_new_tokens=24,
        text=Text("none", {}),
        tokens=2,
    )
    export = sample / "export"
    found = ask_source(whole, export)
    # Enough for a model of 10 MB, and less than what is left free beside a model that stays.
    streamed = ask_source(replace(whole, device_memory=2**30), export)
    assert (found.costs.streamed, streamed.costs.streamed) == (False, True)
    assert [answer.ids for answer in streamed.answers] == [answer.ids for answer in found.answers]
    assert 0 < streamed.costs.peak_device_memory_bytes <= 2**30
    assert streamed.costs.peak_device_memory_bytes < found.costs.peak_device_memory_bytes + 2**20
