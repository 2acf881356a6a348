"""What a build fetches whose source is streamed, by the headers of its files alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nf4_pipeline.checkpoint.block_names import numbered_block
from nf4_pipeline.checkpoint.safetensors_header import HeaderTensor
from nf4_pipeline.checkpoint.source import Checkpoint
from nf4_pipeline.selection import Plan, TensorPlan
from nf4_pipeline.stages.outgoing import fitting
from nf4_pipeline.streaming.stretches import cut


@dataclass(frozen=True)
class StreamedBytes:
    """Bytes of weights over the network, where nothing comes wrong and nothing is killed.

    Attributes:
        checkpoint: the headers.
        sizes: of its files, in bytes.
        plan: what is made of it.
    """

    checkpoint: Checkpoint
    sizes: Mapping[str, int]
    plan: Plan

    def to_quantize(self, room: int | None = None, *, of_tasks: bool = False) -> int:
        """All files once, and once more what waits for the hash of a file.

        Args:
            room: bytes of the result that lie here at a time; None for all.
            of_tasks: each file of the result is made by a task of its own. At worst all of them
                begin at once, and each has the whole file of the source pass by.
        """
        layouts = self.plan.layouts()
        outputs: dict[str, list[str]] = {file: [] for file in self.sizes}
        tensors = self.plan.files()
        for name, made_of in tensors.items():
            outputs[made_of[0].source.file].append(name)
        if of_tasks:
            return sum(size * max(1, len(outputs[file])) for file, size in self.sizes.items())
        waiting: list[str] = []
        if room is not None:
            for names in outputs.values():
                waiting += names[fitting([layouts[name].nbytes for name in names], room) :]
        return sum(self.sizes.values()) + sum(self._again(tensors[name]) for name in waiting)

    def to_make_again(self) -> int:
        """What all files of the result are made of, each by itself."""
        return sum(self._again(tensors) for tensors in self.plan.files().values())

    def to_compare(self, passes: int) -> int:
        """Each tensor once, those in blocks as often as the models pass them.

        Args:
            passes: of the models.
        """
        tensors = [tensor.header for tensor in self.checkpoint.tensors]
        in_blocks = sum(tensor.nbytes for tensor in tensors if numbered_block(tensor.name))
        return sum(tensor.nbytes for tensor in tensors) + (passes - 1) * in_blocks

    def _again(self, tensors: tuple[TensorPlan, ...]) -> int:
        """The stretches of a file that has passed by that hold any of these tensors."""
        wanted = [_span(tensor.source.header) for tensor in tensors]
        held = self.checkpoint.tensors_in(tensors[0].source.file)
        stretches = cut([tensor.header for tensor in held])
        return sum(
            end - start
            for start, end in stretches
            if any(first < end and start < last for first, last in wanted)
        )


def _span(tensor: HeaderTensor) -> tuple[int, int]:
    return tensor.offset, tensor.offset + tensor.nbytes
