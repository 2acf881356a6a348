"""bitsandbytes as its documentation shows it: NF4, double quantization, through transformers."""

from __future__ import annotations

import common
import torch


def quantize(request: common.Request) -> None:
    """Quantizes while loading, and saves."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        request["source"], quantization_config=config, dtype="auto", device_map={"": "cpu"}
    )
    model.save_pretrained(request["out"])
    AutoTokenizer.from_pretrained(request["source"]).save_pretrained(request["out"])


def decode(request: common.Request) -> common.Decoded:
    """By bitsandbytes' own functions; the artifacts of this package have the same layout."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    end = ".quant_state.bitsandbytes__nf4"
    tensors = common.read(request["out"])
    found: common.Decoded = {}
    for weight in [name.removesuffix(end) for name in tensors if name.endswith(end)]:
        parts = {name: t for name, t in tensors.items() if name.startswith(f"{weight}.")}
        nbytes = sum(t.numel() * t.element_size() for t in (*parts.values(), tensors[weight]))
        state = QuantState.from_dict(parts, device=torch.device("cpu"))
        state.dtype = torch.float32
        found[weight] = (dequantize_4bit(tensors[weight], state), nbytes)
    return found


if __name__ == "__main__":
    common.run(quantize, decode)
