"""A worker whose libraries take long to import."""

from __future__ import annotations

import time


def prepare() -> None:
    time.sleep(600)
