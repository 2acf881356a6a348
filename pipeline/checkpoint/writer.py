"""One output file: complete or absent, written at known places by any thread."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pipeline.checkpoint.durable import replacing
from pipeline.checkpoint.header import HeaderTensor, header_bytes
from pipeline.checkpoint.layout import FileLayout


class TensorFile:
    """An output file that is being written; see `writing`."""

    def __init__(self, descriptor: int, layout: FileLayout) -> None:
        self._descriptor = descriptor
        self._layout = layout
        self._places = {tensor.name: tensor for tensor in layout.placed}
        self.tensors: tuple[HeaderTensor, ...] = ()

    def write(self, name: str, start: int, data: NDArray[Any] | bytes) -> None:
        """Writes bytes of one tensor, `start` bytes after its beginning. Safe from any thread."""
        view = memoryview(data if isinstance(data, bytes) else data.data).cast("B")
        place = self._places[name]
        if start + view.nbytes > place.nbytes:
            raise ValueError(f"{name}: {start + view.nbytes} bytes do not fit {place.nbytes}")
        self._pwrite(view, place.offset + start)

    def finish(self, texts: Mapping[str, bytes]) -> None:
        """Writes the quant states and the header, once every other tensor is written."""
        self.tensors = self._layout.finish(texts)
        for tensor in self.tensors[len(self._layout.placed) :]:
            self._pwrite(memoryview(texts[tensor.name]), tensor.offset)
        self._pwrite(memoryview(header_bytes(self.tensors, self._layout.data_start)), 0)

    def _pwrite(self, view: memoryview, offset: int) -> None:
        while view:
            count = os.pwrite(self._descriptor, view, offset)
            view, offset = view[count:], offset + count


@contextmanager
def writing(path: Path, layout: FileLayout) -> Iterator[TensorFile]:
    """Opens an output file; when the body ends well, the whole file stands at `path`.

    The body must call `TensorFile.finish`.
    """
    with replacing(path) as descriptor:
        file = TensorFile(descriptor, layout)
        yield file
        if not file.tensors and (layout.placed or layout.texts):
            raise RuntimeError(f"{path}: the file was left without its header")
