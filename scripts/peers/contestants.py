"""Who takes part, with which versions and settings.

Settings are those that a peer's own documentation starts with, for 4 bits on a CPU. Peers that
calibrate read the very tokens that ours reads: 64 sequences of 256, written by the 16-bit model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

TORCH: Final = "torch==2.13.0"


@dataclass(frozen=True)
class Environment:
    """A virtual environment of a peer's own.

    Attributes:
        packages: exact versions that are installed after torch.
        torch: of it.
    """

    packages: tuple[str, ...]
    torch: str = TORCH


@dataclass(frozen=True)
class Contestant:
    """One row of the table.

    Attributes:
        name: by which the command line knows it.
        label: in the table.
        driver: the file in drivers/ that quantizes and decodes.
        environment: by name; empty for the one in which this package runs.
        settings: for the driver; of ours, options of `nf4 quantize`.
        calibrated: whether it reads tokens.
        note: what a reader of the table has to know.
    """

    name: str
    label: str
    driver: str
    environment: str
    settings: dict[str, Any] = field(default_factory=dict)
    calibrated: bool = False
    note: str = ""


ENVIRONMENTS: Final = {
    "bitsandbytes": Environment(
        ("bitsandbytes==0.50.2", "transformers==4.57.6", "accelerate==1.15.0")
    ),
    "auto-round": Environment(("auto-round==0.16.1", "transformers==5.24.0")),
    "llmcompressor": Environment(("llmcompressor==0.14.0.1", "transformers==5.17.0")),
    "gptqmodel": Environment(("gptqmodel==7.6.0", "transformers==5.24.0")),
    "llama.cpp": Environment(("transformers==4.57.6", "sentencepiece==0.2.1")),
}

CONTESTANTS: Final = (
    Contestant("nf4", "nf4-pipeline, round to nearest", "bitsandbytes_stock.py", ""),
    Contestant(
        "nf4-calibrated", "nf4-pipeline, `--calibrate self`", "bitsandbytes_stock.py", "",
        {"--calibrate": "self"}, calibrated=True,
    ),
    Contestant(
        "nf4-extra", "nf4-pipeline, `--calibrate self --extra-bytes 5%`",
        "bitsandbytes_stock.py", "",
        {"--calibrate": "self", "--extra-bytes": "5%"}, calibrated=True,
        note="the most sensitive layers stay in 16 bit",
    ),
    Contestant(
        "bitsandbytes", "bitsandbytes, NF4, double quantization", "bitsandbytes_stock.py",
        "bitsandbytes",
        note="with transformers 4.57.6: 5.5 and newer quantize nothing in a Falcon",
    ),
    Contestant(
        "autoround-rtn", "AutoRound, W4A16 group 128, round to nearest", "auto_round_w4.py",
        "auto-round", {"scheme": "W4A16", "iters": 0},
    ),
    Contestant(
        "autoround", "AutoRound, W4A16 group 128, 200 steps", "auto_round_w4.py", "auto-round",
        {"scheme": "W4A16"}, calibrated=True,
    ),
    Contestant(
        "llmcompressor-w4a16", "llm-compressor, model-free, W4A16 group 128",
        "llm_compressor.py", "llmcompressor", {"scheme": "W4A16"},
    ),
    Contestant(
        "llmcompressor-nvfp4", "llm-compressor, model-free, NVFP4A16", "llm_compressor.py",
        "llmcompressor", {"scheme": "NVFP4A16"},
    ),
    Contestant(
        "llmcompressor-fp8", "llm-compressor, model-free, FP8_DYNAMIC", "llm_compressor.py",
        "llmcompressor", {"scheme": "FP8_DYNAMIC"},
        note="8 bits; activations, which its kernels round to 8 bits too, stay as they are here",
    ),
    Contestant(
        "llmcompressor-gptq", "llm-compressor, GPTQ, W4A16 group 128", "llm_compressor.py",
        "llmcompressor", {"scheme": "W4A16", "gptq": True}, calibrated=True,
    ),
    Contestant(
        "gptqmodel", "GPTQModel, GPTQ 4 bit group 128", "gptqmodel_w4.py", "gptqmodel",
        {"bits": 4, "group_size": 128}, calibrated=True,
        note="7.6.0: 7.7.0 asks for a newer torch than the others were run with",
    ),
    Contestant(
        "llamacpp-iq4_nl", "llama.cpp, IQ4_NL", "llama_cpp.py", "llama.cpp", {"type": "IQ4_NL"},
        note="without an importance matrix; embeddings are quantized, too",
    ),
    Contestant(
        "llamacpp-q4_k_m", "llama.cpp, Q4_K_M", "llama_cpp.py", "llama.cpp", {"type": "Q4_K_M"},
        note="without an importance matrix; embeddings are quantized, too",
    ),
)  # fmt: skip
