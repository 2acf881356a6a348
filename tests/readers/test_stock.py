"""Stock transformers and PEFT, in a process that knows nothing of this package."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import transformers
from nf4_pipeline.manifest.read import read_manifest
from nf4_pipeline.processes.worker import Script
from nf4_pipeline.readers import stock
from nf4_pipeline.readers.document import ReaderResult, reader_checks
from nf4_pipeline.readers.logits import write_logits
from nf4_pipeline.readers.promises import published_lines
from nf4_pipeline.readers.stock import StockReader, StockReply, StockRequest, awkward_layers
from nf4_pipeline.runtime.loader import load


@pytest.fixture(scope="module")
def export(exported_falcon: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Falcon, and beside it what our loader says."""
    folder = exported_falcon / "export"
    path = folder.parent / "own.npy"
    if not path.exists():
        write_logits(load(folder, device="cpu"), path)
    return folder


def _layers(export: Path) -> list[str]:
    tensors = read_manifest(export).tensors
    return [tensor.module for tensor in tensors if tensor.quantized and tensor.module]


def _ask(export: Path, tmp_path: Path, lines: str | None, *, lora: bool) -> list[ReaderResult]:
    request = StockRequest(
        artifact=str(export),
        device="cpu",
        threads=1,
        lines=lines,
        logits=str(tmp_path / "stock.npy"),
        lora=lora,
    )
    with StockReader(request) as reader:
        return reader.results(
            _layers(export),
            export.parent / "own.npy",
            "bfloat16",
            promised=True,
            version=transformers.__version__,
        )


def test_a_falcon_with_the_published_lines(export: Path, tmp_path: Path) -> None:
    lines = published_lines("FalconForCausalLM", ["transformer.h.0.mlp.dense_h_to_4h"])
    found, peft = _ask(export, tmp_path, lines, lora=True)
    assert (found.outcome, found.version) == ("passed", transformers.__version__), found.why
    assert found.layers == len(_layers(export))
    assert found.logits_distance == 0.0
    if find_spec("peft") is None:
        assert (peft.outcome, peft.why) == ("not tried", "peft is not installed")
    else:
        assert (peft.outcome, peft.layers) == ("passed", found.layers), peft.why


def test_a_falcon_without_them_fails_the_verdict(export: Path, tmp_path: Path) -> None:
    (found,) = _ask(export, tmp_path, None, lora=False)
    assert found.outcome == "failed"
    (check,) = reader_checks([found])
    assert not check.passed
    assert check.name == f"read by transformers {transformers.__version__}"


def test_the_script_imports_nothing_of_ours(export: Path, tmp_path: Path) -> None:
    request = StockRequest(str(export), "cpu", 1, published_lines("Falcon", ["x"]), None, False)
    done = subprocess.run(
        [sys.executable, "-P", "-X", "importtime", stock.SCRIPT],
        input=json.dumps(request.to_json()),
        capture_output=True,
        text=True,
        check=True,
    )
    assert StockReply.from_json(json.loads(done.stdout.splitlines()[-1])["reply"]).error is None
    assert "transformers" in done.stderr
    assert "nf4_pipeline" not in done.stderr


def _reply(**changes: object) -> StockReply:
    values = {
        "transformers": "5",
        "torch": "2",
        "bitsandbytes": "1",
        "error": None,
        "linear4bit": ["a", "b"],
        "missing": [],
        "unexpected": [],
        "seconds": 1.0,
        "lora": None,
    }
    return StockReply.from_json(values | changes)


class _Answering(StockReader):
    def __init__(self, reply: StockReply, logits: Path | None, *, lora: bool = True) -> None:
        self._request = StockRequest("", "cpu", 1, None, str(logits) if logits else None, lora)
        self._awkward = 0 if logits else 2
        self._lora_wanted = lora
        self._child = self  # type: ignore[assignment]
        self._reply = reply

    def wait(self) -> StockReply:
        return self._reply


def _judged(reply: StockReply, tmp_path: Path, found: list[float]) -> list[ReaderResult]:
    np.save(tmp_path / "own.npy", np.array([1.0, 2.0]))
    np.save(tmp_path / "stock.npy", np.array(found))
    return _Answering(reply, tmp_path / "stock.npy").results(
        ["a", "b"], tmp_path / "own.npy", "bfloat16", promised=True, version="5"
    )


@pytest.mark.parametrize(
    ("changes", "logits", "why"),
    [
        ({"error": "RuntimeError: float != c10::BFloat16"}, [1.0, 2.0], "float != c10"),
        ({"linear4bit": ["a"]}, [1.0, 2.0], "b is not 4 bit"),
        ({"linear4bit": ["a", "b", "c"]}, [1.0, 2.0], "c is 4 bit and should not be"),
        ({"missing": ["norm.weight"]}, [1.0, 2.0], "norm.weight"),
        ({}, [1.0, 2.2], "from our loader's"),
        ({}, [1.0, float("nan")], "not finite"),
        ({}, [1.0], "of another shape"),
    ],
)
def test_what_fails(
    changes: dict[str, object], logits: list[float], why: str, tmp_path: Path
) -> None:
    result = _judged(_reply(**changes), tmp_path, logits)[0]
    assert result.outcome == "failed"
    assert why in result.why


@pytest.mark.parametrize(
    ("lora", "outcome"),
    [
        ({"peft": "1", "error": None, "loss": 5.0}, "passed"),
        ({"peft": "1", "error": None, "loss": float("nan")}, "failed"),
        ({"peft": "1", "error": "ValueError: no adapter", "loss": None}, "failed"),
        ({"peft": None, "error": "peft is not installed", "loss": None}, "not tried"),
        (None, "not tried"),
    ],
)
def test_peft_is_said_and_decides_nothing(
    lora: dict[str, object] | None, outcome: str, tmp_path: Path
) -> None:
    stock_result, peft = _judged(_reply(lora=lora), tmp_path, [1.0, 2.0])
    assert (stock_result.outcome, peft.outcome) == ("passed", outcome)
    assert [check.name for check in reader_checks([stock_result, peft])] == [
        "read by transformers 5"
    ]


def test_layers_that_bitsandbytes_computes_wrongly_are_said(tmp_path: Path) -> None:
    assert awkward_layers([(64, 64), (32, 48), (40, 64)], "cpu") == 2
    assert awkward_layers([(32, 48)], "cuda:0") == 0
    result = _Answering(_reply(), None).results(
        ["a", "b"], tmp_path, "bfloat16", promised=True, version="5"
    )[0]
    assert result.outcome == "loaded only"
    assert "to compare logits" in result.why


def test_a_reader_that_dies_is_a_result(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "dies.py"
    script.write_text("raise SystemExit('out of something')")
    monkeypatch.setattr(stock, "READER", Script(script, StockReply))
    (found, peft) = _ask(export, tmp_path, None, lora=True)
    assert (found.outcome, peft.outcome) == ("failed", "failed")
    assert "out of something" in found.why
