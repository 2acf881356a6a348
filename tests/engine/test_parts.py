"""How output files are dealt out to parts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nf4_pipeline.engine.parts import Part
from nf4_pipeline.errors import UsageError

SIZES = st.lists(st.integers(1, 10**9), min_size=1, max_size=60).map(
    lambda sizes: {f"{number:03d}": size for number, size in enumerate(sizes)}
)


@given(sizes=SIZES, of=st.integers(1, 70))
def test_each_file_is_in_one_part_and_neighbours_stay_together(
    sizes: dict[str, int], of: int
) -> None:
    shares = [Part(of, number).share(sizes) for number in range(1, of + 1)]
    assert [name for share in shares for name in share] == list(sizes)


@given(files=st.integers(1, 60), of=st.integers(1, 70))
def test_equal_files_are_dealt_equally(files: int, of: int) -> None:
    sizes = {f"{number:03d}": 1000 for number in range(files)}
    counts = [len(Part(of, number).share(sizes)) for number in range(1, of + 1)]
    assert max(counts) <= -(-files // of)
    assert of > files or min(counts) >= files // of


@given(number=st.integers(1, 10_000), more=st.integers(0, 5_000))
def test_text_and_back(number: int, more: int) -> None:
    part = Part(min(number + more, 10_000), number)
    assert Part.parse(str(part)) == part


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "3/",
        "/8",
        "0/8",
        "9/8",
        "1/0",
        "-1/8",
        "1.5/8",
        "3/8/2",
        "3 of 8",
        "1/10001",
        "٣/٨",
    ],
)
def test_what_is_no_part(text: str) -> None:
    with pytest.raises(UsageError, match=r"expected I/N, such as 3/8|there is no part 9 of 8"):
        Part.parse(text)
