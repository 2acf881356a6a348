"""Decoded weights against the 16-bit model: the same model, tokens and arithmetic for everybody.

What a peer stored is decoded to float32 by its own code, rounded to the 16-bit type of the source,
as its readers do before they multiply, and put into the source's place. So a figure says what the
stored numbers are worth, not what a kernel makes of them; activations are never quantized.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from nf4_pipeline.blocks.streamed_model import StreamedModel
from nf4_pipeline.checkpoint.source import open_checkpoint
from nf4_pipeline.fidelity.metrics import Fidelity, compare
from nf4_pipeline.fidelity.token_scores import TokenScores, score_tokens
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer
from nf4_pipeline.runtime.threads import one_thread_if_small
from nf4_pipeline.verification.eval_text import cut, read_text
from safetensors import safe_open
from safetensors.torch import load_file, save_file

WORST_ERROR: Final = 0.5
"""Relative RMSE of a decoded weight; 4 bits cost about 0.1. More is a wrong decoder, not a loss."""


class WrongDecoding(Exception):
    """Decoded weights are not those of the source."""


class Evaluation:
    """A 16-bit model and a text.

    Args:
        source: the checkpoint.
        text: a file to read; None for the text that comes with the package.
        tokens: of the text, at most.

    Attributes:
        tokens: on which models are asked for the next one.
    """

    def __init__(self, source: Path, text: Path | None, tokens: int) -> None:
        self._source = source
        sequences = cut(read_text(text), LimitedTokenizer.open(source), tokens, None)
        self._ids = [torch.from_numpy(s.ids.copy())[None] for s in sequences]
        self.tokens = sum(ids.shape[1] - 1 for ids in self._ids)
        self._reference = self._logits(source)

    def _logits(self, folder: Path) -> list[torch.Tensor]:
        with StreamedModel(folder, "cpu") as streamed:
            for block in streamed.blocks:
                streamed.hold(block)
            with torch.inference_mode(), one_thread_if_small(streamed.footprint):
                return [streamed.model(ids, use_cache=False).logits[0, :-1] for ids in self._ids]

    def fidelity(self, decoded: Path) -> Fidelity:
        """How far the model is from itself with these weights.

        Args:
            decoded: a safetensors file; names that it lacks stay as they are in the source.

        Raises:
            WrongDecoding: a name or a shape is not the source's, or a weight resembles it too
                little.
        """
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            self._compose(model, load_file(decoded))
            logits = self._logits(model)
        scores = [
            score_tokens(reference, own, ids[0, 1:])
            for reference, own, ids in zip(self._reference, logits, self._ids, strict=True)
        ]
        return compare(TokenScores.joined(scores), [ids.shape[1] - 1 for ids in self._ids])

    def _compose(self, folder: Path, decoded: Mapping[str, torch.Tensor]) -> None:
        """Writes the source with decoded weights in it."""
        shutil.copytree(
            self._source, folder, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin")
        )
        tensors = read_source(self._source)
        for name, values in decoded.items():
            if name not in tensors or tensors[name].shape != values.shape:
                raise WrongDecoding(f"{name} {tuple(values.shape)} is no tensor of the source")
            exact = tensors[name].float()
            error = float((values - exact).norm() / exact.norm())
            if not error < WORST_ERROR:
                raise WrongDecoding(f"{name} differs from the source by {error:.2f} of its norm")
            tensors[name] = values.to(tensors[name].dtype)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text("utf-8"))
        if any("lm_head" in name for name in decoded):  # a tied head that was quantized by itself
            config["tie_word_embeddings"] = False
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def read_source(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    tensors = {}
    checkpoint = open_checkpoint(folder)
    for file in checkpoint.files:
        with safe_open(checkpoint.path(file), "pt") as opened:
            tensors.update({name: opened.get_tensor(name) for name in opened.keys()})
    return tensors
