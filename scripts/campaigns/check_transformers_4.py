"""Does stock transformers 4 load an artifact, and does it compute the same?

transformers 4.57.6 quantizes and loads a Falcon without any help. This script sets it up in a
virtual environment of its own, with the torch and the bitsandbytes that run here, loads the
artifact there with a plain `AutoModelForCausalLM.from_pretrained`, and holds the logits and the
count of 4-bit layers against those of `nf4_pipeline.load` here. Both sides run on the CPU.

    python scripts/campaigns/check_transformers_4.py artifacts/<build>/export

The bound. Two correct programs that round to bf16 (or fp16) after every step agree with exact
arithmetic to within some distance, but not with each other to the last bit: transformers 4 and 5
order steps differently. That distance is measured on this very model: its logits here, against its
logits here with everything but the stored weights in float32. Each of the two programs may be that
far from exact, in whatever direction; so they may be twice as far from each other. A model that
computes in float32 leaves nothing to measure, and gets 1e-5. (Seen: bit-equal.)
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NamedTuple

import click
import numpy as np
from numpy.typing import NDArray

TRANSFORMERS: Final = "4.57.6"
FLOAT32_BOUND: Final = 1e-5
SHOWN: Final = (
    "transformers",
    "torch",
    "bitsandbytes",
    "accelerate",
    "huggingface_hub",
    "tokenizers",
    "safetensors",
)
PROMPTS: Final = (
    "Once upon a time there was a",
    "The capital of France is",
    "Question: What is 4-bit quantization?\nAnswer:",
)


class Found(NamedTuple):
    """What one side found.

    Attributes:
        versions: of the packages it ran with, by name.
        tokens: of each prompt.
        layers: the names of the 4-bit layers.
        logits: of each prompt, [length, vocabulary].
    """

    versions: dict[str, str]
    tokens: list[list[int]]
    layers: list[str]
    logits: list[NDArray[np.float32]]


def observe(model: Any, tokenizer: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """Runs a model; stands on its own, since its source text is run in the other environment, too.

    Returns:
        tokens, layers and logits, as in `Found`.
    """
    import torch
    from bitsandbytes.nn import Linear4bit

    layers = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    for name in layers:
        # The same arithmetic on every CPU: on some, bitsandbytes rounds the scales to bf16.
        model.get_submodule(name).support_avx512bf16_for_cpu = False
    tokens = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    with torch.inference_mode():
        logits = [model(torch.tensor([row])).logits[0].float().numpy() for row in tokens]
    return {"tokens": tokens, "layers": layers, "logits": logits}


# Run in the other environment, below the source of `observe`.
_THERE: Final = """
import json, sys
from importlib import metadata
import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

