"""What a person sees at the end of `nf4 build`."""

from __future__ import annotations

import shlex
from typing import Any, Final

import click

from nf4_pipeline.build_folder import Build
from nf4_pipeline.job import StageResult
from nf4_pipeline.stages.download import download_notes

_SHOWN_ANSWERS: Final = 3
_COMPARED: Final = {
    "mean_kl": "mean KL",
    "p99_kl": "99th percentile of KL",
    "top1_agreement": "same next token",
    "sure_agreement": "where 16 bit is sure",
    "perplexity_4bit": "perplexity",
}


def summary(build: Build, results: dict[str, StageResult]) -> dict[str, Any]:
    """The result of a build as plain JSON."""
    totals = results["serialize"].record.facts["totals"]
    found = results["verify"].record.facts
    return {
        "build": str(build.root),
        "artifact": str(build.export),
        "verdict": found["verdict"],
        "totals": totals,
        "disk_bytes": sum(d.size for d in results["serialize"].record.outputs.values()),
        "stages": {
            name: {
                "ran": result.ran,
                "seconds": round(result.record.seconds, 2),
                "peak_memory_bytes": result.record.peak_memory,
            }
            for name, result in results.items()
        },
        "hidden_modules": len(results["serialize"].record.facts["hidden_modules"]),
        "left_out": results["serialize"].record.facts.get("left_out", []),
        "notes": download_notes(results["download"].record),
        "verification": {key: value for key, value in found.items() if key != "answers"},
        "answers": found.get("answers", []),
    }


def show_summary(value: dict[str, Any]) -> None:
    """Prints it for people."""
    totals = value["totals"]
    click.echo()
    click.echo(f"  original    {size(totals['original_bytes'])}")
    click.echo(
        f"  NF4         {size(totals['artifact_bytes'])}: {1 - totals['ratio']:.1%} smaller, "
        f"{1 / totals['ratio']:.2f} x"
    )
    click.echo(
        f"  bits        {totals['bits_per_weight']:.3f} per weight; "
        f"{totals['bits_per_quantized_weight']:.3f} per quantized weight "
        f"({totals['tensors']['quantized']} layers)"
    )
    kept = ", ".join(
        f"{reason} {size(nbytes, short=True)}"
        for reason, nbytes in totals["kept_bytes_by_reason"].items()
    )
    click.echo(f"  in 16 bit   {kept or 'nothing'}")
    for part in value["left_out"]:
        sized = f"{part['tensors']} tensors, {size(part['bytes'], short=True)}"
        click.echo(f"  left out    {sized}: {part['reason']}")
    for note in value["notes"]:
        click.echo(f"  note        {note.removeprefix('Warning: ')}")
    click.echo()
    click.echo("  stage         time   peak memory")
    for name, stage in value["stages"].items():
        took = f"{stage['seconds']:6.1f} s" if stage["ran"] else "  (done)"
        click.echo(f"  {name:<10} {took}   {size(stage['peak_memory_bytes'], short=True):>9}")
    _show_answers(value["answers"])
    show_checks(value["verification"])
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


def show_checks(verification: dict[str, Any]) -> None:
    """Prints the checks and the verdict."""
    click.echo()
    for check in verification["checks"]:
        mark = "ok  " if check["passed"] else "FAIL"
        click.echo(f"  {mark}  {check['name']}: {check['found']} (expected: {check['expected']})")
    device = verification.get("device")
    on = f", measured on {device['name']} in {device['dtype']}" if device else ""
    colour = "green" if verification["verdict"] == "pass" else "red"
    _show_beside(verification, "nearest", "round to nearest")
    _show_beside(verification, "against", "the other")
    click.echo("  verdict     " + click.style(verification["verdict"], fg=colour, bold=True) + on)


def _show_beside(verification: dict[str, Any], part: str, name: str) -> None:
    """What the artifact was compared with, if it was."""
    other = verification.get(part)
    if not other:
        return
    click.echo()
    click.echo(f"  {'':<22}  {'this artifact':<28}  {name}")
    for key, title in _COMPARED.items():
        own, theirs = verification["fidelity"][key], other["fidelity"][key]
        click.echo(f"  {title:<22}  {_interval(own):<28}  {_interval(theirs)}")
    ratio = _interval(other["difference"]["mean_kl_ratio"])
    click.echo(f"  mean KL of this one over {name}: {ratio}")
    click.echo()


def _interval(found: dict[str, float | None]) -> str:
    value, low, high = (found[name] for name in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return "not finite"
    return f"{value:.4f} [{low:.4f}, {high:.4f}]"


def size(count: int, *, short: bool = False) -> str:
    """Bytes for people, in both kinds of unit unless `short`."""
    large = count >= 10**9
    decimal = f"{count / 1e9:.3f} GB" if large else f"{count / 1e6:.2f} MB"
    binary = f"{count / 2**30:.3f} GiB" if large else f"{count / 2**20:.2f} MiB"
    return decimal if short else f"{decimal} = {binary}"


def _line(text: str, width: int = 88) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
