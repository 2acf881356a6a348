"""What chooses codes and scales, by the kind of device that it does so on."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from nf4_pipeline.gptq.config import GptqConfig
from nf4_pipeline.gptq.device_group import DeviceGroup
from nf4_pipeline.gptq.hessian import HessianFactor
from nf4_pipeline.gptq.quantizer import GptqOnCpu, QuantizedWeight
from nf4_pipeline.gptq.quantizer_cuda import GptqOnCuda


class GptqQuantizer(Protocol):
    """Chooses codes and scales on one kind of device."""

    def quantize(
        self,
        rows: Sequence[torch.Tensor],
        factors: Sequence[HessianFactor],
        limits: NDArray[np.float32],
    ) -> QuantizedWeight:
        """Rounds a weight; what comes of it does not depend on where its rows are.

        Args:
            rows: of the weight, some on each device in order, [some, columns] of any float dtype;
                fewer than devices if there are few of them.
            factors: of its inputs' Hessian, the same on each device.
            limits: what no scale may be beyond, see `scale_limits`; float32 [blocks].
        """


def quantizer_for(group: DeviceGroup, config: GptqConfig, pool: Executor) -> GptqQuantizer:
    """What quantizes on devices of a kind; the pool gives threads of the CPU."""
    if group.lead.type == "cpu":
        return GptqOnCpu(config, pool)
    return GptqOnCuda(config, group, pool)
