"""Folders that are no checkpoint: what they are called, and the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from nf4_pipeline.checkpoint.source import open_checkpoint
from nf4_pipeline.errors import SourceError
from nf4_pipeline.model.config import read_config

COMMIT = "0123456789" * 4


def cache(folder: Path, *, snapshots: int = 1) -> Path:
    root = folder / "models--org--some-name"
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    for number in range(snapshots):
        (root / "snapshots" / f"{number}{COMMIT[1:]}").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    return root


def adapter(folder: Path) -> Path:
    value = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps(value))
    return folder


def adapter_of_an_artifact(folder: Path) -> Path:
    base = folder / "artifact"
    base.mkdir()
    (base / "config.json").write_text('{"quantization_config": {"load_in_4bit": true}}')
    said = {"base_model_name_or_path": str(base), "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def training(folder: Path) -> Path:
    for step in (9, 100, 20):
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "config.json").write_text("{}")
    return folder


def gguf(folder: Path) -> Path:
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    return folder


def dead_config(folder: Path) -> Path:
    (folder / "config.json").symlink_to("gone.json")
    return folder


CASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "the root of a cache": (cache, rf"Hub cache's folder for org/some-name.*snapshots/{COMMIT}"),
    "its snapshots": (lambda f: cache(f) / "snapshots", rf"Give .*{COMMIT}"),
    "a cache without any": (lambda f: cache(f, snapshots=0), "holds no snapshot of it"),
    "an adapter": (adapter, r"an adapter \(LORA\) of org/base.*Merge it into that model first"),
    "an adapter of an artifact": (
        adapter_of_an_artifact,
        "quantized itself: what is merged into it is rounded twice. Load the 16-bit model",
    ),
    "a training": (training, r"checkpoint-9, checkpoint-20, checkpoint-100.*such as .*-100\."),
    "GGUF": (gguf, "GGUF files"),
    "a dead link": (dead_config, r"is a dead link: there is no gone\.json"),
    "something else": (lambda f: f, "has no config.json, so it is not"),
}


@pytest.mark.parametrize("kind", CASES)
def test_without_a_config(kind: str, tmp_path: Path) -> None:
    make, message = CASES[kind]
    with pytest.raises(SourceError, match=message):
        read_config(make(tmp_path))


def test_a_snapshot_whose_blob_is_gone(tmp_path: Path) -> None:
    snapshot = cache(tmp_path) / "snapshots" / COMMIT
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    with pytest.raises(SourceError, match=rf"dead link: abc is no longer.*--revision {COMMIT}"):
        open_checkpoint(snapshot)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.fp16.safetensors", r"as a variant \(model\.fp16\.safetensors\)"),
        ("weights.safetensors", r"There is weights\.safetensors: if that is the model, rename it"),
        ("pytorch_model.bin", "only as Python pickles"),
        ("notes.txt", "holds no weights: expected"),
    ],
)
def test_without_weights_that_would_be_loaded(file: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(SourceError, match=message):
        open_checkpoint(tmp_path)


def test_an_index_of_other_shards(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(b"x")
    index = {"weight_map": {"a": "pytorch-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match="belongs to another set of files than model-00001"):
        open_checkpoint(tmp_path)
