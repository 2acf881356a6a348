"""A checkpoint folder: one file, or shards that must agree with their index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nf4_pipeline.checkpoint.source import open_checkpoint, read_json
from nf4_pipeline.checkpoint.weight_files import INDEX_FILE, SINGLE_FILE
from nf4_pipeline.errors import CheckpointError, SourceError
from safetensors.torch import save_file

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / FIRST)
    save_file({"c": torch.ones(4)}, tmp_path / SECOND)
    write_index(tmp_path, {"a": FIRST, "b": FIRST, "c": SECOND})
    return tmp_path


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards(sharded: Path) -> None:
    found = open_checkpoint(sharded)
    assert found.files == (FIRST, SECOND)
    assert [(t.name, t.file) for t in found.tensors] == [("a", FIRST), ("b", FIRST), ("c", SECOND)]
    assert found.nbytes == 4 * 9
    assert found.path(SECOND) == sharded / SECOND


def test_a_single_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / SINGLE_FILE)
    found = open_checkpoint(tmp_path)
    assert (found.files, [t.name for t in found.tensors]) == ((SINGLE_FILE,), ["a"])


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    with pytest.raises(CheckpointError, match=f"lacks 1 of the 2 shards.*{SECOND}"):
        open_checkpoint(sharded)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    content = (sharded / SECOND).read_bytes()
    (sharded / SECOND).write_bytes(content[:-4])
    with pytest.raises(CheckpointError, match=f"{SECOND} is truncated"):
        open_checkpoint(sharded)


def test_an_absent_tensor_is_remembered(sharded: Path) -> None:
    """Whether the model needs it is not known here."""
    write_index(sharded, {"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND})
    assert open_checkpoint(sharded).promised == {"d": SECOND}


def test_a_tensor_in_another_shard_than_the_index_says(sharded: Path) -> None:
    write_index(sharded, {"a": SECOND, "b": FIRST, "c": SECOND})
    first = open_checkpoint(sharded).tensors[0]
    assert (first.name, first.file) == ("a", FIRST)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..",
        "",
        "model.bin",
        "model\n.safetensors",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_a_shard_name_that_escapes_or_is_no_name(sharded: Path, name: Any) -> None:
    write_index(sharded, {"a": FIRST, "b": name})
    with pytest.raises(CheckpointError, match=r"expected the plain name of a \.safetensors file"):
        open_checkpoint(sharded)


def test_of_a_duplicate_the_last_counts_as_in_transformers(sharded: Path) -> None:
    save_file({"a": torch.zeros(2), "c": torch.ones(4)}, sharded / SECOND)
    found = open_checkpoint(sharded)
    assert [(t.name, t.file) for t in found.tensors] == [("b", FIRST), ("a", SECOND), ("c", SECOND)]


def test_a_tensor_that_the_index_forgot_is_still_there(sharded: Path) -> None:
    write_index(sharded, {"a": FIRST, "c": SECOND})
    assert [t.name for t in open_checkpoint(sharded).tensors] == ["a", "b", "c"]


def test_the_single_file_comes_before_the_index(sharded: Path) -> None:
    save_file({"x": torch.ones(2)}, sharded / SINGLE_FILE)
    (sharded / FIRST).unlink()
    assert [t.name for t in open_checkpoint(sharded).tensors] == ["x"]


@pytest.mark.parametrize("named", [SECOND, "other.safetensors.index.json"])
def test_what_the_config_names_comes_first(sharded: Path, named: str) -> None:
    save_file({"x": torch.ones(2)}, sharded / SINGLE_FILE)
    other = json.dumps({"weight_map": {"c": SECOND}})
    (sharded / "other.safetensors.index.json").write_text(other)
    (sharded / "config.json").write_text(json.dumps({"transformers_weights": named}))
    assert [t.name for t in open_checkpoint(sharded).tensors] == ["c"]


def test_two_keys_of_one_name_in_an_index_do_not_hide_a_shard(sharded: Path) -> None:
    text = json.dumps({"weight_map": {"a": FIRST, "b": FIRST, "c": SECOND}})
    (sharded / INDEX_FILE).write_text(text.replace('"b"', f'"a": "{SECOND}", "b"'))
    with pytest.raises(CheckpointError, match="'a'"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_an_index_without_a_map(sharded: Path, weight_map: Any) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(CheckpointError, match="has no weight_map"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "holds a list, expected a JSON object"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
    ],
)
def test_json_of_strangers(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_json_that_is_missing_or_too_large(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_json(tmp_path / "none.json")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(CheckpointError, match="no real one has more than"):
        read_json(tmp_path / "huge.json")


def test_no_weights_and_pickles(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"only as Python pickles.*pytorch_model\.bin"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("claims", "is_refused"),
    [
        ([16 << 20] * 4, False),
        ([16 << 20] * 5, True),
        ([1 << 20] * 65, True),
        ([(16 << 20) + 1] * 9, False),  # each is refused by itself
        ([64 << 20], False),
        ([2**63] * 3, False),
    ],
    ids=str,
)
def test_headers_that_are_large_together(
    claims: list[int], is_refused: bool, tmp_path: Path
) -> None:
    files = [f"model-{number}.safetensors" for number in range(len(claims))]
    for name, length in zip(files, claims, strict=True):
        (tmp_path / name).write_bytes(length.to_bytes(8, "little") + b"{}")
    write_index(tmp_path, dict(zip(files, files, strict=True)))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert ("claim more than 67,108,864 bytes together" in str(caught.value)) == is_refused
