"""Mean KL in each domain of the text, with its interval."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipeline.report.draw.canvas import AFTER, BEFORE, OTHER, bare, new_figure, plain
from pipeline.report.words import label


def draw(verification: dict[str, Any]) -> Figure:
    """A dot and its interval for each domain; a second one for the artifact compared with."""
    domains = verification["domains"]
    names = [domain["name"] for domain in domains]
    against = verification.get("against")
    figure = new_figure(0.75 + 0.3 * len(domains))
    axes = figure.add_subplot()
    series = [("this artifact", domains, AFTER, "o", -0.12 if against else 0.0)]
    if against:
        series.append((against["name"], against["domains"], OTHER, "s", 0.12))
    for series_name, rows, colour, marker, shift in series:
        points = [
            (names.index(row["name"]) + shift, row["mean_kl"])
            for row in rows
            if row["name"] in names and None not in row["mean_kl"].values()
        ]
        values = [interval["value"] for _, interval in points]
        axes.errorbar(
            values,
            [place for place, _ in points],
            xerr=[
                [max(0.0, i["value"] - i["low"]) for _, i in points],
                [max(0.0, i["high"] - i["value"]) for _, i in points],
            ],
            fmt=marker,
            markersize=5,
            color=colour,
            elinewidth=1.6,
            label=label(series_name, 40),
        )
    overall = verification["fidelity"]["mean_kl"]["value"]
    if overall is not None:
        axes.axvline(overall, color=BEFORE, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xlim(left=0)
    axes.set_ylim(len(domains) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), [label(name, 30) for name in names])
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    axes.set_xlabel("mean KL in nats per token; dashed: over all domains")
    bare(axes, grid="x")
    if against:
        figure.legend(loc="outside upper left", ncols=2)
    return figure
