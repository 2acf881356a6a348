"""Folders that people give to `nf4 download`, each with one thing about it that must be noticed.

A `Change` edits a whole, good checkpoint: one model.safetensors of a Llama, and its tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny import edit_json

SINGLE: Final = "model.safetensors"
POINTER: Final = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:"
    + "0123456789abcdef" * 4
    + "\nsize 7\n"
)
TEMPLATE: Final = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"

Tensors = dict[str, torch.Tensor]
Change = Callable[[Path], object]


def retensor(edit: Callable[[Tensors], Tensors]) -> Change:
    """Changes the tensors."""

    def change(folder: Path) -> None:
        tensors = edit(load_file(folder / SINGLE))
        save_tensors(folder / SINGLE, tensors)

    return change


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a safetensors file."""
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})


def with_extra(**extra: torch.Tensor) -> Change:
    """Adds tensors; two underscores stand for a dot."""
    return retensor(lambda ts: ts | {n.replace("__", "."): t for n, t in extra.items()})


def renamed(edit: Callable[[str], str]) -> Change:
    """Changes every name."""
    return retensor(lambda tensors: {edit(name): tensor for name, tensor in tensors.items()})


def without(part: str) -> Change:
    """Takes out the tensors whose name has a part."""
    return retensor(lambda tensors: {n: t for n, t in tensors.items() if part not in n})


def configured(**changes: Any) -> Change:
    """Sets keys of config.json; None deletes one."""
    return lambda folder: edit_json(folder / "config.json", **changes)


def with_file(name: str, content: str | dict[str, Any]) -> Change:
    """Writes a file."""
    text = content if isinstance(content, str) else json.dumps(content)
    return lambda folder: (folder / name).write_text(text, "utf-8")


def templated(template: Any) -> Change:
    """Sets the chat template."""
    return lambda folder: edit_json(folder / "tokenizer_config.json", chat_template=template)


def both(*changes: Change) -> Change:
    """One after the other."""

    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def sharded(folder: Path, parts: int = 2, *, add: float = 0.0) -> None:
    """Writes shards and an index beside model.safetensors, with `add` added to all values."""
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    size = -(-len(names) // parts)
    weight_map: dict[str, str] = {}
    for number in range(parts):
        part = names[number * size : (number + 1) * size]
        file = f"model-{number + 1:05d}-of-{parts:05d}.safetensors"
        save_tensors(folder / file, {name: tensors[name] + add for name in part})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{SINGLE}.index.json").write_text(json.dumps(index))


def packed(kind: str) -> Change:
    """Projections as a quantizing tool leaves them."""

    def edit(tensors: Tensors) -> Tensors:
        made: Tensors = {}
        for name, tensor in tensors.items():
            if not name.endswith("_proj.weight"):
                made[name] = tensor
                continue
            made |= _packed(kind, name, tensor)
        return made

    return retensor(edit)


def _packed(kind: str, name: str, tensor: torch.Tensor) -> Tensors:
    rows, columns = tensor.shape
    stem = name.removesuffix(".weight")
    words = torch.zeros(rows, -(-columns // 8), dtype=torch.int32)
    bytes_ = torch.zeros(rows * columns // 2, 1, dtype=torch.uint8)
    match kind:
        case "gptq":
            return {
                f"{stem}.qweight": torch.zeros(-(-columns // 8), rows, dtype=torch.int32),
                f"{stem}.qzeros": torch.zeros(1, -(-rows // 8), dtype=torch.int32),
                f"{stem}.g_idx": torch.zeros(columns, dtype=torch.int32),
                f"{stem}.scales": torch.ones(1, rows),
            }
        case "fp8":
            return {
                name: tensor.to(torch.float8_e4m3fn),
                f"{name}_scale_inv": torch.ones(1, 1),
            }
        case "int8":
            return {
                name: torch.zeros(rows, columns, dtype=torch.int8),
                f"{name}_scale": torch.ones(rows, 1),
            }
        case "llm.int8":
            return {
                name: torch.zeros(rows, columns, dtype=torch.int8),
                f"{stem}.SCB": torch.ones(rows),
            }
        case "nf4":
            return {
                name: bytes_,
                f"{name}.absmax": torch.zeros(rows * columns // 64, dtype=torch.uint8),
                f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
            }
        case "mlx":
            return {
                name: words.view(torch.uint32),
                f"{stem}.scales": torch.ones(rows, 1),
                f"{stem}.biases": torch.ones(rows, 1),
            }
        case "packed":
            return {f"{stem}.weight_packed": words, f"{stem}.weight_scale": torch.ones(rows, 1)}
        case _:
            return {f"{stem}.W_q": bytes_, f"{stem}.scale": torch.ones(rows, 1)}
