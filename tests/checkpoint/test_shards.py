"""Cutting files into shards: tensors that belong together stay together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nf4_pipeline.checkpoint.digest import digest_file
from nf4_pipeline.checkpoint.shards import Piece, name_shards, split_file, write_shard
from nf4_pipeline.nf4.stored_weight import stored_tensors
from nf4_pipeline.progress import SILENT
from safetensors.torch import load_file, save_file

KINDS = {"U8": torch.uint8, "F32": torch.float32}
GROUPS = [
    stored_tensors(name, (32, 64), "bfloat16")
    for name in ("h.1.weight", "h.10.weight", "h.1.weight.odd", "z.weight")
]


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    """Four weights with companions, two of them with names that begin alike, and two others."""
    dice = torch.Generator().manual_seed(0)
    tensors = {"norm.weight": torch.rand(64, generator=dice), "h.bias": torch.rand(8)}
    for group in GROUPS:
        for part in group:
            values = torch.randint(0, 255, part.shape, generator=dice)
            tensors[part.name] = values.to(KINDS[part.dtype])
    path = tmp_path / "whole.safetensors"
    save_file(tensors, path)
    return path


def names(piece: Piece) -> set[str]:
    return {tensor.name for tensor in piece.tensors}


def family(name: str) -> set[str]:
    return {part.name for part in stored_tensors(name, (32, 64), "bfloat16")}


@pytest.mark.parametrize("limit", [1, 100, 1100, 2500, 3000, 5000, 9000])
def test_a_weight_stays_with_its_companions(quantized: Path, limit: int) -> None:
    pieces = split_file(quantized, limit, GROUPS)
    found = [name for piece in pieces for name in names(piece)]
    assert sorted(found) == sorted(load_file(quantized))
    for weight in ("h.1.weight", "h.10.weight", "h.1.weight.odd", "z.weight"):
        assert [family(weight) <= names(piece) for piece in pieces].count(True) == 1


@pytest.mark.parametrize("limit", [2500, 3000, 5000])
def test_pieces_keep_to_the_limit_where_they_can(quantized: Path, limit: int) -> None:
    pieces = split_file(quantized, limit, GROUPS)
    assert len(pieces) > 1
    assert all(piece.nbytes <= limit for piece in pieces)
    # As few as fit in order: no piece could have taken the first unit of the next one.
    assert len(pieces) <= -(-quantized.stat().st_size // (limit - 2300))


def test_a_weight_larger_than_the_limit_stands_alone(quantized: Path) -> None:
    pieces = split_file(quantized, 1, GROUPS)
    assert sorted(len(piece.tensors) for piece in pieces) == [1, 1, 6, 6, 6, 6]


def test_a_file_within_the_limit_is_taken_whole(quantized: Path) -> None:
    total = sum(tensor.nbytes for tensor in load_file(quantized).values())
    (piece,) = split_file(quantized, total, GROUPS)
    assert piece.whole
    assert piece.nbytes == total
    assert not any(piece.whole for piece in split_file(quantized, total - 1, GROUPS))


def test_pieces_written_as_shards_hold_the_same_tensors(quantized: Path, tmp_path: Path) -> None:
    pieces = split_file(quantized, 4000, GROUPS)
    merged: dict[str, torch.Tensor] = {}
    for name, piece in zip(name_shards(len(pieces)), pieces, strict=True):
        with SILENT.task("reshard", piece.nbytes) as task:
            shard = write_shard(tmp_path / name, piece, task)
        assert shard.name == name
        assert shard.digest == digest_file(tmp_path / name)
        assert set(shard.tensors) == names(piece)
        merged |= load_file(tmp_path / name)
    original = load_file(quantized)
    assert set(merged) == set(original)
    for name, tensor in original.items():
        assert tensor.dtype == merged[name].dtype
        assert torch.equal(tensor, merged[name])


def test_names_of_shards() -> None:
    assert name_shards(1) == ["model.safetensors"]
    assert name_shards(2) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
