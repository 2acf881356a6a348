"""Tensors of a checkpoint that the model has no place for, and what they are.

Learned values never go missing in silence. A buffer that the model computes itself may; a head that
is known to be no part of generating is named as what it is; anything else stops the build.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from nf4_pipeline.checkpoint.safetensors_header import HeaderTensor
from nf4_pipeline.documents import Document
from nf4_pipeline.errors import CheckpointError
from nf4_pipeline.model.name_patterns import fits

BUFFER: Final = "a buffer that the model computes itself"
MTP: Final = (
    "multi-token prediction head: transformers does not use it, engines that speculate with it do"
)
VALUE_HEAD: Final = "value head of reinforcement learning: no part of generating"
MEDUSA: Final = "Medusa head: guesses tokens ahead, and transformers does not use it"

_SQUARE: Final = "square"
_SCALAR: Final = "scalar"
_ANY: Final = "any"

# Computed when the model is made; older versions of transformers saved them. By name and shape.
_BUFFERS: Final[tuple[tuple[re.Pattern[str], str], ...]] = (
    (re.compile(r"(^|\.)(original_)?inv_freq$"), _ANY),
    (re.compile(r"(^|\.)(cos|sin)_cached$"), _ANY),
    (re.compile(r"(^|\.)freqs_cis$"), _ANY),
    (re.compile(r"(^|\.)position_ids$"), _ANY),
    (re.compile(r"(^|\.)relative_position_index$"), _ANY),
    (re.compile(r"(^|\.)alibi(_slopes|_bias)?$"), _ANY),
    (re.compile(r"(^|\.)embed_positions\.(weights|_float_tensor)$"), _ANY),
    (re.compile(r"(^|\.)\w*(attn|attention)\.bias$"), _SQUARE),
    (re.compile(r"(^|\.)\w*(attn|attention)\.masked_bias$"), _SCALAR),
    (re.compile(r"(^|\.)(causal|attn|attention)_(mask|bias)$"), _SQUARE),
    (re.compile(r"(^|\.)mask$"), _SQUARE),
)

_MTP_NAME: Final = re.compile(r"(^|\.)(mtp(_\w+)?|nextn(_\w+)?|multi_token_prediction\w*)(\.|$)")
_MTP_LAYER: Final = re.compile(
    r"\.(eh_proj|enorm|hnorm|shared_head|embed_tokens|nextn\w*|final_layernorm|mtp_block|"
    r"input_proj|token_layernorm|hidden_layernorm)(\.|$)"
)
_VALUE_HEAD: Final = re.compile(r"^(v_head|value_head|pretrained_model\.v_head)\.")
_MEDUSA: Final = re.compile(r"^medusa_heads?\.")
_LAYER: Final = re.compile(r"^(.*?(?:^|\.)(?:layers|h|blocks|block|layer))\.(\d+)\.")
_PARTS: Final = (
    (re.compile(r"vis(ion|ual)|image"), "vision tower"),
    (re.compile(r"audio|speech"), "audio tower"),
    (re.compile(r"talker|token2wav|code2wav"), "speech output"),
)
_SCALES: Final = re.compile(r"(^|[._])(scales?|zeros|zero_points?|absmax|scale_inv|[kv]_scale)$")


@dataclass(frozen=True)
class Unused:
    """A tensor that the model has no place for.

    Attributes:
        name: in the checkpoint.
        reason: what it is, in words for people; None if that is not known.
    """

    name: str
    reason: str | None


@dataclass(frozen=True)
class LeftOut(Document):
    """Learned tensors that an artifact lacks for one reason: how many, and their bytes."""

    reason: str
    tensors: int
    bytes: int


def left_out(dropped: Iterable[tuple[str, int]]) -> tuple[LeftOut, ...]:
    """What a person should know of that an artifact lacks.

    Args:
        dropped: reason and bytes of each tensor that was dropped.
    """
    groups: dict[str, list[int]] = {}
    for reason, nbytes in dropped:
        if is_worth_saying(reason):
            groups.setdefault(reason, []).append(nbytes)
    return tuple(
        LeftOut(reason, len(sizes), sum(sizes)) for reason, sizes in sorted(groups.items())
    )


def is_worth_saying(reason: str) -> bool:
    """True of a reason for which learned values were left out."""
    return reason != BUFFER and not reason.startswith("equals ")


def explain_unused(
    unplaced: Sequence[HeaderTensor],
    *,
    names: Iterable[str],
    model_names: Iterable[str],
    ignorable: frozenset[str],
    class_name: str,
    allowed: Sequence[str] = (),
) -> tuple[Unused, ...]:
    """Says of each tensor without a place what it is.

    Args:
        unplaced: the tensors.
        names: of all tensors of the checkpoint.
        model_names: of all parameters and buffers of the model.
        ignorable: those that the architecture itself passes over on loading.
        class_name: of the model.
        allowed: patterns of `--allow-unused`.
    """
    layers = _layers_in(model_names)
    predicting = {
        layer
        for name in names
        if (layer := _beyond(name, layers)) is not None and _MTP_LAYER.search(name)
    }
    return tuple(
        Unused(
            tensor.name,
            _reason(tensor, layers, predicting, ignorable, class_name)
            or next(
                (
                    f"left out, as --allow-unused {pattern!r} says"
                    for pattern in allowed
                    if matches(pattern, tensor.name)
                ),
                None,
            ),
        )
        for tensor in unplaced
    )


def check_all_known(unused: Sequence[Unused], class_name: str, hint: str = "") -> None:
    """Stops where learned tensors would be left out.

    Args:
        unused: from `explain_unused`.
        class_name: of the model.
        hint: what else the checkpoint looks like, as a sentence; "" for nothing.

    Raises:
        CheckpointError: a tensor has no place in the model, and nothing says what it is.
    """
    unknown = [tensor.name for tensor in unused if tensor.reason is None]
    if not unknown:
        return
    raise CheckpointError(
        f"A {class_name} as config.json describes it has no place for {len(unknown)} tensors of "
        f"the checkpoint, {_listed(unknown)}: {_looks_like(unknown)}. transformers would leave "
        "them out, and the model would not be the one that was trained. "
        f"{hint or _hint(unknown)} "
        f"If they may be left out: --allow-unused {_pattern_of(unknown)!r}."
    )


def matches(pattern: str, name: str) -> bool:
    """True if a pattern of --allow-unused names a tensor; `*` stands for anything, dots included.

    A pattern without a `*` also names everything below it: "score" names "score.weight".
    """
    return fits(pattern, name) or fits(f"{pattern}.*", name)


def _layers_in(model_names: Iterable[str]) -> dict[str, int]:
    """How many layers each list of them has, by the last part of its name ("layers", "h")."""
    found: dict[str, int] = {}
    for name in model_names:
        if (match := _LAYER.match(name)) is not None:
            kind = match[1].rpartition(".")[2]
            found[kind] = max(found.get(kind, 0), int(match[2]) + 1)
    return found


def _beyond(name: str, layers: dict[str, int]) -> str | None:
    """The layer that a tensor is of, if the model has fewer layers than that."""
    match = _LAYER.match(name)
    if match is None:
        return None
    kind = match[1].rpartition(".")[2]
    return f"{match[1]}.{match[2]}" if int(match[2]) >= layers.get(kind, 0) > 0 else None


def _reason(
    tensor: HeaderTensor,
    layers: dict[str, int],
    predicting: set[str],
    ignorable: frozenset[str],
    class_name: str,
) -> str | None:
    name = tensor.name
    if any(p.search(name) and _fits(tensor.shape, shape) for p, shape in _BUFFERS):
        return BUFFER
    if _MTP_NAME.search(name) or _beyond(name, layers) in predicting:
        return MTP
    if _VALUE_HEAD.search(name):
        return VALUE_HEAD
    if _MEDUSA.search(name):
        return MEDUSA
    if name in ignorable:
        part = next((what for pattern, what in _PARTS if pattern.search(name)), "part")
        return f"{part} that {class_name} passes over by its own rules"
    return None


def _fits(shape: tuple[int, ...], kind: str) -> bool:
    if kind == _SQUARE:  # a mask: [..., n, n], nothing learned has that shape under that name
        return len(shape) >= 3 and shape[-1] == shape[-2]
    if kind == _SCALAR:
        return all(size == 1 for size in shape)
    return True


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if names[3:] else ""
    return ", ".join(repr(name) for name in names[:3]) + more


def _looks_like(names: Sequence[str]) -> str:
    if all(name.endswith(".bias") for name in names):
        return "biases of its layers"
    if all(_SCALES.search(name) for name in names):
        return "scales of a quantization"
    layers = {match[2] for name in names if (match := _LAYER.match(name)) is not None}
    if any("lora_" in name for name in names):
        return "an adapter that was not merged"
    if all("norm" in name or name.endswith(("_ln.weight", "_ln.bias")) for name in names):
        return "normalizations"
    if all(re.match(r"(score|classifier|\w*_head)\.", name) for name in names):
        return "a head of its own"
    if layers and len(layers) < len(names):
        return f"parts of {len(layers)} layers"
    return "learned values, as far as their names tell"


def _hint(names: Sequence[str]) -> str:
    if all(name.endswith(".bias") for name in names):
        return (
            'If its layers have biases, config.json must say so, as "attention_bias": true does '
            "for a Llama; or the weights are those of another model."
        )
    return "Correct config.json, or take the class that the weights were made for."


def _pattern_of(names: Sequence[str]) -> str:
    """A pattern that names them all, or the first of them."""
    if len(names) == 1:
        return names[0]
    first, *others = ([*name.split(".")] for name in names)
    if all(len(parts) == len(first) for parts in others):
        merged = [
            part if all(other[i] == part for other in others) else "*"
            for i, part in enumerate(first)
        ]
        if any(part != "*" for part in merged):
            return ".".join(merged)
    common: list[str] = []
    for parts in zip(first, *others, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join([*common, "*"]) if common else names[0]
