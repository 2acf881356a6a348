"""Tied tensors that a checkpoint stores twice are dropped only if every byte is the same."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from nf4_pipeline.checkpoint.safetensors_header import read_header
from nf4_pipeline.checkpoint.source import SourceTensor
from nf4_pipeline.engine.chunks import OpenFile, cut, read_chunk
from nf4_pipeline.engine.tied_weights import TiedTensor
from nf4_pipeline.errors import TiedWeightsDiffer
from nf4_pipeline.selection import TensorPlan
from safetensors.numpy import save_file


def check(folder: Path, head: np.ndarray, embedding: np.ndarray) -> None:
    """Reads the embedding in small chunks and holds the head against each of them."""
    path = folder / "m.safetensors"
    save_file({"embedding": embedding, "head": head}, path)
    plans = {
        tensor.name: TensorPlan(SourceTensor(path.name, tensor), tensor.name, "keep", "")
        for tensor in read_header(path)
    }
    descriptor = os.open(path, os.O_RDONLY)
    try:
        tied = TiedTensor(plans["head"], OpenFile(descriptor))
        for chunk in cut(plans["embedding"], 1024):
            tied.announce(chunk)
            data = read_chunk(OpenFile(descriptor), chunk, np.empty(chunk.nbytes, np.uint8))
            tied.check(data, chunk, np.empty(chunk.nbytes, np.uint8))
    finally:
        os.close(descriptor)


def weights(rows: int, columns: int) -> np.ndarray:
    dice = np.random.default_rng(0)
    return dice.integers(0, 2**16, (rows, columns), dtype=np.uint16)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (64, 8), (97, 53)])
def test_equal_twins(shape: tuple[int, int], tmp_path: Path) -> None:
    check(tmp_path, weights(*shape), weights(*shape))


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (64, 8), (97, 53)])
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("bit", [1, 2**15])
def test_one_bit_is_enough(shape: tuple[int, int], place: int, bit: int, tmp_path: Path) -> None:
    head = weights(*shape)
    head.reshape(-1)[place] ^= bit
    with pytest.raises(TiedWeightsDiffer, match="'head' does not equal"):
        check(tmp_path, head, weights(*shape))


def test_the_same_bytes_in_another_shape(tmp_path: Path) -> None:
    with pytest.raises(TiedWeightsDiffer):
        check(tmp_path, weights(8, 4).reshape(4, 8), weights(8, 4))
