"""A worker one of whose libraries begins a thread."""

from __future__ import annotations

import threading
import time


def prepare() -> None:
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
