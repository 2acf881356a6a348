"""What docs/cluster.md gives to Slurm and Kubernetes, started as they would start it.

`nf4` only notes what it is called with here; the real one is called by `scripts/campaigns/docs.py`.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.doc_blocks import DOCS, blocks_of

COUNT = 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All files of the page, and an `nf4` that writes down its arguments."""
    for block in blocks_of(DOCS / "cluster.md"):
        if block.mark == "file":
            (tmp_path / block.why).write_text(block.text)
    program = tmp_path / "bin" / "nf4"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n')
    program.chmod(0o755)
    return tmp_path


def called(folder: Path, *command: str, **variables: str) -> list[str]:
    """What `nf4` was called with by a command."""
    (folder / "called").unlink(missing_ok=True)
    subprocess.run(
        command,
        cwd=folder,
        env={"PATH": f"{folder}/bin:{os.environ['PATH']}", **variables},
        check=True,
    )
    return (folder / "called").read_text().splitlines()


def test_slurm_starts_each_part(folder: Path) -> None:
    script = (folder / "quantize.sbatch").read_text()
    assert f"#SBATCH --array=1-{COUNT}\n" in script
    for number in range(1, COUNT + 1):
        found = called(
            folder,
            *("sh", "quantize.sbatch"),
            SLURM_ARRAY_TASK_ID=str(number),
            SLURM_ARRAY_TASK_COUNT=str(COUNT),
        )
        assert found == [f"quantize --build-dir whole --part {number}/{COUNT}"]


def test_kubernetes_starts_each_part(folder: Path) -> None:
    job = yaml.safe_load((folder / "parts.yaml").read_text())
    assert (job["kind"], job["spec"]["completionMode"]) == ("Job", "Indexed")
    assert job["spec"]["completions"] == COUNT
    (container,) = job["spec"]["template"]["spec"]["containers"]
    mounted = {volume["name"] for volume in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in job["spec"]["template"]["spec"]["volumes"]}
    given = {variable["name"]: variable["value"] for variable in container["env"]}
    for index in range(COUNT):
        found = called(folder, *container["command"], JOB_COMPLETION_INDEX=str(index), **given)
        assert found == [f"quantize --build-dir whole --part {index + 1}/{COUNT}"]


def test_the_first_and_the_last_step(folder: Path) -> None:
    assert called(folder, "sh", "begin.sh", MODEL="me/m") == ["download me/m --build-dir whole"]
    assert called(folder, "sh", "end.sh", MODEL="me/m") == [
        "quantize --build-dir whole --merge",
        "build me/m --build-dir whole",
    ]


def test_parts_alone_are_gathered(folder: Path) -> None:
    for number in ("1", "2"):
        assert called(folder, "sh", "alone.sh", number, "2", MODEL="me/m") == [
            f"download me/m --build-dir parts/{number}",
            f"quantize --build-dir parts/{number} --part {number}/2",
        ]
        for name in (f"quantized/{number}.safetensors", f"records/quantize.{number}-of-2.json"):
            (folder / "parts" / number / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "parts" / number / name).touch()
    assert called(folder, "sh", "gather.sh", MODEL="me/m")[-1] == "build me/m --build-dir gathered"
    assert sorted(path.name for path in (folder / "gathered").rglob("*.*")) == [
        *("1.safetensors", "2.safetensors"),
        *("quantize.1-of-2.json", "quantize.2-of-2.json"),
    ]
