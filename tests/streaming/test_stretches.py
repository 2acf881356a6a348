"""Files of weights in stretches: every byte in one of them, and none in two blocks of a model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nf4_pipeline.checkpoint.safetensors_header import HeaderTensor
from nf4_pipeline.streaming import stretches
from nf4_pipeline.streaming.stretches import cut

NAMES = ["embed.weight", "norm.weight", "h.1.a.weight", "h.1.b.weight", "h.10.a.weight", "h.2.a"]


def laid_out(tensors: list[tuple[str, int]], start: int) -> list[HeaderTensor]:
    found = []
    for number, (name, nbytes) in enumerate(tensors):
        found.append(HeaderTensor(f"{name}.{number}x", "U8", (nbytes,), start, nbytes))
        start += nbytes
    return found


@given(
    tensors=st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 40)), max_size=12),
    start=st.integers(8, 100),
)
def test_each_byte_is_in_one_stretch(tensors: list[tuple[str, int]], start: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stretches, "LARGEST", 16)
        headers = laid_out(tensors, start)
        spans = cut(headers)
    end = start
    for first, last in spans:
        assert first == end < last <= first + 16
        end = last
        blocks = {
            header.name.split(".")[1]
            for header in headers
            if header.nbytes and header.offset < last and header.offset + header.nbytes > first
        }
        assert len(blocks) == 1 or not blocks & {"1", "10", "2"}, "a stretch of two blocks"
    assert end == start + sum(nbytes for _, nbytes in tensors)
