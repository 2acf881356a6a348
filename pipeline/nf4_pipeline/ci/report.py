"""A plan, an artifact or a failure -> Markdown, outputs for later steps, annotations. Pure.

Every name and every reason may be a stranger's: Markdown holds them as words, outputs as one line;
and where a log shows the Markdown, no line of it is a workflow command.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from nf4_pipeline.fidelity.verdict import Check
from nf4_pipeline.manifest.manifest import Manifest
from nf4_pipeline.model.unused_tensors import left_out
from nf4_pipeline.printable import printable
from nf4_pipeline.records import PushFacts
from nf4_pipeline.report.formatting import interval, is_finite, plain_size
from nf4_pipeline.report.markdown import folded, in_cell, in_text, table
from nf4_pipeline.report.pictures import drawable
from nf4_pipeline.verification.document import MeasuredVerification, Verification

if TYPE_CHECKING:
    from nf4_pipeline.stages.forecast import Forecast, Space

_MOST_CHECKS: Final = 100
"""Rows of a table: an artifact has some twenty checks, and a stranger's may have any number."""

_LONGEST_MESSAGE: Final = 1_000


@dataclass(frozen=True)
class Annotation:
    """A line that stands out on the page of a run.

    Attributes:
        level: "error" for what failed, "warning" for what a person should look at.
        title: what it is about.
        message: what was found.
    """

    level: Literal["error", "warning"]
    title: str
    message: str


