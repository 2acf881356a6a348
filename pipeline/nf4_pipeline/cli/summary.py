"""What a person sees at the end of `nf4 build`."""

from __future__ import annotations

import shlex
from typing import Any, Final

import click

from nf4_pipeline.build_folder import Build
from nf4_pipeline.fidelity.metrics import Fidelity
from nf4_pipeline.job import StageResult
from nf4_pipeline.report.formatting import both_units, interval, plain_size
from nf4_pipeline.verification.document import (
    Against,
    MeasuredVerification,
    NearestBaseline,
    Verification,
    parse_verification,
)

_SHOWN_ANSWERS: Final = 3


def summary(build: Build, results: dict[str, StageResult]) -> dict[str, Any]:
    """The result of a build as plain JSON."""
    serialized = results["serialize"].record
    verification = results["verify"].record.facts.to_json()
    return {
        "build": str(build.root),
        "artifact": str(build.export),
        "verdict": verification["verdict"],
        "totals": serialized.facts.totals.to_json(),
        "disk_bytes": serialized.total_bytes,
        "stages": {
            name: {
                "ran": result.ran,
                "seconds": round(result.record.seconds, 2),
                "peak_memory_bytes": result.record.peak_memory,
            }
            for name, result in results.items()
        },
        "hidden_modules": len(serialized.facts.hidden_modules),
        "left_out": [part.to_json() for part in serialized.facts.left_out],
        "notes": results["download"].record.facts.notes,
        "verification": {key: value for key, value in verification.items() if key != "answers"},
        "answers": verification.get("answers", []),
    }


def show_summary(value: dict[str, Any]) -> None:
    """Prints it for people."""
    totals = value["totals"]
    click.echo()
    click.echo(f"  original    {both_units(totals['original_bytes'])}")
    click.echo(
        f"  NF4         {both_units(totals['artifact_bytes'])}: {1 - totals['ratio']:.1%} smaller, "
        f"{1 / totals['ratio']:.2f} x"
    )
    click.echo(
        f"  bits        {totals['bits_per_weight']:.3f} per weight; "
        f"{totals['bits_per_quantized_weight']:.3f} per quantized weight "
        f"({totals['tensors']['quantized']} layers)"
    )
    kept = ", ".join(
        f"{reason} {plain_size(nbytes)}"
        for reason, nbytes in totals["kept_bytes_by_reason"].items()
    )
    click.echo(f"  in 16 bit   {kept or 'nothing'}")
    for part in value["left_out"]:
        sized = f"{part['tensors']} tensors, {plain_size(part['bytes'])}"
        click.echo(f"  left out    {sized}: {part['reason']}")
    for note in value["notes"]:
        click.echo(f"  note        {note.removeprefix('Warning: ')}")
    click.echo()
    click.echo("  stage         time   peak memory")
    for name, stage in value["stages"].items():
        took = f"{stage['seconds']:6.1f} s" if stage["ran"] else "  (done)"
        click.echo(f"  {name:<10} {took}   {plain_size(stage['peak_memory_bytes']):>9}")
    _show_answers(value["answers"])
    show_checks(parse_verification({**value["verification"], "answers": value["answers"]}))
    click.echo(f"  artifact    {value['artifact']}")
    if value["hidden_modules"]:
        click.echo(
            "  loading     nf4_pipeline.load(…); stock transformers >= 5.5 needs the line that "
            "README.md there gives"
        )
    build = shlex.quote(value["build"])
    click.echo(f'  next        nf4 prompt {build} "…"')
    click.echo(f"              nf4 push --dry-run --repo-id ORG/NAME --build-dir {build}")


def _show_answers(answers: list[dict[str, Any]]) -> None:
    if not answers:
        return
    click.echo()
    for answer in answers[:_SHOWN_ANSWERS]:
        click.echo(f"  prompt      {_line(answer['prompt'])}")
        click.echo(f"    16 bit    {_line(answer['answer_16bit'])}")
        click.echo(f"    NF4       {_line(answer['answer_4bit'])}")
    same = sum(answer["same"] for answer in answers)
    click.echo(f"  {same} of {len(answers)} answers are the same to the letter")


def show_checks(verification: Verification) -> None:
    """Prints the checks and the verdict."""
    click.echo()
    for check in verification.checks:
        mark = "ok  " if check.passed else "FAIL"
        click.echo(f"  {mark}  {check.name}: {check.found} (expected: {check.expected})")
    on = ""
    if isinstance(verification, MeasuredVerification):
        on = f", measured on {verification.device.name} in {verification.device.dtype}"
        _show_beside(verification.fidelity, verification.nearest, "round to nearest")
        _show_beside(verification.fidelity, verification.against, "the other")
    colour = "green" if verification.verdict == "pass" else "red"
    click.echo("  verdict     " + click.style(verification.verdict, fg=colour, bold=True) + on)


def _show_beside(own: Fidelity, other: NearestBaseline | Against | None, name: str) -> None:
    """What the artifact was compared with, if it was."""
    if other is None:
        return
    click.echo()
    click.echo(f"  {'':<22}  {'this artifact':<28}  {name}")
    for title, one, two in (
        ("mean KL", own.mean_kl, other.fidelity.mean_kl),
        ("99th percentile of KL", own.p99_kl, other.fidelity.p99_kl),
        ("same next token", own.top1_agreement, other.fidelity.top1_agreement),
        ("where 16 bit is sure", own.sure_agreement, other.fidelity.sure_agreement),
        ("perplexity", own.perplexity_4bit, other.fidelity.perplexity_4bit),
    ):
        click.echo(f"  {title:<22}  {interval(one, '.4f'):<28}  {interval(two, '.4f')}")
    ratio = interval(other.difference.mean_kl_ratio, ".4f")
    click.echo(f"  mean KL of this one over {name}: {ratio}")
    click.echo()


def _line(text: str, width: int = 88) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
