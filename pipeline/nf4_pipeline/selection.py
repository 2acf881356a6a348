"""Which tensors are quantized, which stay, which are dropped, and why. Pure: facts in, plan out.

The plan decides from what a module computes, never from what a stock quantizer would do, and it
knows every output tensor and its bytes before anything is read (`checkpoint/layout.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Final, Literal

from numpy.typing import NDArray

from nf4_pipeline.checkpoint.layout import FileLayout, StoredTensor, plan_layout
from nf4_pipeline.checkpoint.safetensors_header import DTYPE_BYTES
from nf4_pipeline.checkpoint.shards import name_shards
from nf4_pipeline.checkpoint.source import SourceTensor
from nf4_pipeline.errors import ArchitectureError, CheckpointError, RecipeError
from nf4_pipeline.model.architecture import Architecture, LinearFact
from nf4_pipeline.model.fit import check_complete, check_shape, unused_tensors
from nf4_pipeline.model.name_patterns import fits
from nf4_pipeline.model.unused_tensors import check_all_known
from nf4_pipeline.nf4.double_quant import NestedScales
from nf4_pipeline.nf4.stored_weight import QUANT_TYPE, companions, stored_tensors
from nf4_pipeline.recipe import QuantizeRecipe

QUANTIZABLE_DTYPES: Final = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Source dtypes that can be quantized, as safetensors and as torch call them."""

LARGEST_FILE: Final = 1_000_000_000
"""Bytes of a file in quantized/, unless a single weight is larger. A sha256 takes one thread, so it
is several files that are hashed side by side."""

_HEADER_ENTRY: Final = 160  # bytes in a header for one tensor at most, but for its name

Action = Literal["quantize", "keep", "drop"]

_NOT_LINEAR: Final = "not the weight of a linear layer"


