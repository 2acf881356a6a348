"""Whether the tensors of a checkpoint and the model of its config.json belong together. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from nf4_pipeline.checkpoint.source import Checkpoint, SourceTensor
from nf4_pipeline.errors import CheckpointError
from nf4_pipeline.model.architecture import Architecture
from nf4_pipeline.model.missing_tensors import adapter_advice, explain_missing, prefix_advice
from nf4_pipeline.model.unused_tensors import Unused, check_all_known, explain_unused


def check_fit(
    checkpoint: Checkpoint, model: Architecture, allow_unused: Sequence[str] = ()
) -> tuple[Unused, ...]:
    """Holds every tensor of a checkpoint against the model.

    Args:
        checkpoint: its headers.
        model: what config.json describes.
        allow_unused: patterns of tensors that may be left out.

    Returns:
        The tensors that the model has no place for, and what they are.

    Raises:
        CheckpointError: a tensor that the model needs is missing or has another shape, or it is not
            known what one that it has no place for is.
    """
    check_complete(checkpoint.tensors, model, checkpoint.promised, checkpoint.index)
    for tensor in checkpoint.tensors:
        name = model.names.get(tensor.name)
        if name is not None and tensor.name not in model.merged:
            check_shape(tensor, model.shapes[name], model)
    unused = unused_tensors(checkpoint.tensors, model, allow_unused)
    strange = [tensor.name for tensor in unused if tensor.reason is None]
    hint = adapter_advice(strange) or prefix_advice(strange, model.shapes) or ""
    check_all_known(unused, model.class_name, hint)
    return unused


def unused_tensors(
    tensors: Sequence[SourceTensor], model: Architecture, allow_unused: Sequence[str] = ()
) -> tuple[Unused, ...]:
    """The tensors that the model has no place for, and what they are.

    Args:
        tensors: of the checkpoint.
        model: what config.json describes.
        allow_unused: patterns of tensors that may be left out.
    """
    unplaced = [
        tensor.header
        for tensor in tensors
        if model.names.get(tensor.name) is None and tensor.name not in model.merged
    ]
    return explain_unused(
        unplaced,
        names=[tensor.name for tensor in tensors],
        model_names=model.shapes,
        ignorable=model.ignorable,
        class_name=model.class_name,
        allowed=allow_unused,
    )


def check_complete(
    tensors: Sequence[SourceTensor],
    model: Architecture,
    promised: Mapping[str, str] | None = None,
    index: str | None = None,
) -> None:
    """Every parameter must be there, or another that it shares its values with.

    Args:
        tensors: of the checkpoint.
        model: what config.json describes.
        promised: tensors that the index names and no file holds, and the file it gives for each.
        index: the file that names the weight files, if one does.

    Raises:
        CheckpointError: a parameter is missing.
    """
    names = {tensor.name for tensor in tensors}
    missing = _missing(model, {found for name in names if (found := model.names.get(name))})
    if missing:
        raise CheckpointError(
            explain_missing(
                missing,
                class_name=model.class_name,
                names=names,
                strange=[n for n in names if model.names.get(n) is None and n not in model.merged],
                shapes=model.shapes,
                head=model.head_modules,
                promised=promised or {},
                index=index,
            )
        )


def _missing(model: Architecture, present: Collection[str]) -> list[str]:
    families: dict[str, set[str]] = {}
    for alias, canonical in model.tied.items():
        families.setdefault(canonical, {canonical}).add(alias)
    shared = {name: family for family in families.values() for name in family}
    return sorted(
        name
        for name in model.shapes
        if name not in model.optional and not shared.get(name, {name}).intersection(present)
    )


def check_shape(tensor: SourceTensor, expected: tuple[int, ...], model: Architecture) -> None:
    """A tensor has the shape of its place in the model.

    Raises:
        CheckpointError: the tensor has another shape than the model's.
    """
    shape = tensor.header.shape
    if shape == expected:
        return
    module = (model.names.get(tensor.name) or "").rpartition(".")[0]
    rows_only = len(shape) == len(expected) and shape[1:] == expected[1:]
    is_head = module in model.head_modules or "emb" in module or module.endswith("wte")
    hint = (
        f" It has {shape[0]:,} rows: if tokens were added after config.json was written, its "
        f'"vocab_size" must be {shape[0]}.'
        if rows_only and is_head
        else ""
    )
    raise CheckpointError(
        f"{tensor.name!r} in {tensor.file} has the shape {shape}; the model of "
        f"config.json has {expected}. The weights and the config do not belong together.{hint}"
    )
