"""Calibrated NF4 with each ingredient left out in turn, against round to nearest.

Takes a build whose download is done (`nf4 download`), samples or reads calibration tokens, chooses
codes and scales with each variant of the method, and prints a row for each: KL from the 16-bit
model on text that calibration did not see, with intervals, and its share of round to nearest's, on
all texts and on those of each domain (`domain_texts.py` makes some). With --starts the rows are for
how the texts begin that the model writes to be calibrated on. The 4-bit weights are dequantized
into the 16-bit model, so the whole of it has to fit.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import torch
from nf4_pipeline.blocks.streamed_model import StreamedModel
from nf4_pipeline.build_folder import Build
from nf4_pipeline.calibration.allocation import select_within_budget
from nf4_pipeline.calibration.beginnings import Mix, read_seeds
from nf4_pipeline.calibration.block_store import BlockStore
from nf4_pipeline.calibration.calibration_pass import calibrate
from nf4_pipeline.calibration.learning import Learning
from nf4_pipeline.calibration.sampling import make_tokens
from nf4_pipeline.calibration.sensitivity import measure_losses
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
from nf4_pipeline.selection import Plan, TensorPlan
from nf4_pipeline.stages.quantize import Quantize
from nf4_pipeline.verification.eval_text import Text, TokenSequence, cut, read_text

_ONE: Final = np.ones(1, np.float32)
VARIANTS: Final = {
    "the recipe": GptqConfig(),
    "inputs of the 16-bit model": GptqConfig(quantized_inputs=False),
    "inputs from the quantized part, no correction": GptqConfig(correction=0.0),
    "a quarter of the correction": GptqConfig(correction=0.25),
    "three quarters of the correction": GptqConfig(correction=0.75),
    "all of the correction": GptqConfig(correction=1.0),
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
        shrinkage=1.0, adaptive_shrinkage=False, refine_scales=False, correction=0.0
    ),
    "scales of the largest weight (plain GPTQ)": GptqConfig(
        refine_scales=False, negative_scales=False, scale_candidates=_ONE
    ),
}


STARTS: Final = {
    "the recipe": Mix(),
    "1/4 end-of-text, 1/4 chats, the rest any token": Mix(plain=0.25, chats=0.25, seeds=0),
    "… and 1/8 seeds": Mix(plain=0.25, chats=0.25, seeds=0.125),
    "… and 1/4 seeds": Mix(plain=0.25, chats=0.25, seeds=0.25),
    "… and 1/2 seeds": Mix(plain=0.25, chats=0.25, seeds=0.5),
    "1/8 end-of-text, 1/4 chats, 1/2 seeds": Mix(plain=0.125, chats=0.25, seeds=0.5),
    "end-of-text alone": Mix(plain=1, chats=0, seeds=0),
    "chats alone": Mix(plain=0, chats=1, seeds=0),
    "any token alone": Mix(plain=0, chats=0, seeds=0),
    "seeds alone": Mix(plain=0, chats=0, seeds=1),
    **{
        f"seeds of {kind} alone": Mix(plain=0, chats=0, seeds=1, kinds=(kind,))
        for kind in read_seeds()
    },
}
_EXTRA: Final = 0.05


@click.command()
@click.argument("build", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--device", default="cpu", show_default=True)
@click.option("--eval-text", "eval_texts", multiple=True,
              type=click.Path(exists=True, path_type=Path),
              help="One for each domain; the domain is the name of the file.")  # fmt: skip
@click.option("--eval-tokens", default=4096, show_default=True, help="Of each domain.")
@click.option("--calibrate", "from_text", type=click.Path(exists=True, path_type=Path))
@click.option("--tokens", default="16384", show_default=True, help="Counts, separated by commas.")
@click.option("--starts", is_flag=True, help="How texts begin, instead of what GPTQ does.")
@click.option("--learn", is_flag=True, help="Let the recipe's codes learn, too (--effort high).")
@click.option("--only", default="", help="Variants whose names begin so; several with commas.")
def main(
    build: Path,
    device: str,
    eval_texts: tuple[Path, ...],
    eval_tokens: int,
    from_text: Path | None,
    tokens: str,
    starts: bool,
    learn: bool,
    only: str,
) -> None:
    """Print the table of a build."""
    device = "cuda:0" if device == "cuda" else device
    house = Build(build)
    plan = Quantize(house, Recipe(), Machine()).plan()
    facts = house.need(DOWNLOAD).facts
    tokenizer = LimitedTokenizer.open(house.source)
    text = domains(eval_texts or ((TEXT,) if facts.is_sample else ()))
    counts = [int(count) for count in tokens.split(",")]
    wanted = tuple(only.split(","))
    with StreamedModel(house.source, device) as streamed:
        for block in streamed.blocks:
            streamed.hold(block)
        sequences = cut(text, tokenizer, eval_tokens * len(text.domains), None)
        trial = _Trial(streamed.model, plan, house.source, sequences, device)
        trial.head()
        trial.nearest()
        if starts:
            has_chats = tokenizer.has_template
            for name, mix in STARTS.items():
                if name.startswith(wanted) and (has_chats or not name.startswith("chats")):
                    start = time.perf_counter()
                    read = make_tokens(
                        house.source, None, counts[-1], name, device, SILENT, mix
                    )  # fmt: skip
                    click.echo(f"{time.perf_counter() - start:.0f} s for the tokens", err=True)
                    trial.calibrated(name, read, GptqConfig())
            return
        for count in counts:
            read = make_tokens(house.source, from_text, count, "", device, SILENT)
            chosen = VARIANTS if count == counts[-1] else {"the recipe": GptqConfig()}
            for name, config in chosen.items():
                if name.startswith(wanted):
                    label = name if count == counts[-1] else f"{count:,} tokens"
                    trial.calibrated(label, read, config, learn=learn and name == "the recipe")
        label = f"{_EXTRA:.0%} more bytes for layers in 16 bit"
        if label.startswith(wanted):
            trial.with_extra_bytes(label, read)


def domains(paths: Sequence[Path]) -> Text:
    """The texts of files, each a domain by the name of its file; none for the built-in ones.

    Raises:
        click.UsageError: two files have one name.
    """
    texts = [read_text(path) for path in paths] or [read_text(None)]
    found: dict[str, str] = {}
    for text in texts:
        for name, words in text.domains.items():
            if name in found:
                raise click.UsageError(f"Two texts are named {name}; a name is for one domain.")
            found[name] = words
    return Text(", ".join(text.name for text in texts), found)


class _Trial:
    """A 16-bit model, and what becomes of it with other weights in it."""

    def __init__(
        self,
        model: Any,
        plan: Plan,
        source: Path,
        sequences: tuple[TokenSequence, ...],
        device: str,
    ) -> None:
        self._model = model
        self._device = device
        self._plan = plan
        self._source = source
        self._weights = weights = plan.quantized
        self._ids = [torch.from_numpy(s.ids.copy())[None].to(device) for s in sequences]
        self._exact = {plan.name: self._layer(plan).weight.data for plan in weights}
        self._reference = [self._logits(ids) for ids in self._ids]
        lengths = [len(s.ids) - 1 for s in sequences]
        of_token = np.repeat([s.domain for s in sequences], lengths)
        self._parts = {"all": (Resampling(lengths), np.ones(len(of_token), bool))}
        names = dict.fromkeys(s.domain for s in sequences)
        for name in names if len(names) > 1 else ():
            own = [n for s, n in zip(sequences, lengths, strict=True) if s.domain == name]
            self._parts[name] = Resampling(own), of_token == name
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
        self,
        name: str,
        tokens: CalibrationTokens,
        config: GptqConfig,
        *,
        kept: Collection[str | None] = (),
        learn: bool = False,
    ) -> None:
        """A row for codes that are chosen so, and one for what they become if they learn.

        Args:
            name: of the variant.
            tokens: what calibration reads.
            config: how codes are chosen.
            kept: modules that stay in 16 bit.
            learn: let them learn, too.
        """
        folder = Path(tempfile.mkdtemp(prefix="nf4-ablate-"))
        try:
            start = time.perf_counter()
            store = BlockStore(folder / "store")
            store.open()
            weights = [plan for plan in self._weights if plan.module not in kept]
            calibrate(
                self._source, weights, tokens, store,
                devices=[self._device], reporter=SILENT, config=config,
            )  # fmt: skip
            self._stored(name, store, start)
            if learn:
                learning = Learning(self._source, self._plan, (), store, None, self._device)
                learning.run(SILENT)
                self._stored(f"{name}, and codes learn", learning.store, start)
        finally:
            shutil.rmtree(folder)

    def _stored(self, name: str, store: BlockStore, start: float) -> None:
        seconds = time.perf_counter() - start
        plans = {plan.name: plan for plan in self._weights}
        for weight, path in store.files().items():
            packed, scales = read_codes(path, weight)
            self._put(plans[weight], dequantize(packed, scales.scales(), plans[weight].shape))
        self._row(name, self._scores().kl, seconds)

    def with_extra_bytes(self, name: str, tokens: CalibrationTokens) -> None:
        """A row for the recipe with the most sensitive layers in 16 bit."""
        stored = sum(part.nbytes for plan in self._weights for part in plan.stored)
        with tempfile.TemporaryDirectory() as folder:
            losses = measure_losses(
                self._source, self._weights, tokens, Path(folder) / "losses.json", "",
                device=self._device, reporter=SILENT,
            )  # fmt: skip
        kept = {loss.module for loss in select_within_budget(losses, int(_EXTRA * stored))}
        self.calibrated(name, tokens, GptqConfig(), kept=kept)

    def head(self) -> None:
        """The head of the table."""
        names = ["variant", "KL", *self._parts, "seconds"]
        click.echo(f"| {' | '.join(names)} |\n|{' --- |' * len(names)}")

    def _row(self, name: str, kl: np.ndarray[Any, np.dtype[np.float64]], seconds: float) -> None:
        def ratio(draws: Resampling, own: np.ndarray[Any, np.dtype[np.bool_]]) -> str:
            upper, lower = mean(kl[own]), mean(self._nearest[own])
            return f"{draws.interval(lambda w: upper(w) / lower(w)):.3f}"

        ratios = [ratio(draws, own) for draws, own in self._parts.values()]
        own = self._parts["all"][0].interval(mean(kl))
        click.echo(f"| {' | '.join([name, f'{own:.4f}', *ratios, f'{seconds:.0f}'])} |")


if __name__ == "__main__":
    main()
