"""Calibrated artifacts of tiny models, from checkpoint to tensors; weights that fall back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import nf4_pipeline
import numpy as np
import pytest
import torch
from nf4_pipeline.blocks.streamed_model import StreamedModel
from nf4_pipeline.build_folder import Build
from nf4_pipeline.calibration import calibration_pass as passes
from nf4_pipeline.calibration.tokens import parse_tokens
from nf4_pipeline.checkpoint.source import read_json
from nf4_pipeline.job import run_stage
from nf4_pipeline.nf4.stored_weight import StoredWeight
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import SerializeRecipe
from nf4_pipeline.records import QUANTIZE
from safetensors.torch import load_file, save_file

from tests.support.calibrated import (
    Listener,
    downloaded,
    manifest_of,
    parts,
    quantized,
    read_back,
    settings,
    shorten_context,
)
from tests.support.checkpoints import FALCONS, KINDS, make_checkpoint, read_tensors
from tests.support.decoders import write_decoder
from tests.support.gptq_reference import largest_of
from tests.support.jobs import CPU
from tests.support.stock import dequantize_stock, linear4bit, load_stock, logits
from tests.support.tiny import copy_of

pytestmark = pytest.mark.usefixtures("workers_here")

DTYPED: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "llama-fp16": ("llama", {"dtype": "float16"}),
    "gpt2-fp32": ("gpt2", {"dtype": "float32"}),
    "falcon-7b-fp16": ("falcon-7b", {"dtype": "float16"}),
    "opt-fp32": ("opt", {"dtype": "float32"}),
    # As on the Hub: shards, the tied head stored twice, names without a prefix.
    "falcon-40b-head": ("falcon-40b", {"stored_head": True, "max_shard_size": "30KB"}),
    "gpt2-bare": ("gpt2", {"bare_names": True, "max_shard_size": "60KB"}),
}
CASES: Final[dict[str, tuple[str, dict[str, Any]]]] = {k: (k, {}) for k in KINDS} | DTYPED
WITHOUT_TOKENIZER: Final = ("mixtral", "phi3", "mamba", "rwkv")


@dataclass(frozen=True)
class Pair:
    """A checkpoint's build, calibrated, and the same rounded to nearest."""

    checkpoint: Path
    build: Build
    nearest: Build


