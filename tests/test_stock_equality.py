"""The pipeline's artifact is the stock one: the same tensors, loaded and computing the same.

"Stock" is transformers with bitsandbytes, with the Falcon patch where the text says so. Checkpoints
are random, tiny and awkward: `tests/support/checkpoints.py`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

import nf4_pipeline
import pytest
import torch
from nf4_pipeline.job import run_stage
from nf4_pipeline.machine import Machine
from nf4_pipeline.processes.in_process import in_process
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import Recipe
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.models.falcon import modeling_falcon
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils import logging as transformers_logging

from tests.support.checkpoints import FALCONS, HEAD, KINDS, make_checkpoint, read_tensors
from tests.support.jobs import download
from tests.support.stock import (
    QUANT_STATE,
    dequantize_stock,
    falcon_patch,
    linear4bit,
    load_stock,
    logits,
    save_stock,
    stock_model,
)
from tests.support.tiny import content_of

# Two texts of twelve tokens, all different.
TOKENS: Final = (torch.arange(24) * 9 % 257).reshape(2, 12)


@dataclass(frozen=True)
class Case:
    """A checkpoint to compare on: its kind, its dtype, and how it lies on disk."""

    kind: str
    dtype: str = "bfloat16"
    options: dict[str, Any] = field(default_factory=dict)


CASES: Final[dict[str, Case]] = {
    **{kind: Case(kind) for kind in KINDS},
    # As on the Hub: shards, and the tied head stored a second time; names without a prefix.
    "falcon-7b": Case("falcon-7b", options={"max_shard_size": "200KB", "stored_head": True}),
    "falcon-40b": Case("falcon-40b", options={"stored_head": True}),
    "opt": Case("opt", options={"stored_head": True, "max_shard_size": "30KB"}),
    "llama": Case("llama", options={"max_shard_size": "200KB"}),
    "gpt2": Case("gpt2", options={"bare_names": True, "max_shard_size": "60KB"}),
    "bloom": Case("bloom", options={"bare_names": True}),
    "falcon-7b-fp16": Case("falcon-7b", "float16"),
    "falcon-7b-fp32": Case("falcon-7b", "float32"),
    "llama-fp16": Case("llama", "float16"),
    "llama-fp32": Case("llama", "float32"),
    "gpt2-fp32": Case("gpt2", "float32"),
}
PLAIN: Final = [name for name, case in CASES.items() if case.kind not in FALCONS]

every_case = pytest.mark.parametrize("name", CASES)


@dataclass(frozen=True)
class Made:
    """A checkpoint, its stock artifact and ours."""

    case: Case
    checkpoint: Path
    stock: Path
    export: Path

    @property
    def manifest(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.export / "manifest.json").read_text("utf-8"))
        return value

    @property
    def planned(self) -> set[str]:
        """The modules that the manifest says are quantized."""
        return {entry["module"] for entry in self.manifest["tensors"] if entry["quantized"]}


Make = Callable[[str], Made]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes the artifacts of a case when they are first asked for."""

    @cache
    def made(name: str) -> Made:
        case = CASES[name]
        root = tmp_path_factory.mktemp(name)
        checkpoint = make_checkpoint(
            root / "checkpoint", case.kind, dtype=case.dtype, **case.options
        )
        # One of them takes the seconds that a child process takes.
        with nullcontext() if name == "falcon-7b" else in_process():
            build, *_ = download(checkpoint, root / "artifacts")
        for stage in ("quantize", "serialize"):
            assert run_stage(build, stage, Recipe(), Machine(), SILENT).ran
        return Made(
            case, checkpoint, save_stock(checkpoint, root / "stock", case.dtype), build.export
        )

    return made


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """sqrt(sum (found - expected)^2 / sum expected^2)."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def quant_state(tensors: dict[str, torch.Tensor], weight: str) -> dict[str, Any]:
    """The parsed JSON that stands beside a quantized weight."""
    value: dict[str, Any] = json.loads(bytes(tensors[weight + QUANT_STATE].tolist()))
    return value


def logit_bound(dtype: str) -> float:
    """How far, relatively, logits may lie apart whose scales differ by single 8-bit steps.

    Twice the rounding step of the dtype, for the layers compute in it, and twice the 1e-3 that the
    weights themselves may differ by. NF4 itself moves these models' logits by 0.12 to 0.4.
    """
    return 2 * torch.finfo(getattr(torch, dtype)).eps + 2e-3


@every_case
def test_artifact_holds_what_stock_writes(make: Make, name: str) -> None:
    made = make(name)
    ours, stock = read_tensors(made.export), read_tensors(made.stock)
    assert ours.keys() == stock.keys()
    weights = {key.removesuffix(QUANT_STATE) for key in ours if key.endswith(QUANT_STATE)}
    assert len(weights) == len(made.planned) > 0

    for key, tensor in ours.items():
        assert tensor.dtype == stock[key].dtype, key
        if not key.endswith(QUANT_STATE):
            assert tensor.shape == stock[key].shape, key
        if not key.endswith((".absmax", ".nested_absmax", QUANT_STATE)):
            # Packed codes, both level tables, and everything that is not quantized.
            assert torch.equal(tensor, stock[key]), key

    for weight in weights:
        found, expected = quant_state(ours, weight), quant_state(stock, weight)
        # bitsandbytes takes the mean of the scales in float32, in an order of its own.
        offset = expected.pop("nested_offset")
        assert found.pop("nested_offset") == pytest.approx(offset, rel=1e-6), weight
        assert found == expected, weight
        nested = f"{weight}.nested_absmax"
        # They are differences to that mean, and carry its rounding.
        torch.testing.assert_close(ours[nested], stock[nested], rtol=1e-6, atol=1e-6 * offset)
        assert relative(dequantize_stock(ours, weight), dequantize_stock(stock, weight)) < 1e-3, (
            weight
        )


@every_case
def test_artifact_is_near_its_source(make: Make, name: str) -> None:
    made = make(name)
    source, ours = read_tensors(made.checkpoint), read_tensors(made.export)
    seen = set()
    for entry in made.manifest["tensors"]:
        original = source[entry["source_name"]]
        seen.add(entry["source_name"])
        if entry["quantized"]:
            original = original.T if entry["transposed"] else original
            error = relative(dequantize_stock(ours, entry["name"]), original)
            # Normally distributed weights lose 9 % to NF4; blocks that are zero lose nothing.
            assert 0.06 < error < 0.11, entry["name"]
            assert entry["relative_rmse"] == pytest.approx(error, rel=0.01), entry["name"]
        else:
            assert torch.equal(ours[entry["name"]], original), entry["name"]
    dropped = {entry["name"] for entry in made.manifest["dropped"]}
    assert dropped == ({HEAD} if made.case.options.get("stored_head") else set())
    assert seen | dropped == source.keys()


@every_case
def test_stock_transformers_accepts_the_quantization_config(make: Make, name: str) -> None:
    made = make(name)
    ours, stock = (
        json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
        for folder in (made.export, made.stock)
    )
    config, unused = BitsAndBytesConfig.from_dict(ours, return_unused_kwargs=True)
    assert not unused
    assert config.quantization_method() == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == getattr(torch, made.case.dtype)
    assert config.bnb_4bit_quant_storage == torch.uint8
    differing = {key for key in ours if key in stock and ours[key] != stock[key]}
    assert differing <= {"llm_int8_skip_modules"}


@every_case
def test_load_gives_the_stock_model(make: Make, name: str) -> None:
    made = make(name)
    model, stock = nf4_pipeline.load(made.export, device="cpu"), load_stock(made.stock)
    assert linear4bit(model) == made.planned == linear4bit(stock)
    assert model.dtype == stock.dtype == getattr(torch, made.case.dtype)
    apart = relative(logits(model, TOKENS), logits(stock, TOKENS))
    assert apart < logit_bound(made.case.dtype)


@every_case
def test_load_quantizes_a_plain_checkpoint_alike(make: Make, name: str) -> None:
    made = make(name)
    model = nf4_pipeline.load(made.checkpoint, device="cpu")
    assert linear4bit(model) == made.planned
    # The scales are stock's here: bitsandbytes quantizes while transformers loads.
    stock = stock_model(made.checkpoint, made.case.dtype)
    assert torch.equal(logits(model, TOKENS), logits(stock, TOKENS))


@pytest.mark.parametrize("name", PLAIN)
def test_unpatched_stock_loads_the_artifact(make: Make, name: str) -> None:
    made = make(name)
    stock = load_stock(made.export, patched=False)
    assert linear4bit(stock) == made.planned
    expected = logits(nf4_pipeline.load(made.export, device="cpu"), TOKENS)
    assert torch.equal(logits(stock, TOKENS), expected)


@pytest.mark.parametrize("name", FALCONS)
def test_patched_stock_loads_the_artifact(make: Make, name: str) -> None:
    made = make(name)
    stock = load_stock(made.export)
    assert linear4bit(stock) == made.planned
    expected = logits(nf4_pipeline.load(made.export, device="cpu"), TOKENS)
    assert torch.equal(logits(stock, TOKENS), expected)


@pytest.mark.parametrize("name", FALCONS)
def test_the_trap_stock_quantizes_nothing_in_a_falcon(
    make: Make, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = make(name)
    library = logging.getLogger("transformers")  # it does not hand its records on
    library.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING, library.name):
            model = stock_model(made.checkpoint, patched=False)
    finally:
        library.removeHandler(caplog.handler)
    assert linear4bit(model) == set()
    assert "eetq" in caplog.text  # the only hint, and it names another library

    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert config["quantization_config"]["load_in_4bit"]
    assert {tensor.dtype for tensor in read_tensors(tmp_path).values()} == {torch.bfloat16}
    # The plan knows: everything that it quantizes is hidden from the stock loader.
    assert set(made.manifest["hidden_modules"]) == made.planned


def test_more_threads_change_no_byte(make: Make, tmp_path: Path) -> None:
    """Tests run torch on one thread; a user's has as many as the machine has processors."""
    made = make("llama")
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with in_process():
            build, *_ = download(made.checkpoint, tmp_path / "artifacts")
        for stage in ("quantize", "serialize"):
            assert run_stage(build, stage, Recipe(), Machine(), SILENT).ran
        found = logits(nf4_pipeline.load(build.export, device="cpu"), TOKENS)
    finally:
        torch.set_num_threads(before)
    assert content_of(build.export) == content_of(made.export)
    stock = load_stock(made.stock)
    assert relative(found, logits(stock, TOKENS)) < logit_bound(made.case.dtype)


