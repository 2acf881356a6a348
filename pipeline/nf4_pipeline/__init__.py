"""nf4-pipeline: quantize a Hugging Face causal LM to bitsandbytes NF4, prove it, publish it.

build(model)              a model in, a verified Artifact out
load(path_or_repo)        a model that is ready to generate, on transformers >= 5.5
load_tokenizer(…)         its tokenizer
prompt(query, artifact)   text generation in one call
rebuild(repos)            artifacts that others published, derived again; a verdict for each
Artifact                  what was built: its figures, and .verify() .push() .prompt() .load()
ProgressEvent             what a progress callback is called with
PipelineError             every expected failure; the tree of them is in errors.py

docs/python-api.md shows them at work.

The house, from the top floor down; a room imports only from rooms below it (`make lint`):

    cli/               one file per command
    batch/             many builds, one after the other
    api/               build and Artifact, for Python programs; what options of both mean
    rebuilding/        what others published: fetched, derived again, accounted for, summed up
    job.py             stages in their order; nothing valid is done again
    reproduce/         an artifact derived again from its source, every byte compared
    ci/                what CI systems show of a build: summary, outputs, annotations
    doctor.py          what this machine has, and known traps on it
    stages/            download, quantize, serialize, verify, attest, push
    builds/            side by side: which one a name means, which folder a recipe gets
    records.py         what each stage leaves for the others to know
    build_folder/      where stages leave their files and their records
    report/            the model card, the report's page and its pictures
    calibration/       codes and scales chosen from what a layer's inputs look like
    verification/      the artifact, reloaded, against the 16-bit model
    provenance/        who made it from what, in forms that other programs check; signatures
    engine/            checkpoint files in, quantized files out, in chunks
    manifest/          what an artifact holds, and its files beside the weights
    readers/           an artifact as its users load it: without this package
    blocks/            a model run block by block, its weights streamed
    gptq/              codes that make up for each other's errors
    selection.py       which tensors are quantized, which stay, and why
    runtime/           loading an artifact, generating text
    model/             a model's architecture, from its config, without its weights
    streaming/         weights that stay on the Hub, and come while they are needed
    hub/               downloads and pushes that are proved
    pickles/           weights in pickles, made safetensors without running them
    fidelity/          metrics: how far the 4-bit model is from the 16-bit one
    recipe.py          what shapes the bytes
    object_store/      files at a URL, complete or absent
    machine.py         what the machine gives: device, workers, memory
    nf4/               the format: arithmetic, and the six tensors of a weight
    processes/         child processes, by one protocol
    cluster/           calls as tasks of a Ray cluster
    checkpoint/        safetensors bytes on disk
    compiled.py        functions that numba compiles, with a cache that may fail
    errors.py          every failure that a user can meet
    progress.py        who is told how far a job is
    resource_usage.py  what a piece of work takes: time and memory
    documents.py       JSON documents as frozen dataclasses
    quiet_libraries.py  what libraries print and warn of, kept quiet
    printable.py       text of strangers, made safe for a terminal
    near_names.py      names that somebody may have meant
    sample/            a tiny model that comes with the package
    __main__.py        python -m nf4_pipeline
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from nf4_pipeline import errors
from nf4_pipeline.errors import PipelineError

if TYPE_CHECKING:
    from nf4_pipeline.api.artifact import Artifact
    from nf4_pipeline.api.building import build
    from nf4_pipeline.api.rebuilding import rebuild
    from nf4_pipeline.progress import ProgressEvent
    from nf4_pipeline.runtime.loader import load, load_tokenizer
    from nf4_pipeline.runtime.prompt import prompt

__version__ = "0.1.0"

__all__ = [
    "Artifact",
    "PipelineError",
    "ProgressEvent",
    "__version__",
    "build",
    "errors",
    "load",
    "load_tokenizer",
    "prompt",
    "rebuild",
]

_LAZY: Final = {
    "Artifact": "nf4_pipeline.api.artifact",
    "ProgressEvent": "nf4_pipeline.progress",
    "build": "nf4_pipeline.api.building",
    "load": "nf4_pipeline.runtime.loader",
    "load_tokenizer": "nf4_pipeline.runtime.loader",
    "prompt": "nf4_pipeline.runtime.prompt",
    "rebuild": "nf4_pipeline.api.rebuilding",
}


def __getattr__(name: str) -> Any:
    """Imports what a name needs when it is asked for; torch and transformers when it is used."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
