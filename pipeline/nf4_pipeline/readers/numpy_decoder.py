"""The NF4 weights of a folder, by NumPy alone: `python numpy_decoder.py FOLDER` lists them.

It shares no code with the rest of the package: whoever can read this file can read the format.
"""

import json
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

STATE = ".quant_state.bitsandbytes__nf4"
TYPES: dict[str, Any] = {"U8": np.dtype("u1"), "F32": np.dtype("<f4")}
PIECE = 2**18  # weights at a time


def open_tensors(folder: Path) -> dict[str, Any]:
    """The uint8 and float32 tensors of all safetensors files, flat, by name: mapped, not read."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__" and entry["dtype"] in TYPES and 0 not in entry["shape"]:
                place = 8 + length + entry["data_offsets"][0]
                count = int(np.prod(entry["shape"], dtype=np.int64))
                tensors[name] = np.memmap(path, TYPES[entry["dtype"]], "r", place, (count,))
    return tensors


def decode(tensors: dict[str, Any], name: str, state: dict[str, Any]) -> Iterator[Any]:
    """A weight, float32 pieces in order: level[code] * (level[scale] * nested scale + offset)."""
    count, block = int(np.prod(state["shape"], dtype=np.int64)), state["blocksize"]
    levels, stored = tensors[f"{name}.quant_map"], tensors[f"{name}.absmax"]
    nested = np.repeat(tensors[f"{name}.nested_absmax"], state["nested_blocksize"])[: stored.size]
    scales = tensors[f"{name}.nested_quant_map"][stored] * nested
    scales += np.float32(state["nested_offset"])
    pairs = np.array([(a, b) for a in levels for b in levels], "<f4").view("<u8")[:, 0]
    for start in range(0, count, PIECE):
        size = min(PIECE, count - start)
        weights = pairs.take(tensors[name][start // 2 : (start + size + 1) // 2]).view("<f4")[:size]
        yield weights * np.repeat(scales[start // block :][: -(-size // block)], block)[:size]


def round_to(dtype: str, weights: Any) -> Any:
    """Weights as readers hold them; bfloat16 by its bits, uint16, for NumPy has no such numbers."""
    bits = weights.view(np.uint32)
    to_even = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return to_even.astype("u2") if dtype == "bfloat16" else weights.astype(dtype)


if __name__ == "__main__":
    found = open_tensors(Path(sys.argv[1]))
    for name in (name.removesuffix(STATE) for name in found if name.endswith(STATE)):
        state = json.loads(found[name + STATE].tobytes())
        print(sha256(b"".join(map(bytes, decode(found, name, state)))).hexdigest()[:16], name)
