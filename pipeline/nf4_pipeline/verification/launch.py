"""Starts workers and reads what they found."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from nf4_pipeline import errors
from nf4_pipeline.fidelity.metrics import difference
from nf4_pipeline.fidelity.token_scores import TokenScores
from nf4_pipeline.progress import Reporter, Task
from nf4_pipeline.verification.eval_text import Text
from nf4_pipeline.verification.prompts import Prompt


@dataclass(frozen=True)
class Examination:
    """What is asked of both models.

    Attributes:
        source: the checkpoint folder.
        device: "cpu" or "cuda:N".
        device_memory: bytes of the device that may be used; 0 for all that is free.
        prompts: asked of both.
        max_new_tokens: of each answer.
        text: what they are compared on; random token ids if it has no domains.
        tokens: of it.
    """

    source: Path
    device: str
    device_memory: int
    prompts: Sequence[Prompt]
    max_new_tokens: int
    text: Text
    tokens: int

    def without_prompts(self) -> Examination:
        """The same, on the text alone."""
        return replace(self, prompts=())

    def ask_source(self, artifact: Path, reporter: Reporter) -> dict[str, Any]:
        """The 16-bit model's answers, from a fresh process.

        Args:
            artifact: whose tokenizer is used for both.
            reporter: told how far it is.

        Raises:
            SourceError: it could not be loaded.
            VerificationError: the process died.
        """
        return self._run("source", artifact, None, reporter)

    def ask_artifact(
        self,
        artifact: Path,
        scores: Path,
        reporter: Reporter,
        *,
        nearest: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """The 4-bit model's answers and its distance from the source, from a fresh process.

        Args:
            artifact: the export folder.
            scores: where the scores of all tokens are left (.npz).
            reporter: told how far it is.
            nearest: measure round to nearest beside it, these modules in 4 bit, too; None not to.

        Raises:
            ArtifactError: it could not be loaded.
            RecipeError: there is too little text.
            VerificationError: the process died.
        """
        return self._run("artifact", artifact, scores, reporter, nearest)

    def _run(
        self,
        kind: str,
        artifact: Path,
        scores: Path | None,
        reporter: Reporter,
        nearest: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        request = {
            "kind": kind,
            "bits": 16 if kind == "source" else 4,
            "source": str(self.source),
            "artifact": str(artifact),
            "device": self.device,
            "device_memory": self.device_memory,
            "prompts": [asdict(prompt) for prompt in self.prompts],
            "max_new_tokens": self.max_new_tokens,
            "text": {"name": self.text.name, "domains": dict(self.text.domains)},
            "tokens": self.tokens,
            "scores": str(scores),
            "nearest": nearest,
        }
        with tempfile.TemporaryDirectory(prefix="nf4-verify-") as folder:
            found = _run_worker(Path(folder), request, reporter)
        if "error" in found:
            raise getattr(errors, found["kind"])(found["error"])
        return found


def scores_differ(first: Path, second: Path) -> dict[str, Any]:
    """Holds the scores that two artifacts left against each other.

    Args:
        first: .npz of the one.
        second: .npz of the other; of the same source and text.
    """
    with np.load(first) as one, np.load(second) as other:
        lengths, domains = one["lengths"].tolist(), one["domains"].tolist()
        return difference(_scores(one), _scores(other), lengths, domains)


def _scores(stored: Any) -> TokenScores:
    return TokenScores(*(stored[field.name] for field in fields(TokenScores)))


def _run_worker(folder: Path, request: dict[str, Any], reporter: Reporter) -> dict[str, Any]:
    path, result = folder / "request.json", folder / "result.json"
    path.write_text(json.dumps({**request, "result": str(result)}), "utf-8")
    with (folder / "errors").open("w+", encoding="utf-8", errors="replace") as stderr:
        with subprocess.Popen(
            [sys.executable, "-P", "-m", "nf4_pipeline.verification.worker", str(path)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as child:
            try:
                _follow(child, reporter)
            finally:
                child.kill()
        status = child.returncode
        if result.is_file():
            found: dict[str, Any] = json.loads(result.read_text("utf-8"))
            return found
        stderr.seek(0)
        tail = stderr.read().strip().splitlines()[-1:] or ["no message"]
    signal = " Signal 9 usually means that memory ran out." if status == -9 else ""
    raise errors.VerificationError(
        f"The process that runs {request[request['kind']]} ended with status {status}: "
        f"{tail[0]}.{signal}"
    )


def _follow(child: subprocess.Popen[str], reporter: Reporter) -> None:
    """Shows what a worker says of its progress, until it ends."""
    task: Task | None = None
    with ExitStack() as stack:
        for line in child.stdout or ():
            try:
                news = json.loads(line)
            except ValueError:
                continue  # a library that prints
            if not isinstance(news, dict):
                continue
            if "task" in news:
                stack.close()
                task = stack.enter_context(
                    reporter.task(news["task"], news["total"], unit=news["unit"])
                )
            elif task is not None and "advance" in news:
                task.advance(news["advance"])
        child.wait()
