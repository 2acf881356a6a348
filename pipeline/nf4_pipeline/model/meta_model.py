"""The model on the meta device, and the facts that selection draws from it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from nf4_pipeline.errors import ArchitectureError
from nf4_pipeline.model.architecture import LinearFact, ModelFacts
from nf4_pipeline.model.config import causal_lm_config, words_of
from nf4_pipeline.model.exposed_weights import exposed_modules
from nf4_pipeline.model.linear import is_plain_linear
from nf4_pipeline.model.named_class import check_named_class
from nf4_pipeline.model.names import NameMap


def build_skeleton(config: Any, dtype: Any = None) -> Any:
    """The causal LM of a transformers config on the meta device: shapes, no memory.

    Args:
        config: a transformers config.
        dtype: torch dtype of the parameters; None leaves it to the config.

    Raises:
        ArchitectureError: the config's values make no model.
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
            f"{words_of(error)}"
        ) from error


def model_facts(config: dict[str, Any], names: Iterable[str], where: Path) -> ModelFacts:
    """Builds the model on the meta device and reads off it what selection needs.

    Args:
        config: config.json of the checkpoint.
        names: of all tensors in the checkpoint.
        where: the folder, for messages.

    Raises:
        ArchitectureError: there is no causal LM for this config.
    """
    built = causal_lm_config(config, where)
    model = build_skeleton(built)
    check_named_class(config, type(model), built)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = NameMap(model, names)
    head = model.get_output_embeddings()
    unexpected = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
    missing = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or [])
    embeddings = _input_embeddings(model)
    linears = _linears(model)
    facts = ModelFacts(
        model_type=model.config.model_type,
        class_name=type(model).__name__,
        shapes=shapes,
        linears=linears,
        head_modules=frozenset(
            n for n, m in model.named_modules() if head is not None and m is head
        ),
        fp32_modules=tuple(getattr(model, "_keep_in_fp32_modules", None) or ()),
        tied=dict(getattr(model, "all_tied_weights_keys", None) or {}),
        names=found.mapped,
        merged=found.merged,
        ignorable=frozenset(n for n in found.mapped if any(re.search(p, n) for p in unexpected)),
        optional=frozenset(n for n in shapes if any(re.search(p, n) for p in missing)),
        embedding=next(
            (f"{n}.weight" for n, m in model.named_modules() if m is embeddings and m is not None),
            "",
        ),
    )
    # Last, for the model is of no use afterwards.
    exposed = exposed_modules(model, frozenset(fact.module for fact in linears.values()))
    marked: dict[str, LinearFact] = {
        name: replace(fact, kind="exposed") if fact.module in exposed else fact
        for name, fact in linears.items()
    }
    return replace(facts, linears=marked)


def _input_embeddings(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:  # an architecture that transformers does not know them of
        return None


def _linears(model: Any) -> dict[str, LinearFact]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    facts: dict[str, LinearFact] = {}
    for name, module in model.named_modules():
        kind: Literal["linear", "conv1d", "other", "exposed"]
        if isinstance(module, Conv1D):
            kind = "conv1d"
        elif isinstance(module, nn.Linear):
            kind = "linear" if is_plain_linear(module) else "other"
        else:
            continue
        stock = isinstance(module, Conv1D) or type(module) is nn.Linear
        facts[f"{name}.weight"] = LinearFact(name, type(module).__name__, kind, stock)
    return facts
