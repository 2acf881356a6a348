"""The tensors of a block, read side by side into one buffer, ahead of time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Final

import torch

from nf4_pipeline.checkpoint.source import SourceTensor
from nf4_pipeline.errors import CheckpointError
from nf4_pipeline.streaming.reading import TensorBytes

_ALIGN: Final = 256  # of a tensor in the buffer; CUDA's kernels like it
_PART: Final = 16 * 2**20  # bytes that one thread reads at a time
_READERS: Final = 8

DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that are read together, and where in a buffer each one goes."""

    tensors: tuple[SourceTensor, ...]
    offsets: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, tensors: Sequence[SourceTensor]) -> TensorGroup:
        offsets, end = [], 0
        for tensor in tensors:
            offsets.append(end)
            end += -(-tensor.header.nbytes // _ALIGN) * _ALIGN
        return cls(tuple(tensors), tuple(offsets), end)

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Checkpoint name -> tensor, without a copy.

        Args:
            buffer: uint8, at least `nbytes` long, on any device.

        Raises:
            CheckpointError: a tensor has a dtype that no causal LM computes with.
        """
        views = {}
        for tensor, offset in zip(self.tensors, self.offsets, strict=True):
            header = tensor.header
            if header.dtype not in DTYPES:
                raise CheckpointError(
                    f"{tensor.name!r} in {tensor.file} is {header.dtype}, which a 16-bit model "
                    f"does not hold; expected one of {', '.join(DTYPES)}."
                )
            part = buffer[offset : offset + header.nbytes]
            views[tensor.name] = part.view(DTYPES[header.dtype]).reshape(header.shape)
        return views


class BlockReader:
    """Reads groups of tensors; a context manager.

    Args:
        source: gives the bytes; closed with this.
    """

    def __init__(self, source: TensorBytes) -> None:
        self._source = source
        self._parts = ThreadPoolExecutor(_READERS, "read")

    def __enter__(self) -> BlockReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._parts.shutdown(cancel_futures=error is not None)
        self._source.close()

    def start(self, group: TensorGroup, buffer: torch.Tensor) -> list[Future[None]]:
        """Begins to read a group.

        Args:
            group: what to read.
            buffer: uint8 on the CPU, at least `group.nbytes` long.

        Returns:
            One future for each part; the group is there when all are done.
        """
        pending = []
        view = buffer.numpy().data if buffer.numel() else memoryview(b"")
        for tensor, offset in zip(group.tensors, group.offsets, strict=True):
            for start in range(0, tensor.header.nbytes, _PART):
                count = min(_PART, tensor.header.nbytes - start)
                part = view[offset + start : offset + start + count]
                pending.append(self._parts.submit(self._source.read, tensor, start, part))
        return pending

    def read(self, tensor: SourceTensor) -> torch.Tensor:
        """A tensor by itself, as it stands in its file; bytes, if torch has no such numbers."""
        header = tensor.header
        buffer = torch.empty(header.nbytes, dtype=torch.uint8)
        for part in self.start(TensorGroup.of([tensor]), buffer):
            part.result()
        if header.dtype not in DTYPES:
            return buffer
        return buffer.view(DTYPES[header.dtype]).reshape(header.shape)
