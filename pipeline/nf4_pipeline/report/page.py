"""Manifest + verification -> report.html. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nf4_pipeline.manifest.manifest import Manifest, Source
from nf4_pipeline.report import calibration, formatting, kl_scale, snippets
from nf4_pipeline.report.answers import by_prompt, excerpt
from nf4_pipeline.report.pictures import PICTURES, svg_elements
from nf4_pipeline.verification.document import BlockError, MeasuredVerification, Verification

if TYPE_CHECKING:
    import jinja2

_TEMPLATES: Final = Path(__file__).with_name("templates")
_SHOWN_PROMPTS: Final = (3, 10)  # at least, and at most of those whose answers differ
_SHOWN_WORST: Final = 3
_REPO: Final = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)

# Attribute of `Fidelity`, what it is called, and how its numbers are said.
_MEASURES: Final = (
    ("mean_kl", "mean KL, nats per token", formatting.number),
    ("median_kl", "median KL", formatting.number),
    ("p99_kl", "99th percentile of KL", formatting.number),
    ("max_kl", "largest KL", formatting.number),
    ("top1_agreement", "same next token", formatting.percent),
    ("sure_agreement", "same next token where the 16-bit model is sure", formatting.percent),
    ("perplexity_16bit", "perplexity, 16 bit", formatting.number),
    ("perplexity_4bit", "perplexity, 4 bit", formatting.number),
    ("perplexity_ratio", "perplexity, 4 bit over 16 bit", formatting.number),
)
_THRESHOLDS: Final = {
    "max_mean_kl": "mean KL at most",
    "min_sure_agreement": "same next token where the 16-bit model is sure, at least",
    "max_perplexity_ratio": "perplexity ratio at most",
    "max_accuracy_drop": "share of right answers lost at most",
}


def report_page(manifest: Manifest, verification: Verification) -> str:
    """The report as one HTML file that needs no network, no font and no script.

    Args:
        manifest: of the artifact; says which model this is, and how its codes were chosen.
        verification: every other number on the page is from it. If the models were not compared,
            the page shows the verdict, the checks and the versions.
    """
    return render(manifest, verification, svg_elements(verification))


def render(manifest: Manifest, verification: Verification, svgs: Mapping[str, str]) -> str:
    """The page around pictures that are already drawn.

    Args:
        manifest: of the artifact.
        verification: of the artifact.
        svgs: name of a picture -> its <svg> element.
    """
    from markupsafe import Markup

    measured = verification if isinstance(verification, MeasuredVerification) else None
    prompts = by_prompt(measured.answers) if measured else []
    least, most = _SHOWN_PROMPTS
    return (
        _environment()
        .get_template("report.html")
        .render(
            manifest=manifest,
            v=verification,
            measured=measured is not None,
            failed=verification.failed_checks,
            pictures={n: (about, Markup(svgs.get(n, ""))) for n, about in PICTURES.items()},
            prompts=prompts,
            shown_prompts=max(least, min(most, sum(prompt.differs for prompt in prompts))),
            kinds=_kinds(measured.blocks) if measured else [],
            contents=_contents(measured),
            address=_address(manifest.source),
            stock=snippets.is_stock(manifest),
        )
    )


@cache
def _environment() -> jinja2.Environment:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,  # answers, prompts and names are whatever a model or a file holds
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: formatting.visible(value) if type(value) is str else value,
    )
    environment.filters |= {
        "number": formatting.number,
        "percent": formatting.percent,
        "share": formatting.share,
        "count": formatting.count,
        "bytes": formatting.size,
        "binary": partial(formatting.size, binary=True),
        "seconds": formatting.seconds,
    }
    environment.tests["finite"] = formatting.is_finite
    environment.globals |= {
        "bounds": formatting.bounds,
        "calibrated": calibration,
        "excerpt": excerpt,
        "one_in": formatting.one_in,
        "scale": kl_scale.scale,
        "scale_source": kl_scale.SOURCE,
        "snippets": snippets,
        "measures": _MEASURES,
        "thresholds": _THRESHOLDS,
        "shown_worst": _SHOWN_WORST,
        "style": Markup((_TEMPLATES / "style.css").read_text("utf-8")),
        "nothing": formatting.NOTHING,
    }
    return environment


def _contents(measured: MeasuredVerification | None) -> list[tuple[str, str]]:
    """Id and title of each section after the contents, as the page has them."""
    if measured is None:
        return [("checks", "Gates and checks"), ("sources", "Sources")]
    shown = {
        "meaning": formatting.is_finite(measured.fidelity.mean_kl.value),
        "worst": measured.worst_tokens,
        "layers": measured.blocks,
        "domains": measured.domains,
        "nearest": measured.nearest,
        "before": measured.before_learning,
        "against": measured.against,
    }
    sections = [
        ("meaning", "What the KL means"),
        ("worst", "The worst tokens"),
        ("prompts", "Prompts, side by side"),
        ("checks", "Gates and checks"),
        *((name, picture.title) for name, picture in PICTURES.items()),
        ("nearest", "Compared with round to nearest"),
        ("before", "Compared with the codes before learning"),
        ("costs", "What running them costs"),
        ("against", "Compared with another artifact"),
        ("method", "How it was measured"),
        ("sources", "Sources"),
    ]
    return [(name, title) for name, title in sections if shown.get(name, True)]


def _address(source: Source) -> str | None:
    """Where the source is on the Hub; None if it is from elsewhere, or called as no repo can be."""
    if source.commit is None or not _REPO.fullmatch(source.repo):
        return None
    return f"https://huggingface.co/{source.repo}/tree/{source.commit}"


def _kinds(blocks: Sequence[BlockError]) -> list[str]:
    """Names of all modules of all blocks, in the order they come."""
    return list(dict.fromkeys(layer.name for block in blocks for layer in block.modules))
