"""A model whose blocks have weights only while they are needed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch
from torch import nn

from nf4_pipeline.blocks.block_reader import BlockReader, TensorGroup
from nf4_pipeline.blocks.find_blocks import block_of, find_blocks
from nf4_pipeline.checkpoint.source import Checkpoint, SourceTensor, open_checkpoint
from nf4_pipeline.errors import CheckpointError
from nf4_pipeline.model.check_folder import build_seconds, building
from nf4_pipeline.model.config import causal_lm_config, read_config
from nf4_pipeline.model.load_dtype import compute_dtype, float32_parts, stored_dtype
from nf4_pipeline.model.meta_model import build_meta_model
from nf4_pipeline.model.tensor_names import NameMap
from nf4_pipeline.quiet_libraries import quiet_loading
from nf4_pipeline.resource_usage import available_memory, peak_memory
from nf4_pipeline.streaming.reading import tensor_bytes

STEM: Final = ""
"""What is in no block, as `block_of` says it."""

_RESCALE: Final = "rescale_every"  # in the config of an RWKV
_DIVIDED: Final = ("attention.output.weight", "feed_forward.value.weight")  # in its blocks


class StreamedModel:
    """A causal LM in the precision it is stored in; a context manager.

    The stem is on the device from the beginning; a block is there between `open` and `close`, or
    from `hold` on. What is not there lives on the meta device.

    Args:
        folder: a 16-bit checkpoint.
        device: "cpu" or "cuda:N".
        dtype: what everything is cast to; None for what the config or the weights say, as far as
            the device computes in it.
        served: where the bytes of its weights are served, if its files are headers alone.
        rescales: an RWKV halves its hidden states after every few blocks, and divides weights to
            match, as transformers has it answer. False: it does not, as transformers trains it.

    Attributes:
        model: the transformers model.
        blocks: by name, in order.
        device: where they are while they are open.
        checkpoint: what the folder holds.
        footprint: bytes of all parameters if they were there at once.
        is_served: no file of its weights is here.
    """

    def __init__(
        self,
        folder: Path,
        device: str,
        dtype: torch.dtype | None = None,
        served: Path | None = None,
        *,
        rescales: bool = True,
    ) -> None:
        self._folder = folder
        self.is_served = served is not None
        self.checkpoint = checkpoint = open_checkpoint(folder)
        self.device = torch.device(device)
        with building(folder, build_seconds(len(checkpoint.tensors))):
            config = causal_lm_config(read_config(folder), folder)
            if not rescales and hasattr(config, _RESCALE):
                setattr(config, _RESCALE, 0)
            stored = stored_dtype(config, checkpoint)
            self._dtype = dtype or compute_dtype(stored, device) or stored
            self.model = build_meta_model(config, self._dtype)
        self.blocks = find_blocks(self.model)
        self.footprint = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self._float32 = float32_parts(self.model, self._dtype)
        self._names = NameMap(self.model, [tensor.name for tensor in checkpoint.tensors])
        self._groups = _grouped(checkpoint, self._names, self.blocks)
        self._reader = BlockReader(tensor_bytes(checkpoint, served))
        self._next: dict[str, tuple[torch.Tensor, list[Future[None]]]] = {}
        self._free: list[torch.Tensor] = []
        self._empty: dict[str, dict[str, torch.Tensor]] = {}
        self._held: set[str] = set()
        self._served_stem: dict[str, torch.Tensor] = {}
        try:
            self._load_stem()
        except BaseException:
            self._reader.__exit__(None, None, None)
            raise

    def __enter__(self) -> StreamedModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._reader.__exit__(kind, error, trace)

    def read(self, tensor: SourceTensor) -> torch.Tensor:
        """A tensor of the checkpoint as it stands there, read for this call."""
        return self._reader.read(tensor)

    def nbytes(self, block: str) -> int:
        """Bytes of a block on the device."""
        return self._groups[block].nbytes

    def prefetch(self, block: str) -> None:
        """Begins to read a block that will be opened soon."""
        if block in self._next or block in self._held or block not in self._groups:
            return
        group = self._groups[block]
        fitting = [i for i, buffer in enumerate(self._free) if buffer.numel() >= group.nbytes]
        buffer = self._free.pop(fitting[0]) if fitting else self._host_buffer(group.nbytes)
        self._next[block] = buffer, self._reader.start(group, buffer)

    def open(self, block: str) -> None:
        """Gives a block its weights."""
        if block in self._held or block not in self._groups:
            return
        self.prefetch(block)
        buffer, parts = self._next[block]
        for part in parts:
            part.result()
        group = self._groups[block]
        on_device = buffer[: group.nbytes].to(self.device)
        self._fill(block, group.views(on_device))

    def stored(self, block: str) -> dict[str, torch.Tensor]:
        """What the checkpoint holds of a block that was just opened, by its names there.

        As it stands in the files, on the CPU: not cast, not merged, and, as long as the block has
        not run, not changed. Nothing for a block that is held. Of the stem, what was served, so
        that nobody has it served again; it is let go with that.
        """
        if block == STEM:
            stem, self._served_stem = self._served_stem, {}
            return stem
        if block not in self._next:
            return {}
        buffer, _ = self._next[block]
        return self._groups[block].views(buffer)

    def opened(self, block: str) -> dict[str, torch.Tensor]:
        """What a block was given when it was opened, by its names in the model."""
        return {name: _tensor(self.model, name) for name in self._empty.get(block, ())}

    def open_ahead(self, block: str, *, again: bool = False) -> None:
        """Opens a block, and begins to read the one behind it.

        Args:
            block: its path.
            again: the first one follows the last, since all blocks are passed more than once.
        """
        self.open(block)
        names = list(self.blocks)
        following = names.index(block) + 1
        if again:
            following %= len(names)
        if following < len(names):
            self.prefetch(names[following])

    def close(self, block: str) -> None:
        """Takes a block's weights away again."""
        if block in self._held or block not in self._groups:
            return
        for name, meta in self._empty.pop(block).items():
            assign(self.model, name, meta)
        self._free.append(self._next.pop(block)[0])

    def hold(self, block: str) -> None:
        """Gives a block its weights for good."""
        if block in self._held or block not in self._groups:
            return
        self.open(block)
        self._held.add(block)
        buffer, _ = self._next.pop(block)
        if self.device.type != "cpu":
            self._free.append(buffer)

    def hold_what_fits(self, spare: int, spare_if_not: int | None = None, limit: int = 0) -> bool:
        """Gives blocks their weights for good as long as there is memory.

        Args:
            spare: bytes that are left for what the model computes with, if all blocks fit.
            spare_if_not: bytes that are left if they do not; None for as many.
            limit: bytes of memory that this process may take in all; 0 for what there is.

        Returns:
            True if all blocks have them.
        """
        sizes = {name: self._size(name) for name in self.blocks}
        free = free_memory(self.device, limit)
        whole = sum(sizes.values()) <= free - spare
        # If one is streamed at a time, it stands in memory twice while it is read.
        if spare_if_not is None:
            spare_if_not = spare
        room = free if whole else free - spare_if_not - 2 * max(sizes.values(), default=0)
        for name, size in sizes.items():
            room -= size
            if room < 0:
                break
            self.hold(name)
        return whole

    def _size(self, block: str) -> int:
        """Bytes of a block, in what it is read as or what it is cast to."""
        cast: int = sum(p.numel() * p.element_size() for p in self.blocks[block].parameters())
        return max(self.nbytes(block), cast)

    def take_generation_config(self) -> None:
        """Generates as the checkpoint says, if it says anything."""
        from transformers import GenerationConfig

        if (self._folder / "generation_config.json").is_file():
            self.model.generation_config = GenerationConfig.from_pretrained(self._folder)

    def _host_buffer(self, nbytes: int) -> torch.Tensor:
        pinned = self.device.type == "cuda"
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)

    def _load_stem(self) -> None:
        """Everything outside the blocks: parameters, tied ones once, and computed buffers."""
        group = self._groups.pop(STEM)
        buffer = torch.empty(group.nbytes, dtype=torch.uint8)
        for part in self._reader.start(group, buffer):
            part.result()
        if self.is_served:
            self._served_stem = group.views(buffer)
        self._fill(STEM, group.views(buffer))
        with quiet_loading():
            missing = {
                name for name in self.model.state_dict() if name not in self._names.mapped.values()
            }
            self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        for parameter in self.model.parameters():
            if parameter.device.type != "meta":
                parameter.data = parameter.data.to(self.device)
        self._compute_buffers()
        absent = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.is_meta and not self._block_of(name)
        ]
        if absent:
            raise CheckpointError(
                f"The checkpoint lacks {len(absent)} of the model's parameters, such as "
                f"{absent[0]!r}. Download it again."
            )
        self.model.eval()
        if self._rescale_every:
            self.model.base_model.layers_are_rescaled = True

    def _compute_buffers(self) -> None:
        """Buffers that no checkpoint stores, such as rotary frequencies, made by transformers.

        Its loader leaves them to the model's own initialization; what is marked is left alone.
        """
        for module in self.model.modules():
            for name, value in module._buffers.items():
                if value is not None and value.is_meta:
                    module._buffers[name] = torch.empty_like(value, device=self.device)
                elif value is not None:
                    module._buffers[name] = value.to(self.device)
                    module._buffers[name]._is_hf_initialized = True
        for parameter in self.model.parameters():
            parameter._is_hf_initialized = True
        self.model.initialize_weights()

    def _fill(self, block: str, tensors: dict[str, torch.Tensor]) -> None:
        before: dict[str, torch.Tensor] = {}
        for name, value in self._parameters(tensors).items():
            wanted = torch.float32 if self._float32 and self._float32.search(name) else self._dtype
            if value.is_floating_point():
                value = value.to(wanted)
            before[name] = assign(self.model, name, value)
        if block != STEM:
            self._empty[block] = before
            self._rescale(block)

    @property
    def _rescale_every(self) -> int:
        """After how many layers an RWKV halves its hidden states; 0 for all other models."""
        rescales = hasattr(self.model.base_model, "layers_are_rescaled")
        return int(getattr(self.model.config, _RESCALE)) if rescales else 0

    def divisor(self, weight: str) -> int:
        """By what a weight is divided, of what the checkpoint holds; 1, but for some of an RWKV.

        Args:
            weight: its name in the model.
        """
        if not self._rescale_every or not weight.endswith(_DIVIDED):
            return 1
        place = list(self.blocks).index(self._block_of(weight))
        return 1 << (place // self._rescale_every)

    def _rescale(self, block: str) -> None:
        """Does what an RWKV does to its weights, once, when it first runs; here they come anew."""
        for name in _DIVIDED if self._rescale_every else ():
            weight = self.blocks[block].get_parameter(name)
            assign(self.blocks[block], name, weight / self.divisor(f"{block}.{name}"))

    def _parameters(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Name in the model -> tensor; merges what transformers merges."""
        whole: dict[str, torch.Tensor] = {}
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            target = self._names.mapped[name]
            if target is None:
                continue
            if name in self._names.merged:
                parts.setdefault(target, {})[name] = tensor
            else:
                whole[target] = tensor
        for target, pieces in parts.items():
            whole |= self._names.merge(target, dict(sorted(pieces.items(), key=_natural)))
        return whole

    def _block_of(self, name: str) -> str:
        return block_of(name, self.blocks)


def footprint_of(folder: Path, device: str) -> int:
    """Bytes of all parameters of a 16-bit checkpoint, as `StreamedModel` has it, unread."""
    checkpoint = open_checkpoint(folder)
    with building(folder, build_seconds(len(checkpoint.tensors))):
        config = causal_lm_config(read_config(folder), folder)
        stored = stored_dtype(config, checkpoint)
        model = build_meta_model(config, compute_dtype(stored, device) or stored)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def free_memory(device: torch.device, limit: int = 0) -> int:
    """Bytes of a device, or of this machine, that may still be taken.

    Args:
        device: a CPU or a CUDA device.
        limit: bytes that this process may take in all; 0 for what there is. A fraction that torch
            was given for the device holds besides.
    """
    if device.type == "cpu":
        free, taken = available_memory() or 0, peak_memory()
    else:
        free, total = torch.cuda.mem_get_info(device)
        taken = torch.cuda.memory_allocated(device)
        fraction = torch.cuda.get_per_process_memory_fraction(device)
        free = min(free, int(fraction * total) - taken)
    return min(free, limit - taken) if limit else free


def _grouped(
    checkpoint: Checkpoint, names: NameMap, blocks: Mapping[str, nn.Module]
) -> dict[str, TensorGroup]:
    members: dict[str, list[SourceTensor]] = {STEM: []}
    for tensor in checkpoint.tensors:
        target = names.mapped[tensor.name]
        if target is not None:
            members.setdefault(block_of(target, blocks), []).append(tensor)
    return {name: TensorGroup.of(tensors) for name, tensors in members.items()}


def assign(model: Any, name: str, value: torch.Tensor) -> torch.Tensor:
    """Puts a tensor in the place of a parameter or buffer.

    Args:
        model: a module.
        name: of the parameter or buffer in it.
        value: what it shall be.

    Returns:
        What was there.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        before: torch.Tensor = module._parameters[leaf]
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        return before
    before = module._buffers[leaf]
    module._buffers[leaf] = value
    return before


def _natural(item: tuple[str, Any]) -> list[Any]:
    """Sorts expert 10 after expert 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", item[0])]


def _tensor(model: Any, name: str) -> torch.Tensor:
    """A parameter or buffer."""
    path, _, leaf = name.rpartition(".")
    found: torch.Tensor = getattr(model.get_submodule(path), leaf)
    return found
