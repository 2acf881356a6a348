"""What stands in the files of an artifact against what stands in those of its source.

No library is asked what a weight is: one may scale weights in place when the model first runs, or
put codes into another order for its kernels. Every 4-bit weight is decoded from its six tensors, in
parts, in float32, and held against the 16-bit one; everything else must be there bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod, sqrt
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray

from nf4_pipeline.blocks.block_reader import DTYPES
from nf4_pipeline.checkpoint.safetensors_header import HeaderTensor, read_header
from nf4_pipeline.checkpoint.source import Checkpoint, SourceTensor
from nf4_pipeline.gptq.scale_limits import SMALL
from nf4_pipeline.manifest.manifest import Manifest, Tensor
from nf4_pipeline.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE
from nf4_pipeline.nf4.codebook import NF4_LEVELS
from nf4_pipeline.nf4.float_bits import dtype_name
from nf4_pipeline.nf4.stored_weight import StoredWeight, stored_tensors
from nf4_pipeline.verification.distance import LayerDistance

_PART: Final = 4 * 2**20  # weights that are compared at a time; whole blocks


class WeightComparison:
    """Holds an artifact's tensors against those of its source; each of them once.

    Args:
        source: the 16-bit checkpoint.
        artifact: the export folder.
        manifest: of the artifact: what stands for what.
        distance: gives the distance that a module's weight is added to, by the module's name.
        device: where it is computed.
        read: reads a tensor of the source; None to map its file.

    Attributes:
        kept: how many tensors that are not 4 bit were compared.
        changed: the names of those that differ; of tensors of the source for which nothing stands,
            though the manifest does not say that they were left out; and of a second tensor that is
            said to stand for one of the source.
        malformed: 4-bit weights whose six tensors are not what the format says, each with why.
    """

    def __init__(
        self,
        source: Checkpoint,
        artifact: Path,
        manifest: Manifest,
        distance: Callable[[str], LayerDistance],
        device: torch.device,
        read: Callable[[SourceTensor], torch.Tensor] | None = None,
    ) -> None:
        self.kept = 0
        self._read_source = read or self._map_source
        self.malformed: list[str] = []
        self._source = source
        self._distance = distance
        self._device = device
        self._left = {tensor.source_name: tensor for tensor in manifest.tensors}
        self._stored: dict[str, tuple[Path, HeaderTensor]] = {
            tensor.name: (path, tensor)
            for path in sorted({artifact / s.file for t in manifest.tensors for s in t.stored})
            for tensor in read_header(path)
        }
        self._codes = _code_pairs(device)
        known = self._left.keys() | {tensor.name for tensor in manifest.dropped}
        self.changed = [tensor.name for tensor in source.tensors if tensor.name not in known]
        first = {id(tensor) for tensor in self._left.values()}
        self.changed += [t.name for t in manifest.tensors if id(t) not in first]

    def compare(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Compares what stands for some tensors of the source, and was not compared yet.

        Args:
            tensors: as they stand in the source's files, by their names there.
        """
        for name, wanted in tensors.items():
            tensor = self._left.pop(name, None)
            if tensor is None:
                continue
            if tensor.quantized:
                self._compare_quantized(tensor, wanted)
            else:
                self.kept += 1
                if not self._is_copy(tensor, wanted):
                    self.changed.append(tensor.name)

    def compare_rest(self, only: Callable[[Tensor], bool] = lambda tensor: True) -> None:
        """Compares everything that was not compared yet, read from the source's files.

        Args:
            only: tells what of it.
        """
        for tensor in self._source.tensors:
            entry = self._left.get(tensor.name)
            if entry is not None and only(entry):
                self.compare({tensor.name: self._read_source(tensor)})

    def _map_source(self, tensor: SourceTensor) -> torch.Tensor:
        return _as_torch(_mapped(self._source.path(tensor.file), tensor.header), tensor.header)

    @property
    def missing(self) -> list[str]:
        """What the manifest says was made of tensors that the source does not hold."""
        return [tensor.name for tensor in self._left.values()]

    def _compare_quantized(self, tensor: Tensor, wanted: torch.Tensor) -> None:
        if tensor.transposed:
            wanted = wanted.T
        problem, stored = self._read(tensor, wanted)
        if stored is None:
            self.malformed.append(f"{tensor.module or tensor.name} {problem}")
            return
        _compare_weight(
            self._distance(tensor.module or tensor.name),
            stored,
            wanted.reshape(-1),
            self._codes,
            self._device,
        )

    def _read(self, tensor: Tensor, wanted: torch.Tensor) -> tuple[str, StoredWeight | None]:
        """A weight from its six tensors, or what is wrong with them."""
        shape, dtype = tuple(wanted.shape), dtype_name(wanted)
        found: dict[str, NDArray[Any]] = {}
        for expected in stored_tensors(tensor.name, shape, dtype):
            entry = self._stored.get(expected.name)
            if entry is None:
                return f"lacks {expected.name}", None
            path, header = entry
            if (header.dtype, header.shape) != (expected.dtype, expected.shape):
                said = f"{header.dtype} {list(header.shape)}"
                right = f"{expected.dtype} {list(expected.shape)}"
                return f"has {expected.name} as {said}, not as {right}", None
            array: NDArray[Any] = _mapped(path, header)
            if header.dtype != "U8":  # small, and need not begin where floats may
                array = array.copy().view(np.float32)
            found[expected.name] = array.reshape(header.shape)
        try:
            stored = StoredWeight.read(tensor.name, found)
            if (stored.shape, stored.dtype) != (shape, dtype):
                return f"says that it is {stored.dtype} {list(stored.shape)}", None
            written = stored.tensors(tensor.name)
        except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
            return f"has a quant state that cannot be read ({error})", None
        for name, array in written.items():
            # Readers differ in which of the tables they look at, so all are as the format has them.
            if array.nbytes < _PART and array.tobytes() != found[name].tobytes():
                return f"has another {name} than the format", None
        return "", stored

    def _is_copy(self, tensor: Tensor, wanted: torch.Tensor) -> bool:
        """Whether a tensor holds the source's bits, cast if it is stored in another dtype."""
        (part,) = tensor.stored
        path, header = self._stored.get(part.name, (None, None))
        if path is None or header is None:
            return False
        found = _as_torch(_mapped(path, header), header)
        if found.shape != wanted.shape:
            return False
        if header.dtype not in DTYPES or found.dtype == wanted.dtype:
            found, wanted = _bytes_of(found), _bytes_of(wanted)
        else:
            found, wanted = found.reshape(-1), wanted.reshape(-1)
        pairs = zip(torch.split(found, _PART), torch.split(wanted, _PART), strict=True)
        return all(_same(one, other) for one, other in pairs)


