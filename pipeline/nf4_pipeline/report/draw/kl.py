"""KL divergence per token: how it is distributed, and whether it grows along the sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from nf4_pipeline.fidelity.metrics import Fidelity, KlHistogram, PositionScore
from nf4_pipeline.report.draw.canvas import (
    AFTER,
    BARS,
    BEFORE,
    INK,
    PAPER,
    SMALL,
    bare,
    new_figure,
    plain,
)
from nf4_pipeline.report.formatting import is_finite, number
from nf4_pipeline.verification.document import MeasuredVerification


def draw(verification: MeasuredVerification, *, narrow: bool = False) -> Figure:
    """The histogram on the left or above, the mean along the position on the right or below."""
    if narrow:
        figure = new_figure(5.4, narrow=True)
        first, second = figure.subplots(2, 1)
    else:
        figure = new_figure(3.1)
        first, second = figure.subplots(1, 2, width_ratios=[1.25, 1])
    _histogram(first, verification.kl_histogram, verification.fidelity, 5 if narrow else 8)
    _positions(second, verification.kl_by_position, verification.fidelity)
    return figure


def _histogram(axes: Axes, histogram: KlHistogram, fidelity: Fidelity, ticks: int) -> None:
    edges, counts = np.array(histogram.edges), np.array(histogram.counts)
    axes.set_xscale("log")
    axes.stairs(counts, edges, fill=True, color=BARS)
    top = float(counts.max(initial=1))
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, top * 1.36)
    figures = {"median": fidelity.median_kl, "mean": fidelity.mean_kl, "p99": fidelity.p99_kl}
    marks = sorted((f.value, name) for name, f in figures.items() if is_finite(f.value))
    # From left to right in steps down, so that no line runs through the label of another.
    for height, (value, name) in zip((1.28, 1.18, 1.08), marks, strict=False):
        at = float(np.clip(value, edges[0], edges[-1]))
        axes.plot([at, at], [0, top * height], color=INK, linewidth=0.9, solid_capstyle="butt")
        right = np.log(at / edges[0]) > 0.8 * np.log(edges[-1] / edges[0])
        axes.annotate(
            f"{name} {number(value, 3)}",
            (at, top * height),
            (-4 if right else 4, 0),
            textcoords="offset points",
            ha="right" if right else "left",
            va="center",
            fontsize=SMALL,
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1},
        )
    axes.set_title("tokens by their KL")
    axes.set_xlabel("KL in nats (log scale)")
    axes.xaxis.set_major_locator(LogLocator(numticks=ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    bare(axes, grid="y")


def _positions(axes: Axes, positions: Sequence[PositionScore], fidelity: Fidelity) -> None:
    edges = [part.first for part in positions] + [part.last + 1 for part in positions[-1:]]
    means = [np.nan if part.mean_kl is None else part.mean_kl for part in positions]
    axes.stairs(means, edges or [0], color=AFTER, linewidth=1.6, baseline=None)
    overall = fidelity.mean_kl.value
    if is_finite(overall):
        axes.axhline(overall, color=BEFORE, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.set_ylim(bottom=0)
    axes.set_title("mean KL along the sequence")
    axes.set_xlabel("position of the token (dashed: mean over all)")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(plain))
    bare(axes, grid="y")
