"""What a machine has, and the traps that are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nf4_pipeline import doctor

from tests.support.tiny import nf4


def texts(found: dict[str, object]) -> str:
    findings = found["findings"]
    assert isinstance(findings, list)
    return "\n".join(finding["text"] for finding in findings)


def test_from_outside(tmp_path: Path) -> None:
    done = nf4("doctor", cwd=tmp_path)
    assert done.status == 0, done.err
    assert "transformers" in done.out
    value = nf4("doctor", "--json", cwd=tmp_path).value
    assert value["gpus"] == []
    assert value["hub"]["offline"] is True
    assert value["processors"] >= 1
    assert all(value["libraries"].values())
    assert "no GPU" in texts(value)
    assert "subclass of nn.Linear" in texts(value)


def test_a_token_is_seen_but_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert doctor.examine(tmp_path)["hub"]["token"] is False
    (tmp_path / "token").write_text("hf_secret")
    found = doctor.examine(tmp_path)
    assert found["hub"]["token"] is True
    assert "hf_secret" not in json.dumps(found)


def test_what_is_missing_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "numba" else "5.4.0")
    monkeypatch.setattr(doctor, "_gpus", list)
    found = doctor.examine(tmp_path / "not there yet")
    assert {"kind": "problem", "text": "not installed: numba. Install this package again."} in (
        found["findings"]
    )
    assert "subclass of nn.Linear" not in texts(found)


def test_old_gpus_and_full_disks_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t4 = {"name": "Tesla T4", "memory_bytes": 16 * 10**9, "capability": [7, 5]}
    monkeypatch.setattr(doctor, "_gpus", lambda: [t4])
    monkeypatch.setattr(doctor, "_disk", lambda folder: {"folder": "/small", "free_bytes": 10**9})
    said = texts(doctor.examine(tmp_path))
    assert "Tesla T4 has no bfloat16 arithmetic" in said
    assert "/small (builds) has 1.0 GB free" in said
    assert "no GPU" not in said
