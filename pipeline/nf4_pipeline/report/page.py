"""Manifest + verification -> report.html. Pure."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nf4_pipeline.report import calibration
from nf4_pipeline.report import formatting as words
from nf4_pipeline.report.answers import by_prompt, excerpt
from nf4_pipeline.report.pictures import PICTURES, svg_elements

if TYPE_CHECKING:
    import jinja2

_TEMPLATES: Final = Path(__file__).with_name("templates")
_SHOWN_PROMPTS: Final = 10

# Key of `fidelity`, what it is called, and how its numbers are said.
_MEASURES: Final = (
    ("mean_kl", "mean KL, nats per token", words.number),
    ("median_kl", "median KL", words.number),
    ("p99_kl", "99th percentile of KL", words.number),
    ("max_kl", "largest KL", words.number),
    ("top1_agreement", "same next token", words.percent),
    ("sure_agreement", "same next token where the 16-bit model is sure", words.percent),
    ("perplexity_16bit", "perplexity, 16 bit", words.number),
    ("perplexity_4bit", "perplexity, 4 bit", words.number),
    ("perplexity_ratio", "perplexity, 4 bit over 16 bit", words.number),
)
_THRESHOLDS: Final = {
    "max_mean_kl": "mean KL at most",
    "min_sure_agreement": "same next token where the 16-bit model is sure, at least",
    "max_perplexity_ratio": "perplexity ratio at most",
    "max_accuracy_drop": "share of right answers lost at most",
}


def report_page(manifest: dict[str, Any], verification: dict[str, Any]) -> str:
    """The report as one HTML file that needs no network, no font and no script.

    Args:
        manifest: of the artifact; says which model this is, and how its codes were chosen.
        verification: what verify found; every other number on the page is from it. After a failed
            gate only the verdict, the checks and the versions are there, and the page shows those.
    """
    return render(manifest, verification, svg_elements(verification))


def render(manifest: dict[str, Any], verification: dict[str, Any], svgs: dict[str, str]) -> str:
    """The page around pictures that are already drawn.

    Args:
        manifest: of the artifact.
        verification: what verify found.
        svgs: name of a picture -> its <svg> element.
    """
    from markupsafe import Markup

    return (
        _environment()
        .get_template("report.html")
        .render(
            manifest=manifest,
            v=verification,
            failed=[check for check in verification["checks"] if not check["passed"]],
            pictures={n: (about, Markup(svgs.get(n, ""))) for n, about in PICTURES.items()},
            prompts=by_prompt(verification.get("answers", ())),
            kinds=_kinds(verification.get("blocks", ())),
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
        finalize=lambda value: words.visible(value) if type(value) is str else value,
    )
    environment.filters |= {
        "number": words.number,
        "percent": words.percent,
        "share": words.share,
        "count": words.count,
        "bytes": words.size,
        "binary": words.binary_size,
        "seconds": words.seconds,
    }
    environment.globals |= {
        "bounds": words.bounds,
        "calibrated": calibration,
        "excerpt": excerpt,
        "measures": _MEASURES,
        "thresholds": _THRESHOLDS,
        "shown_prompts": _SHOWN_PROMPTS,
        "style": Markup((_TEMPLATES / "style.css").read_text("utf-8")),
        "nothing": words.NOTHING,
    }
    return environment


def _kinds(blocks: Any) -> list[str]:
    """Names of all modules of all blocks, in the order they come."""
    return list(dict.fromkeys(m["name"] for block in blocks for m in block["modules"]))
