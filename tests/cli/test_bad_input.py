"""Input that cannot be used: one clear message, the right exit code, nothing half-written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nf4_pipeline.build_folder import Build
from nf4_pipeline.processes.in_process import in_process
from nf4_pipeline.records import QUANTIZE
from safetensors.torch import load_file, save_file

from tests.support.command_line import run_nf4, without_progress
from tests.support.failures import check_message, check_nothing_written
from tests.support.jobs import download
from tests.support.tiny import INDEX, SHARDS, Done, copy_of, edit_json, nf4

WEIGHT = "transformer.h.0.mlp.dense_h_to_4h.weight"


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most commands run in this process; some, one of each kind of fault, in one of their own."""
    monkeypatch.chdir(tmp_path)


def check_nothing_half_written(build: Build) -> None:
    """A build folder with its source and nothing else of worth."""
    assert not list(build.root.rglob("*.partial"))
    assert not list(build.root.glob("quantized/*.safetensors"))
    assert not list(build.root.glob("export/*"))
    assert [path.name for path in (build.root / "records").iterdir()] == ["download.json"]


def change_tensor(
    shard: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]
) -> None:
    """Replaces one tensor of a file; None takes it out."""
    tensors = load_file(shard)
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed.contiguous()
    save_file(tensors, shard, metadata={"format": "pt"})


def shard_of(model: Path, name: str) -> Path:
    return model / str(json.loads((model / INDEX).read_text())["weight_map"][name])


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def config_is_a_list(model: Path) -> None:
    (model / "config.json").write_text("[]")


