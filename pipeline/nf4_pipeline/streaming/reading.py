"""The bytes of tensors: from files that lie here, or from whoever serves them."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from nf4_pipeline import errors
from nf4_pipeline.checkpoint.source import Checkpoint, SourceTensor
from nf4_pipeline.errors import CheckpointError, HubError, PipelineError


class TensorBytes(Protocol):
    """Reads tensors of a checkpoint, from several threads."""

    def read(self, tensor: SourceTensor, start: int, into: memoryview) -> None:
        """Fills `into` with bytes of a tensor.

        Args:
            tensor: which.
            start: where in it the bytes begin.
            into: as long as what is wanted.

        Raises:
            CheckpointError: the bytes are not there any more.
            HubError: nobody gives them.
        """

    def close(self) -> None:
        """Lets go of what it holds."""


def tensor_bytes(checkpoint: Checkpoint, served: Path | None) -> TensorBytes:
    """What reads the tensors of a checkpoint.

    Args:
        checkpoint: its files are there, or, if they are served, headers and holes.
        served: the socket of whoever serves them; None if the files are there.
    """
    return FileBytes(checkpoint) if served is None else ServedBytes(served)


class FileBytes:
    """From the files of a checkpoint.

    Args:
        checkpoint: where they are.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._stack = ExitStack()
        self._descriptors: dict[str, int] = {}
        for file in checkpoint.files:
            descriptor = os.open(checkpoint.path(file), os.O_RDONLY)
            self._stack.callback(os.close, descriptor)
            self._descriptors[file] = descriptor

    def read(self, tensor: SourceTensor, start: int, into: memoryview) -> None:
        offset = tensor.header.offset + start
        while into:
            count = os.preadv(self._descriptors[tensor.file], [into], offset)
            if count == 0:
                raise CheckpointError(
                    f"{tensor.file} ended in the middle of {tensor.name!r}: it became shorter "
                    "while it was read. Download the checkpoint again."
                )
            into, offset = into[count:], offset + count

    def close(self) -> None:
        self._stack.close()


class ServedBytes:
    """From another process, by a socket; each thread has a connection of its own.

    Args:
        served: the socket.
    """

    def __init__(self, served: Path) -> None:
        self._served = served
        self._own = threading.local()
        self._open: list[Any] = []

    def read(self, tensor: SourceTensor, start: int, into: memoryview) -> None:
        asked = {
            "file": tensor.file,
            "offset": tensor.header.offset + start,
            "size": into.nbytes,
        }
        stream = self._stream()
        stream.write(json.dumps(asked).encode() + b"\n")
        stream.flush()
        answer = json.loads(stream.readline() or b"{}")
        if "error" in answer:
            kind = getattr(errors, answer["error"], PipelineError)
            raise kind(answer["text"])
        if not answer or stream.readinto(into) != into.nbytes:
            raise HubError(f"{tensor.file}: whoever serves the source ended. Run this again.")

    def _stream(self) -> Any:
        stream = getattr(self._own, "stream", None)
        if stream is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._open.append(connection)
            with short(self._served) as address:
                connection.connect(address)
            stream = self._own.stream = connection.makefile("rwb", buffering=1 << 16)
            self._open.append(stream)
        return stream

    def close(self) -> None:
        for opened in reversed(self._open):
            opened.close()


@contextmanager
def short(path: Path) -> Iterator[str]:
    """An address of a socket, which no system takes with more than a hundred characters."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    through = Path(f"/proc/self/fd/{folder}")
    try:
        yield str((through if through.exists() else path.parent) / path.name)
    finally:
        os.close(folder)
