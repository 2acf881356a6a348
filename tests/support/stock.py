"""What transformers and bitsandbytes make of a checkpoint themselves, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Linear4bit
from nf4_pipeline.runtime.bnb_cpu_fixes import repair
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.models.falcon import modeling_falcon

QUANT_STATE: Final = ".quant_state.bitsandbytes__nf4"
COMPANIONS: Final = (
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    QUANT_STATE,
)


@contextmanager
def falcon_patch() -> Iterator[None]:
    """While the body runs, Falcon's projections are what transformers >= 5.5 quantizes."""
    original = modeling_falcon.FalconLinear
    modeling_falcon.FalconLinear = torch.nn.Linear
    try:
        yield
    finally:
        modeling_falcon.FalconLinear = original


def stock_model(checkpoint: Path, dtype: str = "bfloat16", *, patched: bool = True) -> Any:
    """A checkpoint, quantized to NF4 with double quantization by stock transformers.

    Args:
        checkpoint: its folder.
        dtype: of the checkpoint; layers compute in it.
        patched: with the Falcon patch.
    """
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return _from_pretrained(checkpoint, patched, quantization_config=config)


def load_stock(artifact: Path, *, patched: bool = True) -> Any:
    """A saved artifact, loaded by stock transformers."""
    return _from_pretrained(artifact, patched)


def save_stock(checkpoint: Path, target: Path, dtype: str = "bfloat16") -> Path:
    """Writes the stock artifact of a checkpoint (with the Falcon patch)."""
    stock_model(checkpoint, dtype).save_pretrained(target)
    return target


def linear4bit(model: Any) -> set[str]:
    """The names of a model's 4-bit layers."""
    return {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def logits(model: Any, tokens: torch.Tensor, *, portable: bool = True) -> torch.Tensor:
    """What a model says after each token, float32 [texts, length, vocabulary].

    Args:
        model: 4-bit or not.
        tokens: [texts, length].
        portable: compute 4-bit layers as every processor can. On those with AVX512-BF16,
            bitsandbytes goes another way: it rounds the scales to bf16, and refuses shapes that are
            no multiples of 32 x 64. (Neither way is right for rows that are no whole blocks, with
            bitsandbytes 0.50.2; but two models with the same weights still agree.)
    """
    repair(model)  # bitsandbytes dequantizes some shapes wrongly on a CPU: see repair's module
    if portable:
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.support_avx512bf16_for_cpu = False
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=tokens).logits.float()
    return found


def _from_pretrained(folder: Path, patched: bool, **options: Any) -> Any:
    load = AutoModelForCausalLM.from_pretrained
    options |= {"dtype": "auto", "device_map": {"": "cpu"}}
    if not patched:
        return load(folder, **options).eval()
    with falcon_patch():
        return load(folder, **options).eval()


def dequantize_stock(tensors: dict[str, torch.Tensor], weight: str) -> torch.Tensor:
    """A weight as bitsandbytes reads it from its six stored tensors."""
    companions = {weight + suffix: tensors[weight + suffix] for suffix in COMPANIONS}
    state = QuantState.from_dict(companions, device=torch.device("cpu"))
    shape = state.shape
    # As one long row: bitsandbytes 0.50.2 takes the wrong scales on a CPU for rows that are no
    # whole number of blocks.
    state.shape = torch.Size([shape.numel()])
    values: torch.Tensor = dequantize_4bit(tensors[weight], state)
    return values.reshape(shape)
