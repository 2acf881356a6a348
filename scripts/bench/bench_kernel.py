"""Times the CPU kernel against bitsandbytes' CPU operation on one weight, bits compared."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import click
import numpy as np
from kept_ratios import show_beside_kept
from nf4_pipeline.nf4 import BLOCK_SIZE, cpu
from nf4_pipeline.nf4.packing import blocks_of

_CHUNK = 2**20  # weights a thread takes at a time: 2 MiB of bfloat16


@click.command()
@click.option("--rows", default=18176, show_default=True)
@click.option("--columns", default=4544, show_default=True)
@click.option("--threads", default=len(os.sched_getaffinity(0)), show_default=True)
@click.option("--rounds", default=5, show_default=True)
def main(rows: int, columns: int, threads: int, rounds: int) -> None:
    """Round a bfloat16 weight of falcon-7b's largest shape."""
    import bitsandbytes  # noqa: F401  # registers its operators
    import torch

    count = rows * columns
    weights = (torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    bits = weights.view(torch.int16).numpy().view(np.uint16)
    packed = np.zeros(-(-count // 2), np.uint8)
    absmax = np.zeros(blocks_of(count), np.float32)
    sums = np.zeros((blocks_of(count), 3), np.int32)

    def part(start: int) -> None:
        stop = min(start + _CHUNK, count)
        blocks = slice(start // BLOCK_SIZE, blocks_of(stop))
        codes = packed[start // 2 : -(-stop // 2)]
        cpu.quantize_blocks(bits[start:stop], "bfloat16", codes, absmax[blocks], sums[blocks])

    def ours() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(part, range(0, count, _CHUNK)))

    def theirs() -> None:
        found = torch.ops.bitsandbytes.quantize_4bit.default(weights, 64, "nf4", torch.uint8)
        result[:] = found

    result: list[torch.Tensor] = []
    ours()
    times = [(_seconds(ours), _seconds(theirs)) for _ in range(rounds)]
    mine, other = (statistics.median(column) for column in zip(*times, strict=True))
    equal = np.array_equal(result[0].numpy().reshape(-1), packed) and np.array_equal(
        result[1].numpy(), absmax
    )
    ratio = statistics.median(b / a for a, b in times)
    click.echo(f"{rows} x {columns} bfloat16, {threads} threads, {rounds} rounds, medians")
    click.echo(f"  this kernel   {mine:.3f} s   {2 * count / mine / 1e9:.2f} GB/s")
    click.echo(f"  bitsandbytes  {other:.3f} s   {2 * count / other / 1e9:.2f} GB/s")
    click.echo(f"  ratio {ratio:.1f}, codes and scales {'equal' if equal else 'DIFFER'}")
    show_beside_kept("kernel: bitsandbytes / ours", ratio)
    if not equal:
        raise SystemExit(1)


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
