"""The 16-bit model and that of the codes, a block of each at a time: learning where they don't fit.

A step is the same as with both models on the device. Forward, a block of the 16-bit model and one
of the 4-bit model are there, all sequences of the step pass them, and what comes to the latter is
kept. Backward, a block is there again, computes again what it gave, and takes its step at once.
Latents, momentum, and all else of the blocks of the 4-bit model wait in the host's memory. Every
number comes of the same operations on the same shapes, in the same order: so do the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from nf4_pipeline.blocks.block_row import BlockRow, RowCall
from nf4_pipeline.blocks.find_blocks import block_of
from nf4_pipeline.blocks.streamed_model import StreamedModel, assign
from nf4_pipeline.calibration.host_memory import HostMemory
from nf4_pipeline.calibration.latents import LearnedWeight, Tables, round_in_place
from nf4_pipeline.calibration.learning_loss import (
    Computed,
    Gradients,
    gradient_of_kl,
    sum_of_kl,
)
from nf4_pipeline.calibration.learning_plan import LearningPlan
from nf4_pipeline.gptq.saved_codes import read_codes
from nf4_pipeline.model.linear import weight_out_in
from nf4_pipeline.selection import TensorPlan

_OUTSIDE: Final = ""  # as `block_of` says of what is in no block


class ModelsByBlock:
    """Two models, of whose blocks one each is on the device.

    Args:
        teacher: the 16-bit model.
        student: another one of the same checkpoint; it becomes the 4-bit one.
        learned: the weights that learn.
        rounded: weights that are rounded to nearest, and stay so.
        files: name of a weight that learns -> the file with the codes that it begins with.
        plan: how it learns.
        memory: where everything waits.
        ids: some sequences, by which it is checked that the blocks can be run by themselves.

    Raises:
        NotInARowError: a block is given, or needs, something else than what the block in front of
            it gives.
    """

    def __init__(
        self,
        teacher: StreamedModel,
        student: StreamedModel,
        learned: Sequence[TensorPlan],
        rounded: Sequence[TensorPlan],
        files: Mapping[str, Path],
        plan: LearningPlan,
        memory: HostMemory,
        ids: NDArray[np.int32],
    ) -> None:
        self._teacher = teacher
        self._student = student
        self._plan = plan
        self._memory = memory
        self.device = student.device
        self._modules = {weight.name: str(weight.module) for weight in learned}
        self._rows = tuple(BlockRow(each.model, each.blocks) for each in (teacher, student))
        first = plan.parts(ids[:2], self.device)[0]
        self._rows[0].check(first, teacher.open_ahead, teacher.close)
        self._rows[1].trust(self._rows[0])
        self.weights: dict[str, LearnedWeight] = {}
        self._own: dict[str, list[str]] = {_OUTSIDE: []}  # the weights of each block, and of none
        self._others: dict[str, dict[str, torch.Tensor]] = {}
        self._given: torch.Tensor | None = None  # to each block, [blocks, sequences, ...]
        student.model.requires_grad_(False)
        tables = Tables(self.device)
        for block in (_OUTSIDE, *student.blocks):
            self._lay_out(block, learned, rounded, files, tables)

    def learn(
        self,
        ids: NDArray[np.int32],
        gradients: Gradients,
        step: Callable[[LearnedWeight], None],
    ) -> None:
        """As that of `HeldModels`."""
        parts = self._plan.parts(ids, self.device)
        theirs, mine, calls = self._forward(parts, gradients.pool, keep=len(ids))
        outside = [self.weights[name] for name in self._own[_OUTSIDE]]
        numbers = range(len(parts))

        def at_the_end(given: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> Computed:
            part, theirs, origin = given
            with torch.no_grad():
                expected = self._rows[0].logits(part, theirs)
            own = self._rows[1].logits(part, origin.requires_grad_())
            return own, gradient_of_kl(own, expected, ids.size), origin

        found = gradients.add(outside, list(zip(parts, theirs, mine, strict=True)), at_the_end)
        del theirs, mine
        for place, block in reversed(list(enumerate(self._student.blocks))):
            weights = [self.weights[name] for name in self._own[block]]
            self._bring(block, learning=True)

            def through(
                number: int,
                block: str = block,
                place: int = place,
                found: Sequence[torch.Tensor] = found,
            ) -> Computed:
                kept = self._kept(place, parts, number)
                origin = kept.to(self.device, non_blocking=True).requires_grad_()
                output = self._rows[1].through(block, calls[number][block], origin)
                return output, found[number], origin

            found = gradients.add(weights, numbers, through)
            for weight in weights:
                step(weight)
            self._take(block, changed=True)
        if outside:
            self._before_blocks(parts, found, outside, gradients)
        for weight in outside:
            step(weight)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # what waits in the host's memory may be read

    def kl(self, ids: NDArray[np.int32], pool: Executor) -> float:
        """Nats per token."""
        parts = self._plan.parts(ids, self.device)
        theirs, mine, _ = self._forward(parts, pool)

        def measure(part: torch.Tensor, theirs: torch.Tensor, mine: torch.Tensor) -> float:
            with torch.no_grad():
                expected = self._rows[0].logits(part, theirs)
                return sum_of_kl(self._rows[1].logits(part, mine), expected)

        return sum(pool.map(measure, parts, theirs, mine)) / ids.size

    def begin_again(self, codes: Mapping[str, NDArray[np.uint8]]) -> None:
        """Puts all latents into the bins of codes."""
        for block, names in self._own.items():
            if block:
                self._teacher.open_ahead(block)
                self._bring(block, learning=True)
            for name in names:
                exact = self._teacher.model.get_submodule(self._modules[name])
                self.weights[name].begin(weight_out_in(exact).detach(), codes[name])
            if block:
                self._take(block, changed=True)
                self._teacher.close(block)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _forward(
        self, parts: Sequence[torch.Tensor], pool: Executor, keep: int = 0
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[dict[str, RowCall]]]:
        """What the last block of each model gives, and how those of the 4-bit one are called.

        Args:
            parts: of the sequences.
            pool: for parts side by side on a CPU.
            keep: how many sequences they are, if what comes to each block is kept.
        """
        (theirs, called), (mine, calls) = (
            map(list, zip(*pool.map(partial(_arrive, row), parts), strict=True))
            for row in self._rows
        )
        for place, block in enumerate(self._student.blocks):
            passed, follow = (partial(_through, row, block) for row in self._rows)
            self._teacher.open_ahead(block, again=True)
            theirs = list(pool.map(passed, called, theirs))
            self._teacher.close(block)
            self._bring(block, learning=False)
            for number, hidden in enumerate(mine) if keep else ():
                self._room(keep, hidden)
                self._kept(place, parts, number).copy_(hidden, non_blocking=True)
            mine = list(pool.map(follow, calls, mine))
            self._take(block, changed=False)
        return theirs, mine, calls

    def _before_blocks(
        self,
        parts: Sequence[torch.Tensor],
        found: Sequence[torch.Tensor],
        outside: Sequence[LearnedWeight],
        gradients: Gradients,
    ) -> None:
        """Adds the gradients of what stands in front of the blocks."""

        def compute(number: int) -> Computed:
            first, _ = self._rows[1].arrive(parts[number])
            return first, found[number], None

        first, _ = self._rows[1].arrive(parts[0])
        if first.requires_grad:
            gradients.add(outside, range(len(parts)), compute, fades=False)

    def _room(self, sequences: int, hidden: torch.Tensor) -> None:
        """Room for what is given to each block, from the first step on."""
        if self._given is None:
            shape = len(self._student.blocks), sequences, *hidden.shape[1:]
            self._given = self._memory.empty(shape, hidden.dtype)

    def _kept(self, place: int, parts: Sequence[torch.Tensor], number: int) -> torch.Tensor:
        """What a part gives to a block."""
        assert self._given is not None
        first = sum(len(part) for part in parts[:number])
        return self._given[place, first : first + len(parts[number])]

    def _lay_out(
        self,
        block: str,
        learned: Sequence[TensorPlan],
        rounded: Sequence[TensorPlan],
        files: Mapping[str, Path],
        tables: Tables,
    ) -> None:
        """Makes a block of the 16-bit model one of the 4-bit model, and has it wait."""
        blocks = self._student.blocks
        if block:
            self._student.open_ahead(block)
        for weight in rounded:
            if block_of(str(weight.module), blocks) == block:
                round_in_place(self._student.model.get_submodule(str(weight.module)))
        self._own[block] = [w.name for w in learned if block_of(str(w.module), blocks) == block]
        for name in self._own[block]:
            module = self._student.model.get_submodule(self._modules[name])
            packed, scales = read_codes(files[name], name)
            exact = weight_out_in(module).detach()
            self.weights[name] = LearnedWeight(module, exact, packed, scales.scales(), tables)
            if block:
                self.weights[name].wait_in(self._memory)
        if block:
            self._put_away(block)

    def _put_away(self, block: str) -> None:
        """Keeps all of a block that does not learn, and takes its weights from it."""
        module = self._student.blocks[block]
        learned = {f"{self._modules[name]}.weight" for name in self._own[block]}
        wanted = set(self._student.opened(block)) - learned  # computed buffers never go away
        self._others[block] = {
            f"{block}.{name}": self._memory.keep(tensor.detach())
            for found in (module.named_parameters, module.named_buffers)
            for name, tensor in found(remove_duplicate=False)
            if f"{block}.{name}" in wanted
        }
        self._student.close(block)

    def _bring(self, block: str, *, learning: bool) -> None:
        """Gives a block of the 4-bit model its weights."""
        for name, kept in self._others[block].items():
            assign(self._student.model, name, kept.to(self.device, non_blocking=True))
        for name in self._own[block]:
            self.weights[name].arrive(learning=learning)

    def _take(self, block: str, *, changed: bool) -> None:
        """Takes them away again, and keeps what they have become if that is something else."""
        for name, kept in self._others[block].items():
            assign(self._student.model, name, torch.empty_like(kept, device="meta"))
        for name in self._own[block]:
            self.weights[name].leave(changed=changed)


def _arrive(row: BlockRow, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, RowCall]]:
    with torch.no_grad():  # which a thread knows for itself
        return row.arrive(ids)


def _through(
    row: BlockRow, block: str, calls: Mapping[str, RowCall], hidden: torch.Tensor
) -> torch.Tensor:
    with torch.no_grad():
        return row.through(block, calls[block], hidden)
