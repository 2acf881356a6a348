"""Mean KL in each domain of the text, with its interval."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nf4_pipeline.report.draw.canvas import AFTER, BEFORE, INK, OTHER, bare, new_figure, plain
from nf4_pipeline.report.formatting import is_finite, label
from nf4_pipeline.verification.document import MeasuredVerification


def draw(verification: MeasuredVerification, *, narrow: bool = False) -> Figure:
    """A dot and its interval for each domain; others for what the artifact is compared with."""
    domains = verification.domains
    names = [domain.name for domain in domains]
    series = [("this artifact", domains, AFTER, "o")]
    if nearest := verification.nearest:
        series.append(("round to nearest", nearest.domains, INK, "D"))
    if before := verification.before_learning:
        series.append(("before learning", before.domains, BEFORE, "^"))
    if against := verification.against:
        series.append((against.name, against.domains, OTHER, "s"))
    height = 0.75 + (0.2 + 0.1 * len(series)) * len(domains)
    figure = new_figure(height + 0.2 * len(series) * narrow, narrow=narrow)
    axes = figure.add_subplot()
    for place, (series_name, rows, colour, marker) in enumerate(series):
        shift = 0.24 * (place - (len(series) - 1) / 2)
        points = [
            (names.index(row.name) + shift, row.mean_kl)
            for row in rows
            if row.name in names and row.mean_kl.is_finite
        ]
        values = [interval.value for _, interval in points]
        axes.errorbar(
            values,
            [row for row, _ in points],
            xerr=[
                [max(0.0, i.value - i.low) for _, i in points],
                [max(0.0, i.high - i.value) for _, i in points],
            ],
            fmt=marker,
            markersize=5,
            color=colour,
            elinewidth=1.6,
            label=label(series_name, 32 if narrow else 40),
        )
    overall = verification.fidelity.mean_kl.value
    if is_finite(overall):
        axes.axvline(overall, color=BEFORE, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xlim(left=0)
    axes.set_ylim(len(domains) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), [label(name, 16 if narrow else 30) for name in names])
    axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 6))
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    axes.set_xlabel("mean KL in nats per token\ndashed: over all domains")
    bare(axes, grid="x")
    if len(series) > 1:
        figure.legend(loc="outside upper left", ncols=1 if narrow else len(series))
    return figure
