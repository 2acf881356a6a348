"""What a machine has, and the traps that are named."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from nf4_pipeline.doctor import Disk, Finding, Gpu, MachineReport, examine, find_traps

from tests.support.tiny import nf4


def texts(findings: Iterable[Finding]) -> str:
    return "\n".join(finding.text for finding in findings)


@pytest.fixture(scope="module")
def machine() -> MachineReport:
    """This machine, as one without a GPU and with room on its disks."""
    room = Disk("/large", 10**12)
    return replace(examine(Path("artifacts")), gpus=(), disks={"builds": room, "hub_cache": room})


def test_from_outside(tmp_path: Path) -> None:
    done = nf4("doctor", cwd=tmp_path)
    assert done.status == 0, done.err
    assert "transformers" in done.out
    value = nf4("doctor", "--json", cwd=tmp_path).value
    assert value["gpus"] == []
    assert value["hub"]["offline"] is True
    assert value["processors"] >= 1
    assert all(value["libraries"].values())
    said = texts(MachineReport.from_json(value).findings)
    assert "no GPU" in said
    assert "subclass of nn.Linear" in said


def test_a_token_is_seen_but_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert examine(tmp_path).hub.token is False
    (tmp_path / "token").write_text("hf_secret")
    report = examine(tmp_path)
    assert report.hub.token is True
    assert "hf_secret" not in json.dumps(report.to_json())


def test_a_folder_that_is_not_there_yet_is_where_its_parent_is(tmp_path: Path) -> None:
    disks = examine(tmp_path / "not there" / "yet").disks
    assert disks["builds"].folder == str(tmp_path / "not there" / "yet")
    assert disks["builds"].free_bytes > 0


def test_what_is_missing_is_a_problem(machine: MachineReport) -> None:
    libraries = {name: "5.4.0" for name in machine.libraries} | {"numba": None}
    findings = list(find_traps(replace(machine, libraries=libraries)))
    assert Finding("problem", "not installed: numba. Install this package again.") in findings
    assert "subclass of nn.Linear" not in texts(findings)


def test_old_gpus_and_full_disks_are_noted(machine: MachineReport) -> None:
    small = {"builds": Disk("/small", 10**9)}
    t4 = Gpu("Tesla T4", 16 * 10**9, (7, 5))
    said = texts(find_traps(replace(machine, gpus=(t4,), disks=small)))
    assert "Tesla T4 has no bfloat16 arithmetic" in said
    assert "/small (builds) has 1.0 GB free" in said
    assert "no GPU" not in said