def test_loading_leaves_the_voice_of_transformers_as_it_was(make: Make) -> None:
    """A process that used `nf4_pipeline.load` must still hear what stock transformers warns of."""
    made = make("falcon-whole")
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    try:
        nf4_pipeline.load(made.export, device="cpu")
        assert transformers_logging.get_verbosity() == logging.WARNING
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity(before)


def stock_cannot_load(export: Path) -> bool:
    """It refuses; or, as transformers 5.5.0 does, takes the codes for weights without a word."""
    try:
        loaded = AutoModelForCausalLM.from_pretrained(export, dtype="auto")
    except RuntimeError as error:
        return "mismatch" in str(error)
    return not linear4bit(loaded)


@pytest.mark.parametrize("name", FALCONS)
def test_the_trap_stock_cannot_load_a_falcon_artifact(make: Make, name: str) -> None:
    made = make(name)
    quantizer = AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
    assert stock_cannot_load(made.export)
    assert linear4bit(nf4_pipeline.load(made.export, device="cpu")) == made.planned
    # What `load` does to transformers ends with it.
    assert AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is quantizer
    assert stock_cannot_load(made.export)


def test_the_patch_of_these_tests_is_undone() -> None:
    original = modeling_falcon.FalconLinear
    with falcon_patch():
        assert modeling_falcon.FalconLinear is torch.nn.Linear
    assert modeling_falcon.FalconLinear is original
    assert original is not torch.nn.Linear


@pytest.mark.parametrize("name", ["falcon-whole", "falcon-7b", "llama", "gpt2"])
def test_a_loaded_model_computes_what_the_artifact_means(make: Make, name: str) -> None:
    """On a CPU, whatever the shapes: the logits of a plain model with the dequantized weights."""
    made = make(name)
    tensors = read_tensors(made.export)
    plain = nf4_pipeline.load(made.checkpoint, device="cpu", quantize=False)
    with torch.no_grad():
        for entry in made.manifest["tensors"]:
            if entry["quantized"]:
                weight = dequantize_stock(tensors, entry["name"])
                plain.get_parameter(entry["name"]).copy_(
                    weight.T if entry["transposed"] else weight
                )
    expected = logits(plain, TOKENS)
    found = logits(nf4_pipeline.load(made.export, device="cpu"), TOKENS, portable=False)
    # Scales may be rounded to bf16 on the way: one step more than between two artifacts.
    assert relative(found, expected) < 2 * logit_bound(made.case.dtype)
