"""What a build takes, from what there is to do and how fast hosts, disks and networks are.

Plain arithmetic; docs/scaling.md holds it against measurements and says what it leaves out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nf4_pipeline.documents import Document


@dataclass(frozen=True, kw_only=True)
class Rates(Document):
    """What a host does in a second, all processors together.

    Attributes:
        sha256: bytes hashed.
        weights: weights quantized.
    """

    sha256: int
    weights: int


@dataclass(frozen=True, kw_only=True)
class Work:
    """What there is to do.

    Attributes:
        source_bytes: of the files of weights.
        largest_source: bytes of the largest of them.
        weights: that are quantized.
        output_bytes: of the quantized files.
        files: how many these are.
    """

    source_bytes: int
    largest_source: int
    weights: int
    output_bytes: int
    files: int


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """Who does it: equal hosts, or equal shares of one.

    Attributes:
        rates: of one of them.
        processors: of one of them.
        count: how many there are.
        network: bytes a second from the Hub to the first one, which fetches.
        disk_read: bytes a second that all of them together read from their common file system.
        disk_write: bytes a second that all of them together write there.
        start: seconds until a process, with its libraries, begins to work.
        efficiency: share of their rates that is left while they also move bytes, in and out.
    """

    rates: Rates
    processors: int
    count: int = 1
    network: float = math.inf
    disk_read: float = math.inf
    disk_write: float = math.inf
    start: float = 0.0
    efficiency: float = 1.0


def download_seconds(work: Work, hosts: Hosts) -> float:
    """The first host fetches the source and hashes it.

    A file is fetched while others are hashed, and each is hashed by one thread, so that few files
    do not keep all processors busy.
    """
    one = hosts.rates.sha256 / hosts.processors
    hashing = max(work.source_bytes / hosts.rates.sha256, work.largest_source / one)
    if math.isinf(hosts.network):
        return max(hashing, work.source_bytes / hosts.disk_read)
    return max(hashing, work.source_bytes / min(hosts.network, hosts.disk_write))


def quantize_seconds(work: Work, hosts: Hosts) -> float:
    """All hosts make files, each file by one of them.

    A worker reads, computes and writes at the same time, so that the slowest of these decides; the
    one with the most files ends last.
    """
    most_files = math.ceil(work.files / hosts.count)
    # Each output file is hashed, and so is each of its tensors.
    computing = work.weights / hosts.rates.weights + 2 * work.output_bytes / hosts.rates.sha256
    computing /= hosts.efficiency
    passing = work.source_bytes / hosts.disk_read + work.output_bytes / hosts.disk_write
    return hosts.start + max(computing * most_files / work.files, passing)


def merge_seconds(work: Work, hosts: Hosts) -> float:
    """Where there are several, one host hashes all files again and completes the record."""
    if hosts.count == 1:
        return 0.0
    return work.output_bytes / min(hosts.rates.sha256, hosts.disk_read)
