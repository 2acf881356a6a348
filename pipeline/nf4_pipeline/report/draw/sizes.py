"""Where the bytes go: each group of weights in 16 bit and in the artifact."""

from __future__ import annotations

from typing import Final

from matplotlib.figure import Figure

from nf4_pipeline.report.draw.canvas import AFTER, BEFORE, MUTED, SMALL, bare, new_figure
from nf4_pipeline.report.formatting import label, size
from nf4_pipeline.verification.document import MeasuredVerification, Sizes, WeightGroup

_NAMED: Final = 8  # groups that get a row of their own, at most
_LEAST: Final = 0.005  # of all bytes, to get one
_ROW: Final = 0.58  # inches
_BAR: Final = 0.22  # of a row


def draw(verification: MeasuredVerification, *, narrow: bool = False) -> Figure:
    """One row for all tensors, one for each of the biggest groups, one for the rest."""
    rows = _rows(verification.sizes, 42 if narrow else 70)
    figure = new_figure(0.05 + _ROW * (len(rows) + 0.6 * narrow), narrow=narrow)
    axes = figure.add_subplot()
    largest = max(max(before, after) for _, _, before, after in rows) or 1
    for row, (name, note, before, after) in enumerate(rows):
        axes.annotate(name, (0, row), (0, -1), textcoords="offset points", va="top").set_fontweight(
            "normal" if row else "bold"
        )
        bars = ((0.43, before, BEFORE, size(before)), (0.67, after, AFTER, note or size(after)))
        for at, value, colour, words in bars:
            axes.barh(row + at, value, height=_BAR, color=colour)
            axes.annotate(
                words, (value, row + at), (4, 0), textcoords="offset points", va="center"
            ).set(color=MUTED, fontsize=SMALL)
    axes.set_xlim(0, largest * (1.35 if narrow else 1.14))
    axes.set_ylim(len(rows) - 0.15, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)
    bare(axes)
    called = ["16 bit", "4-bit artifact"]
    if narrow:
        figure.legend(axes.patches[:2], called, loc="outside lower left", ncols=2)
    else:
        axes.legend(axes.patches[:2], called, loc="lower right")
    return figure


def _rows(sizes: Sizes, letters: int) -> list[tuple[str, str, int, int]]:
    """Name, what to say instead of the bytes after, bytes before, bytes after."""
    groups = sorted(sizes.groups, key=lambda group: (-group.before, group.name))
    least = sizes.original_bytes * _LEAST
    named = [group for group in groups if group.before >= least][:_NAMED]
    rest = groups[len(named) :]
    rows = [("all tensors", "", sizes.original_bytes, sizes.artifact_bytes)]
    for group in named:
        rows.append((label(group.name, letters), _note(group), group.before, group.after))
    if rest:
        before, after = sum(group.before for group in rest), sum(group.after for group in rest)
        groups_word = "other group" if len(rest) == 1 else "other groups"
        rows.append((f"{len(rest)} {groups_word}", "", before, after))
    return rows


def _note(group: WeightGroup) -> str:
    if group.quantized:
        return ""
    return f"{size(group.after)}, not quantized" if group.after else "left out"
