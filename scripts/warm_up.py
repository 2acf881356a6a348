"""Has Python and numba compile what a build uses, so that its first run does not.

    python scripts/warm_up.py

Two processes: one imports the libraries, the other compiles the CPU kernels.
"""

from __future__ import annotations

import subprocess
import sys

IMPORTS = """
from importlib import import_module

from nf4_pipeline.quiet_libraries import quiet_libraries

quiet_libraries()
for name in (
    "nf4_pipeline.cli.summary",
    "nf4_pipeline.job",
    "nf4_pipeline.runtime.prompt_worker",
    "nf4_pipeline.verification.artifact_worker",
    "nf4_pipeline.verification.source_worker",
    "matplotlib.figure",
    "jinja2",
    "bitsandbytes",
    "transformers.models.auto.modeling_auto",
    "transformers.models.falcon.modeling_falcon",
    "transformers.models.llama.modeling_llama",
    "transformers.quantizers.quantizer_bnb_4bit",
):
    import_module(name)
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
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
    running = [subprocess.Popen([sys.executable, "-c", code]) for code in (IMPORTS, KERNELS)]
    sys.exit(max(abs(process.wait()) for process in running))


if __name__ == "__main__":
    main()
