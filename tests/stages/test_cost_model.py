"""The cost model: sums that can be done by hand, and what must hold whatever the figures are."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nf4_pipeline.stages.cost_model import (
    Hosts,
    Rates,
    Work,
    download_seconds,
    merge_seconds,
    quantize_seconds,
)

GB: Final = 10**9
WORK: Final = Work(
    source_bytes=16 * GB, largest_source=2 * GB, weights=8 * GB, output_bytes=4 * GB, files=8
)
HOST: Final = Hosts(rates=Rates(sha256=2 * GB, weights=GB), processors=2)


def test_one_host_by_hand() -> None:
    assert download_seconds(WORK, HOST) == 8.0
    assert quantize_seconds(WORK, HOST) == 8.0 + 4.0
    assert merge_seconds(WORK, HOST) == 0.0


def test_one_large_file_is_hashed_by_one_thread() -> None:
    assert download_seconds(replace(WORK, largest_source=16 * GB), HOST) == 16.0


def test_a_slow_network_decides() -> None:
    assert download_seconds(WORK, replace(HOST, network=GB / 10)) == 160.0
    assert download_seconds(WORK, replace(HOST, network=100 * GB)) == 8.0
    assert download_seconds(WORK, replace(HOST, network=100 * GB, disk_write=GB)) == 16.0


def test_files_are_not_shared() -> None:
    """Three hosts with 8 files: one of them has 3 files, so it takes 3/8 of the whole."""
    took = [quantize_seconds(WORK, replace(HOST, count=count)) for count in (1, 2, 3, 4, 8, 9)]
    assert took == [12.0, 6.0, 4.5, 3.0, 1.5, 1.5]
    assert merge_seconds(WORK, replace(HOST, count=2)) == 2.0


def test_the_disk_is_the_limit_of_many() -> None:
    disk = replace(HOST, disk_read=4 * GB, disk_write=GB)
    assert [quantize_seconds(WORK, replace(disk, count=count)) for count in (1, 2, 8)] == [12, 8, 8]


sizes: Final = st.integers(1, 10**13)
speeds: Final = st.integers(10**6, 10**11)


@given(
    sizes,
    sizes,
    st.integers(1, 500),
    st.builds(
        Hosts,
        rates=st.builds(Rates, sha256=speeds, weights=speeds),
        processors=st.integers(1, 256),
        network=speeds,
        disk_read=speeds,
        disk_write=speeds,
        start=st.floats(0, 60),
    ),
    st.integers(1, 600),
)
def test_more_hosts_never_take_longer_to_quantize(
    source: int, output: int, files: int, host: Hosts, count: int
) -> None:
    work = Work(
        source_bytes=source,
        largest_source=source,
        weights=source // 2,
        output_bytes=output,
        files=files,
    )
    alone, together = (
        quantize_seconds(work, host),
        quantize_seconds(work, replace(host, count=count)),
    )
    assert together <= alone
    assert alone - host.start <= count * (together - host.start) * (1 + 1e-9)
    assert download_seconds(work, host) == download_seconds(work, replace(host, count=count))


@pytest.mark.parametrize("rate", ["sha256", "weights"])
def test_a_faster_host_is_faster(rate: str) -> None:
    faster = replace(HOST.rates, **{rate: 10 * GB})
    assert quantize_seconds(WORK, replace(HOST, rates=faster)) < quantize_seconds(WORK, HOST)