Make = Callable[[str], Pair]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes both builds of a case when they are first asked for."""

    @cache
    def made(name: str) -> Pair:
        root = tmp_path_factory.mktemp(name)
        if name in CASES:
            kind, options = CASES[name]
            checkpoint = make_checkpoint(root / "model", kind, **options)
        else:
            write_decoder(root / "model", name)
            checkpoint = root / "model"
        shorten_context(checkpoint)
        build = downloaded(checkpoint, root)
        nearest = Build(copy_of(build.root, root / "nearest"))
        quantized(build, settings())
        quantized(nearest, settings(""))
        return Pair(checkpoint, build, nearest)

    return made


def tokens_of(build: Build) -> torch.Tensor:
    """What it was calibrated on."""
    return torch.from_numpy(parse_tokens(read_json(build.export / "calibration.json")).ids).long()


@pytest.mark.parametrize("name", [*CASES, *WITHOUT_TOKENIZER])
def test_an_artifact_of_the_same_form(make: Make, name: str) -> None:
    """Same tensors, same sizes; what is not quantized is equal, and so are the tables of levels."""
    pair = make(name)
    ours, nearest = read_tensors(pair.build.export), read_tensors(pair.nearest.export)
    assert ours.keys() == nearest.keys()
    manifest, plain = manifest_of(pair.build), manifest_of(pair.nearest)
    assert manifest["totals"] == plain["totals"]
    assert manifest["calibration"]["fallbacks"] == {}
    assert "calibration" not in plain
    source = read_tensors(pair.checkpoint)
    for entry in manifest["tensors"]:
        key = entry["name"]
        if not entry["quantized"]:
            assert torch.equal(ours[key], nearest[key]), key
            continue
        for suffix in (".quant_map", ".nested_quant_map"):
            assert torch.equal(ours[key + suffix], nearest[key + suffix])
        for part in parts(ours, key):
            assert ours[part].shape == nearest[part].shape, part
        assert not torch.equal(ours[key], nearest[key]), key
        shape = tuple(entry["shape"])
        weight = read_back(ours, key, shape)
        # What bitsandbytes reads, in the dtype of the source.
        stock = dequantize_stock(ours, key)
        assert torch.equal(stock, torch.from_numpy(weight).to(stock.dtype)), key
        exact = source[entry["source_name"]].double().numpy()
        exact = exact.T if entry["transposed"] else exact
        error = np.linalg.norm(weight - exact) / np.linalg.norm(exact)
        assert entry["relative_rmse"] == pytest.approx(error, rel=1e-3), key
        assert error < 0.25, key


@pytest.mark.parametrize("name", [*CASES, *WITHOUT_TOKENIZER])
def test_layers_give_what_the_16_bit_ones_give(make: Make, name: str) -> None:
    """On what it was calibrated on, every layer is nearer to its original than by rounding."""
    pair = make(name)
    tokens = tokens_of(pair.build)
    inputs: dict[str, torch.Tensor] = {}
    with StreamedModel(pair.build.source, "cpu") as streamed, torch.inference_mode():
        for block in streamed.blocks:
            streamed.hold(block)

        def keep(module_name: str) -> Any:
            def hook(module: Any, given: Any) -> None:
                inputs[module_name] = given[0].reshape(-1, given[0].shape[-1]).double()

            return hook

        quantized_tensors = [e for e in manifest_of(pair.build)["tensors"] if e["quantized"]]
        for entry in quantized_tensors:
            module = streamed.model.get_submodule(entry["module"])
            module.register_forward_pre_hook(keep(entry["module"]))
        streamed.model(tokens)
    source = read_tensors(pair.checkpoint)
    ours, nearest = read_tensors(pair.build.export), read_tensors(pair.nearest.export)
    better = 0
    for entry in quantized_tensors:
        x = inputs[entry["module"]].numpy()
        exact = source[entry["source_name"]].double().numpy()
        exact = exact.T if entry["transposed"] else exact
        losses = [
            np.linalg.norm(x @ (read_back(t, entry["name"], exact.shape) - exact).T)
            for t in (ours, nearest)
        ]
        assert losses[0] < 0.98 * losses[1], entry["name"]
        better += losses[0] < 0.85 * losses[1]
    assert better >= 0.5 * len(quantized_tensors)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][0] not in FALCONS])
def test_unpatched_stock_reads_what_we_read(make: Make, name: str) -> None:
    pair = make(name)
    stock = load_stock(pair.build.export, patched=False)
    ours = nf4_pipeline.load(pair.build.export, device="cpu")
    planned = {t["module"] for t in manifest_of(pair.build)["tensors"] if t["quantized"]}
    assert linear4bit(stock) == linear4bit(ours) == planned
    tokens = tokens_of(pair.build)[:2, :12]
    assert torch.equal(logits(stock, tokens), logits(ours, tokens))


@pytest.mark.parametrize("name", FALCONS)
def test_patched_stock_reads_what_we_read(make: Make, name: str) -> None:
    pair = make(name)
    tokens = tokens_of(pair.build)[:2, :12]
    ours = nf4_pipeline.load(pair.build.export, device="cpu")
    assert torch.equal(logits(load_stock(pair.build.export), tokens), logits(ours, tokens))


def changed(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], None], kind: str = "llama"
) -> Build:
    """A build of a checkpoint of which some tensors were changed, and a text beside it."""
    make_checkpoint(folder / "model", kind)
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "text.txt").write_text("".join(chr(32 + i * i % 90) for i in range(2000)))
    return downloaded(folder / "model", folder)


def held_beside_nearest(build: Build, folder: Path, listener: Listener) -> dict[str, str]:
    """Calibrates on the text; weights that fell back are those of nearest, others are not."""
    nearest = Build(copy_of(build.root, folder / "nearest"))
    quantized(build, settings(folder / "text.txt"), listener)
    quantized(nearest, settings(""))
    fallbacks: dict[str, str] = manifest_of(build)["calibration"]["fallbacks"]
    ours, plain = read_tensors(build.export), read_tensors(nearest.export)
    for entry in manifest_of(build)["tensors"]:
        if entry["quantized"]:
            same = all(
                torch.equal(value, plain[key]) for key, value in parts(ours, entry["name"]).items()
            )
            assert same == (entry["name"] in fallbacks), entry["name"]
    return fallbacks


def test_inputs_that_are_all_zero(tmp_path: Path) -> None:
    def silence(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.input_layernorm.weight"].zero_()

    listener = Listener()
    fallbacks = held_beside_nearest(changed(tmp_path, silence), tmp_path, listener)
    # Without values attention says nothing, so what comes behind it hears nothing, either.
    heads = ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert fallbacks == {
        f"model.layers.1.self_attn.{head}.weight": "its inputs are all zero" for head in heads
    }
    expected = (
        "4 of 14 weights are rounded to nearest after all, such as "
        "model.layers.1.self_attn.k_proj.weight: its inputs are all zero."
    )
    assert listener.notes == [expected]


def test_inputs_that_are_not_finite(tmp_path: Path) -> None:
    def shout(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"].mul_(1e38)

    fallbacks = held_beside_nearest(changed(tmp_path, shout), tmp_path, Listener())
    assert fallbacks == {
        "model.layers.1.mlp.up_proj.weight": "what rounding it costs is beyond float32",
        "model.layers.1.mlp.down_proj.weight": "its inputs are not finite",
    }


def test_some_inputs_that_are_always_zero(tmp_path: Path) -> None:
    """Their columns do not matter: no fallback, and the others are not harmed."""

    def silence(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            tensors[f"model.layers.{layer}.input_layernorm.weight"][[0, 5, 64, 100]] = 0.0
            tensors[f"model.layers.{layer}.mlp.gate_proj.weight"][:70] = 0.0

    assert held_beside_nearest(changed(tmp_path, silence), tmp_path, Listener()) == {}


def test_too_few_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for an expert that the router hardly ever chooses."""
    monkeypatch.setattr(passes, "_FEWEST", 100_000)
    listener = Listener()
    fallbacks = held_beside_nearest(changed(tmp_path, lambda tensors: None), tmp_path, listener)
    assert len(fallbacks) == 14
    assert set(fallbacks.values()) == {"only 1024 tokens came to it"}
    assert "14 of 14 weights" in listener.notes[0]


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 70] = float("nan")

    build = changed(tmp_path, spoil)
    with pytest.raises(nf4_pipeline.PipelineError, match=r"layers\.1\.mlp\.down_proj.*NaN"):
        run_stage(build, "quantize", settings(tmp_path / "text.txt"), CPU, SILENT)
    assert build.record(QUANTIZE) is None


