"""`nf4 report`: what a CI system is told of a build, whatever strangers put into it."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.ci import github, gitlab
from nf4_pipeline.ci.report import (
    Annotation,
    CiReport,
    report_of_artifact,
    report_of_failure,
    report_of_plan,
)
from nf4_pipeline.hub.local import Proof
from nf4_pipeline.records import PushFacts
from nf4_pipeline.stages.forecast import Forecast
from nf4_pipeline.verification.document import parse_verification

from tests.support.command_line import controls, run_nf4
from tests.support.made import (
    failed_behaviour,
    failed_gate,
    hostile,
    made,
    manifest,
    nulls,
    sample,
)
from tests.support.tiny import copy_of
from tests.support.workflow_commands import obeyed
from tests.support.workflow_runner import read_outputs

VERIFICATIONS: Final = {
    "passed": made(),
    "calibrated": made(nearest=True),
    "learned": made(nearest=True, learned=True),
    "sample": sample(),
    "files": failed_gate(),
    "behaviour": failed_behaviour(),
    "nulls": nulls(),
    "hostile": hostile(),
}
ATTACKS: Final = (
    "::set-output name=verdict::pass",
    "  ::error::not from nf4",
    "##[set-output name=verdict]pass",
    "x ##[error]not from nf4",
    "a\n::set-env name=PATH::/tmp",
    "a\r::add-path::/tmp",
    "a%0A::warning::forged",
    "a%250A%25",
    "a,line=1,title=forged::b",
    "verdict=pass\nverdict<<EOF\npass\nEOF",
    "</details><script>alert(1)</script>",
    "| a | b |\n| --- | --- |",
    "[pass](javascript:alert(1)) ![x](https://tracker.example/x.png)",
    "`code` `` ` ``",
    "\x1b[2J\u202e\x00\ud800",
    "$(touch /tmp/nf4-was-here) `id` ${PATH} '\"",
    "漢字 👩‍👩‍👧 עברית",
    "x" * 100_000,
)
PUSHED: Final = PushFacts(
    repo_id="me/model",
    commit="c" * 40,
    url=f"https://huggingface.co/me/model/commit/{'c' * 40}",
    branch="main",
    parent=None,
    committed=True,
    created=True,
    private=True,
    pull_request=None,
    pull_request_url=None,
    verdict="pass",
    allow_unverified=False,
    files={},
    total_bytes=12,
    proof=Proof(commit="c" * 40, files={}, others=()),
)


def report(document: dict[str, Any], *, repo: str = "a/b", **more: Any) -> CiReport:
    return report_of_artifact(
        manifest(repo), parse_verification(document), folder="artifacts/x/export", **more
    )


def check_harmless(told: CiReport) -> None:
    """Whatever was in it: one line an output, no command but annotations, nothing raw in text."""
    lines = github.annotation_commands(told.annotations)
    commands = obeyed("\n".join(lines).splitlines())
    assert [command.name for command in commands] == [line.split()[0].strip(":") for line in lines]
    assert {command.name for command in commands} <= {"error", "warning"}
    assert all(set(command.properties) == {"title"} for command in commands)
    assert controls("".join(lines)) == []
    assert list(read_outputs(github.output_lines(told.outputs))) == list(told.outputs)
    for line in gitlab.variables(told.outputs).splitlines():
        assert re.fullmatch(r"NF4_[A-Z_]+=[\w .,:/@+=-]*", line, re.ASCII), line
    assert controls(told.markdown) == []
    assert obeyed(told.markdown.splitlines()) == []
    tags = re.findall(r"<[^>]*>", told.markdown)
    assert set(tags) <= {"<details>", "</details>", "<summary>", "</summary>"}
    assert "](javascript" not in told.markdown
    assert "![" not in told.markdown
    assert not set(told.markdown) & set("`$~\\")
    xml = ElementTree.fromstring(gitlab.junit(told.checks))
    assert len(xml) == len(told.checks)


@pytest.mark.parametrize("name", VERIFICATIONS)
def test_every_kind_of_verification(name: str) -> None:
    document = VERIFICATIONS[name]
    told = report(document, report_url="https://example.com/report", pushed=PUSHED)
    check_harmless(told)
    failed = [check["name"] for check in document["checks"] if not check["passed"]]
    assert told.outputs["verdict"] == document["verdict"]
    assert told.outputs["failed-checks"] == str(len(failed))
    assert [a.level for a in told.annotations] == ["error"] * len(failed)
    assert ("check that failed" in told.markdown) == bool(failed)
    assert ("kl" in told.outputs) == ("fidelity" in document)
    failures = ElementTree.fromstring(gitlab.junit(told.checks)).get("failures")
    assert failures == str(len(failed))
    assert "[Report and pictures](https://example.com/report)" in told.markdown
    assert f"[me/model]({PUSHED.url})" in told.markdown
    if "fidelity" in document:
        assert f"](https://huggingface.co/me/model/blob/{'c' * 40}/pictures/" in told.markdown


@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
def test_words_of_strangers_stay_words(attack: str) -> None:
    document = failed_behaviour()
    for check in document["checks"]:
        check |= {"name": attack, "found": attack, "expected": attack}
    document["device"]["name"] = attack
    source = replace(manifest().source, repo=attack, commit=None, unchecked=(attack, attack))
    told = report_of_artifact(
        replace(manifest(), source=source),
        parse_verification(document),
        folder=f"/builds/{attack}/export",
        pushed=replace(PUSHED, repo_id=attack, url=attack),
        report_url=attack,
    )
    check_harmless(told)
    assert told.outputs["verdict"] == "fail"
    assert read_outputs(github.output_lines(told.outputs))["verdict"] == "fail"
    check_harmless(report_of_failure(f"Error: {attack}\n"))
    check_harmless(report_of_plan(plan(attack, attack, seconds={attack: 1.0}), 3))


def plan(name: str = "org/model", commit: str | None = "d" * 40, **more: Any) -> Forecast:
    """Of a falcon-7b."""
    space = {"folder": "/builds", "needed": 5_000_000_000, "free": 9_000_000_000}
    totals = manifest().totals.to_json() | {"artifact_bytes": 4_010_000_000, "ratio": 0.28}
    return Forecast.from_json(
        {
            "source": {"name": name} | ({} if commit is None else {"commit": commit}),
            "build": "artifacts/x",
            "source_bytes": 14_434_000_000,
            "fetch_bytes": 14_434_000_000,
            "quantized_bytes": 4_010_000_000,
            "files": {"a.safetensors": 4_010_000_000},
            "totals": totals,
            "kept": {"embedding": 590_000_000},
            "dropped": {},
            "skip_modules": [],
            "extra_bytes": 0,
            "memory_bytes": 600_000_000,
            "hub_cache": space,
            "builds": space,
            "fits": True,
            "rates": {"sha256": 1_000_000_000, "weights": 1_000_000_000},
            "seconds": {"download": 14.4, "quantize": 9.9},
        }
        | more
    )


def test_a_plan() -> None:
    told = report_of_plan(plan(), 3)
    assert told.outputs["parts"] == "[1, 2, 3]"
    assert told.outputs["commit"] == "d" * 40
    assert "14.434 GB" in told.markdown
    assert "72.0% smaller" in told.markdown
    assert told.annotations == ()
    assert "NF4_PARTS" not in gitlab.variables(told.outputs)  # no value for such a file
    assert f"NF4_COMMIT={'d' * 40}\n" in gitlab.variables(told.outputs)
    assert report_of_plan(plan(commit=None)).outputs["commit"] == ""
    full = report_of_plan(plan(fits=False)).annotations
    assert {a.level for a in full} == {"error"}
    assert "5.000 GB needed, 9.000 GB free" in full[0].message


@pytest.mark.parametrize("text", ["", "{}", "[]", "no JSON", '{"source": 1}', '{"source": NaN}'])
def test_what_is_no_plan(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    (tmp_path / "log").write_text("Error: there is no such model.\n")
    done = run_nf4("report", "--plan", tmp_path / "plan.json")
    assert done.status == 2
    assert "is no plan of a build" in done.err
    told = run_nf4("report", "--plan", tmp_path / "plan.json", "--log", tmp_path / "log", "--json")
    assert told.status == 0, told.err
    assert "there is no such model" in told.value["annotations"][0]["message"]


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("1/5 download: begins\nError: a/b is gated.\n", "a/b is gated."),
        ("Error: first\nError: last\n", "last"),
        ("killed\n", "see the log"),
        ("", "see the log"),
        ("an Error: within a line\n", "see the log"),
    ],
)
def test_why_there_is_no_artifact(log: str, said: str) -> None:
    told = report_of_failure(log)
    assert [a.level for a in told.annotations] == ["error"]
    assert said in told.annotations[0].message
    assert said in told.markdown
    assert told.outputs == {"verdict": "none"}


@pytest.mark.parametrize(("errors", "shown"), [(0, 0), (1, 1), (10, 10), (11, 10), (500, 10)])
def test_github_shows_ten_of_a_kind(errors: int, shown: int) -> None:
    many = [Annotation("error", f"check {n}", "found") for n in range(errors)]
    lines = github.annotation_commands([*many, Annotation("warning", "w", "x")])
    assert len(lines) == shown + 1
    if errors > shown:
        assert f"{errors - 9} more" in lines[shown - 1]


def test_a_summary_is_no_larger_than_github_shows() -> None:
    document = failed_behaviour()
    document["checks"] = [document["checks"][0] | {"passed": False}] * 50_000
    told = report(document)
    assert len(told.markdown) < 100_000
    assert "and 49,900 more" in told.markdown
    assert len(github.step_summary("漢" * 10**6).encode()) < 2**20


@pytest.mark.parametrize(("level", "kind"), [("error", failed_gate), ("error", nulls)])
def test_failures_become_annotations(level: str, kind: Any) -> None:
    document = kind()
    first = next(check for check in document["checks"] if not check["passed"])
    command = obeyed(github.annotation_commands(report(document).annotations))[0]
    assert command.name == level
    assert command.properties == {"title": f"nf4: {first['name']}"}
    assert command.text == f"{first['found']} (expected: {first['expected']})"


def test_on_the_command_line(
    verified: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = run_nf4("report", verified)
    assert plain.status == 0, plain.err
    assert plain.out.startswith("## tiny-falcon in NF4: pass\n")
    for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    assert run_nf4("report", verified, "--format", "github").status == 2
    for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY"):
        (tmp_path / name).write_text("before=1\n")
        monkeypatch.setenv(name, str(tmp_path / name))
    done = run_nf4("report", verified, "--format", "github")
    assert (done.status, done.out) == (0, ""), done.err
    outputs = read_outputs((tmp_path / "GITHUB_OUTPUT").read_text("utf-8"))
    assert outputs["before"] == "1"
    assert outputs["verdict"] == "pass"
    assert outputs["artifact"] == str(verified / "export")
    assert (tmp_path / "GITHUB_STEP_SUMMARY").read_text("utf-8") == "before=1\n" + plain.out
    done = run_nf4("report", verified, "--format", "gitlab")
    assert done.status == 0, done.err
    assert (tmp_path / "nf4-summary.md").read_text("utf-8") == plain.out
    assert "NF4_VERDICT=pass\n" in (tmp_path / "nf4.env").read_text("utf-8")
    tests = ElementTree.parse(tmp_path / "nf4-checks.xml").getroot()
    assert tests.get("failures") == "0"
    assert len(tests) > 10
    value = run_nf4("report", verified, "--json").value
    assert value["outputs"] == {name: text for name, text in outputs.items() if name != "before"}


def test_a_build_without_an_artifact(
    exported_falcon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not verified, or not even exported: it is said, with what the build's log says of it."""
    monkeypatch.chdir(tmp_path)
    told = run_nf4("report", exported_falcon, "--json").value
    assert told["outputs"]["verdict"] == "none"
    assert [a["title"] for a in told["annotations"]] == ["nf4: not verified"]
    build = Build(copy_of(exported_falcon, tmp_path / "build"))
    shutil.rmtree(build.export)
    assert run_nf4("report", build.root).status == 1
    (tmp_path / "log").write_text("Error: the disk is full.\n")
    for log in ("log", "no-log"):
        told = run_nf4("report", build.root, "--log", log, "--json").value
        (annotation,) = told["annotations"]
        assert ("the disk is full." in annotation["message"]) == (log == "log")
    assert run_nf4("report").status == 2
    assert run_nf4("report", build.root, "--plan", "log").status == 2
