"""Where the error comes from: a heat map of blocks and kinds of layer, each block's error above."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from nf4_pipeline.report.draw.canvas import BAD, BARS, LINE, PAPER, SMALL, bare, new_figure
from nf4_pipeline.report.formatting import label
from nf4_pipeline.verification.document import BlockError, MeasuredVerification

_COLOURS: Final = "cividis"  # the same order of light and dark to every kind of colour vision
_SHADES: Final = 48
_LEAST_SPAN: Final = 0.2  # of the largest error: less than that is not blown up to all colours
_FEW: Final = 10  # blocks with their numbers in the cells
_FEW_NARROW: Final = 4
_BREAK: Final = {False: " ", True: "\n"}


def draw(verification: MeasuredVerification, *, narrow: bool = False) -> Figure:
    """Blocks from left to right. A grey cell: no such layer. A cross: an error not finite."""
    blocks = verification.blocks
    kinds, errors = _grid(blocks)
    rows = max(1, len(kinds))
    figure = new_figure(2.0 + 0.27 * rows + 0.5 * narrow, narrow=narrow)
    few = len(blocks) <= (_FEW_NARROW if narrow else _FEW)
    above, heat = figure.subplots(2, 1, sharex=True, height_ratios=[1.0, 0.27 * rows])
    at = np.arange(len(blocks))
    _bars(above, [block.relative_error for block in blocks], few)
    above.set_title(f"error of each block’s output,{_BREAK[narrow]}with all errors before it")
    above.yaxis.set_major_locator(MaxNLocator(3))
    above.yaxis.set_major_formatter(FuncFormatter(_percent))
    bare(above, grid=None if few else "y")
    if kinds:
        _heat(figure, heat, errors, few, narrow)
    shown = [label(kind.rpartition(".")[2] if narrow else kind, 40) for kind in kinds]
    shown = [label(kind, 18) for kind in shown] if narrow else shown
    heat.set_yticks(range(len(kinds)), shown)
    heat.set_ylim(rows - 0.5, -0.5)
    heat.set_xlim(-0.5, len(blocks) - 0.5)
    names = _numbers([block.name for block in blocks])
    step = max(1, -(-len(blocks) // (6 if narrow else 20)))
    heat.set_xticks(at[::step], names[::step])
    heat.set_xlabel("block")
    heat.set_title("error that each layer adds by itself")
    bare(heat)
    heat.spines["bottom"].set_visible(False)
    return figure


def _bars(axes: Axes, errors: list[float | None], few: bool) -> None:
    axes.bar(range(len(errors)), [error or 0 for error in errors], width=0.8, color=BARS)
    axes.margins(y=0.25 if few else 0.05)
    for place, error in enumerate(errors):
        if error is None:
            axes.text(place, 0, "×", color=BAD, ha="center", va="bottom")
        elif few:
            axes.text(place, error, _share(error), ha="center", va="bottom", fontsize=SMALL)


def _heat(figure: Figure, axes: Axes, errors: NDArray[np.float64], few: bool, narrow: bool) -> None:
    finite = errors[np.isfinite(errors)]
    high = float(finite.max()) if finite.any() else 1.0
    low = min(float(finite.min()), high * (1 - _LEAST_SPAN)) if finite.size else 0.0
    colours = matplotlib.colormaps[_COLOURS].resampled(_SHADES).with_extremes(bad=LINE)
    rows, columns = errors.shape
    mesh = axes.pcolormesh(
        np.arange(columns + 1) - 0.5,
        np.arange(rows + 1) - 0.5,
        np.ma.masked_invalid(errors),
        cmap=colours,
        norm=Normalize(low, high),
        edgecolors=PAPER,
        linewidth=0.5,
    )
    for (row, column), error in np.ndenumerate(errors):
        if np.isposinf(error):
            axes.text(column, row, "×", color=BAD, ha="center", va="center")
        elif few and np.isfinite(error):
            dark = (error - low) / (high - low) < 0.5
            axes.text(column, row, _share(error), ha="center", va="center", fontsize=SMALL).set(
                color="#fefefe" if dark else "#111111"  # the cell's colour is that of no theme
            )
    if narrow:
        bar = figure.colorbar(mesh, ax=axes, location="bottom", pad=0.02, aspect=24)
    else:
        bar = figure.colorbar(mesh, ax=axes, pad=0.01, aspect=max(6, 4 * rows), fraction=0.03)
    bar.locator = MaxNLocator(3)
    bar.formatter = FuncFormatter(_percent)
    bar.outline.set_visible(False)
    for shades in bar.ax.collections:
        shades.set_edgecolor("face")  # no seams between them in an SVG
    bar.ax.tick_params(length=0)
    bar.update_ticks()


def _grid(blocks: Sequence[BlockError]) -> tuple[list[str], NDArray[np.float64]]:
    """Kinds of layer in the order they come, and [kind, block] errors.

    NaN where a block has no such layer; infinity where the error is not finite. Layers whose names
    differ only by a number, such as experts, are one kind, and the worst of them counts.
    """
    worst: dict[tuple[str, int], float] = {}
    for place, block in enumerate(blocks):
        for layer in block.modules:
            key = re.sub(r"(?<![^.])\d+(?![^.])", "*", layer.name), place
            error = layer.relative_error
            worst[key] = max(worst.get(key, 0.0), np.inf if error is None else error)
    kinds = list(dict.fromkeys(kind for kind, _ in worst))
    errors = np.full((len(kinds), len(blocks)), np.nan)
    for (kind, place), error in worst.items():
        errors[kinds.index(kind), place] = error
    return kinds, errors


def _numbers(names: list[str]) -> list[str]:
    """The blocks' own numbers; their places if they have none or share them."""
    numbers = [re.findall(r"\d+", name)[-1:] for name in names]
    own = [last[0] for last in numbers if last]
    return own if len(set(own)) == len(names) else [str(place) for place in range(len(names))]


def _percent(value: float, _: int | None = None) -> str:
    return f"{value * 100:g} %"


def _share(error: float) -> str:
    return f"{error * 100:.1f} %"
