"""The 16-bit model and the 4-bit one on the same tokens, block by block, side by side.

The 4-bit model stands on the device as anybody's loader put it there; of the 16-bit one, a block is
there only while both pass it. So what is looked at in each block costs no second reading:

- every 4-bit weight in the artifact's files against the 16-bit one that it stands for, and each
  block of 64 of them (`compare_weights.py`);
- everything that is not 4 bit, which must be what the source has, bit for bit;
- the output of every 4-bit layer, given the input that the 16-bit one gets;
- what has become of the hidden states after the block, all errors before it included.

Beside an artifact whose codes are not rounded to nearest, more models can pass: one of which they
are, and one with the codes that learning began with.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit

from nf4_pipeline.blocks.lockstep import Lockstep
from nf4_pipeline.blocks.streamed_model import STEM, StreamedModel
from nf4_pipeline.fidelity.token_scores import TokenScores, score_tokens
from nf4_pipeline.manifest.read import read_manifest
from nf4_pipeline.verification.baseline import Baseline
from nf4_pipeline.verification.compare_weights import WeightComparison
from nf4_pipeline.verification.distance import BlockDistance, LayerDistance, Ratio
from nf4_pipeline.verification.document import BlockError, LayerError
from nf4_pipeline.verification.eval_text import TOGETHER, TokenSequence
from nf4_pipeline.verification.messages import SavedCodes
from nf4_pipeline.verification.shares import BlockSums, Share
from nf4_pipeline.verification.worst_tokens import WorstTokens


class Comparison:
    """Runs both models over sequences.

    Args:
        reference: the 16-bit model.
        model: the 4-bit one, whole.
        artifact: the folder that it was loaded from; None not to look at weights.
        nearest: measure round to nearest as well, with these modules in 4 bit, too, which the
            artifact leaves in 16 bit for what they would lose; None not to.
        before_learning: measure these codes as well, by module; None not to.

    Attributes:
        blocks: errors by the name of the block.
        outside: 4-bit layers that no block holds, by name; their output is not looked at.
        weights: what the files hold; None if they are not looked at.
        nearest: after `run`, the scores of round to nearest; None if it is not measured.
        before_learning: after `run`, those of these codes, likewise.
        beside: after `run`, both of them by name, as far as they are measured.
        worst: after `run`, the tokens on which the two models differ most.
    """

    def __init__(
        self,
        reference: StreamedModel,
        model: Any,
        artifact: Path | None = None,
        *,
        nearest: Sequence[str] | None = None,
        before_learning: Mapping[str, SavedCodes] | None = None,
    ) -> None:
        self.blocks = {name: BlockDistance() for name in reference.blocks}
        self._reference = reference
        self._model = model
        self._own = {name: model.get_submodule(name) for name in reference.blocks}
        self._names = list(reference.blocks)
        self._looked_at: set[str] = set()
        self._hidden: torch.Tensor | None = None
        self.nearest: TokenScores | None = None
        self.before_learning: TokenScores | None = None
        self.beside: Mapping[str, TokenScores] = {}
        self.worst = WorstTokens()
        self._baselines: dict[str, Baseline] = {}
        if nearest is not None:
            self._baselines["nearest"] = Baseline(reference, model, nearest)
        if before_learning is not None:
            saved = Baseline(reference, model, saved=before_learning)
            self._baselines["before_learning"] = saved
        self.outside: dict[str, LayerDistance] = {}
        self.weights: WeightComparison | None = None
        if artifact is not None:
            manifest = read_manifest(artifact)
            self.weights = WeightComparison(
                reference.checkpoint,
                artifact,
                manifest,
                self._distance,
                reference.device,
                reference.read if reference.is_served else None,
            )

    def block_errors(self) -> tuple[BlockError, ...]:
        """Errors of each block and of the layers in it."""
        return tuple(block.error(name) for name, block in self.blocks.items())

    def outside_errors(self) -> tuple[LayerError, ...]:
        """Errors of the layers that no block holds."""
        return tuple(layer.error(name, output=False) for name, layer in self.outside.items())

    def _distance(self, module: str) -> LayerDistance:
        """Of a layer, wherever it is."""
        for block, errors in self.blocks.items():
            if module.startswith(f"{block}."):
                name = module.removeprefix(f"{block}.")
                return errors.layers.setdefault(name, LayerDistance())
        return self.outside.setdefault(module, LayerDistance())

    def run(
        self,
        sequences: Sequence[TokenSequence],
        done: Callable[[int], None],
        *,
        first: int = 0,
    ) -> TokenScores:
        """Scores all tokens, in the order of the sequences.

        Args:
            sequences: what both models read.
            done: told how many tokens have been read to the end.
            first: number of the first of them, where others read those before it.
        """
        models: list[tuple[Any, list[TokenScores]]] = [(self._model, [])]
        models += [(baseline.model, []) for baseline in self._baselines.values()]
        others = [baseline.blocks for baseline in self._baselines.values()]
        blocks = [self._reference.blocks, self._own, *others]
        numbers = itertools.count(first)
        if self.weights is not None:
            self.weights.compare(self._reference.stored(STEM))
        for wave in _waves(sequences):
            with self._watched():
                lockstep = Lockstep(blocks, self._opened, self._closed)
                lockstep.run(
                    [task for s in wave for task in self._runs(next(numbers), s, models, done)]
                )
        if self.weights is not None:
            self.weights.compare_rest()  # what no block holds, or none that ran
        own, *beside = (TokenScores.joined(parts) for _, parts in models)
        self._keep_beside(dict(zip(self._baselines, beside, strict=True)))
        return own

    def _keep_beside(self, found: Mapping[str, TokenScores]) -> None:
        self.beside = found
        self.nearest, self.before_learning = found.get("nearest"), found.get("before_learning")

    def sums(self) -> dict[str, BlockSums]:
        """What was summed in each block, sequence by sequence."""
        return {
            name: BlockSums(
                block.hidden.sums, {n: layer.output.sums for n, layer in block.layers.items()}
            )
            for name, block in self.blocks.items()
        }

    def take(self, shares: Sequence[Share]) -> TokenScores:
        """Takes what others found instead of running, and looks at the weights.

        Args:
            shares: of all sequences, in their order.
        """
        for share in shares:
            self.worst.take(share.worst)
            for name, found in share.blocks.items():
                block = self.blocks[name]
                block.hidden.take(found.hidden)
                for layer, sums in found.layers.items():
                    block.layers.setdefault(layer, LayerDistance()).output.take(sums)
        if self.weights is not None:
            self.weights.compare_rest()
        names = shares[0].beside
        self._keep_beside({n: TokenScores.joined([s.beside[n] for s in shares]) for n in names})
        return TokenScores.joined([share.scores for share in shares])

    def _runs(
        self,
        number: int,
        sequence: TokenSequence,
        models: Sequence[tuple[Any, list[TokenScores]]],
        done: Callable[[int], None],
    ) -> list[Callable[[], None]]:
        """Runs that follow each other through every barrier: the reference, then each model."""
        logits: list[torch.Tensor] = []  # of the reference, until the last model is held against it
        device = self._model.get_input_embeddings().weight.device
        ids = torch.from_numpy(sequence.ids.copy())[None].to(device)

        def reference() -> None:
            logits.append(self._reference.model(ids, use_cache=False).logits[0, :-1])

        def scored(model: Any, parts: list[TokenScores], last: bool) -> None:
            own = model(ids, use_cache=False).logits[0, :-1]
            parts.append(score_tokens(logits[0], own, ids[0, 1:]))
            if model is self._model:
                self.worst.add(number, parts[-1], logits[0], own, ids[0, 1:])
            if last:
                logits.clear()
                done(len(sequence.ids))

        return [
            reference,
            *(partial(scored, model, parts, parts is models[-1][1]) for model, parts in models),
        ]

    def _opened(self, block: str) -> None:
        self._reference.open_ahead(block)
        if block not in self._looked_at:
            self._looked_at.add(block)
            if self.weights is not None:
                self.weights.compare(self._reference.stored(block))
        for baseline in self._baselines.values():
            baseline.open(block)

    def _closed(self, block: str) -> None:
        self._reference.close(block)
        for baseline in self._baselines.values():
            baseline.close(block)

    def _layers(self, block: str) -> Iterator[tuple[str, Any, Any]]:
        """Each 4-bit layer of a block: its name in it, the 16-bit layer, the 4-bit one."""
        for name, own in self._own[block].named_modules():
            if isinstance(own, Linear4bit):
                yield name, self._reference.blocks[block].get_submodule(name), own

    @contextmanager
    def _watched(self) -> Iterator[None]:
        with ExitStack() as stack:
            for block in self._names:
                errors = self.blocks[block]
                hooks = [
                    self._reference.blocks[block].register_forward_hook(self._keep),
                    self._own[block].register_forward_hook(self._hold_against(errors.hidden)),
                ]
                for name, layer, own in self._layers(block):
                    layer_error = errors.layers.setdefault(name, LayerDistance())
                    hooks.append(layer.register_forward_hook(_ask(own, layer_error.output)))
                for hook in hooks:
                    stack.callback(hook.remove)
            yield

    def _keep(self, module: Any, inputs: Any, output: Any) -> None:
        self._hidden = _states(output)

    def _hold_against(self, ratio: Ratio) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            if self._hidden is not None:
                ratio.add(_states(output), self._hidden)
                self._hidden = None

        return hook


def _ask(own: Any, ratio: Ratio) -> Callable[[Any, Any, Any], None]:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        ratio.add(own(inputs[0]), output)

    return hook


def _states(output: Any) -> torch.Tensor:
    states: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return states


def _waves(sequences: Sequence[TokenSequence]) -> Iterator[list[TokenSequence]]:
    wave: list[TokenSequence] = []
    size = 0
    for sequence in sequences:
        if wave and size + len(sequence.ids) > TOGETHER:
            yield wave
            wave, size = [], 0
        wave.append(sequence)
        size += len(sequence.ids)
    if wave:
        yield wave
