"""`python -m nf4_pipeline.model.probe_worker FOLDER`: facts of its model and tokenizer, as JSON."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.checkpoint.source import open_checkpoint
from nf4_pipeline.errors import PipelineError
from nf4_pipeline.model.config import read_config
from nf4_pipeline.model.meta_model import model_facts
from nf4_pipeline.model.tokenizer_probe import tokenizer_facts
from nf4_pipeline.runtime.quiet import quiet_libraries

WITHOUT_WEIGHTS: Final = "--without-weights"

MAX_SECONDS: Final = 240
"""Of processor time. Models of some hundred billion weights take less than one minute."""

MAX_MEMORY: Final = 8 * 2**30
"""Bytes; torch and transformers take half a GiB, a model without weights hardly anything."""


def main() -> None:
    """Answers for the folder named on the command line."""
    folder = Path(sys.argv[1])
    _limit_itself()
    quiet_libraries()
    answer: dict[str, Any]
    try:
        has_weights = WITHOUT_WEIGHTS not in sys.argv[2:]
        checkpoint = open_checkpoint(folder) if has_weights else None
        names = [tensor.name for tensor in checkpoint.tensors] if checkpoint else []
        facts = model_facts(read_config(folder), names, folder)
        tokenizer = tokenizer_facts(folder, facts.embedding_rows)
        answer = {"model": facts.as_json(), "tokenizer": tokenizer.as_json()}
    except PipelineError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    json.dump(answer, sys.stdout)


def _limit_itself() -> None:
    """A hostile config that passes for plausible must not take the machine with it."""
    for kind, limit in ((resource.RLIMIT_CPU, MAX_SECONDS), (resource.RLIMIT_DATA, MAX_MEMORY)):
        _, hard = resource.getrlimit(kind)
        new = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (new, hard))


if __name__ == "__main__":
    main()
