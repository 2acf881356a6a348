"""`nf4 inspect`: the tree of modules, folded where layers are alike, no wider than it may be."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nf4_pipeline.cli.module_tree import lines_of, tree_of
from nf4_pipeline.manifest.manifest import Tensor


def tensor(name: str, error: float | None = None, shape: Sequence[int] = (64, 32)) -> Tensor:
    """A tensor of a manifest; in 4 bit if it has an error."""
    weights = 1
    for size in shape:
        weights *= size
    return Tensor(
        name=name,
        quantized=error is not None,
        reason="",
        shape=tuple(shape),
        dtype="BF16",
        source_name=name,
        source_bytes=2 * weights,
        bytes=2 * weights if error is None else weights // 2,
        stored=(),
        relative_rmse=error,
    )


def layers(count: int, odd: int | None = None) -> list[Tensor]:
    found = [tensor("model.embed.weight")]
    for number in range(count):
        at = f"model.layers.{number}"
        found += [
            tensor(f"{at}.attention.q_proj.weight", 0.09 + number / 1000),
            tensor(f"{at}.norm.weight", shape=(32,)),
            tensor(f"{at}.mlp.up.weight", None if number == odd else 0.08),
        ]
    return found


def test_layers_that_are_alike_are_one_branch() -> None:
    text = "\n".join(lines_of(layers(12), 80))
    assert re.search(r"layers\.0–11\b", text)
    assert re.search(r"q_proj +4\.00  0\.0900–0\.1010$", text, re.MULTILINE)
    assert re.search(r"up +4\.00  0\.0800$", text, re.MULTILINE)
    assert re.search(r"embed +16\.00$", text, re.MULTILINE)


@pytest.mark.parametrize("odd", [0, 5, 11])
def test_a_layer_that_differs_stands_by_itself(odd: int) -> None:
    (model,) = tree_of(layers(12, odd)).branches
    inside = next(branch for branch in model.branches if branch.name == "layers")
    names = [branch.name for branch in inside.branches]
    expected = {0: ["0", "1–11"], 5: ["0–4", "5", "6–11"], 11: ["0–10", "11"]}
    assert names == expected[odd]


def test_numbers_with_a_gap_are_not_one_series() -> None:
    found = [tensor(f"h.{number}.w.weight", 0.1) for number in (0, 1, 3, 4, 10)]
    (h,) = tree_of(found).branches
    assert [branch.name for branch in h.branches] == ["0–1", "3–4", "10"]


names = st.lists(
    st.sampled_from(
        ["model", "layers", "0", "1", "2", "a_rather_long_name_of_a_module", "\x1b[31m"]
    )
    | st.text(st.characters(exclude_characters="."), min_size=1, max_size=30),
    min_size=1,
    max_size=6,
).map(".".join)


@given(st.lists(names, max_size=30, unique=True), st.sampled_from(["utf-8", "ascii"]))
def test_any_names(found: list[str], encoding: str) -> None:
    tensors = [tensor(f"{name}.weight", 0.1) for name in found]
    lines = lines_of(tensors, 60, encoding)
    assert all(line.isprintable() for line in lines)
    if all(len(name.split(".")) <= 4 and name.isascii() for name in found):
        assert all(len(line) <= 60 for line in lines), lines


def test_sixty_columns_hold_a_falcon() -> None:
    found = [
        tensor(f"transformer.h.{number}.self_attention.query_key_value.weight", 0.09 + number / 999)
        for number in range(32)
    ]
    found += [tensor("transformer.h.31.mlp.dense_h_to_4h.weight"), tensor("lm_head.weight")]
    lines = lines_of(found, 60)
    assert max(map(len, lines)) <= 60
    assert any("query_key_value " in line for line in lines)
