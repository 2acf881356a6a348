"""Checkpoints of odd shapes, for `odd_places_cases.py`."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, Final

from tests.support.tiny import INDEX, edit_json, write_falcon


def make(name: str, folder: str) -> None:
    """Writes one of them."""
    _MAKERS[name](Path(folder))


def _header(tensors: dict[str, Any]) -> bytes:
    header = json.dumps(tensors).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _one_file(folder: Path, **options: Any) -> Path:
    write_falcon(folder, shards=1, **options)
    (folder / INDEX).unlink()
    file = folder / "model.safetensors"
    (folder / "model-00001-of-00001.safetensors").rename(file)
    return file


def _no_tensors(folder: Path) -> None:
    _one_file(folder).write_bytes(_header({}))


def _edit_tensors(folder: Path, change: Callable[[dict[str, Any]], None], **options: Any) -> None:
    from safetensors.torch import load_file, save_file

    file = _one_file(folder, **options)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def _zero_size(folder: Path) -> None:
    import torch

    def change(tensors: dict[str, Any]) -> None:
        tensors["transformer.h.0.mlp.dense_h_to_4h.weight"] = torch.zeros(0, 64)

    _edit_tensors(folder, change)


def _small_vocabulary(folder: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for name in ("transformer.word_embeddings.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:1].clone()

    _edit_tensors(folder, change)
    edit_json(folder / "config.json", vocab_size=1, bos_token_id=0, eos_token_id=0)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {"<|endoftext|>": 0}
    tokenizer["added_tokens"][0]["id"] = 0
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def _no_layers(folder: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if ".h." in name]:
            del tensors[name]

    _edit_tensors(folder, change)
    edit_json(folder / "config.json", num_hidden_layers=0)


def _sparse(folder: Path) -> None:
    """One tensor of 3 GB of zeros, in a file that takes no room, beside a model that lacks it."""
    file = _one_file(folder)
    size = 3 * 2**30
    header = _header(
        {
            "transformer.big.weight": {
                "dtype": "BF16",
                "shape": [size // 2],
                "data_offsets": [0, size],
            }
        }
    )
    big = folder / "model-00002.safetensors"
    with big.open("wb") as out:
        out.write(header)
        out.truncate(len(header) + size)
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
    weight_map = {**dict.fromkeys(names, file.name), "transformer.big.weight": big.name}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _many(folder: Path) -> None:
    import torch

    def change(tensors: dict[str, Any]) -> None:
        tensors |= {f"extra.{number}": torch.zeros(1) for number in range(20_000)}

    _edit_tensors(folder, change)


def _pickled(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    file = _one_file(folder)
    tensors = load_file(file)
    file.unlink()
    return tensors


def _legacy(folder: Path) -> None:
    """As torch wrote before 1.6: pickles one after the other, then the bytes."""
    import torch

    tensors = _pickled(folder)
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def _tar(folder: Path) -> None:
    """A tar, as torch wrote before 0.1.10."""
    _pickled(folder)
    with tarfile.open(folder / "pytorch_model.bin", "w") as file:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            info = tarfile.TarInfo(name)
            info.size = 4
            file.addfile(info, BytesIO(b"\x80\x02N."))


_MAKERS: Final[dict[str, Callable[[Path], object]]] = {
    "no tensors": _no_tensors,
    "zero-size tensors": _zero_size,
    "a vocabulary of 1": _small_vocabulary,
    "one layer": lambda folder: write_falcon(folder, layers=1),
    "no layers": _no_layers,
    "sparse 3 GB tensor": _sparse,
    "20,000 tiny tensors": _many,
    "tar pickle": _tar,
    "legacy pickle": _legacy,
}
