"""AutoRound: rounding and clipping tuned by signed gradient descent, or round to nearest."""

from __future__ import annotations

import common


def quantize(request: common.Request) -> None:
    """With its default steps and learning rates; `iters` 0 is its round to nearest."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    common.falcon_linear_is_linear()
    rows = common.calibration_rows(request)
    AutoRound(
        request["source"],
        AutoTokenizer.from_pretrained(request["source"]),
        dataset=[{"input_ids": row, "attention_mask": row * 0 + 1} for row in rows],
        nsamples=len(rows),
        seqlen=rows[0].shape[1],
        device_map="cpu",
        **request["settings"],
    ).quantize_and_save(request["out"], format="auto_round")


def decode(request: common.Request) -> common.Decoded:
    """The packing of GPTQ's first version, which AutoRound writes for symmetric codes."""
    return common.decode_gptq(common.read(request["out"]), zero_offset=1)


if __name__ == "__main__":
    common.run(quantize, decode)
