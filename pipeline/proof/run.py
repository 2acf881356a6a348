"""Starts workers and reads what they found."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.errors import ArtifactError, VerificationError
from pipeline.proof.prompts import Prompt
from pipeline.recipe import VerifyRecipe


def examine(
    source: Path,
    artifact: Path,
    prompts: Sequence[Prompt],
    recipe: VerifyRecipe,
    device: str,
    finished_one: Callable[[], None],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs the 16-bit and the 4-bit model, one after the other, each in a fresh process.

    Args:
        source: the checkpoint folder.
        artifact: the export folder.
        prompts: asked of both.
        recipe: how long answers are, and how many tokens are scored.
        device: "cpu" or "cuda:N".
        finished_one: called after each of the two.

    Returns:
        What `pipeline.proof.worker.run` found for the 16-bit model and for the 4-bit model.

    Raises:
        ArtifactError: a model could not be loaded.
        VerificationError: a worker died.
    """
    with tempfile.TemporaryDirectory(prefix="nf4-verify-") as folder:
        shared = {
            "device": device,
            "prompts": [asdict(prompt) for prompt in prompts],
            "max_new_tokens": recipe.max_new_tokens,
            "score_tokens": recipe.score_tokens,
            "reference": str(Path(folder) / "reference.npz"),
        }
        found = []
        for name, model, quantized in (("16bit", source, False), ("4bit", artifact, True)):
            request = {**shared, "model": str(model), "quantized": quantized}
            found.append(_run_worker(Path(folder) / f"{name}.json", request))
            finished_one()
    return found[0], found[1]


def _run_worker(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    result = path.with_suffix(".result.json")
    path.write_text(json.dumps({**request, "result": str(result)}), "utf-8")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pipeline.proof.worker", str(path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0 or not result.is_file():
        tail = done.stderr.strip().splitlines()[-1:] or ["no message"]
        signal = " Signal 9 usually means that memory ran out." if done.returncode < 0 else ""
        raise VerificationError(
            f"The process that runs {request['model']} ended with status {done.returncode}: "
            f"{tail[0]}.{signal}"
        )
    found: dict[str, Any] = json.loads(result.read_text("utf-8"))
    if "error" in found:
        raise ArtifactError(str(found["error"]))
    return found