def config_is_cut(model: Path) -> None:
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text[: len(text) // 2])


def no_weights(model: Path) -> None:
    for name in (*SHARDS, INDEX):
        (model / name).unlink()


def missing_shard(model: Path) -> None:
    (model / SHARDS[1]).unlink()


def truncated_shard(model: Path) -> None:
    content = (model / SHARDS[0]).read_bytes()
    (model / SHARDS[0]).write_bytes(content[: len(content) // 2])


def shard_is_an_error_page(model: Path) -> None:
    (model / SHARDS[0]).write_text("<!DOCTYPE html><html>404 Not Found</html>" * 3)


def escaping_index(model: Path) -> None:
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["transformer.ln_f.weight"] = "../../secret.safetensors"
    (model / INDEX).write_text(json.dumps(index))


def already_quantized(model: Path) -> None:
    edit_json(
        model / "config.json",
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
    )


def encoder_decoder(model: Path) -> None:
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    (model / "config.json").write_text(json.dumps(config))


def vision(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_size": 64}))


def unknown_architecture(model: Path) -> None:
    edit_json(
        model / "config.json",
        model_type="brand-new",
        auto_map={"AutoModelForCausalLM": "modeling_new.NewForCausalLM"},
    )


UNUSABLE: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no config": (no_config, (r"has no config\.json", "save_pretrained|Hub")),
    "config a list": (config_is_a_list, (r"config\.json holds a list", "expected a JSON object")),
    "config cut": (config_is_cut, (r"config\.json is not valid JSON", "again")),
    "no weights": (no_weights, ("holds no weights", r"expected model\.safetensors\.index\.json")),
    "missing shard": (missing_shard, ("lacks 1 of the 2 shards", SHARDS[1], "again")),
    "truncated shard": (truncated_shard, (SHARDS[0], "is truncated", "[0-9,]+, it has", "again")),
    "an error page": (shard_is_an_error_page, (SHARDS[0], "claims a header of", "again")),
    "escaping index": (escaping_index, (INDEX, r"'\.\./\.\./secret", "expected the plain name")),
    "already quantized": (
        already_quantized,
        ("already quantized", "'bitsandbytes'", "Start from the 16-bit"),
    ),
    "t5": (encoder_decoder, ("t5 model", "no causal LM", "decoder-only")),
    "vit": (vision, ("vit model", "no causal LM")),
    "unknown architecture": (unknown_architecture, ("'brand-new'", "does not know", "never run")),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_source_that_cannot_be_used(tiny_falcon: Path, tmp_path: Path, case: str) -> None:
    damage, patterns = UNUSABLE[case]
    model = copy_of(tiny_falcon, tmp_path / "model")
    damage(model)
    done = run_nf4("download", model)
    check_message(done, 1, re.escape(str(model)), *patterns)
    check_nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("name", "status", "patterns"),
    [
        ("no-such-model", 2, ("no-such-model: no such folder", "ORG/NAME")),
        ("./no/such/folder", 2, ("no such folder",)),
        ("nobody/nothing", 1, ("nobody/nothing", "(?i)offline|cache")),
        ("bad name/with spaces", 2, ("bad name/with spaces", "ORG/NAME")),
    ],
)
def test_an_unknown_model(
    tmp_path: Path, name: str, status: int, patterns: tuple[str, ...]
) -> None:
    check_message(nf4("download", name, cwd=tmp_path), status, *patterns)
    check_nothing_written(tmp_path)


def test_a_revision_of_a_folder(tiny_falcon: Path, tmp_path: Path) -> None:
    done = run_nf4("download", tiny_falcon, "--revision", "main")
    check_message(done, 2, "--revision main means nothing", "local folder")
    check_nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("recipe", "patterns"),
    [
        ("[quantise]\n", ("'quantise' as a table is unknown", "Did you mean 'quantize'")),
        ("[verify]\nmax_new_tokens = 0\n", (r"verify\.max_new_tokens is 0", "expected > 0")),
        ("[verify\n", ("not valid TOML",)),
    ],
)
def test_a_bad_recipe(
    tiny_falcon: Path, tmp_path: Path, recipe: str, patterns: tuple[str, ...]
) -> None:
    path = tmp_path / "my-recipe.toml"
    path.write_text(recipe)
    done = run_nf4("build", tiny_falcon, "--recipe", path)
    check_message(done, 2, r"my-recipe\.toml", *patterns)
    check_nothing_written(tmp_path)


def test_a_recipe_that_is_not_there(tiny_falcon: Path, tmp_path: Path) -> None:
    done = run_nf4("build", tiny_falcon, "--recipe", "none.toml")
    check_message(done, 2, r"none\.toml cannot be read", "No such file")
    check_nothing_written(tmp_path)


def test_wrong_usage(tmp_path: Path) -> None:
    for arguments in (("build",), ("nonsense",), ("download", "sample", "--nonsense")):
        done = nf4(*arguments, cwd=tmp_path)
        assert done.status == 2
        assert "Traceback" not in done.err
        assert "Error: " in done.err
        assert done.out == ""


def downloaded(model: Path, folder: Path) -> Build:
    """A build of which only `download` is done."""
    with in_process():
        build, *_ = download(model, folder / "artifacts")
    return build


def quantize(build: Build, folder: Path, recipe: str = "") -> Done:
    path = folder / "recipe.toml"
    path.write_text(recipe)
    return run_nf4("quantize", "--build-dir", build.root, "--recipe", path)


@pytest.mark.parametrize("patterns", ['"*"', '"transformer"', '"self_attention", "mlp"'])
def test_a_recipe_that_leaves_no_layer(
    downloaded_falcon: Path, tmp_path: Path, patterns: str
) -> None:
    build = Build(copy_of(downloaded_falcon, tmp_path / "build"))
    done = quantize(build, tmp_path, f"[quantize]\nskip_modules = [{patterns}]\n")
    check_message(done, 1, "no linear layer that could be quantized", "8 skipped by the recipe")
    check_nothing_half_written(build)


def test_weights_that_do_not_fit_the_config(tiny_falcon: Path, tmp_path: Path) -> None:
    model = copy_of(tiny_falcon, tmp_path / "model")
    edit_json(model / "config.json", hidden_size=128)
    check_message(
        run_nf4("download", model),
        1,
        r"'transformer\..*' in " + SHARDS[0],
        r"has the shape \(.*64.*\)",
        r"config\.json has \(.*128.*\)",
        "do not belong together",
    )
    check_nothing_written(tmp_path)


def test_a_config_that_makes_no_model(tiny_falcon: Path, tmp_path: Path) -> None:
    model = copy_of(tiny_falcon, tmp_path / "model")
    edit_json(model / "config.json", num_attention_heads=7)
    done = nf4("download", model, cwd=tmp_path)
    assert done.status == 1
    said = without_progress(done.err)
    # The first is what transformers says as it reads the config; before 5.20 or so it says it as it
    # builds the model.
    assert said.startswith(
        (
            f"Error: {model / 'config.json'} is not a valid falcon config: ",
            "Error: transformers cannot build a falcon model from this config: ",
        )
    )
    assert "Traceback" not in done.err
    check_nothing_written(tmp_path)


def test_a_tensor_that_the_model_needs(tiny_falcon: Path, tmp_path: Path) -> None:
    model = copy_of(tiny_falcon, tmp_path / "model")
    change_tensor(shard_of(model, WEIGHT), WEIGHT, lambda tensor: None)
    index = json.loads((model / INDEX).read_text())
    del index["weight_map"][WEIGHT]
    (model / INDEX).write_text(json.dumps(index))
    done = run_nf4("download", model)
    check_message(done, 1, "lacks 1 tensors", re.escape(WEIGHT), "again")
    check_nothing_written(tmp_path)


def test_a_weight_that_is_not_finite(tiny_falcon: Path, tmp_path: Path) -> None:
    model = copy_of(tiny_falcon, tmp_path / "model")
    shard = shard_of(model, WEIGHT)
    assert shard.name == SHARDS[0]

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[1, 5] = float("nan")
        return tensor

    change_tensor(shard, WEIGHT, spoil)
    build = downloaded(model, tmp_path)
    done = nf4("quantize", "--build-dir", build.root, cwd=tmp_path)
    check_message(
        done, 1, re.escape(WEIGHT), shard.name, "an infinity or a NaN", "weights 64 and on", "look"
    )
    assert not (build.quantized / shard.name).exists()
    assert not list(build.root.rglob("*.partial"))
    assert build.record(QUANTIZE) is None


def test_tensors_that_the_model_does_not_know_do_no_harm(tiny_falcon: Path, tmp_path: Path) -> None:
    """Old checkpoints hold buffers that newer models compute, such as rotary frequencies."""
    model = copy_of(tiny_falcon, tmp_path / "model")
    tensors = load_file(model / SHARDS[1])
    for layer in range(2):
        name = f"transformer.h.{layer}.self_attention.maybe_rotary.inv_freq"
        tensors[name] = torch.ones(8)
    save_file(tensors, model / SHARDS[1], metadata={"format": "pt"})
    build = downloaded(model, tmp_path)
    done = quantize(build, tmp_path)
    assert done.status == 0, done.err
    assert len(list(build.quantized.glob("*.safetensors"))) == 2


def test_a_model_whose_only_linear_layer_is_its_head(tmp_path: Path) -> None:
    """transformers has none so small; a Falcon without layers comes to the same."""
    from tests.support.tiny import write_falcon

    model = write_falcon(tmp_path / "model", layers=0, shards=1)
    build = downloaded(model, tmp_path)
    check_message(quantize(build, tmp_path), 1, "FalconForCausalLM has no linear layer", "tensors")
    check_nothing_half_written(build)
