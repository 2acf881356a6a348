"""Hashing a file that is never written: any order of parts, bounded memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nf4_pipeline.checkpoint.layout import StoredTensor, plan_layout
from nf4_pipeline.checkpoint.sink import HashingSink
from nf4_pipeline.checkpoint.writer import writing

STEP = 700


@pytest.mark.parametrize("held", [0, 1_000, 10**9])
@pytest.mark.parametrize("order", ["in turn", "backwards", "shuffled"])
def test_the_hashes_are_those_of_the_file(tmp_path: Path, held: int, order: str) -> None:
    dice = np.random.default_rng(0)
    content = {f"t{i}": dice.bytes(1_500 + 37 * i) for i in range(9)} | {"empty": b""}
    stored = {n: StoredTensor(n, "U8", (len(d),), len(d)) for n, d in content.items()}
    layout = plan_layout(stored.values())
    parts = [
        (n, s, d[s : s + STEP]) for n, d in content.items() for s in range(0, len(d) or 1, STEP)
    ]
    if order == "backwards":
        parts.reverse()
    elif order == "shuffled":
        parts = [parts[i] for i in dice.permutation(len(parts))]

    with writing(tmp_path / "m.safetensors", layout) as output:
        for part in parts:
            output.write(*part)
        expected = output.finish()
    sink = HashingSink(layout, held)
    rounds = 0
    while any(sink.wants([tensor]) for tensor in stored.values()):
        rounds += 1
        for part in parts:
            sink.write(*part)
            assert sum(map(len, sink._held.values())) <= held
    assert sink.finish() == expected
    assert rounds == 1 or held < 10**9


def test_a_file_that_lacks_bytes_has_no_hash() -> None:
    sink = HashingSink(plan_layout([StoredTensor("a", "U8", (10,), 10)]))
    sink.write("a", 0, b"12345")
    assert sink.wants([StoredTensor("a", "U8", (10,), 10)])
    with pytest.raises(RuntimeError, match=r"of .* bytes"):
        sink.finish()
