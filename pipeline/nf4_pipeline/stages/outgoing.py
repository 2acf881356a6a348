"""What becomes of finished files: they stay here, or they go to the Hub and make room."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Final, Protocol

from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.selection import LARGEST_FILE


class Outgoing(Protocol):
    """Is told of finished files; a file that goes away makes room for another."""

    def begin(self, sizes: Collection[int]) -> int:
        """Is told how large all files will be; says how much of them lies here at most.

        Raises:
            ResourceError: what follows has no room for them.
        """

    def fitting(self, sizes: Sequence[int]) -> int:
        """How many of these files, from the first on, may lie here at a time."""

    def reserve(self, nbytes: int) -> None:
        """Waits until there is room for a file of this size, which is then made.

        Raises:
            HubError: a file cannot go away.
        """

    def release(self, nbytes: int) -> None:
        """Takes back what was reserved for a file that will not be."""

    def add(self, path: Path, digest: FileDigest) -> None:
        """Is told of a file that is finished and counts."""

    def settle(self) -> None:
        """Waits until every file that is to go away is gone.

        Raises:
            HubError: a file cannot go away.
        """


class StaysHere:
    """Files stay where they are made."""

    def begin(self, sizes: Collection[int]) -> int:
        return sum(sizes)

    def fitting(self, sizes: Sequence[int]) -> int:
        return len(sizes)

    def reserve(self, nbytes: int) -> None:
        pass

    def release(self, nbytes: int) -> None:
        pass

    def add(self, path: Path, digest: FileDigest) -> None:
        pass

    def settle(self) -> None:
        pass


STAYS_HERE: Final = StaysHere()


def room_for(sizes: Collection[int]) -> int:
    """Bytes of the files that lie here at a time, where each goes away once the Hub has it.

    One is made while another is sent.

    Args:
        sizes: of all files.
    """
    return min(sum(sizes), max(2 * LARGEST_FILE, *sizes))


def fitting(sizes: Sequence[int], room: int) -> int:
    """How many files, from the first on, have room at a time."""
    return sum(end <= room for end in accumulate(sizes))
