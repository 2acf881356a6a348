"""Other quantizers and this one on the same model and text: size, time, memory, distance.

Each peer is installed from PyPI into an environment of its own, quantizes the checkpoint on the CPU
with the settings that its documentation starts with, and is measured as a whole process. What it
wrote is decoded by its own code and compared with the 16-bit model by one evaluation, the same for
all (peers/evaluation.py). What fails is a row with the reason.

    python scripts/compare_peers.py run WORK                     # the bundled sample
    python scripts/compare_peers.py run WORK --model second --text second-eval.txt
    python scripts/compare_peers.py run WORK --llama-cpp ~/llama.cpp --only llamacpp
    python scripts/compare_peers.py table                        # what docs/comparison.md shows

WORK takes some 8 GB of environments, which a second run uses again. Results go into
docs/comparison.json row by row, so rows can be made again one at a time. llama.cpp is not on PyPI:
build `llama-quantize` in a checkout (cmake -B build && cmake --build build --target llama-quantize)
and name it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import click
from nf4_pipeline.sample import MODEL_DIR, TEXT
from peers.contestants import CONTESTANTS, ENVIRONMENTS, Contestant
from peers.evaluation import Evaluation, WrongDecoding, read_source
from peers.running import Cost, StepFailed, make_environment, run_measured, versions
from peers.table import render

_ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = _ROOT / "docs" / "comparison.json"
_DRIVERS: Final = Path(__file__).parent / "peers" / "drivers"
_SHOWN: Final = (
    "torch", "transformers", "bitsandbytes", "auto-round", "llmcompressor", "compressed-tensors",
    "gptqmodel",
)  # fmt: skip
_SAMPLE_ABOUT: Final = "a Falcon of 4.4 M weights that comes along, stories and questions"


@click.group(help=__doc__.split("\n\n")[0] if __doc__ else None)
def main() -> None:
    pass


@main.command()
@click.argument("work", type=click.Path(file_okay=False, path_type=Path))
@click.option("--model", type=click.Path(exists=True, path_type=Path), default=MODEL_DIR,
              help="Checkpoint folder; the bundled sample if it is not given.")  # fmt: skip
@click.option("--text", type=click.Path(exists=True, path_type=Path),
              help="What models read; nothing may have been calibrated on it.")  # fmt: skip
@click.option("--name", help="Of the model, in the table.")
@click.option("--about", help="The model in a few words, in the table.")
@click.option("--tokens", default=8192, show_default=True, help="Of the text, at most.")
@click.option("--only", multiple=True, help="Contestants whose names begin so; repeatable.")
@click.option("--llama-cpp", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="A checkout in which llama-quantize is built.")  # fmt: skip
@click.option("--quiet-machine", is_flag=True, help="Say that nothing else ran meanwhile.")
@click.option("--results", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS)
def run(
    work: Path,
    model: Path,
    text: Path | None,
    name: str | None,
    about: str | None,
    tokens: int,
    only: tuple[str, ...],
    llama_cpp: Path | None,
    quiet_machine: bool,
    results: Path,
) -> None:
    """Measure contestants on one model, and keep the rows."""
    is_sample = model.resolve() == MODEL_DIR.resolve()
    if is_sample:
        text, about = text or TEXT, about or _SAMPLE_ABOUT
    if text is None:
        raise click.UsageError("Name a --text for a model of your own.")
    work = work.resolve()
    name = name or ("the sample" if is_sample else model.name)
    match = Comparison(work, model.resolve(), text.resolve(), tokens, llama_cpp)
    document = json.loads(results.read_text("utf-8")) if results.exists() else {"models": []}
    document["machine"] = machine(quiet_machine)
    known = {entry["name"]: entry for entry in document["models"]}
    entry = known.setdefault(name, {"name": name, "rows": []})
    entry |= {"about": about or "", "tokens": match.tokens}
    document["models"] = list(known.values())
    for contestant in CONTESTANTS:
        if only and not contestant.name.startswith(only):
            continue
        row = match.row(contestant)
        rows = {old["name"]: old for old in entry["rows"]} | {row["name"]: row}
        entry["rows"] = [rows[c.name] for c in CONTESTANTS if c.name in rows]
        results.write_text(f"{json.dumps(document, indent=1)}\n", encoding="utf-8")
    click.echo(render(document))


@main.command()
@click.option("--results", type=click.Path(exists=True, path_type=Path), default=RESULTS)
def table(results: Path) -> None:
    """Print the tables of kept results."""
    click.echo(render(json.loads(results.read_text("utf-8"))), nl=False)


class Comparison:
    """Contestants on one model.

    Args:
        work: where environments and files are made.
        source: the checkpoint.
        text: what the models read.
        tokens: of it, at most.
        llama_cpp: a checkout in which llama-quantize is built, if there is one.

    Attributes:
        tokens: on which models are compared.
    """

    def __init__(
        self, work: Path, source: Path, text: Path, tokens: int, llama_cpp: Path | None
    ) -> None:
        self._work, self._source, self._text = work, source, text
        self._llama_cpp = llama_cpp and llama_cpp.resolve()
        self._runs = work / "runs" / source.name
        self._runs.mkdir(parents=True, exist_ok=True)
        self._wanted = tokens
        self._evaluation = Evaluation(source, text, tokens)
        self.tokens = self._evaluation.tokens
        self._shapes = {name: t.numel() for name, t in read_source(source).items()}

    def row(self, contestant: Contestant) -> dict[str, Any]:
        """Everything about one contestant; what failed is its `error`."""
        click.echo(f"{contestant.label} …", err=True)
        row: dict[str, Any] = {
            "name": contestant.name,
            "label": contestant.label,
            "settings": contestant.settings,
            "calibrated": contestant.calibrated,
            "note": contestant.note,
        }
        try:
            return row | self._measured(contestant)
        except (StepFailed, WrongDecoding) as error:
            click.echo(f"  {error}", err=True)
            return row | {"error": " ".join(str(error).replace(str(self._work), "WORK").split())}

    def _measured(self, contestant: Contestant) -> dict[str, Any]:
        folder = self._runs / contestant.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        log = folder / "log"
        python = Path(sys.executable)
        if contestant.environment:
            place = self._work / "environments" / contestant.environment
            place.mkdir(parents=True, exist_ok=True)
            python = make_environment(place, ENVIRONMENTS[contestant.environment], log)
        if contestant.environment == "llama.cpp":
            if self._llama_cpp is None:
                raise StepFailed("no checkout was named (--llama-cpp)")
            settings = {**contestant.settings, "checkout": str(self._llama_cpp)}
            contestant = replace(contestant, settings=settings)
        request = {
            "source": str(self._source),
            "out": str(folder / "out"),
            "settings": contestant.settings,
            "decoded": str(folder / "decoded.safetensors"),
            "tokens": str(self._calibration_tokens(log)),
        }
        driver = _DRIVERS / contestant.driver
        extra: dict[str, Any] = {}
        if contestant.environment:
            cost = run_measured([python, driver, "quantize"], log, request)
        else:
            cost, extra["verify_mean_kl"] = self._ours(contestant, folder, log)
            request["out"] = str(folder / "build" / "export")
        run_measured([python, driver, "decode"], log, request)
        sizes = json.loads((folder / "decoded.json").read_text("utf-8"))
        if not sizes:
            raise StepFailed("it quantized nothing, and ended with 0")
        out = Path(request["out"])
        files = [path for kind in ("safetensors", "gguf") for path in out.rglob(f"*.{kind}")]
        fidelity = self._evaluation.fidelity(folder / "decoded.safetensors")
        have = versions(python)
        return extra | {
            "versions": {name: have[name] for name in _SHOWN if name in have},
            "bits_per_weight": 8 * sum(sizes.values()) / sum(self._shapes[n] for n in sizes),
            "quantized_weights": sum(self._shapes[n] for n in sizes),
            "file_bytes": sum(path.stat().st_size for path in files),
            "seconds": round(cost.seconds, 1),
            "processor_seconds": round(cost.processor_seconds, 1),
            "peak_bytes": cost.peak_bytes,
            "fidelity": fidelity.to_json(),
        }

    def _calibration_tokens(self, log: Path) -> Path:
        """What the 16-bit model wrote, for everybody who calibrates; made once."""
        path = self._runs / "calibration.json"
        if not path.exists():
            build = self._runs / "calibration-build"
            self._nf4("download", build, log)
            self._nf4("quantize", build, log, "--calibrate", "self")
            kept = json.loads((build / "calibration" / "tokens.json").read_text("utf-8"))
            path.write_text(json.dumps(kept["ids"]), encoding="utf-8")
        return path

    def _ours(self, contestant: Contestant, folder: Path, log: Path) -> tuple[Cost, float]:
        """Quantizes and exports; then what `nf4 verify` says of it."""
        build = folder / "build"
        options = [part for pair in contestant.settings.items() for part in pair]
        self._nf4("download", build, log)
        cost = self._nf4("quantize", build, log, *options) + self._nf4("serialize", build, log)
        reading = ("--eval-text", str(self._text), "--eval-tokens", str(self._wanted))
        self._nf4("verify", build, log, *reading)
        document = json.loads((build / "export" / "verification.json").read_text("utf-8"))
        return cost, document["fidelity"]["mean_kl"]["value"]

    def _nf4(self, command: str, build: Path, log: Path, *options: str) -> Cost:
        place = ("--build-dir", str(build))
        model = (str(self._source),) if command == "download" else ()
        nf4 = (sys.executable, "-m", "nf4_pipeline")
        return run_measured([*nf4, command, *model, *place, *options], log)


def machine(quiet: bool) -> dict[str, Any]:
    """What the figures were taken on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line for line in lines if line.startswith("model name")]
    return {
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "quiet": quiet,
    }


if __name__ == "__main__":
    main()
