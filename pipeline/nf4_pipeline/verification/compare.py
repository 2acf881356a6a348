"""The 16-bit model and the 4-bit one on the same tokens, block by block, side by side.

The 4-bit model stands on the device as anybody's loader put it there; of the 16-bit one, a block is
there only while both pass it. So what is looked at in each block costs no second reading:

- every 4-bit weight against the 16-bit one that it stands for, and each block of 64 of them;
- everything that is not 4 bit, which must be what the source has;
- the output of every 4-bit layer, given the input that the 16-bit one gets;
- what has become of the hidden states after the block, all errors before it included.

Beside an artifact whose codes are not rounded to nearest, a third model can pass: one of which they
are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import isfinite, sqrt
from typing import Any, Final

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from einops import rearrange

from nf4_pipeline.blocks.lockstep import Lockstep
from nf4_pipeline.blocks.streamed_model import StreamedModel
from nf4_pipeline.fidelity.token_scores import TokenScores, score_tokens
from nf4_pipeline.model.linear import weight_out_in
from nf4_pipeline.nf4 import BLOCK_SIZE
from nf4_pipeline.runtime.bnb_cpu_fixes import dequantized, stored_scales
from nf4_pipeline.verification.document import BlockError, LayerError
from nf4_pipeline.verification.eval_text import TokenSequence
from nf4_pipeline.verification.rtn_baseline import RtnBaseline

_TOGETHER: Final = 16_384
"""Tokens whose hidden states wait at a barrier at once; more are read in several passes."""
_PART: Final = 4 * 2**20  # weights that are compared at a time; whole blocks
_SMALL: Final = 0.05
"""Share of a weight's typical block below which a block counts as being that large: stock double
quantization gives near-zero blocks any small scale, and nobody can tell."""


@dataclass
class _Ratio:
    """A relative error that is being summed: sqrt(sum of squared differences / sum of squares)."""

    error: Any = 0.0
    energy: Any = 0.0

    def add(self, actual: torch.Tensor, expected: torch.Tensor) -> None:
        wanted = expected.float().flatten()
        off = actual.float().flatten() - wanted
        self.error = self.error + off.dot(off).double()
        self.energy = self.energy + wanted.dot(wanted).double()

    @property
    def value(self) -> float:
        error, energy = float(self.error), float(self.energy)
        return sqrt(error / energy) if energy else (0.0 if error == 0 else float("inf"))


@dataclass
class LayerComparison:
    """How far a 4-bit layer is from the 16-bit one, as far as both were looked at.

    Attributes:
        output: of its output, for the input that the 16-bit layer gets.
        weight: relative RMSE of its weight.
        worst: see `LayerError` for this and the rest.
    """

    output: _Ratio = field(default_factory=_Ratio)
    weight: float = 0.0
    worst: float = 0.0
    worst_at: int = 0
    scale: float = 0.0
    scale_at: int = 0
    reach: float = 0.0
    reach_at: int = 0

    def error(self, name: str, *, output: bool = True) -> LayerError:
        """All of it, with six significant digits, as verification.json holds it.

        Args:
            name: of the layer.
            output: whether its output was looked at.
        """
        return LayerError(
            name=name,
            relative_error=_digits(self.output.value) if output else None,
            weight_error=_digits(self.weight),
            worst=_digits(self.worst),
            worst_at=self.worst_at,
            scale=_digits(self.scale),
            scale_at=self.scale_at,
            reach=_digits(self.reach),
            reach_at=self.reach_at,
        )


@dataclass
class BlockComparison:
    """How far a block is: its hidden states, and its layers by their names within it."""

    hidden: _Ratio = field(default_factory=_Ratio)
    layers: dict[str, LayerComparison] = field(default_factory=dict)

    def error(self, name: str) -> BlockError:
        """All of it, as verification.json holds it."""
        return BlockError(
            name=name,
            relative_error=_digits(self.hidden.value),
            modules=tuple(layer.error(inner) for inner, layer in self.layers.items()),
        )


def _digits(value: float) -> float | None:
    """A number with six significant digits; None if it is not finite."""
    return float(f"{value:.6g}") if isfinite(value) else None


class Comparison:
    """Runs both models over sequences.

    Args:
        reference: the 16-bit model.
        model: the 4-bit one, whole.
        nearest: measure round to nearest as well, with these modules in 4 bit, too, which the
            artifact leaves in 16 bit for what they would lose; None not to.

    Attributes:
        blocks: errors by the name of the block.
        outside: 4-bit layers that no block holds, by name; their output is not looked at.
        kept: how many parameters that are not 4 bit were held against the source.
        changed: the names of those that differ.
        nearest: after `run`, the scores of round to nearest; None if it is not measured.
    """

    def __init__(
        self, reference: StreamedModel, model: Any, *, nearest: Sequence[str] | None = None
    ) -> None:
        self.blocks = {name: BlockComparison() for name in reference.blocks}
        self._reference = reference
        self._model = model
        self._own = {name: model.get_submodule(name) for name in reference.blocks}
        self._names = list(reference.blocks)
        self._looked_at: set[str] = set()
        self._hidden: torch.Tensor | None = None
        self.kept = 0
        self.changed: list[str] = []
        self.nearest: TokenScores | None = None
        self._baseline = None if nearest is None else RtnBaseline(reference, model, nearest)
        self.outside: dict[str, LayerComparison] = {}
        for name, module in model.named_modules():
            if isinstance(module, Linear4bit) and not self._in_a_block(name):
                self.outside[name] = LayerComparison()
                _compare_weights(self.outside[name], reference.model.get_submodule(name), module)
        self._compare_kept(
            {name: p for name, p in model.named_parameters() if not self._in_a_block(name)}
        )

    def block_errors(self) -> tuple[BlockError, ...]:
        """Errors of each block and of the layers in it."""
        return tuple(block.error(name) for name, block in self.blocks.items())

    def outside_errors(self) -> tuple[LayerError, ...]:
        """Errors of the layers that no block holds."""
        return tuple(layer.error(name, output=False) for name, layer in self.outside.items())

    def _in_a_block(self, name: str) -> bool:
        return any(name.startswith(f"{block}.") for block in self._own)

    def run(self, sequences: Sequence[TokenSequence], done: Callable[[int], None]) -> TokenScores:
        """Scores all tokens, in the order of the sequences.

        Args:
            sequences: what both models read.
            done: told how many tokens have been read to the end.
        """
        models: list[tuple[Any, list[TokenScores]]] = [(self._model, [])]
        blocks = [self._reference.blocks, self._own]
        if self._baseline is not None:
            models.append((self._baseline.model, []))
            blocks.append(self._baseline.blocks)
        for wave in _waves(sequences):
            with self._watched():
                lockstep = Lockstep(blocks, self._opened, self._closed)
                lockstep.run([task for s in wave for task in self._runs(s, models, done)])
        own, *nearest = (TokenScores.joined(parts) for _, parts in models)
        self.nearest = nearest[0] if nearest else None
        return own

    def _runs(
        self,
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
            for name, layer, own in self._layers(block):
                error = self.blocks[block].layers.setdefault(name, LayerComparison())
                _compare_weights(error, layer, own)
            inside = self._own[block].named_parameters()
            self._compare_kept({f"{block}.{name}": parameter for name, parameter in inside})
        if self._baseline is not None:
            self._baseline.open(block)

    def _closed(self, block: str) -> None:
        self._reference.close(block)
        if self._baseline is not None:
            self._baseline.close(block)

    def _compare_kept(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """What is not 4 bit was copied exactly, and both sides cast it alike."""
        for name, own in parameters.items():
            if isinstance(own, Params4bit):
                continue
            self.kept += 1
            if not torch.equal(own, self._reference.model.get_parameter(name)):
                self.changed.append(name)

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
                    layer_error = errors.layers.setdefault(name, LayerComparison())
                    hooks.append(layer.register_forward_hook(_ask(own, layer_error.output)))
                for hook in hooks:
                    stack.callback(hook.remove)
            yield

    def _keep(self, module: Any, inputs: Any, output: Any) -> None:
        self._hidden = _states(output)

    def _hold_against(self, ratio: _Ratio) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            if self._hidden is not None:
                ratio.add(_states(output), self._hidden)
                self._hidden = None

        return hook


def _ask(own: Any, ratio: _Ratio) -> Callable[[Any, Any, Any], None]:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        ratio.add(own(inputs[0]), output)

    return hook


def _states(output: Any) -> torch.Tensor:
    states: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _compare_weights(error: LayerComparison, layer: Any, own: Any) -> None:
    wanted, actual = weight_out_in(layer).reshape(-1), dequantized(own).reshape(-1)
    pairs = zip(actual.split(_PART), wanted.split(_PART), strict=True)
    parts = [_in_blocks(one, other) for one, other in pairs]
    off, energy, largest_off, largest = (torch.cat(part) for part in zip(*parts, strict=True))
    floor = max(_SMALL * float(largest.double().mean()), 1e-300)
    share = largest_off.double() / largest.double().clamp(min=floor)
    total = float(energy.sum())
    error.weight = sqrt(float(off.sum()) / total) if total else 0.0
    error.worst = float(share.max())
    error.worst_at = int(share.argmax())
    scales, nested = stored_scales(own)
    scale_error = (scales - largest).abs().double() / nested.double()
    scale_error = torch.where(scales == largest, 0.0, scale_error)  # of a group of equal scales
    error.scale = float(scale_error.max())
    error.scale_at = int(scale_error.argmax())
    reach = scales.abs().double() / largest.double().clamp(min=floor)
    error.reach = float(reach.max())
    error.reach_at = int(reach.argmax())


def _in_blocks(actual: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Squared differences, squares, largest difference and largest weight of each block of 64."""
    exact = wanted.float()
    off = actual.float() - exact
    ragged = -len(exact) % BLOCK_SIZE
    if ragged:
        exact, off = (torch.nn.functional.pad(part, (0, ragged)) for part in (exact, off))
    exact, off = (
        rearrange(part, "(block weight) -> block weight", weight=BLOCK_SIZE)
        for part in (exact, off)
    )
    return (
        torch.linalg.vecdot(off, off).double(),
        torch.linalg.vecdot(exact, exact).double(),
        off.abs().amax(dim=1),
        exact.abs().amax(dim=1),
    )


def _waves(sequences: Sequence[TokenSequence]) -> Iterator[list[TokenSequence]]:
    wave: list[TokenSequence] = []
    size = 0
    for sequence in sequences:
        if wave and size + len(sequence.ids) > _TOGETHER:
            yield wave
            wave, size = [], 0
        wave.append(sequence)
        size += len(sequence.ids)
    if wave:
        yield wave
