"""`python -m pipeline.model.worker FOLDER`: facts of a checkpoint's model, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pipeline.checkpoint.source import open_checkpoint
from pipeline.errors import PipelineError
from pipeline.model.config import read_config
from pipeline.model.skeleton import model_facts
from pipeline.runtime.quiet import quiet_libraries


def main() -> None:
    """Answers for the folder named on the command line."""
    folder = Path(sys.argv[1])
    quiet_libraries()
    try:
        names = [tensor.name for tensor in open_checkpoint(folder).tensors]
        answer = model_facts(read_config(folder), names, folder).as_json()
    except PipelineError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
