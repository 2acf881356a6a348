"""How many texts a model draws together, by what one of them takes."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
from nf4_pipeline.blocks.lockstep import Lockstep
from nf4_pipeline.blocks.streamed_model import StreamedModel
from nf4_pipeline.calibration import learning_tokens

from tests.support.checkpoints import make_checkpoint
from tests.support.decoders import DECODERS, write_decoder

MOST: Final = 2**30


def _nothing(block: str) -> None:
    pass


@pytest.mark.parametrize(
    ("kind", "grows"), [("falcon-rw", True), ("qwen2", True), ("mamba", False), ("rwkv", False)]
)
def test_a_recurrent_state_counts_once_and_keys_for_each_token(
    kind: str, grows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind in DECODERS:
        write_decoder(tmp_path / "model", kind, vocab_size=264)
    else:
        make_checkpoint(tmp_path / "model", kind)
    monkeypatch.setattr(learning_tokens, "_PROBABILITIES", 0)
    monkeypatch.setitem(learning_tokens._MOST, "cpu", MOST)

    def rows(room: int, length: int) -> int:
        monkeypatch.setitem(learning_tokens._CACHE, "cpu", room)
        with StreamedModel(tmp_path / "model", "cpu", rescales=False) as streamed:
            for block in streamed.blocks:
                streamed.hold(block)
            lockstep = Lockstep([], _nothing, _nothing)
            return learning_tokens._rows_at_a_time(streamed, length, lockstep)

    room = 2**20
    assert rows(room, 8) < MOST  # what is kept is counted
    assert rows(room, 8) == 2 * rows(room // 2, 8)
    assert rows(room, 8) == (2 if grows else 1) * rows(room, 16)
