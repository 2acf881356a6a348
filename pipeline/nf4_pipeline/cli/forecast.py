"""What a person sees of `nf4 build --dry-run`."""

from __future__ import annotations

from typing import Final

from nf4_pipeline.cli.terminal import say, say_brief
from nf4_pipeline.report.formatting import both_units, plain_size
from nf4_pipeline.stages.forecast import Forecast, Space

_A_NETWORK: Final = 100_000_000
"""Bytes a second, of a good one."""


def show_forecast(found: Forecast, *, verbose: bool = False) -> None:
    """Prints it; each file, too, if all is asked for."""
    totals, commit = found.totals, found.source.commit
    say()
    say(f"  source      {found.source.name}" + (f" at commit {commit[:12]}" if commit else ""))
    say_brief(f"  weights     {both_units(found.source_bytes)}, {_fetched(found)}")
    say_brief(
        f"  artifact    {both_units(totals.artifact_bytes)}: {1 - totals.ratio:.1%} smaller, in "
        f"{len(found.files)} files"
    )
    if found.extra_bytes:
        say_brief(f"              and up to {plain_size(found.extra_bytes)} of --extra-bytes")
    say_brief(
        f"  in 4 bit    {totals.tensors.quantized} tensors, "
        f"{totals.bits_per_quantized_weight:.3f} bits a weight"
    )
    for title, groups in (("in 16 bit", found.kept), ("left out", found.dropped)):
        for reason, nbytes in groups.items():
            say_brief(f"  {title:<11} {plain_size(nbytes)}: {reason}")
            title = ""
    say_brief(f"  memory      {plain_size(found.memory_bytes)} to quantize, and the libraries")
    spaces = [found.builds]
    if found.hub_cache is not None and not found.window_bytes:
        spaces.insert(0, found.hub_cache)
    for title, space in zip(("disk", ""), spaces, strict=False):
        say_brief(f"  {title:<11} {_space(space)}")
    if found.lying_bytes:
        say_brief(
            f"              and {plain_size(found.quantized_bytes)} of memory (/dev/shm) to verify "
            "the result, of which the disk keeps nothing"
        )
    took = ", ".join(f"{name} {value:.1f} s" for name, value in found.seconds.items())
    say_brief(f"  time        {took}, as fast as these processors hash and quantize")
    if found.fetch_bytes:
        wait = f"{found.fetch_bytes / _A_NETWORK:.0f} s"
        say_brief(f"              and {wait} to fetch the weights at {plain_size(_A_NETWORK)}/s")
    if verbose:
        for name, nbytes in found.files.items():
            say(f"  {nbytes:>18,}  {name}")
    if not found.fits:
        say("  Error: there is too little room on the disk.")


def _fetched(found: Forecast) -> str:
    if found.hub_cache is None:
        return "here"
    if not found.fetch_bytes:
        return "all in the Hub cache"
    if found.window_bytes:
        again = ", to be made again," if found.lying_bytes else ""
        return (
            f"streamed: fetched once to be quantized, and once more{again} to verify; "
            f"{plain_size(found.fetch_bytes)} in all"
        )
    return f"{plain_size(found.fetch_bytes)} of them still to be fetched"


def _space(space: Space) -> str:
    return f"{plain_size(space.needed)} in {space.folder}, where {plain_size(space.free)} are free"
