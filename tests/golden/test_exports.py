"""Every exported byte is what it was: hashes of quantized and serialized checkpoints, kept.

`exports.json` was written by the version before the import name became `nf4_pipeline`. Checkpoints
are made on the fly, and what the libraries write may change with them: hashes are compared only
where the source has the hash that it had then. To renew it after a change that is meant:

    NF4_RENEW_GOLDEN=1 python -m pytest tests/golden
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from nf4_pipeline.checkpoint.digest import digest_file
from nf4_pipeline.cli import cli

from tests.support.checkpoints import make_checkpoint
from tests.support.decoders import write_decoder
from tests.support.tiny import write_falcon

GOLDEN: Final = Path(__file__).with_name("exports.json")
RENEW: Final = bool(os.environ.get("NF4_RENEW_GOLDEN"))
SHAPES: Final[dict[str, Callable[[Path], Any] | None]] = {
    "sample": None,  # comes with the package
    "falcon-tiny": write_falcon,
    "falcon-7b": lambda folder: make_checkpoint(folder, "falcon-7b"),
    "gpt2": lambda folder: make_checkpoint(folder, "gpt2"),
    "opt": lambda folder: make_checkpoint(folder, "opt"),
    "llama": lambda folder: make_checkpoint(folder, "llama"),
    "mixtral": lambda folder: write_decoder(folder, "mixtral"),
}
OPTIONS: Final = {"llama": ["--max-shard-size", "200KB"]}


@pytest.mark.usefixtures("workers_here")
@pytest.mark.parametrize("shape", SHAPES)
def test_an_export_has_the_bytes_that_it_had(shape: str, tmp_path: Path) -> None:
    make = SHAPES[shape]
    model = shape
    if make is not None:
        make(tmp_path / shape)
        model = str(tmp_path / shape)
    build = tmp_path / "build"
    nf4("download", model, "--build-dir", str(build), "-q")
    nf4("quantize", "--build-dir", str(build), "--device", "cpu", "-q")
    nf4("serialize", "--build-dir", str(build), "-q", *OPTIONS.get(shape, []))
    export = build / "export"
    manifest = json.loads((export / "manifest.json").read_text("utf-8"))
    made = {
        "source": manifest["source"]["content_sha256"],
        "export": {path.name: digest_file(path).sha256 for path in sorted(export.iterdir())},
    }
    golden = json.loads(GOLDEN.read_text("utf-8"))
    if RENEW:
        GOLDEN.write_text(json.dumps(golden | {shape: made}, indent=2) + "\n", "utf-8")
    elif made["source"] != golden[shape]["source"]:
        pytest.skip("the libraries here make another checkpoint")
    else:
        assert made == golden[shape]


def nf4(*args: str) -> None:
    cli.main(args=list(args), standalone_mode=False)
