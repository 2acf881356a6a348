"""Runs the blocks of documents, one page after the other, each in a folder of its own.

    python -m tests.support.doc_runner ORDER.json

Hub and token come with the environment. A page's folder holds, before its first block, finished
builds of `sample` and of `tiiuae/falcon-7b-instruct` (small ones) and what `_PLACE` names. With
`in_process` in the order, `nf4` is called in this process and verifies little; otherwise it is the
real program.
What came of each block stands in results.jsonl beside the order, block by block.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any, Final

from nf4_pipeline import sample
from nf4_pipeline.processes.in_process import in_process
from nf4_pipeline.recipe import load_recipe, parse_recipe, read_tables

MODEL: Final = "tiiuae/falcon-7b-instruct"
MODELS: Final = ("sample", MODEL)
_PLACE: Final = {
    "my-text.txt": "Once upon a time, there was a clever fox named Ben. He lived by the lake.\n"
    * 40,
    "chats.jsonl": '{"text": "Once upon a time, there was a clever fox named Ben."}\n' * 40,
}
_WITH_SHELL: Final = re.compile(r"[|&;<>$`(){}]|^(cd|export|for|if|while|do|done|fi|wait)\b", re.M)


def main(order_file: Path) -> None:
    """Runs them."""
    order_file = order_file.absolute()
    order = json.loads(order_file.read_text("utf-8"))
    nf4: Callable[[list[str]], str] = _real
    if order["in_process"]:
        sample.MODEL_DIR = Path(order["model"])
        _verify_little(Path(order["recipe"]))
        nf4 = _here
    made = order_file.parent / "made"
    made.mkdir()
    os.chdir(made)
    with (order_file.parent / "results.jsonl").open("w", buffering=1) as results:

        def told(block: dict[str, Any], work: Callable[[], str]) -> None:
            began = time.monotonic()
            try:
                fault = work()
            except BaseException:
                fault = traceback.format_exc()
            seconds = round(time.monotonic() - began, 2)
            results.write(json.dumps({"block": block, "fault": fault, "seconds": seconds}) + "\n")

        for model in MODELS:
            told({"page": f"build {model}", "line": 0}, partial(nf4, ["build", model]))
        for page, blocks in order["pages"].items():
            place = order_file.parent / "places" / page.replace("/", "-")
            shutil.copytree(made, place, symlinks=True)
            shutil.copytree(order["model"], place / "my-model")
            for name, text in _PLACE.items():
                (place / name).write_text(text)
            os.chdir(place)
            names: dict[str, Any] = {}
            for block in blocks:
                told(block, partial(_run, block, names, nf4, order["slow"]))
            for claim in order["claims"].get(page, ()):
                told({"page": page, "line": 0}, partial(_hold, claim, names))


def _hold(claim: str, names: dict[str, Any]) -> str:
    return "" if eval(claim, names) else f"{claim} does not hold"


def _run(
    block: dict[str, Any], names: dict[str, Any], nf4: Callable[[list[str]], str], slow: bool
) -> str:
    """Runs a block; returns what went wrong."""
    mark, language, text = block["mark"], block["language"], block["text"]
    if mark == "not run" or (mark == "slow" and not slow):
        return ""
    if mark == "file":
        Path(block["why"]).parent.mkdir(parents=True, exist_ok=True)
        Path(block["why"]).write_text(text, "utf-8")
    match language:
        case "toml":
            if mark == "file":
                load_recipe(Path(block["why"]))
            else:
                path = Path(f"recipe-{block['line']}.toml")
                path.write_text(text, "utf-8")
                parse_recipe(read_tables(path), str(path))
        case "json" if mark == "file":
            for line in text.splitlines() if block["why"].endswith(".jsonl") else [text]:
                json.loads(line)
        case "python" if mark != "file":
            code = compile(text, f"<{block['page']}:{block['line']}>", "exec")
            said = StringIO()
            with nullcontext() if nf4 is _real else in_process(), redirect_stdout(said):
                exec(code, names)
            # What libraries log goes to stderr, whatever place it has on the page.
            shown = [line for line in block["output"].splitlines() if not line.startswith("[")]
            if shown and shown != said.getvalue().splitlines():
                return f"printed:\n{said.getvalue()}"
        case "sh" | "console" if mark != "file":
            if nf4 is _real or _WITH_SHELL.search("\n".join(block["commands"])):
                return _shell("\n".join(block["commands"]))
            for line in block["commands"]:
                if fault := _run_line(line, nf4):
                    return fault
    return ""


def _run_line(line: str, nf4: Callable[[list[str]], str]) -> str:
    words = shlex.split(line, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return nf4(words[1:]) if words[:1] == ["nf4"] else _shell(line)


def _shell(line: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    return f"{line}\nexit {done.returncode}: {done.stdout}{done.stderr}" if done.returncode else ""


def _real(args: list[str]) -> str:
    return _shell(shlex.join(["nf4", *args]))


def _here(args: list[str]) -> str:
    """`nf4 ARGS` in this process, workers and all."""
    from nf4_pipeline.cli import main as nf4

    said = StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said), in_process():
            nf4(args)
    except SystemExit as ended:
        return f"nf4 {shlex.join(args)}\nexit {ended.code}: {said.getvalue()}" if ended.code else ""
    return ""


def _verify_little(path: Path) -> None:
    """Verifying and calibrating take little time, for once.

    The default recipe is a quick one, stock transformers is no reader (it would be a process of its
    own for each build), and nothing is drawn.
    """
    names = ("api.options", "readers.read", "report.pictures")
    modules: list[Any] = [import_module(f"nf4_pipeline.{name}") for name in names]
    options, readers, pictures = modules

    def two_readers(self: Any, own: Any) -> Any:
        layers = self._export.modules
        ours = readers.judge_own(own.version, own.layers, layers, own.lost, self.own_logits)
        return ours, self._decoded.result()

    pictures.drawable = lambda verification: {}
    readers.Readers._start = lambda self: None
    readers.Readers.results = two_readers
    quick, read = load_recipe(path), options._read

    def read_quick(said: Any) -> Any:
        recipe, given = read(said)
        if "verify" not in given:
            recipe = replace(recipe, verify=quick.verify)
        if "quantize" not in given:
            recipe = replace(recipe, quantize=replace(recipe.quantize, calibration_tokens=256))
        return recipe, given

    options._read = read_quick


if __name__ == "__main__":
    main(Path(sys.argv[1]))
