"""What all drivers share. Run in a peer's environment: nothing of this package is there.

A driver is called with a step and reads a request from stdin:

    quantize  source, out, settings, tokens  a checkpoint in, the peer's own files out; measured
    decode    source, out, decoded           the peer's files in, plain float32 weights out

`decode` writes `decoded`, a safetensors file with the source's names, and beside it a JSON file
with the bytes that each decoded weight takes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Request = dict[str, Any]
Decoded = dict[str, tuple[torch.Tensor, int]]
"""Of each weight that is not stored as it was: float32 values, and the bytes that it takes."""


def run(quantize: Callable[[Request], None], decode: Callable[[Request], Decoded]) -> None:
    """Does the step that the command line names."""
    request = json.load(sys.stdin)
    if sys.argv[1] == "quantize":
        quantize(request)
    else:
        save(Path(request["decoded"]), decode(request))


def save(path: Path, weights: Decoded) -> None:
    """Writes decoded weights, and what each took."""
    tensors = {name: values.float().contiguous() for name, (values, _) in weights.items()}
    save_file(tensors, path)
    sizes = {name: nbytes for name, (_, nbytes) in weights.items()}
    path.with_suffix(".json").write_text(json.dumps(sizes), encoding="utf-8")


def read(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder."""
    tensors = {}
    for path in sorted(Path(folder).rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})
    return tensors


def calibration_rows(request: Request) -> list[torch.Tensor]:
    """Token ids of each calibration sequence, int64 [1, length]."""
    rows = json.loads(Path(request["tokens"]).read_text("utf-8"))
    return [torch.tensor(row)[None] for row in rows]


def falcon_linear_is_linear() -> None:
    """Lets a peer that knows `nn.Linear` alone see a Falcon's projections.

    transformers calls them `FalconLinear`, a subclass; some peers would quantize nothing.
    """
    from transformers.models.falcon import modeling_falcon

    modeling_falcon.FalconLinear = torch.nn.Linear


def decode_gptq(tensors: dict[str, torch.Tensor], zero_offset: int) -> Decoded:
    """Decodes the int32-packed 4-bit format of GPTQ.

    Args:
        tensors: of the checkpoint: qweight [in / 8, out], qzeros [groups, out / 8], scales
            [groups, out], and g_idx [in] where columns have an order of their own.
        zero_offset: what is added to stored zero points: 1 in the first version of the format.
    """
    found: Decoded = {}
    for name in tensors:
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        parts = {
            kind: tensors[f"{module}.{kind}"]
            for kind in ("qweight", "qzeros", "scales", "g_idx")
            if f"{module}.{kind}" in tensors
        }
        shifts = torch.arange(0, 32, 4)
        packed = parts["qweight"]
        codes = (packed[:, None, :] >> shifts[None, :, None]) & 15
        codes = codes.reshape(-1, packed.shape[1])
        zeros = (parts["qzeros"][:, :, None] >> shifts) & 15
        zeros = zeros.reshape(len(zeros), -1) + zero_offset
        scales = parts["scales"].float()
        per_group = len(codes) // len(scales)
        group = parts.get("g_idx", torch.arange(len(codes)) // per_group).long()
        values = (codes - zeros[group]).float() * scales[group]
        nbytes = sum(part.numel() * part.element_size() for part in parts.values())
        found[f"{module}.weight"] = (values.T, nbytes)
    return found
