"""What is left of a job, by how long its stages took here with the last model of that size.

Kept in one small file in the user's cache folder. It is a convenience: where it cannot be read or
written, nothing is said of what is left, and nothing else happens.
"""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from nf4_pipeline.checkpoint.atomic import write_json

_FILE: Final = Path("nf4-pipeline", "pace.json")
_LONGEST: Final = 64 * 2**10


def default_file() -> Path | None:
    """Where it is kept; None for somebody without a home."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if Path(cache).is_absolute():
        return Path(cache) / _FILE
    with suppress(RuntimeError):
        return Path.home() / ".cache" / _FILE
    return None


class Pace:
    """How long each stage of a job took, by the size of its model and the stage's place in the job.

    Args:
        file: where that is kept; None to keep nothing.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._known = _read(file)
        self._took: dict[str, float] = {}
        self._size: str | None = None

    def ended(self, number: int, of: int, seconds: float, *, ran: bool, nbytes: int) -> None:
        """A stage is done.

        Args:
            number: its place in the job, from 1 on.
            of: how many stages the job has.
            seconds: that it took.
            ran: an earlier result was not still valid.
            nbytes: what it worked on; that of the first stage is the model's size.
        """
        if number == 1 and nbytes > 0:
            self._size = f"{round(math.log2(nbytes))}"  # models up to 1.4 times smaller or larger
        if ran:
            self._took[f"{number}/{of}"] = round(seconds, 1)
        if number == of:
            self._keep()

    def left(self, number: int, of: int, gone: float) -> float | None:
        """Seconds that the job still needs.

        Args:
            number: of the stage that runs, from 1 on.
            of: how many stages the job has.
            gone: seconds since it began.

        Returns:
            None if nobody can say: the first model of its size, or it takes longer than the last.
        """
        known = self._known.get(self._size or "", {})
        rest = [known.get(f"{place}/{of}", math.nan) for place in range(number, of + 1)]
        left = sum(rest) - gone
        return None if math.isnan(left) or rest[0] < gone else left

    def _keep(self) -> None:
        if self._file is None or self._size is None or not self._took:
            return
        known = self._known | {self._size: self._known.get(self._size, {}) | self._took}
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._file, known)


def _read(file: Path | None) -> dict[str, dict[str, float]]:
    """What was kept; nothing of what is not as it was kept."""
    try:
        if file is None or file.stat().st_size > _LONGEST:
            return {}
        found = json.loads(file.read_bytes())
        return {
            size: {place: float(took) for place, took in stages.items() if 0 <= took < math.inf}
            for size, stages in found.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
