"""The pictures of a verification: PNG files for the model card, SVG elements for the page. Pure."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Final

from nf4_pipeline.manifest.manifest import Manifest
from nf4_pipeline.verification.document import MeasuredVerification, Verification

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A picture, by the name of the module that draws it.

    Attributes:
        title: its heading.
        caption: how to read it, in a sentence.
        file: the PNG file; None if it is only in the page.
    """

    title: str
    caption: str
    file: str | None


PICTURES: Final = {
    "sizes": Picture(
        "Where the bytes go",
        "Each pair of bars is a group of weights, before and after; bars of the same length were "
        "not quantized.",
        "pictures/bytes.png",
    ),
    "layers": Picture(
        "Where the error comes from",
        "The brighter a cell, the further that layer’s output is from the 16-bit one for the same "
        "input (grey: no such layer); the bars above show how the errors of all layers add up on "
        "the way to the output.",
        "pictures/layers.png",
    ),
    "kl": Picture(
        "How far the predictions move",
        "KL is 0 where both models predict the same; a line on the right that climbs means that "
        "the error grows along the text.",
        "pictures/kl.png",
    ),
    "domains": Picture(
        "What kind of text suffers",
        "Each dot is the mean KL of one kind of text, its bar the interval: where two bars "
        "overlap, the difference may be chance.",
        None,
    ),
}


def pictures(manifest: Manifest, verification: Verification) -> dict[str, bytes]:
    """The PNG files of the model card, 1600 px wide, on white.

    The same input and version of matplotlib give the same bytes.

    Args:
        manifest: of the artifact; gives the model's name in each title.
        verification: of the artifact. A picture for which it has no numbers is left out.

    Returns:
        Path in the artifact, such as "pictures/kl.png" -> content.
    """
    if not isinstance(verification, MeasuredVerification):
        return {}
    model = manifest.source.repo.rpartition("/")[2]
    files = {}
    with _drawing() as canvas:
        for name, picture in drawable(verification).items():
            if picture.file is not None:
                title = (
                    f"{model} in {manifest.codebook}: {picture.title[0].lower()}{picture.title[1:]}"
                )
                files[picture.file] = canvas.to_png(_figure(name, verification), title)
    return files


def svg_elements(verification: Verification) -> dict[str, str]:
    """Name of a picture -> two <svg> elements, "wide" and "narrow", of which the page shows one.

    The page defines their colours as CSS variables.
    """
    if not isinstance(verification, MeasuredVerification):
        return {}
    with _drawing() as canvas:
        return {
            name: canvas.to_svg(_figure(name, verification), name, picture.title, "wide")
            + canvas.to_svg(
                _figure(name, verification, narrow=True), f"narrow-{name}", picture.title, "narrow"
            )
            for name, picture in drawable(verification).items()
        }


def drawable(verification: MeasuredVerification) -> dict[str, Picture]:
    """The pictures for which there is something to draw: a finite number, at least."""
    layers = [layer for block in verification.blocks for layer in block.modules]
    has_numbers = {
        "sizes": True,
        "layers": any(layer.relative_error is not None for layer in layers),
        "kl": any(verification.kl_histogram.counts),
        "domains": any(domain.mean_kl.is_finite for domain in verification.domains),
    }
    return {name: picture for name, picture in PICTURES.items() if has_numbers[name]}


@contextmanager
def _drawing() -> Iterator[ModuleType]:
    """The canvas, in the house style. matplotlib is imported here and not before."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)  # the first import on a machine warns that it lists the fonts
    try:
        canvas = import_module("nf4_pipeline.report.draw.canvas")
    finally:
        logger.setLevel(level)
    with canvas.style():
        yield canvas


def _figure(name: str, verification: MeasuredVerification, *, narrow: bool = False) -> Figure:
    draw: Callable[..., Figure] = import_module(f"nf4_pipeline.report.draw.{name}").draw
    return draw(verification, narrow=narrow)
