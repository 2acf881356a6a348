"""A plan's output files, dealt out to processes that share nothing but their input."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from nf4_pipeline.errors import UsageError

_MOST: Final = 10_000
_PART: Final = re.compile(r"([0-9]{1,5})/([0-9]{1,5})")


@dataclass(frozen=True, order=True)
class Part:
    """One of several equal parts of the work.

    Attributes:
        of: how many parts there are.
        number: which one this is, from 1 on.
    """

    of: int
    number: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """A part as people write it, such as "3/8".

        Raises:
            UsageError: the text is no such part.
        """
        found = _PART.fullmatch(text.strip())
        part = cls(int(found[2]), int(found[1])) if found else None
        if part is not None and 1 <= part.of < part.number:
            raise UsageError(
                f"--part {text[:80]!r}: there is no part {part.number} of {part.of}; the last one "
                f"is --part {part.of}/{part.of}"
            )
        if part is None or not 1 <= part.number <= part.of <= _MOST:
            raise UsageError(
                f"--part {text[:80]!r}: expected I/N, such as 3/8 for the third of eight; I from 1 "
                f"to N, N at most {_MOST:,}."
            )
        return part

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def share(self, sizes: Mapping[str, int]) -> tuple[str, ...]:
        """The files that this part makes; each file is in exactly one part.

        Neighbours stay together, since they come from the same files of the source. A part may be
        empty where there are more parts than files.

        Args:
            sizes: in bytes, of all files by name, in the plan's order.
        """
        if self.of >= len(sizes):  # one each, whatever their sizes
            return tuple(sizes)[self.number - 1 : self.number]
        total = sum(sizes.values())
        share, begin = [], 0
        for name, size in sizes.items():
            middle = begin + size / 2
            if int(middle * self.of / total) + 1 == self.number:
                share.append(name)
            begin += size
        return tuple(share)