@dataclass(frozen=True)
class CiReport:
    """What is said of one step of a run.

    Attributes:
        markdown: the summary.
        outputs: name -> one line, for later steps.
        annotations: what stands out.
        checks: what was verified, for a table of tests; empty if nothing was.
    """

    markdown: str
    outputs: Mapping[str, str]
    annotations: tuple[Annotation, ...] = ()
    checks: tuple[Check, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What `nf4 report --json` says."""
        return {
            "outputs": dict(self.outputs),
            "annotations": [vars(annotation) for annotation in self.annotations],
            "markdown": self.markdown,
        }


def report_of_artifact(
    manifest: Manifest,
    verification: Verification | None,
    *,
    folder: str,
    pushed: PushFacts | None = None,
    report_url: str | None = None,
) -> CiReport:
    """What a build came to, and where it was published.

    Args:
        manifest: of the artifact.
        verification: of the artifact; None if it was not verified.
        folder: where it is.
        pushed: what the Hub holds of it; None if it was not pushed.
        report_url: where report.html and the pictures can be downloaded; None if nowhere.
    """
    verdict = "not verified" if verification is None else verification.verdict
    failed = () if verification is None else verification.failed_checks
    measured = verification if isinstance(verification, MeasuredVerification) else None
    name = in_text(manifest.source.repo[:_LONGEST_MESSAGE])
    parts = [f"## {name} in {manifest.codebook}: {verdict}", _figures(manifest, measured)]
    if failed:
        rows = [(in_cell(c.name), in_cell(c.found), in_cell(c.expected)) for c in failed]
        parts.append(_checks_table(("check that failed", "found", "expected"), rows))
    parts += _where(measured, pushed, report_url)
    if verification is not None and not failed:
        rows = [
            (in_cell(c.name), in_cell(c.found), in_cell(c.expected)) for c in verification.checks
        ]
        listed = _checks_table(("check", "found", "expected"), rows)
        parts.append(folded(f"All {len(rows)} checks passed", listed))
    return CiReport(
        "\n\n".join(parts) + "\n",
        _outputs(manifest, verification, folder, pushed),
        (*_failures(verification), *_warnings(manifest, pushed)),
        () if verification is None else verification.checks[:_MOST_CHECKS],
    )


def report_of_plan(plan: Forecast, parts: int = 1) -> CiReport:
    """What a build will take, and in which parts it is made.

    Args:
        plan: as `nf4 build --dry-run` makes it.
        parts: among how many jobs quantizing is divided.
    """
    commit, totals = plan.source.commit or "", plan.totals
    pinned = f" at {in_text(commit[:12])}" if commit else ""
    heading = f"## Plan for {in_text(plan.source.name[:_LONGEST_MESSAGE])}{pinned}"
    took = ", ".join(f"{in_cell(name)} {value:.0f} s" for name, value in plan.seconds.items())
    rows = [
        ("weights", f"{plain_size(plan.source_bytes)}, {plain_size(plan.fetch_bytes)} to fetch"),
        ("artifact", f"{plain_size(totals.artifact_bytes)}: {1 - totals.ratio:.1%} smaller"),
        ("memory", plain_size(plan.memory_bytes)),
        *[("disk", _room(space)) for space in (plan.hub_cache, plan.builds) if space is not None],
        ("time of the processors", took),
        ("parts", str(parts)),
    ]
    outputs = {
        "commit": printable(commit),
        "parts": json.dumps(list(range(1, parts + 1))),
        "original-bytes": str(totals.original_bytes),
        "artifact-bytes": str(totals.artifact_bytes),
    }
    full = [
        Annotation("error", "nf4: too little room on the disk", f"{_room(space)}.")
        for space in (plan.hub_cache, plan.builds)
        if space is not None and not plan.fits
    ]
    return CiReport(f"{heading}\n\n{table(('', ''), rows)}\n", outputs, tuple(full))


def report_of_failure(log: str) -> CiReport:
    """Why a command ended without an artifact.

    Args:
        log: what it wrote on stderr; its last line "Error: …" counts.
    """
    lines = [line.removeprefix("Error: ") for line in log.splitlines() if line.startswith("Error:")]
    why = lines[-1].strip() if lines else "Nothing says why: see the log of the step that built it."
    annotation = Annotation("error", "nf4: no artifact", printable(why, _LONGEST_MESSAGE))
    markdown = f"## No artifact was made\n\n**Error:** {in_text(why[:_LONGEST_MESSAGE])}\n"
    return CiReport(markdown, {"verdict": "none"}, (annotation,))


def _room(space: Space) -> str:
    return f"{plain_size(space.needed)} needed, {plain_size(space.free)} free"


def _figures(manifest: Manifest, measured: MeasuredVerification | None) -> str:
    totals = manifest.totals
    before, after = plain_size(totals.original_bytes), plain_size(totals.artifact_bytes)
    bits = f"{totals.bits_per_weight:.3f} bits per weight"
    rows = [
        ("source", in_cell(_pinned(manifest))),
        ("size", f"{before} to {after}: {1 - totals.ratio:.1%} smaller, {bits}"),
    ]
    if measured is not None:
        fidelity, device = measured.fidelity, measured.device
        rows += [
            ("mean KL from the 16-bit model", interval(fidelity.mean_kl, ".4f")),
            ("same next token", interval(fidelity.top1_agreement, ".4f")),
            ("perplexity, 16 bit", interval(fidelity.perplexity_16bit, ".3f")),
            ("perplexity, 4 bit", interval(fidelity.perplexity_4bit, ".3f")),
        ]
        if measured.nearest is not None:
            ratio = interval(measured.nearest.difference.mean_kl_ratio, ".2f")
            rows.append(("mean KL over that of round to nearest", ratio))
        if measured.before_learning is not None:
            ratio = interval(measured.before_learning.difference.mean_kl_ratio, ".2f")
            rows.append(("mean KL over that before codes learned", ratio))
        rows.append(("measured on", in_cell(f"{device.name} in {device.dtype}")))
    return table(("", ""), rows)


def _pinned(manifest: Manifest) -> str:
    source = manifest.source
    return f"commit {source.commit}" if source.commit else f"content {source.content_sha256}"


def _checks_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    shown = table(head, rows[:_MOST_CHECKS])
    more = len(rows) - _MOST_CHECKS
    return f"{shown}\n\nand {more:,} more" if more > 0 else shown


def _where(
    measured: MeasuredVerification | None, pushed: PushFacts | None, report_url: str | None
) -> list[str]:
    """Links to the report, to the pictures, and to what the Hub holds."""
    lines = []
    if pushed is not None:
        done = "Proposed as a pull request" if pushed.pull_request else "Published"
        lines.append(
            f"{done}: [{in_text(pushed.repo_id)}]({_address(pushed.url)}), "
            f"{len(pushed.files)} files, {plain_size(pushed.total_bytes)}; the Hub lists the "
            "expected checksum of each."
        )
        if measured is not None:
            base = pushed.url.replace("/commit/", "/blob/")
            shown = [
                f"[{picture.title}]({_address(f'{base}/{picture.file}')})"
                for picture in drawable(measured).values()
                if picture.file
            ]
            lines.append("Pictures: " + ", ".join(shown))
    if report_url is not None:
        lines.append(f"[Report and pictures]({_address(report_url)}): open report.html in it.")
    return lines


def _address(url: str) -> str:
    """An address inside of a link: what could end it, or begin another scheme, is not let in."""
    plain = "".join(char for char in url if char.isascii() and char.isprintable())
    kept = plain.translate({ord(char): f"%{ord(char):02X}" for char in ' "<>()[]`|\\'})
    return kept if kept.startswith(("https://", "http://")) else "#"


def _outputs(
    manifest: Manifest, verification: Verification | None, folder: str, pushed: PushFacts | None
) -> dict[str, str]:
    totals = manifest.totals
    outputs = {
        "artifact": printable(folder),
        "verdict": "none" if verification is None else verification.verdict,
        "commit": manifest.source.commit or "",
        "original-bytes": str(totals.original_bytes),
        "artifact-bytes": str(totals.artifact_bytes),
        "bits-per-weight": f"{totals.bits_per_weight:.6g}",
    }
    if verification is not None:
        outputs["failed-checks"] = str(len(verification.failed_checks))
    if isinstance(verification, MeasuredVerification):
        fidelity = verification.fidelity
        for name, figure in (("kl", fidelity.mean_kl), ("agreement", fidelity.top1_agreement)):
            outputs[name] = f"{figure.value:.6g}" if is_finite(figure.value) else "nan"
    if pushed is not None:
        outputs |= {"hub-commit": pushed.commit, "hub-url": printable(pushed.url)}
    return outputs


def _failures(verification: Verification | None) -> list[Annotation]:
    if verification is None:
        return [Annotation("error", "nf4: not verified", "Run nf4 verify on it.")]
    return [
        Annotation(
            "error",
            f"nf4: {printable(check.name, 120)}",
            printable(f"{check.found} (expected: {check.expected})", _LONGEST_MESSAGE),
        )
        for check in verification.failed_checks[:_MOST_CHECKS]
    ]


def _warnings(manifest: Manifest, pushed: PushFacts | None) -> list[Annotation]:
    found = []
    if names := manifest.source.unchecked:
        text = f"The Hub listed no hash of {len(names)} files: {', '.join(names)}"
        found.append(("nf4: files that nobody could check", text))
    for part in left_out((tensor.reason, tensor.bytes) for tensor in manifest.dropped):
        text = f"{part.tensors} tensors, {plain_size(part.bytes)}: {part.reason}"
        found.append(("nf4: not in the artifact", text))
    if pushed is not None and pushed.allow_unverified:
        found.append(("nf4: published unverified", 'Its verdict is not "pass"; its card says so.'))
    return [
        Annotation("warning", title, printable(text, _LONGEST_MESSAGE)) for title, text in found
    ]
