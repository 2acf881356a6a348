"""What happens to each tensor: facts made by hand, no model and no file."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
from nf4_pipeline import selection
from nf4_pipeline.checkpoint.safetensors_header import DTYPE_BYTES, HeaderTensor
from nf4_pipeline.checkpoint.shards import name_shards
from nf4_pipeline.checkpoint.source import SourceTensor
from nf4_pipeline.errors import ArchitectureError, CheckpointError, RecipeError
from nf4_pipeline.model.architecture import Architecture, LinearFact
from nf4_pipeline.recipe import QuantizeRecipe
from nf4_pipeline.selection import Plan, select, skips

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed.weight": (100, 8),
    "model.h.0.norm.weight": (8,),
    "model.h.0.attn.weight": (24, 8),
    "model.h.0.attn.bias": (24,),
    "model.h.1.attn.weight": (24, 8),
    "model.h.1.router.weight": (4, 8),
    "head.weight": (100, 8),
}
LINEARS = {
    "model.h.0.attn.weight": LinearFact("model.h.0.attn", "FalconLinear", "linear", False),
    "model.h.1.attn.weight": LinearFact("model.h.1.attn", "Linear", "linear", True),
    "model.h.1.router.weight": LinearFact("model.h.1.router", "Llama4Router", "other", False),
    "head.weight": LinearFact("head", "Linear", "linear", True),
}
FACTS = Architecture(
    model_type="made-up",
    class_name="MadeUpForCausalLM",
    shapes=SHAPES,
    linears=LINEARS,
    head_modules=frozenset({"head"}),
    fp32_modules=(),
    tied={"head.weight": "model.embed.weight"},
    names={name: name for name in SHAPES},
    merged=frozenset(),
    ignorable=frozenset(),
    optional=frozenset(),
)


def tensor(
    name: str, shape: tuple[int, ...] | None = None, dtype: str = "BF16", file: str = "f"
) -> SourceTensor:
    size = shape if shape is not None else SHAPES[name]
    return SourceTensor(file, HeaderTensor(name, dtype, size, 64, prod(size) * DTYPE_BYTES[dtype]))


TENSORS = tuple(tensor(name) for name in SHAPES)


def reasons(plan: Plan) -> dict[str, tuple[str, str]]:
    return {t.source.name: (t.action, t.reason) for t in plan.tensors}


def test_the_ordinary_case() -> None:
    plan = select(TENSORS, FACTS, QuantizeRecipe())
    assert reasons(plan) == {
        "model.embed.weight": ("keep", "embedding"),
        "model.h.0.norm.weight": ("keep", "normalization"),
        "model.h.0.attn.weight": ("quantize", "linear layer"),
        "model.h.0.attn.bias": ("keep", "bias"),
        "model.h.1.attn.weight": ("quantize", "linear layer"),
        "model.h.1.router.weight": ("keep", "Llama4Router is not a plain linear map"),
        "head.weight": ("drop", "equals model.embed.weight, to which it is tied"),
    }
    assert plan.skip_modules == ("head", "model.h.1.router")
    assert plan.hidden_modules == ("model.h.0.attn",)
    assert [t.name for t in plan.quantized] == ["model.h.0.attn.weight", "model.h.1.attn.weight"]


def test_a_head_that_differs_from_its_twin_is_kept() -> None:
    plan = select(TENSORS, FACTS, QuantizeRecipe(), untied=frozenset({"head.weight"}))
    assert reasons(plan)["head.weight"] == ("keep", "output head")


def test_a_head_that_is_not_tied_is_kept() -> None:
    plan = select(TENSORS, replace(FACTS, tied={}), QuantizeRecipe())
    assert reasons(plan)["head.weight"] == ("keep", "output head")
    assert "head" in plan.skip_modules


def test_only_the_alias_is_stored() -> None:
    without = [t for t in TENSORS if t.name != "model.embed.weight"]
    plan = select(without, FACTS, QuantizeRecipe())
    assert reasons(plan)["head.weight"] == ("keep", "output head")
    # Under the name that every version of transformers ties the others to.
    assert {t.source.name: t.name for t in plan.tensors}["head.weight"] == "model.embed.weight"
    assert "head" in plan.skip_modules


def test_only_two_aliases_are_stored() -> None:
    shapes = {**SHAPES, "second.weight": (100, 8)}
    tied = {"head.weight": "model.embed.weight", "second.weight": "model.embed.weight"}
    facts = replace(FACTS, shapes=shapes, tied=tied, names={name: name for name in shapes})
    without = [t for t in TENSORS if t.name != "model.embed.weight"]
    plan = select([*without, tensor("second.weight", (100, 8))], facts, QuantizeRecipe())
    assert reasons(plan)["second.weight"] == ("drop", "equals head.weight, to which it is tied")
    assert "model.embed.weight" in {t.name for t in plan.tensors}


def test_readers_are_told_both_names_of_a_module() -> None:
    names = {**FACTS.names, "embed_out.weight": "head.weight"}
    del names["head.weight"]
    facts = replace(FACTS, tied={}, names=names)
    tensors = [t for t in TENSORS if t.name != "head.weight"]
    plan = select([*tensors, tensor("embed_out.weight", (100, 8))], facts, QuantizeRecipe())
    assert plan.skip_modules == ("embed_out", "head", "model.h.1.router")


def test_readers_are_told_of_a_matrix_that_is_a_layer_elsewhere() -> None:
    linears = {name: fact for name, fact in LINEARS.items() if "router" not in name}
    plan = select(TENSORS, replace(FACTS, linears=linears), QuantizeRecipe())
    assert reasons(plan)["model.h.1.router.weight"][1] == "not the weight of a linear layer"
    assert plan.skip_modules == ("head", "model.h.1.router")


def test_kept_tensors_of_several_dtypes_are_cast() -> None:
    tensors = [
        tensor(name, dtype="F32" if "norm" in name or "attn.weight" in name else "BF16")
        for name in SHAPES
    ]
    plan = select(tensors, replace(FACTS, dtype="bfloat16"), QuantizeRecipe())
    by_name = {t.source.name: t for t in plan.tensors}
    norm = by_name["model.h.0.norm.weight"]
    assert (norm.cast_to, norm.reason) == ("BF16", "normalization; F32 cast to the model's BF16")
    assert [(s.dtype, s.nbytes) for s in norm.stored] == [("BF16", 16)]
    assert {t.source.name for t in plan.tensors if t.cast_to} == {norm.source.name}


def test_what_transformers_does_not_cast_is_not_cast() -> None:
    tensors = [tensor(name, dtype="F32" if "norm" in name else "BF16") for name in SHAPES]
    never = frozenset({"model.h.0.norm.weight"})
    plan = select(tensors, replace(FACTS, dtype="bfloat16", never_cast=never), QuantizeRecipe())
    assert not any(t.cast_to for t in plan.tensors)


@pytest.mark.parametrize("said", ["bfloat16", "float32", None])
def test_kept_tensors_of_one_dtype_are_exact(said: str | None) -> None:
    tensors = [tensor(name, dtype="F16") for name in SHAPES]
    plan = select(tensors, replace(FACTS, dtype=said), QuantizeRecipe())
    assert not any(t.cast_to for t in plan.tensors)


def test_a_config_without_a_dtype_leaves_it_to_the_weights() -> None:
    tensors = [tensor(name, dtype="F32" if "norm" in name else "F16") for name in SHAPES]
    plan = select(tensors, FACTS, QuantizeRecipe())
    assert {t.cast_to for t in plan.tensors} == {None, "F16"}


def test_a_recipe_skips_and_readers_are_told() -> None:
    plan = select(TENSORS, FACTS, QuantizeRecipe(skip_modules=("h.0",)))
    assert reasons(plan)["model.h.0.attn.weight"] == ("keep", "skipped by the recipe")
    assert plan.skip_modules == ("head", "model.h.0.attn", "model.h.1.router")
    assert plan.hidden_modules == ()


@pytest.mark.parametrize("patterns", [("*",), ("attn",), ("model",), ("h.0.attn", "h.1.attn")])
def test_a_recipe_that_leaves_nothing(patterns: tuple[str, ...]) -> None:
    with pytest.raises(ArchitectureError, match=r"no linear layer.*[23] skipped by the recipe"):
        select(TENSORS, FACTS, QuantizeRecipe(skip_modules=patterns))


def test_a_pattern_that_names_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"'h\.9' names no linear layer .* 'model\.h\.0\.attn'"):
        select(TENSORS, FACTS, QuantizeRecipe(skip_modules=("h.0", "h.9")))


@pytest.mark.parametrize(
    ("pattern", "module", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("head", "lm_head", False),
        ("h.0.mlp", "transformer.h.0.mlp.dense", True),
        ("h.0.mlp", "transformer.h.10.mlp.dense", False),
        ("h.1", "transformer.h.10.mlp", False),
        ("h.1", "transformer.h.1.mlp", True),
        ("mlp", "transformer.h.0.mlp.dense", True),
        ("mlp", "transformer.h.0.mlps.dense", False),
        ("h.*.mlp", "transformer.h.7.mlp.dense", True),
        ("h.*.mlp", "transformer.h.7.attn.mlp2", False),
        ("h.*.dense", "transformer.h.7.mlp.dense", False),
        ("*_proj", "layers.0.q_proj", True),
        ("h.0", "transformer.hx0.mlp", False),
        ("(", "transformer.h", False),
    ],
)
def test_what_a_pattern_names(pattern: str, module: str, expected: bool) -> None:
    assert skips(pattern, module) is expected


@pytest.mark.parametrize(("dtype", "quantized"), [("BF16", True), ("F16", True), ("F32", True)])
def test_float_dtypes(dtype: str, quantized: bool) -> None:
    tensors = [tensor(t.name, dtype=dtype) for t in TENSORS]
    assert len(select(tensors, FACTS, QuantizeRecipe()).quantized) == 2 * quantized


@pytest.mark.parametrize("dtype", ["F64", "F8_E4M3", "I8", "U8"])
def test_other_dtypes_stay(dtype: str) -> None:
    odd = tensor("model.h.0.attn.weight", dtype=dtype)
    tensors = [odd if t.name == odd.name else t for t in TENSORS]
    plan = select(tensors, FACTS, QuantizeRecipe())
    assert reasons(plan)[odd.name] == ("keep", f"dtype {dtype} cannot be quantized")
    assert "model.h.0.attn" in plan.skip_modules


def test_modules_that_an_architecture_wants_in_float32() -> None:
    facts = replace(FACTS, fp32_modules=("1",))
    found = reasons(select(TENSORS, facts, QuantizeRecipe()))
    assert found["model.h.1.attn.weight"] == ("keep", "kept in float32 by its architecture")
    assert found["model.h.0.attn.weight"][0] == "quantize"


def test_a_transposed_layer_is_stored_as_readers_want_it() -> None:
    conv = LinearFact("model.h.0.attn", "Conv1D", "conv1d", True)
    facts = replace(FACTS, linears={**LINEARS, "model.h.0.attn.weight": conv})
    plan = select(TENSORS, facts, QuantizeRecipe())
    chosen = plan.quantized[0]
    assert chosen.transposed
    assert chosen.shape == (8, 24)
    assert chosen.stored[0].shape == (96, 1)


def test_tensors_that_the_model_does_not_know() -> None:
    more = [*TENSORS, tensor("model.h.0.attn.masked_bias", (1,)), tensor("stray", (3,))]
    facts = replace(
        FACTS,
        names={**FACTS.names, "model.h.0.attn.masked_bias": None, "stray": None},
        ignorable=frozenset({"model.h.0.attn.masked_bias"}),
    )
    with pytest.raises(CheckpointError, match=r"no place for 1 tensors.*--allow-unused 'stray'"):
        select(more, facts, QuantizeRecipe())
    found = reasons(select(more, facts, QuantizeRecipe(allow_unused=("stray",))))
    assert found["model.h.0.attn.masked_bias"] == (
        "drop",
        "a buffer that the model computes itself",
    )
    assert found["stray"] == ("drop", "left out, as --allow-unused 'stray' says")


def test_tensors_that_are_merged_on_loading_stay() -> None:
    facts = replace(FACTS, merged=frozenset({"model.h.0.attn.weight"}))
    action, reason = reasons(select(TENSORS, facts, QuantizeRecipe()))["model.h.0.attn.weight"]
    assert action == "keep"
    assert "merged with others on loading" in reason


def test_names_without_the_base_prefix_get_it() -> None:
    names = {name.removeprefix("model."): name for name in SHAPES}
    tensors = [tensor(short, SHAPES[full]) for short, full in names.items()]
    plan = select(tensors, replace(FACTS, names=dict(names)), QuantizeRecipe())
    assert [t.name for t in plan.quantized] == ["model.h.0.attn.weight", "model.h.1.attn.weight"]
    assert [t.source.name for t in plan.quantized] == ["h.0.attn.weight", "h.1.attn.weight"]


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*'model\.h\.0\.norm\.weight'"):
        select([t for t in TENSORS if "norm" not in t.name], FACTS, QuantizeRecipe())


def test_a_missing_tensor_that_may_be_missing() -> None:
    facts = replace(FACTS, optional=frozenset({"model.h.0.norm.weight"}))
    plan = select([t for t in TENSORS if "norm" not in t.name], facts, QuantizeRecipe())
    assert len(plan.tensors) == len(TENSORS) - 1


def test_a_missing_head_is_fine_if_it_is_tied_and_only_then() -> None:
    without = [t for t in TENSORS if t.name != "head.weight"]
    assert len(select(without, FACTS, QuantizeRecipe()).quantized) == 2
    with pytest.raises(CheckpointError, match=r"first 'head\.weight'"):
        select(without, replace(FACTS, tied={}), QuantizeRecipe())


@pytest.mark.parametrize("name", ["model.h.0.attn.weight", "model.embed.weight"])
def test_a_wrong_shape_is_named(name: str) -> None:
    tensors = [tensor(name, (9, 9)) if t.name == name else t for t in TENSORS]
    with pytest.raises(CheckpointError, match=rf"'{name}' in f has the shape \(9, 9\).*config"):
        select(tensors, FACTS, QuantizeRecipe())


def test_files_hold_what_is_left_and_layouts_know_their_bytes() -> None:
    spread = [tensor(t.name, file=f"f{i % 2}") for i, t in enumerate(TENSORS)]
    lone = tensor("head.weight", file="f9")
    spread = [lone if t.name == lone.name else t for t in spread]
    plan = select(spread, FACTS, QuantizeRecipe())
    # The dropped head was alone in its file.
    assert list(plan.files()) == [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    assert [{t.source.file for t in ts} for ts in plan.files().values()] == [{"f0"}, {"f1"}]
    layouts = plan.layouts()
    stored = {t.name: t for plan_of in plan.tensors for t in plan_of.stored}
    placed = {t.name: t for layout in layouts.values() for t in layout.tensors}
    assert {n: t.nbytes for n, t in placed.items()} == {n: t.nbytes for n, t in stored.items()}
    assert len(placed) == 2 * 6 + 4


@pytest.mark.parametrize("limit", [1, 3_000, 20_000, 10**9])
def test_no_file_is_larger_than_the_limit_unless_a_weight_is(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread = [tensor(t.name, file=f"f{i % 2}") for i, t in enumerate(TENSORS)]
    plan = select(spread, FACTS, QuantizeRecipe())
    whole = plan.files()
    monkeypatch.setattr(selection, "LARGEST_FILE", limit)
    files, layouts = plan.files(), plan.layouts()
    assert list(files) == name_shards(len(files))
    for name, tensors in files.items():
        assert layouts[name].nbytes <= limit or len(tensors) == 1
        assert len({t.source.file for t in tensors}) == 1
    assert [t for ts in files.values() for t in ts] == [t for ts in whole.values() for t in ts]
