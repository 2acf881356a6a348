"""Mutated headers: refused by an error of ours or read, soon, and in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaigns.headers import campaign, large

PROGRAM = """
import json, sys
from pathlib import Path
from nf4_pipeline.resource_usage import peak_memory
from tests.campaigns.headers import Outcome, feed, large, pack
outcome, before = Outcome(), peak_memory()
text = large()[sys.argv[1]]
path = Path(sys.argv[2])
path.write_bytes(pack(text, b""))
del text
from nf4_pipeline.checkpoint.safetensors_header import read_header
from nf4_pipeline.errors import CheckpointError
from nf4_pipeline.resource_usage import measured
with measured() as usage:
    try:
        read_header(path)
        said = "accepted"
    except CheckpointError as error:
        said = str(error)
print(json.dumps({"said": said, "peak": usage.peak_memory, "seconds": usage.seconds}))
"""


def test_no_mutation_crashes_the_parser(tmp_path: Path) -> None:
    found = campaign(4_000, 0, tmp_path / "m.safetensors")
    assert found.crashes == []
    assert found.count == 4_000
    assert found.accepted > 20
    assert len(found.messages) > 15


@pytest.mark.parametrize("kind", large())
def test_a_large_header_takes_little_memory(kind: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind, str(tmp_path / "m.safetensors")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(kind, found)
    assert found["peak"] < 200e6
    assert ("accepted" in found["said"]) == (kind in ("100,000 tensors", "spaces"))
