"""Calibrated NF4 with each ingredient left out in turn, against round to nearest.

Takes a build whose download is done (`nf4 download`), samples or reads calibration tokens, chooses
codes and scales with each variant of the method, and prints a row for each: KL from the 16-bit
model on text that calibration did not see, with intervals, and its share of round to nearest's.
The 4-bit weights are dequantized into the 16-bit model, so the whole of it has to fit.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import torch
from nf4_pipeline.blocks.streamed_model import StreamedModel
from nf4_pipeline.build_folder import Build
from nf4_pipeline.calibration.block_store import BlockStore
from nf4_pipeline.calibration.calibration_pass import calibrate
from nf4_pipeline.calibration.calibrator import Calibrator
from nf4_pipeline.calibration.tokens import CalibrationTokens
from nf4_pipeline.fidelity.bootstrap import Resampling, mean
from nf4_pipeline.fidelity.token_scores import TokenScores, score_tokens
from nf4_pipeline.gptq.config import GptqConfig
from nf4_pipeline.gptq.saved_codes import read_codes
from nf4_pipeline.machine import Machine
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer
from nf4_pipeline.model.linear import as_held
from nf4_pipeline.nf4.dequantize import dequantize
from nf4_pipeline.nf4.float_bits import bits_of
from nf4_pipeline.nf4.rtn import round_to_nearest
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.records import DOWNLOAD
from nf4_pipeline.sample import TEXT
from nf4_pipeline.selection import TensorPlan
from nf4_pipeline.stages.quantize import Quantize
from nf4_pipeline.verification.eval_text import TokenSequence, cut, read_text

_ONE: Final = np.ones(1, np.float32)
VARIANTS: Final = {
    "the recipe": GptqConfig(),
    "scales chosen once, before the loop": GptqConfig(refine_scales=False),
    "no negative scales": GptqConfig(negative_scales=False),
    "columns in their own order": GptqConfig(act_order=False),
    "off-diagonals not shrunk": GptqConfig(shrinkage=0.0),
    "off-diagonals shrunk by 10 % whatever the sample": GptqConfig(adaptive_shrinkage=False),
    "off-diagonals shrunk by 30 % whatever the sample": GptqConfig(
        shrinkage=0.3, adaptive_shrinkage=False
    ),
    "damping 0.001": GptqConfig(percdamp=0.001),
    "damping 0.003": GptqConfig(percdamp=0.003),
    "damping 0.1": GptqConfig(percdamp=0.1),
    "no error compensation (scale search alone)": GptqConfig(
        shrinkage=1.0, adaptive_shrinkage=False, refine_scales=False
    ),
    "scales of the largest weight (plain GPTQ)": GptqConfig(
        refine_scales=False, negative_scales=False, scale_candidates=_ONE
    ),
}


@click.command()
@click.argument("build", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--device", default="cpu", show_default=True)
@click.option("--eval-text", type=click.Path(exists=True, path_type=Path))
@click.option("--eval-tokens", default=8192, show_default=True)
@click.option("--calibrate", "from_text", type=click.Path(exists=True, path_type=Path))
@click.option("--tokens", default="16384", show_default=True, help="Counts, separated by commas.")
@click.option("--only", default="", help="Variants whose names begin so.")
def main(
    build: Path,
    device: str,
    eval_text: Path | None,
    eval_tokens: int,
    from_text: Path | None,
    tokens: str,
    only: str,
) -> None:
    """Print the table of a build."""
    house = Build(build)
    weights = Quantize(house, Recipe(), Machine()).plan().quantized
    facts = house.need(DOWNLOAD).facts
    tokenizer = LimitedTokenizer.open(house.source)
    text = read_text(eval_text)
    if eval_text is None and facts.is_sample:
        text = read_text(TEXT)
    counts = [int(count) for count in tokens.split(",")]
    with StreamedModel(house.source, device) as streamed:
        for block in streamed.blocks:
            streamed.hold(block)
        trial = _Trial(streamed.model, weights, cut(text, tokenizer, eval_tokens, None), device)
        click.echo("| variant | KL | share of nearest | seconds |\n| --- | --- | --- | --- |")
        trial.nearest()
        for count in counts:
            recipe = replace(
                Recipe().quantize,
                calibrate=str(from_text or "self"),
                calibration_tokens=count,
                rounding="",
            )
            read = Calibrator(
                house.source, facts.content_sha256, house.calibration, recipe, device
            ).tokens(SILENT)
            chosen = VARIANTS if count == counts[-1] else {"the recipe": GptqConfig()}
            for name, config in chosen.items():
                if name.startswith(only):
                    label = name if count == counts[-1] else f"{count:,} tokens"
                    trial.calibrated(label, house.source, read, config)


class _Trial:
    """A 16-bit model, and what becomes of it with other weights in it."""

    def __init__(
        self,
        model: Any,
        weights: tuple[TensorPlan, ...],
        sequences: tuple[TokenSequence, ...],
        device: str,
    ) -> None:
        self._model = model
        self._device = device
        self._weights = weights
        self._ids = [torch.from_numpy(s.ids.copy())[None].to(device) for s in sequences]
        self._exact = {plan.name: self._layer(plan).weight.data for plan in weights}
        self._reference = [self._logits(ids) for ids in self._ids]
        self._draws = Resampling([len(s.ids) - 1 for s in sequences])
        self._nearest: np.ndarray[Any, np.dtype[np.float64]]

    def _layer(self, plan: TensorPlan) -> Any:
        return self._model.get_submodule(plan.module)

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = self._model(ids, use_cache=False).logits[0, :-1]
            return found

    def _scores(self) -> TokenScores:
        parts = [
            score_tokens(reference, self._logits(ids), ids[0, 1:])
            for reference, ids in zip(self._reference, self._ids, strict=True)
        ]
        for plan in self._weights:
            self._layer(plan).weight.data = self._exact[plan.name]
        return TokenScores.joined(parts)

    def _put(self, plan: TensorPlan, values: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        layer, exact = self._layer(plan), self._exact[plan.name]
        weight = torch.from_numpy(values).to(exact)
        layer.weight.data = as_held(layer, weight)

    def nearest(self) -> None:
        for plan in self._weights:
            exact = as_held(self._layer(plan), self._exact[plan.name].float())
            self._put(plan, round_to_nearest(bits_of(exact), "float32").dequantize())
        self._nearest = self._scores().kl
        self._row("round to nearest", self._nearest, 0.0)

    def calibrated(
        self, name: str, source: Path, tokens: CalibrationTokens, config: GptqConfig
    ) -> None:
        folder = Path(tempfile.mkdtemp(prefix="nf4-ablate-"))
        try:
            start = time.perf_counter()
            store = BlockStore(folder / "store")
            store.open()
            calibrate(
                source, self._weights, tokens, store,
                devices=[self._device], reporter=SILENT, config=config,
            )  # fmt: skip
            seconds = time.perf_counter() - start
            plans = {plan.name: plan for plan in self._weights}
            for weight, path in store.files().items():
                packed, scales = read_codes(path, weight)
                self._put(plans[weight], dequantize(packed, scales.scales(), plans[weight].shape))
            self._row(name, self._scores().kl, seconds)
        finally:
            shutil.rmtree(folder)

    def _row(self, name: str, kl: np.ndarray[Any, np.dtype[np.float64]], seconds: float) -> None:
        own = self._draws.interval(mean(kl))
        ratio = self._draws.interval(lambda w: mean(kl)(w) / mean(self._nearest)(w))
        click.echo(
            f"| {name} | {own.value:.4f} [{own.low:.4f}, {own.high:.4f}] | "
            f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] | {seconds:.0f} |"
        )


if __name__ == "__main__":
    main()
