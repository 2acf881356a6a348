"""The sample, calibrated on what it writes itself: what that is worth, and that stock reads it."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import nf4_pipeline
import pytest
import torch
from nf4_pipeline.build_folder import Build
from nf4_pipeline.sample import MODEL_DIR, TEXT

from tests.support.calibrated import downloaded, manifest_of, quantized, settings
from tests.support.checkpoints import read_tensors
from tests.support.stock import linear4bit, load_stock, logits

TOKENS = (torch.arange(48) * 37 % 1000).reshape(2, 24)


@pytest.fixture(scope="module")
def verification(calibrated_sample: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(
        (calibrated_sample / "export" / "verification.json").read_text("utf-8")
    )
    return value


def test_less_than_half_of_the_loss_at_the_same_bytes(
    calibrated_sample: Path, verification: dict[str, Any], tmp_path: Path
) -> None:
    assert verification["verdict"] == "pass"
    ratio = verification["nearest"]["difference"]["mean_kl_ratio"]
    assert ratio["value"] <= 0.45
    assert ratio["high"] < 0.6
    ours, nearest = verification["fidelity"], verification["nearest"]["fidelity"]
    assert ours["mean_kl"]["value"] <= 0.45 * nearest["mean_kl"]["value"]
    assert ours["top1_agreement"]["value"] > nearest["top1_agreement"]["value"]
    assert ours["p99_kl"]["value"] < nearest["p99_kl"]["value"]

    plain = downloaded(MODEL_DIR, tmp_path)
    quantized(plain, settings(""))
    found = manifest_of(Build(calibrated_sample))
    assert found["totals"] == manifest_of(plain)["totals"]
    assert found["calibration"]["fallbacks"] == {}
    assert (found["calibration"]["sequences"], found["calibration"]["tokens"]) == (16, 4096)


def test_no_answer_is_lost(verification: dict[str, Any]) -> None:
    """All are right, as in 16 bit; so round to nearest cannot have more of them."""
    accuracy = verification["accuracy"]
    assert accuracy["right_4bit"] == accuracy["right_16bit"] == accuracy["asked"] == 50


def test_the_artifact_says_so(calibrated_sample: Path) -> None:
    export = calibrated_sample / "export"
    assert (export / "calibration.json").is_file()
    assert "calibrat" in (export / "README.md").read_text("utf-8")
    assert "calibrat" in (export / "report.html").read_text("utf-8")


def test_patched_stock_reads_what_we_read(calibrated_sample: Path) -> None:
    export = calibrated_sample / "export"
    stock, ours = load_stock(export), nf4_pipeline.load(export, device="cpu")
    planned = {
        t["module"] for t in manifest_of(Build(calibrated_sample))["tensors"] if "module" in t
    }
    assert linear4bit(stock) == linear4bit(ours) <= planned
    assert len(linear4bit(ours)) == 24
    assert torch.equal(logits(stock, TOKENS), logits(ours, TOKENS))


def test_scales_of_both_signs_are_stored(calibrated_sample: Path) -> None:
    tensors = read_tensors(calibrated_sample / "export")
    for name, codes in tensors.items():
        if name.endswith(".absmax") and not name.endswith("nested_absmax"):
            assert 0.2 < float((codes < 127).float().mean()) < 0.8, name
            assert not (codes == 127).any(), name  # the level zero


def test_the_evaluation_of_the_comparison_agrees_with_verify(
    calibrated_sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/comparison.md: decoded by bitsandbytes, scored as all peers are."""
    scripts = Path(__file__).parents[1] / "scripts"
    monkeypatch.syspath_prepend(scripts / "peers" / "drivers")
    monkeypatch.syspath_prepend(scripts)
    export = calibrated_sample / "export"
    common, driver = import_module("common"), import_module("bitsandbytes_stock")
    decoded = tmp_path / "decoded.safetensors"
    common.save(decoded, driver.decode({"out": str(export)}))
    evaluation = import_module("peers.evaluation").Evaluation(MODEL_DIR, TEXT, 8192)
    found = evaluation.fidelity(decoded)
    verified = json.loads((export / "verification.json").read_text("utf-8"))["fidelity"]
    assert found.tokens == verified["tokens"]
    assert found.mean_kl.value == pytest.approx(verified["mean_kl"]["value"], rel=0.05)
    for name in ("top1_agreement", "perplexity_16bit", "perplexity_4bit"):
        assert getattr(found, name).value == pytest.approx(verified[name]["value"], rel=0.005)
