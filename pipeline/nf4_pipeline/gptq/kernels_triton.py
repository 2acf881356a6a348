"""`nf4_pipeline.gptq.kernels_cpu` on a CUDA device: the same steps in the same order, bit for bit.

Nothing is fused, sums go from the first to the last, and divisions are rounded to nearest, so the
same factor gives the same codes as on a CPU. One program of `_round_block` takes one row, tries all
scales of its block side by side, each in a thread of its own, and keeps what the best one gave.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl

from nf4_pipeline.nf4 import BLOCK_SIZE
from nf4_pipeline.nf4.codebook import NF4_LEVELS, NF4_MIDPOINTS, SCALE_LEVELS, SCALE_MIDPOINTS

_TRIED: Final = 64
_ROWS: Final = 64
_WIDE: Final = 128
# So that two programs of `_propagate` fit a processor; AMD's compiler knows no such limit.
_TWO_FIT: Final = {} if torch.version.hip else {"maxnreg": 128}


@triton.jit
def _code(x, midpoints):
    """The number of NF4 midpoints below x, by bisection."""
    code = tl.where(x > tl.load(midpoints + 7), 8, 0)
    code += tl.where(x > tl.load(midpoints + code + 3), 4, 0)
    code += tl.where(x > tl.load(midpoints + code + 1), 2, 0)
    code += tl.where(x > tl.load(midpoints + code), 1, 0)
    return code


@triton.jit
def _scale_code(scale, nested, limit, midpoints, levels):
    """The nearest of the 256 levels, or the next one within the limit; zero if there is none."""
    scale = tl.minimum(tl.maximum(scale, -limit), limit)
    x = tl.math.div_rn(scale, tl.maximum(nested, 1.1754943508222875e-38))
    low = tl.zeros_like(x).to(tl.int32)
    for step in tl.static_range(8):
        half = 128 >> step
        low += tl.where(tl.load(midpoints + low + half - 1) < x, half, 0)
    beyond = tl.abs(tl.load(levels + low) * nested) > limit
    low += tl.where(beyond, tl.where(low > 127, -1, 1), 0)
    code = tl.where(low == 127, tl.where(scale >= 0, 128, 126), low)
    return tl.where(tl.abs(tl.load(levels + code) * nested) > limit, 127, code)


@triton.jit
def _start_scales(
    weights,
    diagonal,
    candidates,
    midpoints,
    levels,
    limits,
    scales,
    blocks,
    columns,
    COUNT: tl.constexpr,
    SIGNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = block < blocks
    first = block.to(tl.int64) * 64
    column = (first % columns).to(tl.int32)
    top = tl.zeros([ROWS], tl.float32)
    for i in range(64):
        top = tl.maximum(
            top, tl.abs(tl.load(weights + first + i, mask=valid, other=0.0).to(tl.float32))
        )
    limit = tl.load(limits + block, mask=valid, other=1.0)
    best = tl.full([ROWS], float("inf"), tl.float32)
    chosen = tl.minimum(top, limit)
    for candidate in range(SIGNS * COUNT):
        scale = tl.minimum(top * tl.load(candidates + candidate % COUNT), limit)
        scale = tl.where(candidate >= COUNT, -scale, scale)
        inverse = tl.math.div_rn(1.0, scale)
        total = tl.zeros([ROWS], tl.float32)
        for i in range(64):
            value = tl.load(weights + first + i, mask=valid, other=0.0).to(tl.float32)
            off = value - scale * tl.load(levels + _code(value * inverse, midpoints))
            total += tl.load(diagonal + column + i, mask=valid, other=0.0) * off * off
        better = (total < best) & (top >= 1.1754943508222875e-38)
        best = tl.where(better, total, best)
        chosen = tl.where(better, scale, chosen)
    tl.store(scales + block, chosen, mask=valid)


@triton.jit(do_not_specialize=["ahead"])
def _round_block(
    weights,
    factor,
    nested,
    scales,
    limits,
    candidates,
    midpoints,
    levels,
    scale_midpoints,
    scale_levels,
    chosen,
    codes,
    errors,
    costs,
    columns,
    per_row,
    start,
    block,
    ahead,
    COUNT: tl.constexpr,
    SIGNS: tl.constexpr,
    TRIED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    trial = tl.arange(0, TRIED)
    number = row * per_row + block
    largest = tl.load(nested + (ahead + number) // 256)
    own = tl.load(scales + number)
    top = tl.max(tl.abs(tl.load(weights + row * columns + start + tl.arange(0, 64))), axis=0)
    sign = tl.where(own >= 0, 1.0, -1.0)
    share = tl.load(candidates + (trial - 1 + COUNT) % COUNT)
    wanted = tl.where(trial <= COUNT, sign, -sign) * share * top
    wanted = tl.where(trial == 0, own, wanted)
    limit = tl.load(limits + number)
    scale_codes = _scale_code(wanted, largest, limit, scale_midpoints, scale_levels)
    scale = tl.load(scale_levels + scale_codes) * largest
    usable = (tl.abs(scale) >= 1.1754943508222875e-38) & (trial <= SIGNS * COUNT)
    scale = tl.where(usable, scale, 1.0)
    inverse = tl.math.div_rn(1.0, scale)
    # Broadcast from one line, so that each thread has all of one trial; as eight times eight, since
    # only what has a number that the compiler knows is taken out of registers for nothing.
    eight = tl.arange(0, 8)
    across = eight[:, None] * 8 + eight[None, :]
    line = tl.load(weights + row * columns + start + across)
    values = tl.broadcast_to(line[:, :, None], [8, 8, TRIED])  # where a step is done, its errors
    found = tl.zeros([8, TRIED], tl.int32)  # eight codes each
    cost = tl.zeros([TRIED], tl.float32)
    for chunk in range(8):
        here = eight[:, None, None] == chunk
        near = tl.sum(tl.where(here, values, 0.0), axis=0)
        packed = tl.zeros([TRIED], tl.int32)
        for j in tl.static_range(8):
            value = tl.sum(tl.where(eight[:, None] == j, near, 0.0), axis=0)
            # The last trial is for blocks of which no scale can be stored: all is rounded to zero.
            code = tl.where(trial == TRIED - 1, 7, _code(value * inverse, midpoints))
            line_of = factor + (start + chunk * 8 + j).to(tl.int64) * columns + start
            diagonal = tl.load(line_of + chunk * 8 + j) + tl.zeros_like(scale)
            error = tl.math.div_rn(value - scale * tl.load(levels + code), diagonal)
            cost += error * error
            packed += code << (4 * j)
            near -= error[None, :] * tl.load(line_of + chunk * 8 + eight)[:, None]
            near = tl.where(eight[:, None] == j, error[None, :], near)
            values -= error[None, None, :] * tl.load(line_of + across)[:, :, None]
        values = tl.where(here, near[None, :, :], values)
        found = tl.where(eight[:, None] == chunk, packed[None, :], found)
    tried = tl.where(usable & (cost < float("inf")), cost, float("inf"))
    least = tl.min(tried, axis=0)
    best = tl.where(least < float("inf"), tl.argmin(tried, axis=0, tie_break_left=True), TRIED - 1)
    taken = tl.sum(tl.where(trial == best, scale_codes, 0), axis=0)
    tl.store(chosen + number, tl.where(least < float("inf"), taken, 127).to(tl.uint8))
    own_codes = tl.sum(tl.where(trial[None, :] == best, found, 0), axis=1)
    own_codes = (own_codes[:, None] >> (4 * eight[None, :])) & 15
    tl.store(codes + row * columns + start + across, own_codes.to(tl.uint8))
    own_errors = tl.sum(tl.where(trial[None, None, :] == best, values, 0.0), axis=2)
    tl.store(errors + row * 64 + across, own_errors)
    own_cost = tl.sum(tl.where(trial == best, cost, 0.0), axis=0)
    tl.store(costs + row, tl.load(costs + row) + own_cost)


@triton.jit
def _propagate(
    weights, factor, errors, rows, columns, start, ROWS: tl.constexpr, WIDE: tl.constexpr
):
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = start + 64 + tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    valid, inside = row < rows, column < columns
    mask = valid[:, None] & inside[None, :]
    place = weights + row[:, None] * columns + column[None, :]
    values = tl.load(place, mask=mask, other=0.0)
    for j in range(0, 64, 4):
        taken = errors + row * 64 + j
        line = factor + (start + j).to(tl.int64) * columns + column
        total = (
            tl.load(taken, mask=valid, other=0.0)[:, None]
            * tl.load(line, mask=inside, other=0.0)[None, :]
        )
        for other in tl.static_range(1, 4):
            e = tl.load(taken + other, mask=valid, other=0.0)
            f = tl.load(line + other * columns, mask=inside, other=0.0)
            total += e[:, None] * f[None, :]
        values -= total
    tl.store(place, values, mask=mask)


class Tables:
    """Levels and midpoints on a device."""

    def __init__(self, device: torch.device) -> None:
        self.levels = torch.from_numpy(NF4_LEVELS).to(device)
        self.midpoints = torch.from_numpy(NF4_MIDPOINTS).to(device)
        self.scale_levels = torch.from_numpy(SCALE_LEVELS).to(device)
        self.scale_midpoints = torch.from_numpy(SCALE_MIDPOINTS).to(device)


def start_scales(
    weight: Any, diagonal: Any, candidates: Any, signs: int, limits: Any, tables: Tables
) -> Any:
    """See `nf4_pipeline.gptq.kernels_cpu.start_scales`.

    Args:
        weight: [rows, columns] of any float dtype, columns a multiple of 64.
        diagonal: float32 [columns].
        candidates: float32 [candidates].
        signs: 1 or 2.
        limits: float32 [rows * columns / 64].
        tables: on the weight's device.

    Returns:
        float32 [rows * columns / 64].
    """
    blocks = weight.numel() // BLOCK_SIZE
    scales = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    _start_scales[(triton.cdiv(blocks, _WIDE),)](
        weight, diagonal, candidates, tables.midpoints, tables.levels, limits, scales, blocks,
        weight.shape[1], COUNT=len(candidates), SIGNS=signs, ROWS=_WIDE,
        enable_fp_fusion=False,
    )  # fmt: skip
    return scales


def round_rows(
    weights: Any,
    factor: Any,
    blocks: list[int],
    scales: Any,
    limits: Any,
    nested: Any,
    candidates: Any,
    signs: int,
    tables: Tables,
    first: int = 0,
) -> tuple[Any, Any, Any]:
    """See `nf4_pipeline.gptq.kernels_cpu.round_rows`.

    Args:
        weights: float32 [rows, columns], columns in the order of the factor; destroyed.
        factor: float32 [columns, columns], with zeros below the diagonal.
        blocks: which block stands at each place.
        scales: float32 [rows * blocks].
        limits: float32 [rows * blocks].
        nested: float32, of the whole matrix.
        candidates: float32 [candidates], at most 31 of them.
        signs: 1 or 2.
        tables: on the device.
        first: the place of the first row in the matrix.

    Returns:
        codes uint8 [rows, columns] in the order of the factor, the scales' codes uint8
        [rows * blocks] in the matrix's order, and the cost of each row, float32.
    """
    rows, columns = weights.shape
    device = weights.device
    if signs * len(candidates) + 1 >= _TRIED:
        raise ValueError(f"{signs * len(candidates) + 1} scales to try; at most {_TRIED - 1}.")
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=device)
    chosen = torch.empty(rows * len(blocks), dtype=torch.uint8, device=device)
    errors = torch.empty((rows, BLOCK_SIZE), dtype=torch.float32, device=device)
    costs = torch.zeros(rows, dtype=torch.float32, device=device)
    common = {"enable_fp_fusion": False}
    ahead = first * len(blocks)
    for place, block in enumerate(blocks):
        start = place * BLOCK_SIZE
        _round_block[(rows,)](
            weights, factor, nested, scales, limits, candidates, tables.midpoints, tables.levels,
            tables.scale_midpoints, tables.scale_levels, chosen, codes, errors, costs, columns,
            len(blocks), start, block, ahead, COUNT=len(candidates), SIGNS=signs, TRIED=_TRIED,
            num_warps=2, **common,
        )  # fmt: skip
        behind = columns - start - BLOCK_SIZE
        if behind:
            _propagate[(triton.cdiv(behind, _WIDE), triton.cdiv(rows, _ROWS))](
                weights, factor, errors, rows, columns, start,
                ROWS=_ROWS, WIDE=_WIDE, num_warps=8, **_TWO_FIT, **common,
            )  # fmt: skip
    return codes, chosen, costs
