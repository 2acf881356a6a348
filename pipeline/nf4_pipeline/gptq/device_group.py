"""Devices that share the work on one layer; what comes of it does not depend on how many they are.

Rows of a weight, columns of a second moment and of a factor are cut into pieces by their number
alone. A piece is computed as if there were no others, on whichever device it is dealt to, so one
device of a kind gives what eight of them give, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Final, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Division:
    """How rows or columns are cut, whatever the devices.

    Attributes:
        most: pieces, at most; more devices than that have nothing to do.
        least: rows or columns of a piece, at least, if there is more than one piece.
    """

    most: int = 1
    least: int = 1

    def pieces(self, count: int) -> list[slice]:
        """Cuts so many rows or columns, in order; all pieces but the last are of one size."""
        number = max(1, min(self.most, count // self.least))
        size = max(1, -(-count // number))
        return [slice(first, min(first + size, count)) for first in range(0, count, size)]


DIVISIONS: Final = {"cpu": Division(), "cuda": Division(most=8, least=512)}
"""By the kind of device. Another one gives other bytes: sums are cut elsewhere. On a CPU threads
share rows instead."""


class DeviceGroup:
    """Devices of one kind; the first one leads: it holds what only one of them needs.

    Args:
        devices: one may stand there twice.
        division: None for that of their kind.
        pool: with a thread for each; None if there is one device.
    """

    def __init__(
        self,
        devices: Sequence[torch.device],
        division: Division | None = None,
        pool: Executor | None = None,
    ) -> None:
        self.devices = tuple(devices)
        self.division = division or DIVISIONS[devices[0].type]
        self._pool = pool

    def __len__(self) -> int:
        return len(self.devices)

    @property
    def lead(self) -> torch.device:
        return self.devices[0]

    def alone(self, index: int) -> DeviceGroup:
        """One of the devices, which cuts as all of them do."""
        return DeviceGroup([self.devices[index]], self.division)

    def shares(self, count: int) -> list[list[slice]]:
        """The pieces of each device: some that follow each other, none at all for the last ones."""
        pieces = iter(self.division.pieces(count))
        each, more = divmod(len(self.division.pieces(count)), len(self))
        return [list(islice(pieces, each + (i < more))) for i in range(len(self))]

    def dealt(self, count: int) -> list[list[int]]:
        """Numbers of things that get smaller or larger one by one, so that all have about as much.

        Returns:
            For each device those that are its own: forth, and back, and forth again.
        """
        rounds = [
            list(range(first, min(first + len(self), count)))
            for first in range(0, count, len(self))
        ]
        own: list[list[int]] = [[] for _ in self.devices]
        for turn, numbers in enumerate(rounds):
            order = own if turn % 2 == 0 else own[::-1]
            for mine, number in zip(order, numbers, strict=False):
                mine.append(number)
        return own

    def dealt_beside(self, count: int, busy: float) -> list[list[int]]:
        """Numbers of things of one size, while the lead has something else to do.

        Args:
            count: of things.
            busy: how many of them would take as long as what the lead has to do.

        Returns:
            For each device those that are its own.
        """
        own: list[list[int]] = [[] for _ in self.devices]
        loads = [busy, *(0.0 for _ in self.devices[1:])]
        for number in range(count):
            least = loads.index(min(loads))
            own[least].append(number)
            loads[least] += 1.0
        return own

    def each(self, work: Callable[[int], T]) -> list[T]:
        """Calls a function with the number of each device, all of them side by side.

        Returns:
            What it gave, in the order of the devices.
        """
        if len(self) == 1 or self._pool is None:
            return [work(index) for index in range(len(self))]

        def run(index: int) -> T:
            with torch.inference_mode(), _current(self.devices[index]):
                return work(index)

        pending = [self._pool.submit(run, index) for index in range(len(self))]
        wait(pending)  # for all of them, if one fails, too
        return [future.result() for future in pending]

    def wait(self) -> None:
        """Waits for what the devices were given to do, so that it can be timed."""
        for device in set(self.devices):
            if device.type == "cuda":
                torch.cuda.synchronize(device)


def _current(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
