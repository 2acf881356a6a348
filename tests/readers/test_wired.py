"""What a whole build says of its readers."""

from __future__ import annotations

import json
from pathlib import Path

import transformers


def test_every_reader_is_in_the_verification_and_on_the_card(verified: Path) -> None:
    found = json.loads((verified / "export" / "verification.json").read_text("utf-8"))
    readers = {reader["name"]: reader for reader in found["readers"]}
    assert list(readers) == ["nf4_pipeline", "transformers", "numpy", "peft"]
    stock = readers["transformers"]
    assert (stock["outcome"], stock["version"]) == ("passed", transformers.__version__)
    assert stock["logits_distance"] == 0.0
    assert readers["nf4_pipeline"]["layers"] == stock["layers"] == readers["numpy"]["layers"]
    assert readers["peft"]["outcome"] in ("passed", "not tried")
    checks = {check["name"]: check["passed"] for check in found["checks"]}
    assert checks[f"read by transformers {transformers.__version__}"]
    card = (verified / "export" / "README.md").read_text("utf-8")
    assert f"| transformers | {transformers.__version__} | passed |" in card
