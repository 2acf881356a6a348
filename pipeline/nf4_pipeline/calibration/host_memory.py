"""Numbers that wait for their turn on a device: in the host's memory, or on disk where it is small.

What stands on disk is in files without a name: a killed run leaves none of them behind.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from nf4_pipeline.checkpoint.atomic import make_folder
from nf4_pipeline.errors import ResourceError
from nf4_pipeline.resource_usage import free_space


class HostMemory:
    """Gives tensors on the CPU; a context manager, behind which they must not be used.

    Args:
        folder: on whose disk the files are.
        room: bytes of memory that may be taken before files are.
        device: which the numbers come from and go to: for a GPU, memory is locked, so that copies
            are fast.

    Attributes:
        in_memory: bytes that were taken of it.
        on_disk: likewise.
    """

    def __init__(self, folder: Path, room: int, device: torch.device) -> None:
        self._folder = folder
        self._room = room
        self._locks = device.type == "cuda"
        # Memory that is locked must not be unmapped, whoever has no use for it any more.
        self._locked: list[torch.Tensor] = []
        self.in_memory = 0
        self.on_disk = 0

    def __enter__(self) -> HostMemory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for tensor in self._locked:
            _cudart().cudaHostUnregister(tensor.data_ptr())
        self._locked = []

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor."""
        kept = self.empty(tensor.shape, tensor.dtype)
        return kept.copy_(tensor)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of any content.

        Raises:
            ResourceError: neither the memory nor the disk has room for it.
        """
        nbytes = prod(shape) * dtype.itemsize
        if not nbytes:
            return torch.empty(shape, dtype=dtype)
        if self.in_memory + nbytes <= self._room:
            self.in_memory += nbytes
            tensor = torch.frombuffer(mmap.mmap(-1, nbytes), dtype=dtype)
            self._lock(tensor)
        else:
            tensor = torch.frombuffer(self._file(nbytes), dtype=dtype)
            self.on_disk += nbytes
        return tensor.view(tuple(shape))

    def _file(self, nbytes: int) -> mmap.mmap:
        make_folder(self._folder)
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                os.posix_fallocate(file.fileno(), 0, nbytes)  # not later, when it is written to
                return mmap.mmap(file.fileno(), nbytes)
        except OSError as error:
            raise ResourceError(
                f"--effort high: {nbytes / 1e9:,.2f} GB more are needed for codes to learn block "
                f"by block, and neither this machine's memory (of which {self.in_memory / 1e9:,.1f}"
                f" GB are taken for it) nor the disk of {self._folder} ("
                f"{free_space(self._folder) / 1e9:,.1f} GB free) has room for them. Make space, "
                "name a --build-dir on another disk, or leave --effort out."
            ) from error

    def _lock(self, tensor: torch.Tensor) -> None:
        """Fails where the system does not let memory be locked; copies are slower then."""
        if not self._locks:
            return
        if int(_cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)) == 0:
            self._locked.append(tensor)
        else:
            self._locks = False


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
