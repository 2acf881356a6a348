"""nf4-pipeline: quantize a Hugging Face causal LM to bitsandbytes NF4, prove it, publish it.

load(artifact)            a model that is ready to generate, on transformers >= 5.5
prompt(query, artifact)   text generation in one call
PipelineError             every expected failure
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nf4_pipeline.errors import PipelineError

if TYPE_CHECKING:
    from nf4_pipeline.runtime.generate import prompt
    from nf4_pipeline.runtime.loader import load, load_tokenizer

__version__ = "0.1.0"

__all__ = ["PipelineError", "__version__", "load", "load_tokenizer", "prompt"]

_LAZY = {
    "load": "nf4_pipeline.runtime.loader",
    "load_tokenizer": "nf4_pipeline.runtime.loader",
    "prompt": "nf4_pipeline.runtime.generate",
}


def __getattr__(name: str) -> Any:
    """Imports torch and transformers only when something that needs them is asked for."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
