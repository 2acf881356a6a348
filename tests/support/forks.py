"""A process that has transformers imported, and forks for each case: a child that costs little.

    python -m tests.support.forks        requests and replies are JSON, one a line

A fork does what a child of the protocol does with a stranger's files, with limits armed; what it
says to its parent, or how it ends, becomes the reply. Its memory and time are measured.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.errors import PipelineError
from nf4_pipeline.model import check_folder, limited_tokenizer
from nf4_pipeline.model.check_folder import check_headers, check_model_fits, check_small_files
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer
from nf4_pipeline.processes import phase
from nf4_pipeline.processes.messages import Message, Phase

TEXT: Final = "What is the sum of 3 and 10, one asks; eeee? " * 8
SECONDS: Final = 0.3


@dataclass(frozen=True)
class Fork:
    """What became of a case.

    Attributes:
        error: the one message; "" if all went well.
        size: of what came back: tokens and characters.
        seconds: it took.
        peak: of its memory, beyond what it began with, in bytes.
    """

    error: str
    size: int
    seconds: float
    peak: int


class Forks:
    """The process, from outside."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, folder: Path, deed: str, seconds: float = SECONDS) -> Fork:
        """Runs a case: "template", "ids", "decode" or "config", which may take some seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(folder), deed, seconds]) + "\n")
        self._process.stdin.flush()
        return Fork(**json.loads(self._process.stdout.readline()))


@contextmanager
def forks() -> Iterator[Forks]:
    """Starts the process, and ends it."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.support.forks"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    ) as process:
        try:
            yield Forks(process)
        finally:
            process.kill()


def _deed(folder: Path, deed: str) -> int:
    if deed == "config":
        check_small_files(folder)
        check_model_fits(check_headers(folder))
        return 0
    tokenizer = LimitedTokenizer.open(folder)
    if deed == "template":
        messages = [{"role": "user", "content": TEXT}]
        return len(tokenizer.in_template(messages, answer_follows=True))
    if deed == "decode":
        return len(tokenizer.decode([40 + n % 90 for n in range(128)]))
    return len(tokenizer.ids(TEXT)) + len(tokenizer.ids(TEXT, special=True))


def _answer(folder: Path, deed: str) -> dict[str, Any]:
    told, says = os.pipe()
    start = time.monotonic()
    before = _resident()
    pid = os.fork()
    if pid == 0:
        os.close(told)
        _run(folder, deed, says)
    os.close(says)
    with os.fdopen(told, "rb") as pipe:
        messages = [json.loads(line) for line in pipe if line.endswith(b"\n")]
    _, status, usage = os.wait4(pid, 0)
    seconds = time.monotonic() - start
    peak = usage.ru_maxrss * 1024 - before
    last = messages[-1] if messages else {}
    if "size" in last:
        return {"error": last["error"], "size": last["size"], "seconds": seconds, "peak": peak}
    phases: list[Phase] = []
    for value in messages:
        message = Message.from_json(value)
        if message.entered is not None:
            phases.append(message.entered)
        elif message.left:
            phases.pop()
    code = os.waitstatus_to_exitcode(status)
    error = phases[-1].ended_by(max(0, -code), "?") if phases else f"no phase; status {code}"
    return {"error": error, "size": 0, "seconds": seconds, "peak": peak}


def _run(folder: Path, deed: str, says: int) -> None:
    def send(value: Any) -> None:
        os.write(says, json.dumps(value).encode() + b"\n")

    phase.arm(lambda message: send(message.to_json()))
    size, error = 0, ""
    try:
        size = _deed(folder, deed)
    except PipelineError as failure:
        error = str(failure)
    except BaseException as failure:
        error = f"FOREIGN {type(failure).__name__}: {failure}"
    send({"size": size, "error": error})
    os._exit(0)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    """Answers one request a line."""
    import torch  # noqa: F401
    import transformers  # noqa: F401
    from transformers import AutoTokenizer  # noqa: F401

    for name in ("falcon", "llama", "gpt2", "gemma3", "mixtral"):
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    for line in sys.stdin:
        folder, deed, allowed = json.loads(line)
        limited_tokenizer._SECONDS = check_folder._BUILD_SECONDS = allowed
        print(json.dumps(_answer(Path(folder), deed)), flush=True)


if __name__ == "__main__":
    main()
