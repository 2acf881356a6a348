"""llm-compressor: its path that needs no model's class and no data, or its GPTQ."""

from __future__ import annotations

import tempfile

import common

_NOT_QUANTIZED = ["lm_head", "re:.*embed.*", "re:.*ln_f$", "re:.*norm$"]


def quantize(request: common.Request) -> None:
    """`settings`: the scheme, and `gptq` if it is to be calibrated."""
    settings = request["settings"]
    if settings.get("gptq"):
        _gptq(request)
        return
    from llmcompressor import model_free_ptq

    model_free_ptq(
        model_stub=request["source"],
        save_directory=request["out"],
        scheme=settings["scheme"],
        ignore=_NOT_QUANTIZED,
        device="cpu",
    )


def _gptq(request: common.Request) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    common.falcon_linear_is_linear()
    model = AutoModelForCausalLM.from_pretrained(request["source"], dtype="auto")
    rows = [row[0].tolist() for row in common.calibration_rows(request)]
    data = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(data),
        recipe=GPTQModifier(
            targets="Linear", scheme=request["settings"]["scheme"], ignore=["lm_head"]
        ),
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
    )
    model.save_pretrained(request["out"], save_compressed=True)


def decode(request: common.Request) -> common.Decoded:
    """By the library's own dequantizer of whole checkpoints."""
    import torch
    from compressed_tensors.entrypoints.convert import convert_checkpoint
    from compressed_tensors.entrypoints.convert.converters import CompressedTensorsDequantizer

    stored = common.read(request["out"])
    with tempfile.TemporaryDirectory() as folder:
        converter = CompressedTensorsDequantizer(request["out"], dtype=torch.float32)
        convert_checkpoint(request["out"], folder, converter, device="cpu")
        plain = common.read(folder)
    found: common.Decoded = {}
    for module in {name.rpartition(".")[0] for name in stored if name.endswith("weight_scale")}:
        parts = [t for name, t in stored.items() if name.startswith(f"{module}.weight")]
        nbytes = sum(t.numel() * t.element_size() for t in parts)
        found[f"{module}.weight"] = (plain[f"{module}.weight"], nbytes)
    return found


if __name__ == "__main__":
    common.run(quantize, decode)
