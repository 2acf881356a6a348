"""The pass of calibration by itself: a checkpoint, tokens, and what some devices choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from nf4_pipeline.calibration.block_store import BlockStore
from nf4_pipeline.calibration.calibration_pass import calibrate
from nf4_pipeline.calibration.tokens import CalibrationTokens
from nf4_pipeline.gptq.device_group import Division
from nf4_pipeline.progress import SILENT
from nf4_pipeline.selection import TensorPlan
from nf4_pipeline.stages.quantize import Quantize

from tests.support.calibrated import downloaded, settings
from tests.support.checkpoints import KINDS, make_checkpoint
from tests.support.decoders import write_decoder
from tests.support.jobs import CPU

DIVISION: Final = Division(4, 16)
"""Cuts even what is tiny."""
SEVERAL: Final = [
    "falcon-7b",  # attention and MLP read the same input
    "gpt2",  # weights the other way round, blocks that run on from row to row
    "opt",  # layers outside the blocks
    "mixtral",  # more experts than devices, and tokens that cannot be paired
]


@dataclass(frozen=True)
class PassCase:
    """A checkpoint, and what is known before codes are chosen."""

    folder: Path
    weights: tuple[TensorPlan, ...]
    tokens: CalibrationTokens

    @classmethod
    def make(cls, root: Path, kind: str) -> PassCase:
        """A tiny random one, with 1,280 tokens."""
        if kind in KINDS:
            make_checkpoint(root / "model", kind)
        else:
            write_decoder(root / "model", kind)
        build = downloaded(root / "model", root)
        plan = Quantize(build, settings(), CPU).plan()
        ids = np.random.default_rng(0).integers(0, 200, (20, 64)).astype(np.int32)
        return cls(build.source, tuple(plan.quantized), CalibrationTokens(ids, "text", "key"))

    def chosen(self, folder: Path, devices: Sequence[str], **options: Any) -> dict[str, bytes]:
        """What devices leave in a store: each file's content."""
        store = BlockStore(folder)
        store.open()
        options = {"division": DIVISION} | options
        calibrate(
            self.folder, self.weights, self.tokens, store,
            devices=devices, reporter=SILENT, **options,
        )  # fmt: skip
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


Cases = Callable[[str], PassCase]


def cases(folders: pytest.TempPathFactory) -> Cases:
    """Makes the case of a kind when it is first asked for."""
    return cache(lambda kind: PassCase.make(folders.mktemp(kind), kind))
