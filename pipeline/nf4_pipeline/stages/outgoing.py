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

    def begin(self, sizes: Collection[int], missing: Collection[int]) -> int:
        """Is told how large files are; says how many bytes more will lie here at most.

        Whether files go away depends on all of them, so that a run that goes on where another
        ended decides as that one did.

        Args:
            sizes: of all files.
            missing: of those that do not lie here yet.

        Raises:
            ResourceError: what follows has no room for them.
        """

    def restart(self) -> None:
        """Waits until no file is on its way; any may be made anew then, and be told of again.

        What was reserved and not told of counts no more.

        Raises:
            HubError: a file cannot go away.
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
        """Is told of a file that is finished and counts; room was reserved for it."""

    def settle(self) -> None:
        """Waits until every file that is to go away is gone.

        Raises:
            HubError: a file cannot go away.
        """


class StaysHere:
    """Files stay where they are made."""

    def begin(self, sizes: Collection[int], missing: Collection[int]) -> int:
        return sum(missing)

    def restart(self) -> None:
        pass

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
    return min(sum(sizes), max(2 * LARGEST_FILE, max(sizes, default=0)))


def fitting(sizes: Sequence[int], room: int) -> int:
    """How many files, from the first on, have room at a time."""
    return sum(end <= room for end in accumulate(sizes))
