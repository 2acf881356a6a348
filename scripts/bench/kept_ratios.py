"""Today's ratios beside those that were kept: a benchmark that became slower is seen at once.

Seconds differ from machine to machine; how many times faster than stock tools this project is, on
one machine and in one run, differs far less. `ratios.json` holds what was measured on a machine
with two cores and no GPU, nothing else running. NF4_KEEP_RATIOS=1 writes today's there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

import click

_KEPT: Final = Path(__file__).with_name("ratios.json")
_WORSE: Final = 0.8
"""Of the kept ratio; less than this is more than what differs between two runs."""


def show_beside_kept(name: str, ratio: float) -> None:
    """Prints a ratio, and the one that was kept under its name.

    Args:
        name: what is compared, such as "quantize, 2 layers: stock / ours".
        ratio: how many times faster ours is.
    """
    kept: dict[str, float] = json.loads(_KEPT.read_text()) if _KEPT.exists() else {}
    if os.environ.get("NF4_KEEP_RATIOS"):
        kept[name] = round(ratio, 2)
        _KEPT.write_text(json.dumps(dict(sorted(kept.items())), indent=2) + "\n")
        click.echo(f"kept: {name} = {ratio:.2f}")
    elif name not in kept:
        click.echo(f"{name} = {ratio:.2f}; none was kept")
    else:
        share = ratio / kept[name]
        mark = "  WORSE" if share < _WORSE else ""
        click.echo(f"{name} = {ratio:.2f}; kept on two cores: {kept[name]:.2f} ({share:.2f}){mark}")
