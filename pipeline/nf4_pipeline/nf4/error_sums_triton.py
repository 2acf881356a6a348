"""The sums that an error needs, on a CUDA device: one pass over weights and codes."""

from __future__ import annotations

from typing import Any, Final

import triton
import triton.language as tl

_BLOCKS: Final = 32  # blocks of 64 weights that one program takes


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(weights, packed, scales, levels, sums, blocks, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    valid = row < blocks
    pair = row[:, None] * 32 + tl.arange(0, 32)[None, :]
    mask = valid[:, None]
    both = tl.load(packed + pair, mask=mask, other=0x77).to(tl.int32)
    inverse = tl.math.div_rn(1.0, tl.load(scales + row, mask=valid, other=1.0))[:, None]
    high = tl.load(levels + (both >> 4))
    low = tl.load(levels + (both & 15))
    x_high = tl.load(weights + 2 * pair, mask=mask, other=0.0).to(tl.float32) * inverse
    x_low = tl.load(weights + 2 * pair + 1, mask=mask, other=0.0).to(tl.float32) * inverse
    d_high = tl.floor((x_high - high) * 32768.0 + 0.5).to(tl.int32)
    d_low = tl.floor((x_low - low) * 32768.0 + 0.5).to(tl.int32)
    v_high = tl.floor(high * 4096.0 + 0.5).to(tl.int32)
    v_low = tl.floor(low * 4096.0 + 0.5).to(tl.int32)
    spoiled = tl.sum(((x_high != x_high) | (x_low != x_low)).to(tl.int32), axis=1) > 0
    own = tl.sum(d_high * d_high + d_low * d_low, axis=1)
    cross = tl.sum(d_high * v_high + d_low * v_low, axis=1)
    level = tl.sum(v_high * v_high + v_low * v_low, axis=1)
    tl.store(sums + 3 * row, tl.where(spoiled, -1, own), mask=valid)
    tl.store(sums + 3 * row + 1, cross, mask=valid)
    tl.store(sums + 3 * row + 2, level, mask=valid)


def block_sums(weights: Any, packed: Any, scales: Any, levels: Any, sums: Any) -> None:
    """Sums of d^2, d * level and level^2 per block, in the fixed point of `nf4_pipeline.nf4.cpu`.

    Args:
        weights: bfloat16 or float16 [n], n a multiple of 64.
        packed: uint8 [n / 2], their codes.
        scales: float32 [n / 64], all of them normal numbers.
        levels: float32 [16].
        sums: receives the result, int32 [n / 64, 3]; -1 stands first for a block that holds a NaN.
    """
    blocks = scales.numel()
    grid = (triton.cdiv(blocks, _BLOCKS),)
    # Without fused multiply-adds, each step rounds as it does on a CPU.
    _kernel[grid](
        weights, packed, scales, levels, sums, blocks, BLOCKS=_BLOCKS, enable_fp_fusion=False
    )
