"""The grammar of the sample model's text, which is a script and no part of the package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_grammar() -> ModuleType:
    """Import the grammar, which is a script beside the package and no part of it."""
    path = Path(__file__).parents[2] / "scripts" / "sample" / "sample_corpus.py"
    spec = importlib.util.spec_from_file_location("sample_corpus", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their own module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


corpus = load_grammar()
