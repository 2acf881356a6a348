"""Tensors that the model needs and the checkpoint lacks: what happened, and the way out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Final

WRAPPERS: Final = {
    "_orig_mod.": "torch.compile leaves them so",
    "module.": "DataParallel and DeepSpeed leave them so",
    "base_model.model.": "PEFT leaves them so",
    "pretrained_model.": "trl leaves them so",
    "language_model.": "the text part of a model that has others, too, stands so",
    "_fsdp_wrapped_module.": "FSDP leaves them so",
    "_forward_module.": "Lightning leaves them so",
}
_ADAPTER: Final = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|base_layer|lora_magnitude\w*)(\.|$)"
)
_LAYER: Final = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")


def explain_missing(
    missing: Sequence[str],
    *,
    class_name: str,
    names: Collection[str],
    strange: Collection[str],
    shapes: Mapping[str, tuple[int, ...]],
    head: Collection[str],
    promised: Mapping[str, str],
    index: str | None,
) -> str:
    """The whole error.

    Args:
        missing: names in the model, sorted.
        class_name: of the model.
        names: of all tensors of the checkpoint, as they stand in it.
        strange: those of them that the model has no place for.
        shapes: of all parameters and buffers of the model.
        head: modules that are the output head.
        promised: tensors that the index names and no file holds, and the file it gives for each.
        index: the file that names the weight files, if one does.
    """
    said = (
        f"The checkpoint lacks {len(missing)} tensors that a {class_name} needs, first "
        f"{missing[0]!r}. transformers would fill them with random numbers. "
    )
    return said + (
        adapter_advice(names)
        or prefix_advice(strange, shapes)
        or _head_advice(missing, head)
        or _index_advice(missing, promised, index)
        or _layer_advice(missing, shapes)
        or "The weights and config.json do not belong together, or the checkpoint was not saved "
        "whole: hold it against the repository that it came from. Download the checkpoint again."
    )


def adapter_advice(names: Collection[str]) -> str | None:
    """For weights with an adapter beside them that was not merged."""
    found = next((name for name in sorted(names) if _ADAPTER.search(name)), None)
    if found is None:
        return None
    return (
        f"It holds a model with an adapter inside of it that was not merged ({found!r}), as PEFT "
        "saves it: load it with peft, call merge_and_unload(), and save what that returns."
    )


def wrapper_prefix(
    strange: Collection[str], model_names: Collection[str]
) -> tuple[str, int] | None:
    """What stands before the model's own names in a checkpoint, and before how many of them.

    Args:
        strange: names of the tensors that the model has no place for.
        model_names: of all parameters and buffers of the model.

    Returns:
        The prefix, with its dot; None if less than half of the names have one.
    """
    inner = set(model_names)
    without_base = {name.partition(".")[2] for name in inner if "." in name}
    counts: Counter[str] = Counter()
    for name in strange:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            rest = ".".join(parts[cut:])
            if rest in inner or (rest in without_base and rest.count(".") >= 2):
                counts[".".join(parts[:cut]) + "."] += 1
                break
    if not counts:
        return None
    prefix, count = max(counts.items(), key=lambda item: (item[1], -len(item[0])))
    return (prefix, count) if 2 * count >= len(strange) else None


def prefix_advice(strange: Collection[str], model_names: Collection[str]) -> str | None:
    """For names with something before them that a wrapper left there.

    Args:
        strange: names of the tensors that the model has no place for.
        model_names: of all parameters and buffers of the model.
    """
    found = wrapper_prefix(strange, model_names)
    if found is None:
        return None
    prefix, count = found
    why = next((why for known, why in WRAPPERS.items() if prefix.endswith(known)), None)
    return (
        f"{count} tensors have the prefix {prefix!r} before the names that the model knows"
        f"{f' ({why})' if why else ''}. Give --strip-prefix {prefix} to read them without it, or "
        "save the inner model."
    )


def _head_advice(missing: Sequence[str], head: Collection[str]) -> str | None:
    heads = {f"{module}.weight" for module in head}
    if not heads.issuperset(missing):
        return None
    return (
        "It is the output head, and config.json does not say that it shares the embedding's "
        'values. If the model was trained so, set "tie_word_embeddings": true in config.json; if '
        "not, the head was left out when the checkpoint was saved: take one that has it."
    )


def _index_advice(
    missing: Sequence[str], promised: Mapping[str, str], index: str | None
) -> str | None:
    lost = [name for name in promised if any(m.endswith(name) or name.endswith(m) for m in missing)]
    if not lost:
        return None
    name = sorted(lost)[0]
    return (
        f"{index} says that {name!r} is in {promised[name]}, which does not hold it: the index and "
        "the files were saved at different times. Bring the index that belongs to these files, or "
        "the files that belong to this index. Download the checkpoint again."
    )


def _layer_advice(missing: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    layers = {int(match[1]) for name in missing if (match := _LAYER.search(name)) is not None}
    whole = {int(match[1]) for name in shapes if (match := _LAYER.search(name)) is not None}
    only_layers = all(_LAYER.search(name) for name in missing)
    if not layers or not only_layers or layers != set(range(min(layers), max(whole) + 1)):
        return None
    per_layer = sum(f".{min(layers)}." in name for name in shapes)
    if len(missing) < per_layer * len(layers):
        return None
    return (
        f"They are the layers {min(layers)} to {max(layers)}: config.json counts "
        f"{max(whole) + 1} layers, and the checkpoint has {min(layers)}. Correct the number in "
        "config.json, or take the checkpoint that it describes."
    )