def test_modules_that_are_skipped_change_nothing_before_them(make: Make, tmp_path: Path) -> None:
    """What comes behind them sees other inputs, and so has other codes."""
    pair = make("llama")
    build = downloaded(pair.checkpoint, tmp_path)
    skip = ("layers.0.mlp.gate_proj", "layers.1.mlp.gate_proj")
    quantized(build, settings(skip_modules=skip))
    manifest = manifest_of(build)
    assert manifest["recipe"]["quantize"]["skip_modules"] == list(skip)
    ours, whole = read_tensors(build.export), read_tensors(pair.build.export)
    kept = {e["name"] for e in manifest["tensors"] if e["reason"] == "skipped by the recipe"}
    assert len(kept) == 2
    source = read_tensors(pair.checkpoint)
    differing = set()
    for key, value in ours.items():
        if key in kept:
            assert torch.equal(value, source[key]), key
        elif not torch.equal(value, whole[key]):
            differing.add(key)
    assert not any(key.startswith("model.layers.0.self_attn") for key in differing)
    assert any(key.startswith("model.layers.0.mlp.down_proj") for key in differing)
    assert any(key.startswith("model.layers.1.self_attn") for key in differing)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_shards_hold_what_a_single_file_holds(kind: str, make: Make, tmp_path: Path) -> None:
    pair = make(kind)
    sharded = make_checkpoint(tmp_path / "sharded", kind, max_shard_size="60KB")
    shorten_context(sharded)
    build = downloaded(sharded, tmp_path)
    quantized(build, settings())
    cut = Build(copy_of(pair.build.root, tmp_path / "cut"))
    options = settings()
    options = replace(options, serialize=SerializeRecipe("40KB"))
    assert not run_stage(cut, "quantize", options, CPU, SILENT).ran
    run_stage(cut, "serialize", options, CPU, SILENT, replaces=True)
    whole = read_tensors(pair.build.export)
    for other in (build, cut):
        assert len(list(other.export.glob("*.safetensors"))) > 1
        found = read_tensors(other.export)
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[key], whole[key]) for key in whole)
        assert (other.export / "calibration.json").is_file()