request = json.loads(sys.stdin.read())
model = AutoModelForCausalLM.from_pretrained(
    request["artifact"], torch_dtype="auto", device_map={"": "cpu"}
).eval()
found = observe(model, AutoTokenizer.from_pretrained(request["artifact"]), request["prompts"])
np.savez(request["logits"], *found.pop("logits"))
found["versions"] = {name: metadata.version(name) for name in request["packages"]}
print(json.dumps(found))
"""


def look_there(python: Path, artifact: Path, prompts: Sequence[str]) -> Found:
    """Loads the artifact with the stock transformers of another environment."""
    with tempfile.TemporaryDirectory() as folder:
        logits = Path(folder) / "logits.npz"
        request = {
            "artifact": str(artifact.resolve()),
            "prompts": list(prompts),
            "packages": SHOWN,
            "logits": str(logits),
        }
        code = f"from __future__ import annotations\n{inspect.getsource(observe)}\n{_THERE}"
        done = subprocess.run(
            [python, "-I", "-c", code],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        if done.returncode != 0:
            raise click.ClickException(
                f"transformers {TRANSFORMERS} could not run {artifact}; its last words:\n"
                + "\n".join(done.stderr.strip().splitlines()[-12:])
            )
        value = json.loads(done.stdout.strip().splitlines()[-1])
        with np.load(logits) as arrays:
            rows = [arrays[f"arr_{number}"] for number in range(len(prompts))]
        return Found(value["versions"], value["tokens"], value["layers"], rows)


def look_here(artifact: Path, prompts: Sequence[str]) -> tuple[Found, float]:
    """Loads the artifact with `nf4_pipeline.load`; measures what rounding does to its logits."""
    import nf4_pipeline
    import torch
    from bitsandbytes.nn import Linear4bit

    tokenizer = nf4_pipeline.load_tokenizer(artifact)
    model = nf4_pipeline.load(artifact, device="cpu")
    versions = {name: metadata.version(name) for name in SHOWN}
    found = Found(versions=versions, **observe(model, tokenizer, prompts))

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = torch.float32
    torch.nn.Module.float(model)  # packed weights are bytes, and stay as they are
    exact = observe(model, tokenizer, prompts)["logits"]
    return found, relative(found.logits, exact)


def relative(
    found: Sequence[NDArray[np.float32]], expected: Sequence[NDArray[np.float32]]
) -> float:
    """sqrt(sum (found - expected)^2 / sum expected^2), over all prompts."""
    one = np.concatenate(found).astype(np.float64)
    other = np.concatenate(expected).astype(np.float64)
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def environment(folder: Path) -> Path:
    """The Python of a virtual environment that holds transformers 4; makes what is missing."""
    wanted = {
        "transformers": TRANSFORMERS,
        # Without the "+cpu" or "+cu130" of the build: pip takes the build that it is set up for.
        "torch": metadata.version("torch").split("+")[0],
        "bitsandbytes": metadata.version("bitsandbytes"),
        "accelerate": None,
    }
    python = folder / "bin" / "python"
    if not python.is_file():
        click.echo(f"making {folder}", err=True)
        venv.create(folder, with_pip=True)
    if not _holds(python, wanted):
        pins = [f"{name}=={version}" if version else name for name, version in wanted.items()]
        click.echo(f"installing {' '.join(pins)}", err=True)
        command = [str(python), "-m", "pip", "install", "--quiet", *pins]
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
            raise click.ClickException(f"pip could not install {' '.join(pins)} into {folder}.")
    return python


def _holds(python: Path, wanted: dict[str, str | None]) -> bool:
    code = (
        "import json, sys; from importlib.metadata import distributions;"
        "print(json.dumps({d.name.lower(): d.version for d in distributions()}))"
    )
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    installed: dict[str, str] = json.loads(done.stdout)
    return all(
        name in installed and version in (None, installed[name].split("+")[0])
        for name, version in wanted.items()
    )


def planned_layers(artifact: Path) -> list[str]:
    """The modules that the manifest says are quantized."""
    from nf4_pipeline.manifest.read import read_manifest

    return sorted(read_manifest(artifact).quantized_modules)


def table(here: Found, there: Found, planned: int, apart: float, bound: float) -> str:
    """The comparison, as text."""
    rows = [("", "stock transformers 4", "nf4_pipeline.load")]
    rows += [(name, there.versions[name], here.versions[name]) for name in SHOWN]
    rows += [
        ("4-bit layers", str(len(there.layers)), str(len(here.layers))),
        ("tokens", _count(there.tokens), _count(here.tokens)),
        ("logits", _spread(there), _spread(here)),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    same = float(np.mean(_best(here) == _best(there)))
    largest = max(
        float(np.abs(one - other).max())
        for one, other in zip(here.logits, there.logits, strict=True)
    )
    lines += [
        "",
        f"4-bit layers in the manifest   {planned}",
        f"logits apart, relative RMS     {apart:.3g}",
        f"  allowed                      {bound:.3g}",
        f"logits apart, at most          {largest:.3g}",
        f"same next token                {same:.1%}",
    ]
    return "\n".join(lines)


def _best(found: Found) -> NDArray[np.int64]:
    return np.concatenate([logits.argmax(-1) for logits in found.logits])


def _count(tokens: list[list[int]]) -> str:
    return f"{sum(map(len, tokens))} in {len(tokens)} prompts"


def _spread(found: Found) -> str:
    values = np.concatenate(found.logits)
    return f"mean {values.mean():.4f}, deviation {values.std():.4f}"


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.argument("artifact", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--venv",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Virtual environment to make or to use again; a temporary one if it is not given.",
)
@click.option("--prompt", "prompts", multiple=True, help="Text to run; may be given again.")
def main(artifact: Path, folder: Path | None, prompts: tuple[str, ...]) -> None:
    texts = prompts or PROMPTS
    planned = planned_layers(artifact)
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory() as place:
        there = look_there(environment(Path(place).resolve()), artifact, texts)
    here, rounding = look_here(artifact, texts)
    if there.tokens != here.tokens:
        raise click.ClickException(
            "The tokenizers give different tokens, so there are no logits to compare: "
            f"{there.tokens} with transformers {TRANSFORMERS}, {here.tokens} here."
        )
    apart, bound = relative(here.logits, there.logits), max(2 * rounding, FLOAT32_BOUND)
    click.echo(table(here, there, len(planned), apart, bound))
    problems = []
    if not set(there.layers) == set(here.layers) == set(planned):
        problems.append("the 4-bit layers are not those of the manifest on both sides")
    if not apart <= bound:  # NaN is no match
        problems.append("the logits differ by more than rounding")
    if problems:
        raise click.ClickException("; ".join(problems) + ".")
    click.echo("equal within rounding")


if __name__ == "__main__":
    main()