@dataclass(frozen=True)
class TensorPlan:
    """What happens to one tensor of the checkpoint.

    Attributes:
        source: where it is.
        name: its name in the output.
        action: quantize, keep (copied exactly) or drop.
        reason: why, in words for people.
        module: the module that it is the weight of, if that module multiplies by it.
        transposed: the source stores [in, out]; the output is [out, in].
        tied_to: name in the source of the tensor that it must equal to be dropped.
        merged: transformers merges it with others on loading, so it cannot be 4 bit.
        cast_to: dtype that it is stored in, as safetensors names it, if that is not its own.
    """

    source: SourceTensor
    name: str
    action: Action
    reason: str
    module: str | None = None
    transposed: bool = False
    tied_to: str | None = None
    merged: bool = False
    cast_to: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """In the output."""
        shape = self.source.header.shape
        return shape[::-1] if self.transposed else shape

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The output tensors that stand for it: six, one or none."""
        header = self.source.header
        if self.action == "quantize":
            return stored_tensors(self.name, self.shape, QUANTIZABLE_DTYPES[header.dtype])
        if self.action == "keep":
            dtype = self.cast_to or header.dtype
            nbytes = prod(header.shape) * DTYPE_BYTES[dtype]
            return (StoredTensor(self.name, dtype, header.shape, nbytes),)
        return ()

    def companions(self, scales: NestedScales) -> dict[str, NDArray[Any]]:
        """What is written beside the codes of a quantized tensor, by name, in this order."""
        dtype = QUANTIZABLE_DTYPES[self.source.header.dtype]
        return companions(self.name, self.shape, dtype, scales)


@dataclass(frozen=True)
class Plan:
    """What happens to every tensor of a checkpoint, file by file.

    Attributes:
        tensors: all of them, in the order of the source.
        skip_modules: what readers must be told to leave alone (config.json).
        hidden_modules: quantized modules that a stock loader of transformers >= 5.5 passes over.
        untied: tensors that are tied in the model and differ in the checkpoint: both are kept.
    """

    tensors: tuple[TensorPlan, ...]
    skip_modules: tuple[str, ...]
    hidden_modules: tuple[str, ...]
    untied: tuple[str, ...]

    @property
    def quant_type(self) -> str:
        """What bitsandbytes calls the codebook of quantized tensors."""
        return QUANT_TYPE

    @property
    def quantized(self) -> tuple[TensorPlan, ...]:
        return self.by_action("quantize")

    def by_action(self, action: Action) -> tuple[TensorPlan, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.action == action)

    def files(self) -> dict[str, tuple[TensorPlan, ...]]:
        """The tensors of each file in quantized/: of one source file, at most 1 GB."""
        parts: list[list[TensorPlan]] = []
        sizes: dict[str, tuple[int, int]] = {}  # by source file: its last part, and how full it is
        for tensor in self.tensors:
            if tensor.action == "drop":
                continue
            nbytes = sum(one.nbytes + len(one.name) + _HEADER_ENTRY for one in tensor.stored)
            part, full = sizes.get(tensor.source.file, (-1, LARGEST_FILE))
            if full + nbytes > LARGEST_FILE:
                part, full = len(parts), _HEADER_ENTRY
                parts.append([])
            parts[part].append(tensor)
            sizes[tensor.source.file] = part, full + nbytes
        parts.sort(key=lambda tensors: tensors[0].source.file)
        names = name_shards(len(parts))
        return {name: tuple(tensors) for name, tensors in zip(names, parts, strict=True)}

    def layouts(self) -> dict[str, FileLayout]:
        """The layout of each file in quantized/."""
        return {
            file: plan_layout(stored for tensor in tensors for stored in tensor.stored)
            for file, tensors in self.files().items()
        }


def select(
    tensors: Sequence[SourceTensor],
    facts: Architecture,
    recipe: QuantizeRecipe,
    *,
    untied: frozenset[str] = frozenset(),
    sensitive: frozenset[str] = frozenset(),
) -> Plan:
    """Decides what happens to each tensor.

    Args:
        tensors: of the checkpoint.
        facts: of its architecture.
        recipe: which modules to skip besides the output head.
        untied: names of tied tensors that were found to differ from what they are tied to; they
            are kept.
        sensitive: modules that were found to lose most by 4 bits; they are kept.

    Raises:
        CheckpointError: a tensor that the model needs is missing or has another shape, or two
            tensors take the same place in the model.
        ArchitectureError: the model has no layer to quantize.
        RecipeError: a skip pattern names no linear layer.
    """
    _check_patterns(recipe, facts)
    by_model_name = {
        model_name: tensor.name
        for tensor in tensors
        if (model_name := facts.names.get(tensor.name)) is not None
    }
    check_complete(tensors, facts)
    unused = unused_tensors(tensors, facts, recipe.allow_unused)
    check_all_known(unused, facts.class_name)
    reasons = {tensor.name: tensor.reason or "" for tensor in unused}
    plans = {tensor.name: _decide(tensor, facts, recipe, sensitive, reasons) for tensor in tensors}
    for tensor in tensors:
        canonical = facts.tied.get(facts.names.get(tensor.name) or "", "")
        if canonical and canonical not in by_model_name and plans[tensor.name].action == "keep":
            # transformers 4 finds the values of tied parameters under the first of their names only
            by_model_name[canonical] = tensor.name
            plans[tensor.name] = replace(plans[tensor.name], name=canonical)
    for tensor in tensors:
        canonical = facts.tied.get(facts.names.get(tensor.name) or "", "")
        other = by_model_name.get(canonical)
        # Only with a tensor that is copied can it be compared while the work goes on.
        tied = other and other != tensor.name and tensor.name not in untied
        if other and tied and plans[other].action == "keep":
            why = f"equals {other}, to which it is tied"
            name = plans[tensor.name].name
            plans[tensor.name] = TensorPlan(tensor, name, "drop", why, tied_to=other)
    decided = _of_one_dtype(tuple(plans.values()), facts)
    _check_distinct(decided)
    if not any(plan.action == "quantize" for plan in decided):
        raise ArchitectureError(
            f"This {facts.class_name} has no linear layer that could be quantized "
            f"({len(decided)} tensors: {_count_reasons(decided)}). Nothing was written."
        )
    return Plan(
        tensors=decided,
        untied=tuple(sorted(untied)),
        skip_modules=_skip_modules(decided, facts),
        hidden_modules=tuple(
            plan.module
            for plan in decided
            if plan.action == "quantize"
            and plan.module is not None
            and not facts.linears[f"{plan.module}.weight"].stock
        ),
    )


def _check_patterns(recipe: QuantizeRecipe, facts: Architecture) -> None:
    """A pattern with a slip in it would otherwise quantize what was to be left alone."""
    modules = [linear.module for linear in facts.linears.values()]
    for pattern in recipe.skip_modules:
        if modules and not any(skips(pattern, module) for module in modules):
            raise RecipeError(
                f"quantize.skip_modules: {pattern!r} names no linear layer of this "
                f"{facts.class_name}; its layers are called like {modules[0]!r}."
            )


def _decide(
    tensor: SourceTensor,
    facts: Architecture,
    recipe: QuantizeRecipe,
    sensitive: frozenset[str],
    reasons: Mapping[str, str],
) -> TensorPlan:
    model_name = facts.names.get(tensor.name)
    if tensor.name in facts.merged:
        why = "merged with others on loading, which 4-bit weights cannot be"
        return TensorPlan(tensor, tensor.name, "keep", why, _container(tensor.name), merged=True)
    if model_name is None:
        return TensorPlan(tensor, tensor.name, "drop", reasons[tensor.name])
    name = _stored_name(tensor.name, model_name)
    check_shape(tensor, facts.shapes[model_name], facts)
    linear = facts.linears.get(model_name)
    if linear is None:
        return TensorPlan(tensor, name, "keep", _kind_of(tensor))
    why_not = _why_not(tensor, linear, facts, recipe)
    if not why_not and linear.module in sensitive:
        why_not = "loses most by 4 bits"
    if why_not:
        return TensorPlan(tensor, name, "keep", why_not, module=linear.module)
    return TensorPlan(
        tensor,
        name,
        "quantize",
        "linear layer",
        module=linear.module,
        transposed=linear.kind == "conv1d",
    )


def _stored_name(source_name: str, model_name: str) -> str:
    """Stock saving adds or drops the base model's prefix, but keeps the Hub's names otherwise."""
    shorter, longer = sorted((source_name, model_name), key=len)
    return model_name if longer.endswith("." + shorter) else source_name


def _why_not(
    tensor: SourceTensor, linear: LinearFact, facts: Architecture, recipe: QuantizeRecipe
) -> str | None:
    """Why a linear layer stays in its source precision, or None if it is quantized."""
    if linear.module in facts.head_modules:
        return "output head"
    if any(skips(pattern, linear.module) for pattern in recipe.skip_modules):
        return "skipped by the recipe"
    if any(part in linear.module.split(".") for part in facts.fp32_modules):
        return "kept in float32 by its architecture"
    if linear.kind == "exposed":
        return "the model multiplies by its weight directly"
    if linear.kind == "other":
        return f"{linear.class_name} is not a plain linear map"
    if tensor.header.dtype not in QUANTIZABLE_DTYPES:
        return f"dtype {tensor.header.dtype} cannot be quantized"
    return None


def skips(pattern: str, module: str) -> bool:
    """True if a skip pattern names a module: whole, as an ancestor, or as a trailing part.

    The pattern "lm_head" names "lm_head"; "h.0.mlp" names "transformer.h.0.mlp.dense"; "mlp" names
    every module below any mlp. `*` stands for one part of a name.
    """
    wanted, parts = pattern.split("."), module.split(".")
    return any(
        all(map(_fits_part, wanted, parts[start : start + len(wanted)]))
        for start in range(len(parts) - len(wanted) + 1)
    )


def _fits_part(pattern: str, part: str) -> bool:
    return fits(pattern, part, least=1)


def _of_one_dtype(plans: Sequence[TensorPlan], facts: Architecture) -> tuple[TensorPlan, ...]:
    """Casts what is kept to the dtype of the model, if it has several dtypes.

    transformers >= 5.5 casts a checkpoint as it loads it, but nothing beside 4-bit weights: a model
    with norms in float32 and an output head in bfloat16 ends in an error.
    """
    castable = [
        plan
        for plan in plans
        if plan.action == "keep"
        and plan.source.header.dtype in QUANTIZABLE_DTYPES
        and facts.names[plan.source.name] not in facts.never_cast
    ]
    found = {plan.source.header.dtype for plan in castable}
    if len(found) < 2 or not any(plan.action == "quantize" for plan in plans):
        return tuple(plans)
    wanted = model_dtype(facts.dtype, plans)
    cast = {
        plan.source.name: replace(
            plan,
            cast_to=wanted,
            reason=f"{plan.reason}; {plan.source.header.dtype} cast to the model's {wanted}",
        )
        for plan in castable
        if plan.source.header.dtype != wanted
    }
    return tuple(cast.get(plan.source.name, plan) for plan in plans)


def model_dtype(said: str | None, plans: Iterable[TensorPlan]) -> str:
    """The dtype of a model, as safetensors names it.

    Args:
        said: what config.json says, such as "bfloat16".
        plans: that of most quantized tensors counts if it says nothing.
    """
    names = {name: dtype for dtype, name in QUANTIZABLE_DTYPES.items()}
    if said in names:
        return names[said]
    stored = Counter(plan.source.header.dtype for plan in plans if plan.action == "quantize")
    return stored.most_common(1)[0][0]


def _container(name: str) -> str:
    """The module that readers must leave alone for a merged tensor: its list of experts, if any."""
    parts = name.split(".")
    if "experts" in parts:
        return ".".join(parts[: parts.index("experts") + 1])
    return name.rpartition(".")[0]


def _kind_of(tensor: SourceTensor) -> str:
    name = tensor.name.lower()
    if name.endswith(".bias") and "norm" not in name and "ln_" not in name:
        return "bias"
    if "norm" in name or "ln_" in name or ".ln" in name:
        return "normalization"
    if "emb" in name or "wte" in name or "wpe" in name:
        return "embedding"
    return _NOT_LINEAR


def _skip_modules(plans: Iterable[TensorPlan], facts: Architecture) -> tuple[str, ...]:
    """Modules that a reader would take for 4-bit if config.json did not name them.

    Their names and classes differ between versions of transformers: version 4 knows some by the
    checkpoint's name, and some matrices that are bare parameters in 5 are linear layers there.
    """
    names = set(facts.head_modules)
    for plan in plans:
        if plan.action != "keep":
            continue
        model_name = facts.names[plan.source.name] or ""
        matrix = plan.reason == _NOT_LINEAR and len(plan.shape) == 2
        if plan.merged:
            names.add(plan.module or "")
        elif model_name.endswith(".weight") and (plan.module or matrix):
            stored = _stored_name(plan.source.name, model_name)
            names |= {name.removesuffix(".weight") for name in (model_name, stored)}
    return tuple(sorted(names))


def _check_distinct(plans: Sequence[TensorPlan]) -> None:
    """Two tensors of a checkpoint can mean the same place in the model, under two names."""
    owners: dict[str, TensorPlan] = {}
    for plan in plans:
        for stored in plan.stored:
            other = owners.setdefault(stored.name, plan)
            if other is not plan:
                raise CheckpointError(
                    f"{plan.source.name!r} in {plan.source.file} and {other.source.name!r} in "
                    f"{other.source.file} both become {stored.name!r}; expected one of them. "
                    "Download the checkpoint again."
                )


def _count_reasons(plans: Sequence[TensorPlan]) -> str:
    counts: dict[str, int] = {}
    for plan in plans:
        counts[plan.reason] = counts.get(plan.reason, 0) + 1
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
