"""The process that turns a pickle into a safetensors file; see `convert.py`.

torch maps the source and rebuilds nothing but tensors (`weights_only`); each is copied in pieces,
and its pages are given back before the next, so memory does not grow with the file.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.checkpoint.layout import StoredTensor, plan_layout
from nf4_pipeline.checkpoint.writer import TensorFile, writing
from nf4_pipeline.errors import SourceError
from nf4_pipeline.pickles.convert import Converted, ConvertRequest
from nf4_pipeline.progress import Reporter
from nf4_pipeline.resource_usage import peak_memory

_CHUNK: Final = 8 * 2**20
_MADV_DONTNEED: Final = 4  # madvise(2)

_DTYPES: Final = {
    "torch.bfloat16": "BF16",
    "torch.bool": "BOOL",
    "torch.float16": "F16",
    "torch.float32": "F32",
    "torch.float64": "F64",
    "torch.int16": "I16",
    "torch.int32": "I32",
    "torch.int64": "I64",
    "torch.int8": "I8",
    "torch.uint8": "U8",
}


def run(request: ConvertRequest, reporter: Reporter) -> Converted:
    """Converts one file.

    Raises:
        SourceError: torch's restricted loader refuses the file, it holds something else than
            tensors by name, or the target cannot be written.
    """
    try:
        return _convert(request.source, request.target)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise SourceError(
            f"{request.source} cannot be converted: {type(error).__name__}: {lines[0][:300]}. "
            "Expected tensors by name, as torch.save writes a state dict; take a checkpoint in "
            "safetensors."
        ) from error


def _convert(source: Path, target: Path) -> Converted:
    import torch

    loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(loaded, Mapping):
        raise TypeError(f"it holds a {type(loaded).__name__}, expected tensors by name")
    for name, tensor in loaded.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
        if not isinstance(name, str) or not plain or str(tensor.dtype) not in _DTYPES:
            raise TypeError(f"{str(name)[:80]!r} is no plain tensor")
    layout = plan_layout(
        StoredTensor(name, _DTYPES[str(tensor.dtype)], tuple(tensor.shape), tensor.nbytes)
        for name, tensor in loaded.items()
    )
    with writing(target, layout) as output:
        for name, tensor in loaded.items():
            _copy(output, name, tensor)
        written = output.finish()
    tensors = {tensor.name: tensor.nbytes for tensor in written.tensors}
    return Converted(written.digest, tensors, peak_memory())


def _copy(output: TensorFile, name: str, tensor: Any) -> None:
    import torch

    storage = tensor.untyped_storage()
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    for start in range(0, data.nbytes, _CHUNK):
        output.write(name, start, data[start : start + _CHUNK])
    # The mapping is private and was not written to: what is dropped here is read again if needed.
    page = mmap.PAGESIZE
    first = -(-storage.data_ptr() // page) * page
    last = (storage.data_ptr() + storage.nbytes()) // page * page
    if last > first:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)
