"""GPTQModel: GPTQ with its defaults."""

from __future__ import annotations

import json
import os
from pathlib import Path

import common


def quantize(request: common.Request) -> None:
    """`settings` go to its QuantizeConfig."""
    common.falcon_linear_is_linear()
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # two cores give it one, with which it ends
    from gptqmodel import GPTQModel, QuantizeConfig

    rows = common.calibration_rows(request)
    data = [{"input_ids": row, "attention_mask": row * 0 + 1} for row in rows]
    config = QuantizeConfig(**request["settings"])
    model = GPTQModel.load(request["source"], config, device="cpu")
    model.quantize(data, batch_size=8)
    model.save(request["out"])


def decode(request: common.Request) -> common.Decoded:
    """The packing of GPTQ, of the version that its config names."""
    config = json.loads(Path(request["out"], "config.json").read_text("utf-8"))
    version = config["quantization_config"]["checkpoint_format"]
    offset = {"gptq": 1, "gptq_v2": 0}[version]
    return common.decode_gptq(common.read(request["out"]), offset)


if __name__ == "__main__":
    common.run(quantize, decode)
