"""The sizes of the tensors in a pickle, held against the bytes that are there; nothing is loaded.

A pickle of 2 KB can describe tensors of any size: one stride of 0, or one storage under a thousand
names. The program that `scan.py` let pass is followed with stand-ins for everything it names; they
keep shapes and no bytes.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from math import prod
from typing import Any, Final, NamedTuple

MAX_TENSORS: Final = 200_000
MAX_REPEATS: Final = 4
"""How often the bytes of all storages may be named; a head tied to an embedding: twice."""
_MAX_RANK: Final = 16

_ITEM_BYTES: Final = {
    "BFloat16Storage": 2,
    "BoolStorage": 1,
    "ByteStorage": 1,
    "CharStorage": 1,
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "IntStorage": 4,
    "LongStorage": 8,
    "ShortStorage": 2,
}


# Tuples: a program can set no attribute of them.
class _Kind(NamedTuple):
    """Stands for a class of storages."""

    item_bytes: int


class _Storage(NamedTuple):
    """Stands for a storage."""

    item_bytes: int
    items: int


class _Tensor(NamedTuple):
    """Stands for a tensor."""

    nbytes: int


def tensor_sizes(program: bytes, storages: Mapping[str, int]) -> dict[str, int]:
    """The bytes of each tensor that a pickle rebuilds, by name.

    Args:
        program: that `scan.py` found nothing forbidden in.
        storages: the bytes that the archive holds for each storage, by its key.

    Raises:
        ValueError: the program rebuilds something else than tensors by name, a tensor that reaches
            beyond its storage or repeats parts of it, or more than `MAX_REPEATS` times the bytes
            there are; or a storage has another size than the archive's entry.
    """
    follower = _Follower(program, storages)
    try:
        value = follower.load()
    except ValueError:
        raise
    except Exception as error:  # a program may do anything wrong
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"its program fails: {why}") from error
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {_shown(value)}, expected tensors by name")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise ValueError(f"{str(name)[:80]!r} is no plain tensor")
    sizes = {name: tensor.nbytes for name, tensor in value.items()}
    if len(sizes) > MAX_TENSORS:
        raise ValueError(f"it holds {len(sizes):,} tensors; no real one has {MAX_TENSORS:,}")
    there, claimed = sum(storages[key] for key in follower.used), sum(sizes.values())
    if claimed > MAX_REPEATS * there:
        raise ValueError(
            f"its tensors make {claimed:,} bytes of the {there:,} that it holds for them; at most "
            f"{MAX_REPEATS} times as many are taken"
        )
    return sizes


def _shown(value: object) -> str:
    return "tensor" if isinstance(value, _Tensor) else type(value).__name__


class _Follower(pickle.Unpickler):
    """Follows a program with stand-ins for all that it names."""

    def __init__(self, program: bytes, storages: Mapping[str, int]) -> None:
        super().__init__(io.BytesIO(program))
        self._storages = storages
        self.used: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for what the program names.

        Raises:
            ValueError: the name is of nothing that a state dict needs.
        """
        if module == "torch" and name in _ITEM_BYTES:
            return _Kind(_ITEM_BYTES[name])
        known: dict[str, Any] = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_parameter": _parameter,
            "torch._utils._rebuild_tensor_v2": _tensor,
        }
        if f"{module}.{name}" not in known:
            raise ValueError(f"it names {module}.{name}"[:200])
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> _Storage:
        """A stand-in for a storage.

        Raises:
            ValueError: the storage is described otherwise than torch.save does, or has another size
                than the archive's entry.
        """
        match pid:
            case ("storage", _Kind(item_bytes=item_bytes), str(key), str(), int(items)):
                pass
            case _:
                raise ValueError("it describes a storage otherwise than torch.save does")
        there = self._storages.get(key)
        if there is None:
            raise ValueError(f"it has no bytes of the storage {key[:80]!r}")
        if items * item_bytes != there:
            raise ValueError(
                f"it gives the storage {key[:80]!r} {items * item_bytes:,} bytes, and holds "
                f"{there:,}"
            )
        self.used.add(key)
        return _Storage(item_bytes, items)


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Tensor:
    are_tuples = isinstance(size, tuple) and isinstance(stride, tuple)
    if not isinstance(storage, _Storage) or not are_tuples or len(size) != len(stride):
        raise ValueError("it describes a tensor otherwise than torch.save does")
    if len(size) > _MAX_RANK:
        raise ValueError(f"it has a tensor of {len(size):,} dimensions")
    numbers = (offset, *size, *stride)
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError("it gives a tensor impossible sizes or strides")
    items = prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if items and last >= storage.items:
        raise ValueError(
            f"it has a tensor that reaches to item {last + 1:,} of a storage of {storage.items:,}"
        )
    if items > storage.items:
        raise ValueError(
            f"it makes a tensor of {items:,} items out of a storage of {storage.items:,}"
        )
    return _Tensor(items * storage.item_bytes)
