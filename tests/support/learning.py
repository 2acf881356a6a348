"""Tiny checkpoints with calibrated codes, from which codes learn in a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from nf4_pipeline.blocks.streamed_model import StreamedModel
from nf4_pipeline.calibration import learning
from nf4_pipeline.calibration.block_store import BlockStore
from nf4_pipeline.calibration.learning import Learning
from nf4_pipeline.calibration.learning_plan import LearningPlan
from nf4_pipeline.machine import Machine
from nf4_pipeline.progress import SILENT
from nf4_pipeline.selection import Plan
from nf4_pipeline.stages.quantize import Quantize

from tests.support.calibrated import downloaded, settings
from tests.support.checkpoints import make_checkpoint, write_tokenizer
from tests.support.decoders import DECODERS, write_decoder
from tests.support.tiny import copy_of

QUICK: Final = LearningPlan(16, 4, 32, 4, 16, 1.6e-3, 64, recompute=False)


@contextmanager
def small_device(*, small_host: bool = False) -> Iterator[None]:
    """Both models do not fit at once.

    Args:
        small_host: nor does what waits its turn fit into the host's memory, nor the 16-bit model
            alone, which writes the tokens, on the device.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "memory_of_learning", lambda *_: 10**15)
        if small_host:
            patch.setattr(learning, "_SHARE_OF_HOST", 0.0)
            patch.setattr(StreamedModel, "hold_what_fits", lambda *_: False)
        yield


class Start:
    """A checkpoint with the codes that calibration chose, and what may be learned from them."""

    def __init__(self, folder: Path, kind: str, device: str = "cpu") -> None:
        self.device = device
        self.checkpoint = folder / "model"
        if kind in DECODERS:
            write_decoder(self.checkpoint, kind, vocab_size=264)
            write_tokenizer(self.checkpoint)
        else:
            make_checkpoint(self.checkpoint, kind)
        build = downloaded(self.checkpoint, folder)
        stage = Quantize(build, settings(), Machine(device=device))
        calibrator = stage._calibrator()
        self.source: Path = build.source
        self.plan: Plan = stage.plan()
        choice = calibrator.choose(self.plan, calibrator.tokens(SILENT), SILENT)
        self.calibrated: Path = calibrator.folder / choice.identity

    def learning(self, folder: Path, how: LearningPlan = QUICK, **changed: Any) -> Learning:
        """One that works in a folder of its own."""
        store = BlockStore(copy_of(self.calibrated, folder / "store"))
        values: dict[str, Any] = {"kept": (), "text": None} | changed
        return Learning(
            self.source, self.plan, values["kept"], store, values["text"], self.device, how
        )


def content(learning: Learning) -> dict[str, bytes]:
    """What came of it: every file of the store."""
    return {
        path.name: path.read_bytes()
        for path in learning.store.folder.iterdir()
        if path.suffix in (".safetensors", ".json")
    }