def _same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal, or what a cast gives, with a NaN for a NaN: which of them is not said anywhere."""
    if found.dtype == wanted.dtype:
        return torch.equal(found, wanted)
    cast = wanted.to(found.dtype)
    return bool(((found == cast) | (found.isnan() & cast.isnan())).all())


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def _mapped(path: Path, header: HeaderTensor) -> NDArray[np.uint8]:
    """The bytes of a tensor, [nbytes], read when they are looked at."""
    if header.nbytes == 0:
        return np.empty(0, np.uint8)
    # "c": torch takes no memory that it may not write to; what it wrote would not reach the file.
    return np.asarray(np.memmap(path, np.uint8, "c", header.offset, (header.nbytes,)))


def _as_torch(content: NDArray[np.uint8], header: HeaderTensor) -> torch.Tensor:
    # A tensor need not begin where memory of its dtype may, so its bytes may have to be moved.
    dtype = DTYPES.get(header.dtype, torch.uint8)
    if content.ctypes.data % dtype.itemsize:
        content = content.copy()
    shape = header.shape if header.dtype in DTYPES else (header.nbytes,)
    return torch.from_numpy(content).view(dtype).reshape(shape)


def _code_pairs(device: torch.device) -> torch.Tensor:
    """The two levels of each byte of codes, as one int64 with the bits of both, [256]."""
    codes = np.arange(256)
    levels = np.stack([NF4_LEVELS[codes >> 4], NF4_LEVELS[codes & 15]], axis=1)
    return torch.from_numpy(levels.view(np.int64).reshape(-1).copy()).to(device)


def _compare_weight(
    error: LayerDistance,
    stored: StoredWeight,
    wanted: torch.Tensor,
    pairs: torch.Tensor,
    device: torch.device,
) -> None:
    """Adds what a weight is off by.

    Args:
        error: is added to.
        stored: the 4-bit weight, as its file has it.
        wanted: the 16-bit one, [n].
        pairs: as `_code_pairs` gives them.
        device: where it is computed.
    """
    scales = torch.from_numpy(stored.scales.scales()).to(device)
    nested = torch.from_numpy(np.repeat(stored.scales.absmax, NESTED_BLOCK_SIZE)).to(device)
    nested = nested[: scales.numel()]
    parts = []
    for start in range(0, prod(stored.shape), _PART):
        exact = wanted[start : start + _PART].to(device).float()
        count = exact.numel()
        codes = torch.from_numpy(stored.packed[start // 2 : (start + count + 1) // 2]).to(device)
        actual = pairs.index_select(0, codes.int()).view(torch.float32)[:count]
        block = start // BLOCK_SIZE
        parts.append(_in_blocks(actual, exact, scales[block : block + -(-count // BLOCK_SIZE)]))
    off, energy, largest_off, largest = (torch.cat(part) for part in zip(*parts, strict=True))
    # Stock double quantization gives near-zero blocks any small scale, and nobody can tell.
    floor = max(SMALL * float(largest.double().mean()), 1e-300)
    share = largest_off.double() / largest.double().clamp(min=floor)
    total = float(energy.sum())
    error.weight = sqrt(float(off.sum()) / total) if total else 0.0
    error.worst = float(share.max())
    error.worst_at = int(share.argmax())
    scale_error = (scales - largest).abs().double() / nested.double()
    scale_error = torch.where(scales == largest, 0.0, scale_error)  # of a group of equal scales
    error.scale = float(scale_error.max())
    error.scale_at = int(scale_error.argmax())
    reach = scales.abs().double() / largest.double().clamp(min=floor)
    error.reach = float(reach.max())
    error.reach_at = int(reach.argmax())


def _in_blocks(
    levels: torch.Tensor, exact: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Squared differences, squares, largest difference and largest weight of each block of 64.

    Args:
        levels: of the codes, [n]; overwritten.
        exact: the weights, float32 [n].
        scales: [ceil(n / 64)].
    """
    ragged = -len(exact) % BLOCK_SIZE
    if ragged:
        exact, levels = (torch.nn.functional.pad(part, (0, ragged)) for part in (exact, levels))
    exact, off = (
        rearrange(part, "(block weight) -> block weight", weight=BLOCK_SIZE)
        for part in (exact, levels)
    )
    off = off.mul_(scales[:, None]).sub_(exact)
    return (
        torch.linalg.vecdot(off, off).double(),
        torch.linalg.vecdot(exact, exact).double(),
        off.abs_().amax(dim=1),
        exact.abs().amax(dim=1),
    )
