"""How a picture looks, and how it becomes a PNG or an SVG that follows the page's theme."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Colours by role, for a light background. In an SVG each becomes the CSS variable of that name, so
# no two may be equal.
INK: Final = "#1d2126"
MUTED: Final = "#565f6b"
LINE: Final = "#d9dee4"
PAPER: Final = "#ffffff"
BEFORE: Final = "#8793a3"  # the 16-bit model
AFTER: Final = "#1f6fb2"  # the 4-bit model
BARS: Final = "#8fb7d8"  # many bars side by side: the same blue, quieter
OTHER: Final = "#c2571a"  # the artifact that it is compared with
BAD: Final = "#b3261e"
_ROLES: Final = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    PAPER: "paper",
    BEFORE: "before",
    AFTER: "after",
    BARS: "bars",
    OTHER: "other",
    BAD: "bad",
}

SMALL: Final = 7.5
_WIDTH: Final = 8.0  # inches; with 9 points of text, a page or card 800 px wide shows it at 12.5 px
_NARROW: Final = 3.8  # inches; the same on the screen of a phone, 340 px wide, at 11 px
_DOTS_PER_INCH: Final = 200  # sharp on a screen of two pixels per point
_STYLE: Final[dict[Any, Any]] = {
    "axes.axisbelow": True,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.grid": False,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.wspace": 0.06,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters everywhere
    "font.size": 9,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # names of modules are text, whatever they hold
    "xtick.color": LINE,
    "xtick.labelcolor": MUTED,
    "xtick.labelsize": 8,
    "ytick.color": LINE,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8,
}


@contextmanager
def style() -> Iterator[None]:
    """Draws and saves in the house style, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(height: float, *, narrow: bool = False) -> Figure:
    """An empty figure as wide as all others, or as a phone, and `height` inches high."""
    return Figure(figsize=(_NARROW if narrow else _WIDTH, height))


def bare(axes: Axes, *, grid: str | None = None) -> None:
    """Takes away ticks and the frame's left side, and draws grid lines across `grid`."""
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    if grid == "x":
        axes.xaxis.grid(True)
    elif grid == "y":
        axes.yaxis.grid(True)


def plain(value: float, _: int | None = None) -> str:
    """A tick's number without zeros at its end."""
    return f"{value:g}"


def to_png(figure: Figure, title: str) -> bytes:
    """On white, under a title, with nothing in the file that says when or by what it was made."""
    figure.suptitle(title, x=0.0125, ha="left", fontsize=11, fontweight="bold")
    out = io.BytesIO()
    figure.savefig(
        out, format="png", dpi=_DOTS_PER_INCH, facecolor=PAPER, metadata={"Software": None}
    )
    return out.getvalue()


def to_svg(figure: Figure, name: str, label: str, kind: str) -> str:
    """An <svg> element to stand in a page: no background, colours as CSS variables.

    Args:
        figure: what to draw.
        name: unique in the page; all ids in the element begin with it.
        label: what a person who cannot see it is told.
        kind: its class in the page.
    """
    out = io.StringIO()
    matplotlib.rcParams["svg.hashsalt"] = name  # ids become hashes of this and of what they name
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(out.getvalue())
    _tidy(root)
    for size in ("width", "height", "version"):
        del root.attrib[size]
    root.attrib |= {
        "class": kind,
        "role": "img",
        "aria-label": label,
        "stroke-linejoin": "round",
    }
    return ElementTree.tostring(root, "unicode")


def _tidy(root: ElementTree.Element) -> None:
    """Drops what only a file of its own needs: namespaces, metadata, fonts, unused ids, space."""
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', ElementTree.tostring(root, "unicode")))
    for element in root.iter():
        for child in list(element):
            # matplotlib's <style> would act on the whole page.
            if _local(child.tag) in ("metadata", "style"):
                element.remove(child)
        element.tag = _local(element.tag)
        element.tail = None
        if element.tag != "text":
            element.text = None
        element.attrib = {
            _local(key): _themed(value)
            for key, value in element.attrib.items()
            if key != "id" or value in used
        }


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _themed(value: str) -> str:
    for colour, role in _ROLES.items():
        value = value.replace(colour, f"var(--{role})")
    return re.sub(r"'DejaVu Sans'[^;]*", "var(--font)", value)
