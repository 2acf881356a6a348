"""What is said of the time that a job still needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nf4_pipeline.cli.pace import Pace, default_file
from nf4_pipeline.cli.reporting import Board, draw

SECONDS = st.floats(0, 1e5)


def job(file: Path, nbytes: int, took: list[float], *, ran: bool = True) -> None:
    pace = Pace(file)
    for number, seconds in enumerate(took, 1):
        pace.ended(number, len(took), seconds, ran=ran, nbytes=nbytes)


@given(took=st.lists(SECONDS, min_size=2, max_size=5), gone=SECONDS, share=st.floats(0.8, 1.25))
def test_the_next_job_of_that_size_is_told(
    tmp_path_factory: pytest.TempPathFactory, took: list[float], gone: float, share: float
) -> None:
    file = tmp_path_factory.mktemp("cache") / "deep" / "pace.json"
    job(file, 2**30, took)
    pace = Pace(file)
    assert pace.left(1, len(took), 0.0) is None  # how large the model is is not known yet
    pace.ended(1, len(took), took[0], ran=False, nbytes=int(share * 2**30))
    left = pace.left(2, len(took), gone)
    kept = [round(seconds, 1) for seconds in took]
    if gone > kept[1]:
        assert left is None
    else:
        assert left == pytest.approx(sum(kept[1:]) - gone)


def test_nothing_is_said_of_other_sizes_or_of_what_did_not_run(tmp_path: Path) -> None:
    file = tmp_path / "pace.json"
    job(file, 2**30, [1.0, 2.0, 3.0])
    other = Pace(file)
    other.ended(1, 3, 1.0, ran=True, nbytes=2**34)
    assert other.left(2, 3, 0.0) is None
    job(file, 2**34, [0.1, 0.1, 0.1], ran=False)
    other = Pace(file)
    other.ended(1, 3, 1.0, ran=True, nbytes=2**34)
    assert other.left(2, 3, 0.0) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b'{"30": 1}',
        b'{"30": {"2/2": "soon"}}',
        b"\xff",
        b"[" * 10**5,
        b"9" * 10**6,
    ],
)
def test_what_stands_in_the_file_breaks_nothing(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "pace.json"
    file.write_bytes(content)
    pace = Pace(file)
    pace.ended(1, 2, 1.0, ran=True, nbytes=2**30)
    assert pace.left(2, 2, 0.0) is None
    pace.ended(2, 2, 5.0, ran=True, nbytes=0)
    again = Pace(file)
    again.ended(1, 2, 1.0, ran=True, nbytes=2**30)
    assert again.left(2, 2, 0.0) == 5.0


def test_where_nothing_can_be_kept_nothing_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    job(tmp_path / "file" / "pace.json", 2**30, [1.0, 2.0])
    job(tmp_path, 2**30, [1.0, 2.0])
    assert default_file() is None or default_file().is_absolute()  # type: ignore[union-attr]


def test_it_stands_beside_the_time_that_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "pace.json"
    job(file, 2**30, [4.0, 10.0])
    now = 0.0
    board = Board(lambda: now, Pace(file))
    first = board.begin("download", 1, 2)
    first.finish(ran=True, nbytes=2**30)
    board.end()
    stage = board.begin("quantize", 2, 2)
    now = 3.0
    left = board.left(stage, now)
    assert draw(stage, [], now, 60, left=left)[0].endswith(
        "quantize  3 s, 3 s in all, some 7 s left"
    )
