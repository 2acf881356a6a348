"""Has Python and numba compile what a build uses, so that its first run does not.

    python scripts/warm_up.py

Two processes: one imports the libraries and loads the sample with them, the other compiles the CPU
kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys

LIBRARIES = """
from importlib import import_module

from nf4_pipeline.quiet_libraries import quiet_libraries

quiet_libraries()
for name in (
    "nf4_pipeline.cli.summary",
    "nf4_pipeline.job",
    "nf4_pipeline.model.probe_worker",
    "nf4_pipeline.runtime.prompt_worker",
    "nf4_pipeline.verification.artifact_worker",
    "nf4_pipeline.verification.source_worker",
    "matplotlib.figure",
    "jinja2",
    "transformers.models.llama.modeling_llama",
):
    import_module(name)

import nf4_pipeline

nf4_pipeline.load_tokenizer("sample")
nf4_pipeline.load("sample", device="cpu")
"""
KERNELS = """
import numpy as np

from nf4_pipeline.engine.finite import first_not_finite
from nf4_pipeline.nf4.rtn import round_to_nearest

for name, layout, kind in (("bfloat16", "BF16", np.uint16), ("float32", "F32", np.uint32)):
    round_to_nearest(np.zeros((64, 64), kind), name)
    first_not_finite(np.zeros(64, kind), layout)
"""


def main() -> None:
    """Runs both, and ends as the worse of them did."""
    # Who wants no compiled files of their own programs still runs this one many times.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=env) for code in (LIBRARIES, KERNELS)
    ]
    sys.exit(max(abs(process.wait()) for process in running))


if __name__ == "__main__":
    main()
