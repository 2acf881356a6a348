"""Numbers and names as people read them."""

from __future__ import annotations

from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nf4_pipeline.fidelity.bootstrap import Interval
from nf4_pipeline.report.formatting import (
    both_units,
    bounds,
    count,
    interval,
    label,
    number,
    percent,
    plain_size,
    seconds,
    share,
    size,
    visible,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.021304, "0.02130"),
        (7.1168, "7.117"),
        (65024.4, "65,024"),
        (-0.0035, "-0.003500"),
        (0, "0"),
        (0.0000321, "3.210e-05"),
        (1e15, "1.000e+15"),
        (None, "not finite"),
        (float("nan"), "not finite"),
        (float("inf"), "not finite"),
    ],
)
def test_numbers_have_four_digits_that_count(value: float | None, text: str) -> None:
    assert number(value) == text


def test_other_units() -> None:
    assert percent(0.97314) == "97.31\N{NO-BREAK SPACE}%"
    assert percent(None) == "not finite"
    assert share(0.95) == "95\N{NO-BREAK SPACE}%"
    assert count(8176) == "8,176"
    assert count(None) == size(None) == size(0) == seconds(None) == "–"
    assert size(14_434_467_840) == "14.43\N{NO-BREAK SPACE}GB"
    assert size(999) == "999\N{NO-BREAK SPACE}B"
    assert size(14_434_467_840, binary=True) == "13.44\N{NO-BREAK SPACE}GiB"
    assert seconds(0.0431) == "43.1\N{NO-BREAK SPACE}ms"
    assert seconds(19.27) == "19.3\N{NO-BREAK SPACE}s"
    assert seconds(125.2) == "2\N{NO-BREAK SPACE}min 5\N{NO-BREAK SPACE}s"


def test_sizes_in_plain_text() -> None:
    assert plain_size(14_434_467_840) == "14.434 GB"
    assert plain_size(14_434_467_840, binary=True) == "13.443 GiB"
    assert plain_size(10**9, binary=True) == "0.931 GiB"
    assert plain_size(10**9 - 1) == "1000.00 MB"
    assert both_units(20_713_472) == "20.71 MB = 19.75 MiB"
    assert both_units(0) == "0.00 MB = 0.00 MiB"


def test_bounds() -> None:
    assert bounds(Interval(1.0, 0.5, 2.0)) == "0.5000 to 2.000"
    assert bounds(Interval(nan, nan, nan)) == "not finite"
    assert bounds(Interval(0.5, 0.4, nan), percent).endswith("to not finite")


def test_intervals() -> None:
    assert interval(Interval(0.0213, 0.02, 0.02264)) == "0.0213 [0.02, 0.02264]"
    assert interval(Interval(0.0213, 0.02, 0.02264), ".4f") == "0.0213 [0.0200, 0.0226]"
    assert interval(Interval(0.0213, nan, nan)) == "0.0213"
    assert interval(Interval(inf, 0.0, inf)) == "not finite"


@given(st.text())
def test_visible_text_keeps_its_length_and_can_be_written(text: str) -> None:
    shown = visible(text + "\x00\x1b\ud800\r")
    assert len(shown) == len(text) + 4
    assert "\x00" not in shown
    shown.encode("utf-8")


@given(st.text(), st.integers(3, 40))
def test_a_label_is_one_line_of_limited_length(text: str, limit: int) -> None:
    short = label(text, limit)
    assert len(short) <= limit
    assert "\n" not in short
    assert label(short, limit) == short


def test_a_label_keeps_both_ends() -> None:
    assert label("transformer.h.*.mlp.dense.weight", 15) == "transfo….weight"