def test_layers_outside_the_blocks_are_calibrated(tmp_path: Path) -> None:
    """project_in and project_out of OPT."""
    build = downloaded(make_checkpoint(tmp_path / "model", "opt"), tmp_path)
    quantized(build, settings(tokens=8192))
    outside = [e for e in manifest_of(build)["tensors"] if ".project_" in e["name"]]
    assert [e["quantized"] for e in outside] == [True, True]
    assert manifest_of(build)["calibration"]["fallbacks"] == {}


def test_tokens_of_another_vocabulary(make: Make, tmp_path: Path) -> None:
    pair = make("llama")
    build = Build(copy_of(pair.build.root, tmp_path / "build"))
    path = build.root / "calibration" / "tokens.json"
    tokens = read_json(path)
    tokens["ids"][0][0] = 257
    path.write_text(json.dumps(tokens))
    with pytest.raises(nf4_pipeline.PipelineError, match="token 257 is beyond the model's 257"):
        run_stage(build, "quantize", settings(), CPU, SILENT)


PROJECTIONS: Final = {
    "falcon-7b": ("mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight"),
    "gpt2": ("mlp.c_fc.weight", "mlp.c_proj.weight"),
}


def let_columns_run_away(checkpoint: Path, kind: str, stored: torch.dtype) -> None:
    """Blocks near zero beside others of which they see the same inputs, so that they make up for
    what those lose; the weights that are changed are stored in another dtype, if it is one.
    """
    (path,) = checkpoint.glob("*.safetensors")
    tensors = load_file(path)
    first, second = PROJECTIONS[kind]
    for down in [name for name in tensors if name.endswith(second)]:
        up = down.replace(second, first)
        # [rows, columns] of each; views, so what is written is written into them
        rows, columns = ((t.T if kind == "gpt2" else t) for t in (tensors[up], tensors[down]))
        half = len(rows) // 2
        rows[:half] = 0.5 * rows[-half:]
        columns[:, :half] *= 1e-3
        tensors[down] = tensors[down].to(stored)
        if stored == torch.float32:  # what bfloat16 rounds
            tensors[down] *= 1 + torch.rand_like(tensors[down]) / 256
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "stored"), [(k, torch.bfloat16) for k in PROJECTIONS] + [("falcon-7b", torch.float32)]
)
def test_scales_stay_within_what_verifying_allows(
    kind: str, stored: torch.dtype, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", kind)
    let_columns_run_away(checkpoint, kind, stored)
    build = downloaded(checkpoint, tmp_path)
    quantized(build, settings())
    tensors, source = read_tensors(build.export), read_tensors(checkpoint)
    reached, weights = [], manifest_of(build)["tensors"]
    assert manifest_of(build)["calibration"]["fallbacks"] == {}
    for entry in (entry for entry in weights if entry["quantized"]):
        exact = source[entry["source_name"]].double().numpy()
        largest = largest_of(exact.T if entry["transposed"] else exact)
        own = {key: t.numpy() for key, t in parts(tensors, entry["name"]).items()}
        scales = np.abs(StoredWeight.read(entry["name"], own).scales.scales())
        reached.append(float((scales / largest).max()))
    assert max(reached) <= 2 * (1 + 1 / 256)
    assert max(reached) > 1.9  # else it shows nothing
