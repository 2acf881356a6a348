"""Double quantization of the scales, with one result on every machine.

    offset         = float32(mean of absmax), summed from the first to the last in float64
    v              = absmax - offset                                     (float32)
    nested_absmax  = max |v| over 256 consecutive scales                 (float32)
    code           = number of midpoints strictly below v * (1 / max(nested_absmax, 1e-38))

bitsandbytes takes the mean in float32 with a sum whose order depends on the device, so its offset
and about 0.15 % of its codes differ between a CPU and a GPU. The rule above does not: the order is
written down, and a tie (a value on a midpoint) takes the lower level. Readers see no difference:
they compute `scale = level[code] * nested_absmax + offset` either way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nf4_pipeline.nf4 import NESTED_BLOCK_SIZE


@dataclass(frozen=True)
class NestedScales:
    """The scales of one weight as they are stored.

    Attributes:
        codes: uint8 [blocks].
        absmax: float32 [ceil(blocks / 256)].
        offset: the mean that was taken off before rounding.
    """

    codes: NDArray[np.uint8]
    absmax: NDArray[np.float32]
    offset: np.float32

    def scales(self) -> NDArray[np.float32]:
        """The scales that every reader will compute, float32 [blocks]."""
        from nf4_pipeline.nf4 import cpu  # and numba: half a second, only where there are scales

        scales = np.empty(self.codes.size, np.float32)
        cpu.nested_dequantize(self.codes, self.absmax, self.offset, scales)
        return scales

    def divided_by(self, power_of_two: int) -> NestedScales:
        """Those of the weight divided by that: the same codes, exactly."""
        absmax = self.absmax / np.float32(power_of_two)
        return NestedScales(self.codes, absmax, self.offset / np.float32(power_of_two))


def nested_blocks_of(blocks: int) -> int:
    """How many nested scales `blocks` consecutive scales have; the last group may be ragged."""
    return -(-blocks // NESTED_BLOCK_SIZE)


def double_quantize(absmax: NDArray[np.float32]) -> NestedScales:
    """Rounds float32 scales to 8 bits.

    Args:
        absmax: the scales of one weight in the order of its blocks, float32 [blocks], blocks > 0.
    """
    from nf4_pipeline.nf4 import cpu

    codes = np.empty(absmax.size, np.uint8)
    nested = np.empty(nested_blocks_of(absmax.size), np.float32)
    offset = cpu.nested_quantize(absmax, codes, nested)
    return NestedScales(codes=codes, absmax=nested, offset=offset)
