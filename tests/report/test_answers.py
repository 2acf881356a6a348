"""Which part of two answers is shown."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from nf4_pipeline.report.answers import Excerpt, by_prompt, excerpt
from nf4_pipeline.verification.document import AnswerPair


def test_a_short_answer_is_shown_whole() -> None:
    assert excerpt("yes", None, 600) == Excerpt("yes", None)
    assert excerpt("yes, but", 3, 600) == Excerpt("yes", ", but")


def test_an_answer_that_ends_where_the_other_goes_on() -> None:
    assert excerpt("yes", 3, 600) == Excerpt("yes", "")


def test_a_long_answer_is_cut_around_its_first_difference() -> None:
    text = "a" * 5000 + "b" * 5000
    assert excerpt(text, None, 600) == Excerpt("a" * 600, None, cut_end=True)
    late = excerpt(text, 5000, 600)
    assert late.cut_start
    assert late.cut_end
    assert late.before == "a" * 160
    assert late.marked == "b" * 440
    assert excerpt(text, 5000, None) == Excerpt("a" * 5000, "b" * 5000)


@given(st.text(max_size=300), st.none() | st.integers(0, 400), st.none() | st.integers(170, 200))
def test_an_excerpt_is_a_part_of_the_text(
    text: str, difference: int | None, shown: int | None
) -> None:
    found = excerpt(text, difference, shown)
    part = found.before + (found.marked or "")
    assert part in text
    assert (part == text) is not found.cut
    assert (found.marked is None) is (difference is None)
    if difference is not None and difference < len(text):
        assert found.marked
        assert found.marked[0] == text[difference]


def pair(
    prompt: str, expect: str | None = None, seed: int | None = None, right: tuple[bool, ...] = ()
) -> AnswerPair:
    return AnswerPair(
        prompt=prompt,
        expect=expect,
        seed=seed,
        answer_16bit="x",
        answer_4bit="x",
        same=True,
        first_difference=None,
        right_16bit=right[0] if right else None,
        right_4bit=right[1] if right else None,
    )


def test_runs_stand_under_their_prompt_and_lost_prompts_first() -> None:
    runs = [
        pair("a"),
        pair("b", "1", right=(True, True)),
        pair("a", seed=7),
        pair("c", "2", right=(True, False)),
        pair("d", "3", right=(False, False)),
    ]
    prompts = by_prompt(runs)
    assert [(entry.prompt, len(entry.runs)) for entry in prompts] == [
        ("c", 1),
        ("a", 2),
        ("b", 1),
        ("d", 1),
    ]
