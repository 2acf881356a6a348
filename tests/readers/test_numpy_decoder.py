"""The decoder that shares no code with us: the same bits, in every dtype that readers use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from threading import Event
from typing import Any

import bitsandbytes.functional
import numpy as np
import pytest
import torch
from nf4_pipeline.nf4.rtn import round_to_nearest
from nf4_pipeline.readers import decoded, numpy_decoder
from nf4_pipeline.readers.decoded import decode_with_numpy
from safetensors.numpy import save_file

SHAPES = {"ragged": (7, 45), "whole": (96, 64), "several pieces": (1100, 1024)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of awkward and of ordinary shapes, in two files."""
    folder = tmp_path_factory.mktemp("decoded")
    generator = np.random.default_rng(0)
    for number, (name, shape) in enumerate(SHAPES.items()):
        weight = generator.standard_normal(shape, np.float32)
        weight.reshape(-1)[:64] = 0
        stored = round_to_nearest(weight.view(np.uint32), "float32").tensors(name)
        if number == 2:
            save_file(stored, folder / "model-2.safetensors")
        else:
            save_file(stored, folder / f"model-{number}.safetensors")
    return folder


def test_no_longer_than_a_page_and_nothing_of_ours() -> None:
    text = Path(numpy_decoder.__file__).read_text("utf-8")
    assert len(text.splitlines()) <= 60
    assert "nf4_pipeline" not in text


def test_bits_equal_ours(folder: Path) -> None:
    result = decode_with_numpy(folder, SHAPES)
    assert (result.outcome, result.layers) == ("passed", 3), result.why


def test_many_weights_are_shared_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded, "_MANY", 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(6))
    assert decode_with_numpy(folder, SHAPES).outcome == "passed"
    wrong = SHAPES | {"ragged": (45, 7)}
    result = decode_with_numpy(folder, wrong)
    assert (result.outcome, "ragged has the shape" in result.why) == ("failed", True)
    stop = Event()
    stop.set()
    assert decode_with_numpy(folder, SHAPES, stop=stop).outcome in ("failed", "passed")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rounds_as_bitsandbytes_does(folder: Path, dtype: str) -> None:
    tensors = numpy_decoder.open_tensors(folder)
    for name in SHAPES:
        state = json.loads(tensors[name + numpy_decoder.STATE].tobytes())
        pieces = list(numpy_decoder.decode(tensors, name, state))
        found = numpy_decoder.round_to(dtype, np.concatenate(pieces))
        expected = _dequantized(tensors, name, dtype)
        if dtype == "bfloat16":
            found = torch.from_numpy(found).view(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(found.astype(np.float32), expected)


def _dequantized(tensors: dict[str, Any], name: str, dtype: str) -> Any:
    parts = {
        key.removeprefix(f"{name}."): torch.from_numpy(np.array(value))
        for key, value in tensors.items()
        if key.startswith(f"{name}.")
    }
    state = bitsandbytes.functional.QuantState.from_dict(parts, torch.device("cpu"))
    # As one row: of others, bitsandbytes takes wrong scales on a CPU where they are awkward.
    state.shape, state.dtype = torch.Size([state.shape.numel()]), getattr(torch, dtype)
    packed = torch.from_numpy(np.array(tensors[name])).view(-1, 1)
    weight = bitsandbytes.functional.dequantize_4bit(packed, state)
    return weight.reshape(-1).float().numpy()


def test_a_changed_scale_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = numpy_decoder.open_tensors

    def changed(path: Path) -> dict[str, Any]:
        tensors = opened(path)
        tensors["whole.absmax"] = tensors["whole.absmax"] ^ 1
        return tensors

    monkeypatch.setattr(numpy_decoder, "open_tensors", changed)
    result = decode_with_numpy(folder, SHAPES)
    assert result.outcome == "failed"
    assert "whole is decoded otherwise" in result.why


def test_weights_that_the_manifest_lacks_are_seen(folder: Path) -> None:
    result = decode_with_numpy(folder, {"whole": (96, 64)})
    assert result.outcome == "failed"
    assert "in the files alone" in result.why


def test_runs_as_a_script(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", numpy_decoder.__file__, folder],
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.split(maxsplit=1)[1] for line in done.stdout.splitlines()] == list(SHAPES)
