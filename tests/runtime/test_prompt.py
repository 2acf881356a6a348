"""Prompts in a process of their own, which stays for the next one and ends with its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from nf4_pipeline.errors import ArtifactError, UsageError
from nf4_pipeline.runtime.generate import Sampling
from nf4_pipeline.runtime.prompt import ask, prompt

from tests.support.command_line import without_progress
from tests.support.hostile_tokenizers import (
    TEMPLATES,
    write_template,
)
from tests.support.processes import children_of, command_of, eventually, is_gone
from tests.support.tiny import copy_of, environment, listen_to_interrupts, nf4

WORKER: Final = b"nf4_pipeline.runtime.prompt_worker"


def workers(of: int) -> list[int]:
    """The pids of the processes that answer for another one."""
    return [pid for pid in children_of(of) if WORKER in command_of(pid)]


def test_one_process_answers_all_prompts(exported_falcon: Path, tmp_path: Path) -> None:
    export = copy_of(exported_falcon / "export", tmp_path / "export")
    write_template(export, TEMPLATES["a huge join"])
    pieces: list[str] = []
    eight = Sampling(max_new_tokens=8)
    first = ask("Hello", export, eight, device="cpu", chat=False, show=pieces.append)
    assert "".join(pieces) == first.answers[0].text
    assert pieces
    (pid,) = workers(os.getpid())

    def again(query: str = "Hello", chat: bool = False, **values: Any) -> list[str]:
        return prompt(query, export, device="cpu", chat=chat, **values)

    assert len(set(again(max_new_tokens=8, num_return_sequences=3, seed=2))) == 3
    with pytest.raises(UsageError, match="empty"):
        again(" ")
    with pytest.raises(UsageError, match="the prompt alone has 5 tokens"):
        again(max_length=2)
    # A template that takes all it can get ends its answer, not the process.
    with pytest.raises(ArtifactError, match=r"chat template of .* memory.* Leave it out \(--raw"):
        again(chat=True)
    assert again(max_new_tokens=8) == [first.answers[0].text]
    assert workers(os.getpid()) == [pid]


def test_a_command_with_a_hostile_template(tiny_falcon: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_falcon, tmp_path / "model")
    write_template(folder, TEMPLATES["a huge join"])
    done = nf4("prompt", folder, "Hello", "--max-new-tokens", "2", cwd=tmp_path, cold=True)
    assert (done.status, done.out) == (1, "")
    said = without_progress(done.err)
    assert said.startswith(f"Error: The chat template of {folder} ")
    assert said.endswith("Leave it out (--raw, or chat=False).\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_the_process_ends_with_the_command(
    number: signal.Signals, tiny_falcon: Path, tmp_path: Path
) -> None:
    folder = copy_of(tiny_falcon, tmp_path / "model")
    write_template(folder, TEMPLATES["nested ranges"])
    place = tmp_path / "tmp"
    place.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "nf4_pipeline", "prompt", str(folder), "Hello"],
        env=environment(tmp_path) | {"TMPDIR": str(place)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=listen_to_interrupts,
    )
    try:
        assert eventually(lambda: workers(process.pid))
        (worker,) = workers(process.pid)
        process.send_signal(number)
        status = process.wait(120)
        assert eventually(lambda: is_gone(worker))
    finally:
        process.kill()
    assert status == (-number if number == signal.SIGKILL else 128 + number)
    assert (list(place.iterdir()) == []) is (number != signal.SIGKILL)
