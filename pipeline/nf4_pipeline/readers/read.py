"""All readers of one export; that of a small one runs beside whatever else verify does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Final

from nf4_pipeline.processes.parent_side import Waiting
from nf4_pipeline.progress import SILENT, Reporter
from nf4_pipeline.readers.decoded import decode_with_numpy
from nf4_pipeline.readers.document import ReaderResult
from nf4_pipeline.readers.own import judge_own
from nf4_pipeline.readers.promises import promised, published_lines
from nf4_pipeline.readers.stock import StockReader, StockReply, StockRequest, awkward_layers

_SMALL: Final = 256 * 2**20
"""Weights of an export that is read beside other work; of a larger one, there is never a second
copy in memory, and more threads than one help."""


@dataclass(frozen=True)
class Export:
    """What is read, as its manifest describes it.

    Attributes:
        folder: the export folder.
        model_class: the causal LM class.
        hidden_modules: quantized modules that stock transformers >= 5.5 passes over.
        modules: the quantized modules.
        shapes: of the quantized weights, [out_features, in_features], by name.
    """

    folder: Path
    model_class: str
    hidden_modules: Sequence[str]
    modules: Sequence[str]
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class OwnReading:
    """What our loader found, in the process that verifies.

    Attributes:
        version: of this package.
        layers: the 4-bit layers.
        lost: names that it missed, or that it had no place for.
        dtype: what the model computes in, such as "bfloat16".
    """

    version: str
    layers: Sequence[str]
    lost: Sequence[str]
    dtype: str


class Readers:
    """Reads an export. Entering starts what can run beside other work; leaving ends it.

    Args:
        export: what is read.
        device: "cpu" or "cuda:N".
        folder: an empty one, for logits.
        waiting: gives the process of stock transformers.
        reporter: told how far it is.
        beside: stock transformers reads beside whatever else verify does; else after it.

    Attributes:
        own_logits: where `write_logits` leaves those of our loader's model, before `results`.
    """

    def __init__(
        self,
        export: Export,
        device: str,
        folder: Path,
        waiting: Callable[[], Waiting[StockRequest, StockReply]],
        reporter: Reporter = SILENT,
        *,
        beside: bool,
    ) -> None:
        self._waiting, self._beside, self._reporter = waiting, beside, reporter
        self.own_logits = folder / "own-logits.npy"
        self._export = export
        self._promised = promised(export.model_class, export.hidden_modules)
        self._small = sum(map(prod, export.shapes.values())) < _SMALL
        self._awkward = awkward_layers(export.shapes.values(), device)
        self._request = StockRequest(
            artifact=str(export.folder.resolve()),
            device=device,
            threads=1 if self._small else None,
            lines=published_lines(export.model_class, export.hidden_modules),
            logits=str(folder / "stock-logits.npy"),
            lora=True,
        )
        self._stock: StockReader | None = None
        self._stop = Event()
        self._open = ExitStack()

    def __enter__(self) -> Readers:
        if self._beside:
            self._start()
        # NumPy needs nothing but the files, and nobody waits for it.
        pool = self._open.enter_context(ThreadPoolExecutor(1, "numpy reader"))
        self._open.callback(self._stop.set)
        self._decoded = pool.submit(
            decode_with_numpy,
            self._export.folder,
            self._export.shapes,
            reporter=self._reporter,
            stop=self._stop,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def _start(self) -> StockReader:
        reader = StockReader(self._request, awkward=self._awkward, waiting=self._waiting())
        self._stock = self._open.enter_context(reader)
        return reader

    def results(self, own: OwnReading) -> tuple[ReaderResult, ...]:
        """What every reader found: our loader, transformers, NumPy and PEFT.

        Args:
            own: what our loader found; its logits lie in `own_logits`.
        """
        stock = self._stock or self._start()
        modules = self._export.modules
        ours = judge_own(own.version, own.layers, modules, own.lost, self.own_logits)
        transformers, *peft = stock.results(
            modules,
            self.own_logits,
            own.dtype,
            promised="transformers" in self._promised,
            version=version("transformers"),
            reporter=self._reporter,
        )
        return (ours, transformers, self._decoded.result(), *peft)
