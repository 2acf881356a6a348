"""llama.cpp, built from source by whoever runs this: its converter, then `llama-quantize`."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

_QUANTIZED = "quantized.gguf"


def _use(checkout: str) -> None:
    """Imports its own gguf and converter, not those of PyPI."""
    sys.path[:0] = [checkout, str(Path(checkout, "gguf-py"))]


def _whole(request: common.Request) -> Path:
    """The converter's 16-bit file, beside what is compared."""
    return Path(f"{request['out']}-16bit.gguf")


def quantize(request: common.Request) -> None:
    """`settings`: the checkout, and the type that `llama-quantize` knows."""
    settings, out = request["settings"], Path(request["out"])
    out.mkdir(parents=True)
    _use(settings["checkout"])
    from conversion.base import TextModel

    known = TextModel.get_vocab_base_pre

    def or_plain(self: Any, tokenizer: Any) -> str:
        """How text is cut before BPE; weights do not depend on it."""
        try:
            return known(self, tokenizer)
        except NotImplementedError:  # a tokenizer that no published model has
            return "gpt-2"

    TextModel.get_vocab_base_pre = or_plain
    convert = Path(settings["checkout"], "convert_hf_to_gguf.py")
    whole = str(_whole(request))
    source = _readable(Path(request["source"]), Path(f"{request['out']}-source"))
    sys.argv = ["convert", str(source), "--outfile", whole, "--outtype", "bf16"]
    try:
        runpy.run_path(str(convert), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
    program = next(Path(settings["checkout"]).glob("build*/bin/llama-quantize"))
    files = [whole, str(out / _QUANTIZED)]
    subprocess.run([str(program), *files, settings["type"]], check=True)


def _readable(source: Path, folder: Path) -> Path:
    """The source, in which a multi-query Falcon says how many heads its keys have.

    The converter reads `num_kv_heads`; transformers gives it the number of all heads where the
    config, as that of falcon-7b, does not name it.
    """
    config = json.loads((source / "config.json").read_text("utf-8"))
    if not config.get("multi_query") or "num_kv_heads" in config:
        return source
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"num_kv_heads": 1}), encoding="utf-8")
    return folder


def decode(request: common.Request) -> common.Decoded:
    """By gguf's own functions; names and the order of rows are found by comparing rows.

    The converter renames tensors and moves rows of some (queries and keys of a Llama). Its 16-bit
    file has the rows of the source, bit for bit, so they say what became of which.
    """
    _use(request["settings"]["checkout"])
    import gguf

    out = Path(request["out"])
    places: dict[bytes, dict[str, int]] = {}
    source = common.read(request["source"])
    for name, tensor in source.items():
        if tensor.ndim == 2:
            for row, values in enumerate(tensor.float().numpy()):
                places.setdefault(values.tobytes(), {})[name] = row
    where: dict[str, tuple[str, list[int]]] = {}
    for tensor in gguf.GGUFReader(_whole(request)).tensors:
        if len(tensor.shape) == 2:
            rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            found = [places[row.astype(np.float32).tobytes()] for row in rows]
            names = set(found[0]).intersection(*found)
            # A tied head that is stored twice is written twice, and may become two types.
            is_head = tensor.name == "output.weight"
            name = sorted(names, key=lambda name: ("lm_head" in name) != is_head)[0]
            where[tensor.name] = name, [row[name] for row in found]
    decoded: common.Decoded = {}
    for tensor in gguf.GGUFReader(out / _QUANTIZED).tensors:
        if tensor.name in where and tensor.tensor_type.name not in ("F32", "F16", "BF16"):
            name, rows = where[tensor.name]
            values = torch.empty(source[name].shape)
            values[rows] = torch.from_numpy(
                gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()
            )
            decoded[name] = values, int(tensor.n_bytes)
    return decoded


if __name__ == "__main__":
    common.run(quantize, decode)
