"""Run by a process: decodes a share of an artifact's weights; see `decoded.py`."""

from __future__ import annotations

from nf4_pipeline.progress import Reporter
from nf4_pipeline.readers.decoded import DecodeReply, DecodeRequest, compare_share


def run(request: DecodeRequest, reporter: Reporter) -> DecodeReply:
    """What is wrong with the first weight of the share that is, or nothing."""
    try:
        return DecodeReply(compare_share(request.artifact, request.shapes))
    except (KeyError, ValueError, IndexError, OSError) as error:
        return DecodeReply(f"{type(error).__name__}: {error}")
