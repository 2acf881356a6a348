"""Round to nearest on a CUDA device, in one pass: codes, scales, and the sums that an error needs.

Its arithmetic is that of `nf4_pipeline.nf4.cpu`, step by step and without fused multiply-adds, so
each step rounds as it does on a CPU.
"""

from __future__ import annotations

import threading
from typing import Any, Final

import triton
import triton.language as tl

_BLOCKS: Final = 32  # blocks of 64 weights that one program takes
_COMPILING: Final = threading.Lock()
_compiled: Final[set[tuple[Any, Any]]] = set()


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["sums"])  # type: ignore[untyped-decorator]
def _kernel(weights, levels, midpoints, packed, absmax, sums, blocks, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    valid = row < blocks
    mask = valid[:, None]
    pair = row[:, None].to(tl.int64) * 32 + tl.arange(0, 32)[None, :]
    w_high = tl.load(weights + 2 * pair, mask=mask, other=1.0).to(tl.float32)
    w_low = tl.load(weights + 2 * pair + 1, mask=mask, other=1.0).to(tl.float32)
    # Without the sign, the order of the bits is that of the magnitudes, and a NaN is the largest.
    bits_high = w_high.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits_low = w_low.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(tl.maximum(bits_high, bits_low), axis=1).to(tl.float32, bitcast=True)
    tl.store(absmax + row, largest, mask=valid)
    inverse = tl.math.div_rn(1.0, largest)[:, None]
    x_high = w_high * inverse
    x_low = w_low * inverse
    c_high = tl.zeros_like(bits_high)
    c_low = tl.zeros_like(bits_low)
    for i in tl.static_range(15):
        midpoint = tl.load(midpoints + i)
        c_high += (x_high > midpoint).to(tl.int32)
        c_low += (x_low > midpoint).to(tl.int32)
    tl.store(packed + pair, (c_high << 4 | c_low).to(tl.uint8), mask=mask)
    high = tl.load(levels + c_high)
    low = tl.load(levels + c_low)
    d_high = tl.floor((x_high - high) * 32768.0 + 0.5).to(tl.int32)
    d_low = tl.floor((x_low - low) * 32768.0 + 0.5).to(tl.int32)
    v_high = tl.floor(high * 4096.0 + 0.5).to(tl.int32)
    v_low = tl.floor(low * 4096.0 + 0.5).to(tl.int32)
    tl.store(sums + 3 * row, tl.sum(d_high * d_high + d_low * d_low, axis=1), mask=valid)
    tl.store(sums + 3 * row + 1, tl.sum(d_high * v_high + d_low * v_low, axis=1), mask=valid)
    tl.store(sums + 3 * row + 2, tl.sum(v_high * v_high + v_low * v_low, axis=1), mask=valid)


def round_blocks(
    weights: Any, levels: Any, midpoints: Any, packed: Any, absmax: Any, sums: Any
) -> None:
    """Rounds whole blocks, as `nf4_pipeline.nf4.cpu.quantize_blocks` does.

    The bits are the same if no scale or reciprocal is zero or nearly subnormal.

    Args:
        weights: bfloat16, float16 or float32 [n], n a multiple of 64.
        levels: float32 [16].
        midpoints: float32 [15], between the levels.
        packed: receives two codes a byte, uint8 [n / 2].
        absmax: receives the scales, float32 [n / 64]; NaN or infinity for a block that holds one.
        sums: receives sums of d^2, d * level and level^2 per block, int32 [n / 64, 3].
    """
    blocks = absmax.numel()
    grid = (triton.cdiv(blocks, _BLOCKS),)

    def launch() -> None:
        _kernel[grid](
            weights,
            levels,
            midpoints,
            packed,
            absmax,
            sums,
            blocks,
            BLOCKS=_BLOCKS,
            enable_fp_fusion=False,
        )

    kind = (weights.dtype, weights.device)
    if kind in _compiled:
        launch()
        return
    with _COMPILING:  # once, not by each thread
        launch()
        _compiled.add(kind)
