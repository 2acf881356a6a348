"""nf4-pipeline: quantize a Hugging Face causal LM to bitsandbytes NF4, prove it, publish it.

load(artifact)            a model that is ready to generate, on transformers >= 5.5
prompt(query, artifact)   text generation in one call
PipelineError             every expected failure
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.runtime.generate import prompt
    from pipeline.runtime.loader import load, load_tokenizer

__version__ = "0.1.0"

__all__ = ["PipelineError", "__version__", "load", "load_tokenizer", "prompt"]

_LAZY = {
    "load": "pipeline.runtime.loader",
    "load_tokenizer": "pipeline.runtime.loader",
    "prompt": "pipeline.runtime.generate",
}


def __getattr__(name: str) -> Any:
    """Imports torch and transformers only when something that needs them is asked for."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
