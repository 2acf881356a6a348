"""Places and sizes that are known before any byte is written."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from nf4_pipeline.checkpoint.layout import StoredTensor, plan_layout
from nf4_pipeline.checkpoint.safetensors_header import DTYPE_BYTES, read_header
from nf4_pipeline.checkpoint.writer import writing
from nf4_pipeline.nf4.stored_weight import stored_tensors
from safetensors.torch import load_file


def kept(name: str, dtype: str, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(name, dtype, shape, prod(shape) * DTYPE_BYTES[dtype])


WEIGHTS = [
    *stored_tensors("h.0.weight", (3, 21), "bfloat16"),
    kept("norm", "F32", (5,)),
    *stored_tensors("h.1.weight", (64, 64), "bfloat16"),
    kept("bias", "F16", (3,)),
    kept("é", "BF16", (2, 2)),
    kept("counter", "I64", ()),
    kept("empty", "F32", (0, 4)),
]


def test_tensors_follow_each_other_without_a_hole() -> None:
    layout = plan_layout(WEIGHTS)
    position = layout.data_start
    for tensor in layout.tensors:
        assert tensor.offset == position
        position += tensor.nbytes
    assert position == layout.nbytes
    assert {t.name for t in layout.tensors} == {t.name for t in WEIGHTS}


def test_every_element_is_aligned() -> None:
    layout = plan_layout(WEIGHTS)
    assert layout.data_start % 64 == 0
    assert all(tensor.offset % DTYPE_BYTES[tensor.dtype] == 0 for tensor in layout.tensors)


def test_tensors_of_even_length_keep_the_order_in_which_they_are_made() -> None:
    names = [t.name for t in plan_layout(WEIGHTS).tensors if t.nbytes % 8 == 0]
    assert names == [t.name for t in WEIGHTS if t.nbytes % 8 == 0]


def test_the_header_fills_exactly_its_room() -> None:
    layout = plan_layout(WEIGHTS)
    header = layout.header()
    assert len(header) == layout.data_start
    assert int.from_bytes(header[:8], "little") == layout.data_start - 8
    assert len(header) - len(header.rstrip(b" ")) < 64


def test_the_file_has_the_predicted_bytes_and_the_library_reads_it(tmp_path: Path) -> None:
    layout = plan_layout(WEIGHTS)
    dice = np.random.default_rng(0)
    content = {t.name: dice.bytes(t.nbytes) for t in WEIGHTS}
    path = tmp_path / "m.safetensors"
    with writing(path, layout) as output:
        for name, data in content.items():
            output.write(name, 0, data)
        output.finish()
    assert path.stat().st_size == layout.nbytes
    assert read_header(path) == tuple(sorted(layout.tensors, key=lambda t: (t.offset, t.nbytes)))
    loaded = load_file(path)
    for tensor in WEIGHTS:
        assert tuple(loaded[tensor.name].shape) == tensor.shape
        raw = loaded[tensor.name].reshape(-1).view(torch.uint8)
        assert raw.numpy().tobytes() == content[tensor.name], tensor.name


@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(DTYPE_BYTES)),
            st.lists(st.integers(0, 9), max_size=3),
            st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12),
        ),
        max_size=12,
        unique_by=lambda part: part[2],
    )
)
@limits(max_examples=200)
def test_any_tensors(parts: list[tuple[str, list[int], str]]) -> None:
    layout = plan_layout(kept(name, dtype, tuple(shape)) for dtype, shape, name in parts)
    header = layout.header()
    assert len(header) == layout.data_start
    assert layout.nbytes == layout.data_start + sum(t.nbytes for t in layout.tensors)
    assert all(tensor.offset % DTYPE_BYTES[tensor.dtype] == 0 for tensor in layout.tensors)


def test_a_weight_has_a_quant_state_whose_length_is_known() -> None:
    layout = plan_layout(WEIGHTS)
    states = [t for t in layout.tensors if ".quant_state." in t.name]
    assert len(states) == 2
    assert all(t.nbytes == t.shape[0] > 100 for t in states)
