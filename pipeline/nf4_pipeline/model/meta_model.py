"""The model on the meta device, and the architecture that is read off it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from nf4_pipeline.errors import ArchitectureError
from nf4_pipeline.model.architecture import Architecture, LinearFact
from nf4_pipeline.model.config import brief_text, causal_lm_config
from nf4_pipeline.model.exposed_weights import exposed_modules
from nf4_pipeline.model.linear import is_plain_linear
from nf4_pipeline.model.load_dtype import float32_parts
from nf4_pipeline.model.named_class import check_named_class
from nf4_pipeline.model.tensor_names import NameMap


def build_meta_model(config: Any, dtype: Any = None) -> Any:
    """The causal LM of a transformers config on the meta device: shapes, no memory.

    Args:
        config: a transformers config.
        dtype: torch dtype of the parameters; None leaves it to the config.

    Raises:
        ArchitectureError: the model's constructor rejects the config's values.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            options = {} if dtype is None else {"dtype": dtype}
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    except Exception as error:  # model constructors may reject values in any way they like
        raise ArchitectureError(
            f"transformers cannot build a {config.model_type} model from this config: "
            f"{brief_text(error)}"
        ) from error


def read_architecture(config: dict[str, Any], names: Iterable[str], where: Path) -> Architecture:
    """Builds the model on the meta device and reads off it what selection needs.

    Args:
        config: config.json of the checkpoint.
        names: of all tensors in the checkpoint.
        where: the folder, for messages.

    Raises:
        ArchitectureError: transformers has no causal LM for this config, rejects its values, or
            builds another model as soon as weights are in 4 bit.
    """
    transformers_config = causal_lm_config(config, where)
    model = build_meta_model(transformers_config)
    _check_same_for_readers(model)
    check_named_class(config, type(model), transformers_config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    name_map = NameMap(model, names)
    head = model.get_output_embeddings()
    unexpected = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
    missing = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or [])
    dtype = config.get("dtype") or config.get("torch_dtype")
    dtype = dtype if isinstance(dtype, str) else None
    embeddings = _input_embeddings(model)
    linears = _linears(model)
    architecture = Architecture(
        model_type=model.config.model_type,
        class_name=type(model).__name__,
        shapes=shapes,
        linears=linears,
        head_modules=frozenset(
            n for n, m in model.named_modules() if head is not None and m is head
        ),
        fp32_modules=tuple(getattr(model, "_keep_in_fp32_modules", None) or ()),
        tied=dict(getattr(model, "all_tied_weights_keys", None) or {}),
        names=name_map.mapped,
        merged=name_map.merged,
        ignorable=frozenset(n for n in name_map.mapped if any(re.search(p, n) for p in unexpected)),
        optional=frozenset(n for n in shapes if any(re.search(p, n) for p in missing)),
        embedding=next(
            (f"{n}.weight" for n, m in model.named_modules() if m is embeddings and m is not None),
            "",
        ),
        dtype=dtype,
        never_cast=_never_cast(model, dtype),
    )
    # Last, for the model is of no use afterwards.
    exposed = exposed_modules(model, frozenset(fact.module for fact in linears.values()))
    marked: dict[str, LinearFact] = {
        name: replace(fact, kind="exposed") if fact.module in exposed else fact
        for name, fact in linears.items()
    }
    return replace(architecture, linears=marked)


def _check_same_for_readers(model: Any) -> None:
    """Refuses a model that transformers builds otherwise for 4-bit weights than for 16-bit ones."""
    from transformers.quantizers import base
    from transformers.utils.quantization_config import QuantizationMethod

    replaced = getattr(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})
    for name, module in model.named_modules():
        entry = replaced.get(type(module).__name__)
        if entry and QuantizationMethod.BITS_AND_BYTES in entry["quantization_methods"]:
            raise ArchitectureError(
                f"{name} of this {type(model).__name__} is a {type(module).__name__}, for which "
                "transformers builds other modules, with other names, as soon as weights are in 4 "
                "bit: no reader could load the artifact. Quantize it with transformers itself."
            )


def _never_cast(model: Any, dtype: str | None) -> frozenset[str]:
    """Buffers, and parameters that the architecture wants in float32."""
    import torch

    float32 = float32_parts(model, getattr(torch, dtype or "", None))
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return frozenset(
        name
        for name in model.state_dict()
        if name not in parameters or (float32 is not None and float32.search(name))
    )


def _input_embeddings(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:  # an architecture that transformers does not know them of
        return None


def _linears(model: Any) -> dict[str, LinearFact]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    linears: dict[str, LinearFact] = {}
    for name, module in model.named_modules():
        kind: Literal["linear", "conv1d", "other", "exposed"]
        if isinstance(module, Conv1D):
            kind = "conv1d"
        elif isinstance(module, nn.Linear):
            kind = "linear" if is_plain_linear(module) else "other"
        else:
            continue
        stock = isinstance(module, Conv1D) or type(module) is nn.Linear
        linears[f"{name}.weight"] = LinearFact(name, type(module).__name__, kind, stock)
    return linears
