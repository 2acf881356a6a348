"""A worker one of whose libraries begins a thread."""

from __future__ import annotations

import threading


def prepare() -> None:
    threading.Thread(target=threading.Event().wait, daemon=True).start()
