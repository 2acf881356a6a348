"""What a person sees at the end of `nf4 build`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from nf4_pipeline.build_folder import Build, Record
from nf4_pipeline.cli.terminal import program, say, say_brief
from nf4_pipeline.fidelity.metrics import Fidelity
from nf4_pipeline.fidelity.verdict import Check
from nf4_pipeline.job import StageResult
from nf4_pipeline.records import SERIALIZE, PushFacts, SerializeFacts
from nf4_pipeline.report.formatting import both_units, interval, is_finite, plain_size
from nf4_pipeline.verification.document import (
    Against,
    AnswerPair,
    MeasuredBaseline,
    MeasuredVerification,
    Verification,
)

_SHOWN_ANSWERS: Final = 3
_LINES: Final = 12
"""Of a summary, at most."""

_OTHERS: Final = 7
"""Lines of a summary of a failure beside fidelity, checks that failed, and what is left out."""


@dataclass(frozen=True)
class Summary:
    """The result of a build.

    Attributes:
        build: the build folder.
        results: of its stages, by name.
        serialized: the record of serialize.
        verification: what verify says.
    """

    build: Build
    results: Mapping[str, StageResult]
    serialized: Record[SerializeFacts]
    verification: Verification

    @classmethod
    def of(cls, build: Build, results: Mapping[str, StageResult]) -> Summary:
        return cls(build, results, results["serialize"].record, results["verify"].record.facts)

    @property
    def notes(self) -> list[str]:
        """What a person should know of the source."""
        notes: list[str] = self.results["download"].record.facts.notes
        return notes

    @property
    def pushed(self) -> PushFacts | None:
        """What the Hub holds, if the build was published."""
        return self.results["push"].record.facts if "push" in self.results else None

    def to_json(self) -> dict[str, Any]:
        """What `nf4 build --json` says."""
        verification = self.verification.to_json()
        answers = verification.pop("answers", [])
        return {
            "build": str(self.build.root),
            "artifact": str(self.build.export),
            "verdict": self.verification.verdict,
            "totals": self.serialized.facts.totals.to_json(),
            "disk_bytes": self.serialized.total_bytes,
            "stages": {
                name: {
                    "ran": result.ran,
                    "seconds": round(result.record.seconds, 2),
                    "peak_memory_bytes": result.record.peak_memory,
                }
                for name, result in self.results.items()
            },
            "hidden_modules": len(self.serialized.facts.hidden_modules),
            "left_out": [part.to_json() for part in self.serialized.facts.left_out],
            "notes": self.notes,
            "verification": verification,
            "answers": answers,
            **({} if self.pushed is None else {"pushed": self.pushed.to_json()}),
        }


def show_summary(summary: Summary, *, verbose: bool = False) -> None:
    """Prints it for people: in at most twelve lines, unless all is asked for."""
    say()
    if verbose:
        _show_all(summary)
        return
    totals, verification = summary.serialized.facts.totals, summary.verification
    before, after = plain_size(totals.original_bytes), plain_size(totals.artifact_bytes)
    say_brief(f"  size        {before} to {after}: {1 - totals.ratio:.1%} smaller")
    if left_out := summary.serialized.facts.left_out:
        tensors, nbytes = sum(p.tensors for p in left_out), sum(p.bytes for p in left_out)
        say_brief(f"  left out    {tensors} tensors, {plain_size(nbytes)} (-v says why)")
    ran = [result.record for result in summary.results.values() if result.ran]
    peak = max((record.peak_memory for record in ran), default=0)
    took = f"{sum(record.seconds for record in ran):.1f} s" if ran else "nothing had to be done"
    say_brief(f"  time        {took}" + (f", at most {plain_size(peak)} of memory" if ran else ""))
    _show_brief(verification, _LINES - _OTHERS - bool(left_out))
    _show_place(summary.build)
    if verification.verdict != "pass":
        say(f"  next        see {summary.build.export / 'report.html'}")
        return
    if summary.serialized.facts.hidden_modules:
        say_brief("  loading     nf4_pipeline.load(…), or see its README.md")
    _show_next(summary)


def _show_place(build: Build) -> None:
    if build.shown == str(build.root):
        say(f"  artifact    {build.export}")
    else:
        say(f"  artifact    {build.shown}/export")


def _show_next(summary: Summary) -> None:
    root, nf4 = shlex.quote(summary.build.shown), program()
    pushed = summary.pushed
    elsewhere = pushed is not None and summary.build.only_sent(SERIALIZE)
    say(f'  next        {nf4} prompt {pushed.repo_id if pushed and elsewhere else root} "…"')
    if pushed is None:
        say(f"              {nf4} push {root} --dry-run --repo-id ORG/NAME")
    else:
        say(f"  on the Hub  {pushed.url}")


def _show_all(summary: Summary) -> None:
    totals, verification = summary.serialized.facts.totals, summary.verification
    say(f"  original    {both_units(totals.original_bytes)}")
    say(
        f"  NF4         {both_units(totals.artifact_bytes)}: {1 - totals.ratio:.1%} smaller, "
        f"{1 / totals.ratio:.2f} x"
    )
    say(
        f"  bits        {totals.bits_per_weight:.3f} per weight; "
        f"{totals.bits_per_quantized_weight:.3f} per quantized weight "
        f"({totals.tensors.quantized} layers)"
    )
    kept = ", ".join(
        f"{reason} {plain_size(nbytes)}" for reason, nbytes in totals.kept_bytes_by_reason.items()
    )
    say(f"  in 16 bit   {kept or 'nothing'}")
    for part in summary.serialized.facts.left_out:
        sized = f"{part.tensors} tensors, {plain_size(part.bytes)}"
        say(f"  left out    {sized}: {part.reason}")
    for note in summary.notes:
        say(f"  note        {note.removeprefix('Warning: ')}")
    say()
    say("  stage         time   peak memory")
    for name, result in summary.results.items():
        took = f"{round(result.record.seconds, 2):6.1f} s" if result.ran else "  (done)"
        say(f"  {name:<10} {took}   {plain_size(result.record.peak_memory):>9}")
    if isinstance(verification, MeasuredVerification):
        _show_answers(verification.answers)
    show_checks(verification)
    _show_place(summary.build)
    if summary.serialized.facts.hidden_modules:
        say(
            "  loading     nf4_pipeline.load(…); stock transformers >= 5.5 needs the line that "
            "README.md there gives"
        )
    _show_next(summary)


def _show_answers(answers: Sequence[AnswerPair]) -> None:
    if not answers:
        return
    say()
    for answer in answers[:_SHOWN_ANSWERS]:
        say(f"  prompt      {_line(answer.prompt)}")
        say(f"    16 bit    {_line(answer.answer_16bit)}")
        say(f"    NF4       {_line(answer.answer_4bit)}")
    same = sum(answer.same for answer in answers)
    say(f"  {same} of {len(answers)} answers are the same to the letter")


def show_checks(verification: Verification) -> None:
    """Prints every check, with what it expects, and the verdict."""
    say()
    for check in verification.checks:
        _show_check(check)
    if isinstance(verification, MeasuredVerification):
        _show_beside(verification.fidelity, verification.nearest, "round to nearest")
        _show_beside(verification.fidelity, verification.before_learning, "before learning")
    _show_other(verification)
    _show_verdict(verification)


def show_verdict(verification: Verification) -> None:
    """Prints the verdict, the checks that failed, and what was compared because it was asked."""
    _show_other(verification)
    _show_brief(verification, len(verification.checks))


def _show_brief(verification: Verification, room: int) -> None:
    """How far it is from the 16-bit model, the checks that failed, and the verdict.

    Args:
        verification: what was found.
        room: lines for fidelity and for checks that failed.
    """
    if isinstance(verification, MeasuredVerification):
        own, beside = verification.fidelity, verification.nearest
        kl, same = own.mean_kl.value, own.top1_agreement.value
        kl_said = f"{kl:.4f}" if is_finite(kl) else "not finite"
        same_said = f"; {same:.1%} same next token" if is_finite(same) else ""
        say_brief(f"  fidelity    mean KL {kl_said}{same_said}")
        room -= 1
        if beside is not None:
            ratio = interval(beside.difference.mean_kl_ratio, ".2f")
            say_brief(f"              {ratio} of round to nearest's KL")
            room -= 1
    checks, failed = verification.checks, verification.failed_checks
    shown = failed[:room]
    mark = None if failed else ("ok", "green")
    more = "; -v shows all that failed" if len(shown) < len(failed) else ""
    good = len(checks) - len(failed)
    say_brief(f"  checks      {good} of {len(checks)} ok{more}", highlight=mark)
    for check in shown:
        _show_check(check, brief=True)
    _show_verdict(verification, brief=True)


def _show_check(check: Check, *, brief: bool = False) -> None:
    mark, colour = ("ok", "green") if check.passed else ("FAIL", "red")
    text = f"  {mark:<4}  {check.name}: {check.found} (expected: {check.expected})"
    (say_brief if brief else say)(text, highlight=(mark, colour))


def _show_verdict(verification: Verification, *, brief: bool = False) -> None:
    verdict, on = verification.verdict, ""
    if isinstance(verification, MeasuredVerification):
        measured = "on" if brief else "measured on"
        on = f", {measured} {verification.device.name} in {verification.device.dtype}"
    colour = "green" if verdict == "pass" else "red"
    text = f"  verdict     {verdict}{on}"
    (say_brief if brief else say)(text, highlight=(verdict, colour))


def _show_other(verification: Verification) -> None:
    """What the artifact was compared with because somebody asked."""
    if isinstance(verification, MeasuredVerification) and verification.against is not None:
        _show_beside(verification.fidelity, verification.against, "the other")
        if verification.against.not_checked is not None:
            say(f"  not checked of the other: {verification.against.not_checked}")


def _show_beside(own: Fidelity, other: MeasuredBaseline | Against | None, name: str) -> None:
    """What the artifact was compared with, if it was."""
    if other is None:
        return
    say()
    say(f"  {'':<22}  {'this artifact':<28}  {name}")
    for title, one, two in (
        ("mean KL", own.mean_kl, other.fidelity.mean_kl),
        ("99th percentile of KL", own.p99_kl, other.fidelity.p99_kl),
        ("same next token", own.top1_agreement, other.fidelity.top1_agreement),
        ("where 16 bit is sure", own.sure_agreement, other.fidelity.sure_agreement),
        ("perplexity", own.perplexity_4bit, other.fidelity.perplexity_4bit),
    ):
        say(f"  {title:<22}  {interval(one, '.4f'):<28}  {interval(two, '.4f')}")
    ratio = interval(other.difference.mean_kl_ratio, ".4f")
    say(f"  mean KL of this one over {name}: {ratio}")
    say()


def _line(text: str, width: int = 88) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
