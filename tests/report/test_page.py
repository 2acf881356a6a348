"""The page: every number is in it, it needs nothing else, and nothing that a model says acts."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import jsonschema
import pytest
from nf4_pipeline.report import kl_scale
from nf4_pipeline.report import page as page_module
from nf4_pipeline.report.page import render, report_page
from nf4_pipeline.verification.document import SCHEMA, parse_verification

from tests.support import made

VOID = {"meta", "link"}
COMMIT = "8782b5c5d8c9290412416618f36a133653e85285"
LINKS = {kl_scale.SOURCE, f"https://huggingface.co/tiiuae/falcon-7b-instruct/tree/{COMMIT}"}
"""All that the page may lead to."""
CASES = {
    "falcon": made.made(against=True),
    "calibrated": made.made(nearest=True),
    "learned": made.made(nearest=True, learned=True),
    "sample": made.sample(),
    "failed gate": made.failed_gate(),
    "failed behaviour": made.failed_behaviour(),
    "nulls": made.nulls(),
    "without tokenizer": made.without_tokenizer(),
    "hostile": made.hostile(),
    "large": made.large(),
}


class Parsed(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not close as they opened."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.marked: list[str] = []
        self.headings: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "h2":
            self.headings += [value or "" for key, value in attrs if key == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if "mark" in self.open:
            self.marked.append(data)


def words(verification: dict[str, Any], **identity: Any) -> str:
    """The page without its pictures: what a person reads."""
    return render(made.manifest(**identity), parse_verification(verification), {})


def page_of(verification: dict[str, Any], repo: str = "tiiuae/falcon-7b-instruct") -> str:
    return report_page(made.manifest(repo), parse_verification(verification))


@pytest.mark.parametrize("name", CASES)
def test_what_is_made_up_is_what_verify_writes(name: str) -> None:
    jsonschema.validate(CASES[name], json.loads(SCHEMA.read_text("utf-8")))


@pytest.mark.parametrize("name", CASES)
def test_the_page_is_whole_and_needs_nothing_else(name: str) -> None:
    page = page_of(CASES[name])
    parsed = Parsed(page)
    assert not {"script", "img", "iframe", "object", "base", "form"} & set(parsed.tags)
    assert set(parsed.tags) & VOID == VOID
    for key, value in parsed.attributes:
        assert not key.startswith("on")
        if key in ("src", "href", "xlink:href"):
            assert value in ("data:,", *LINKS) or str(value).startswith("#")
    assert "@import" not in page
    assert "url(h" not in page
    ids = [value for key, value in parsed.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert {value for key, value in parsed.attributes if key == "aria-labelledby"} <= set(ids)
    targets = [str(v)[1:] for k, v in parsed.attributes if k == "href" and str(v).startswith("#")]
    assert len(set(targets)) > 1  # the contents
    assert set(targets) <= set(ids)
    places = [page.index(f'id="{target}"') for target in targets if target in parsed.headings]
    assert places == sorted(places)
    listed = set(parsed.headings) - {"verdict", "use", "contents"}
    assert listed == set(targets) & set(parsed.headings)
    page.encode("utf-8")


def test_the_page_is_the_same_every_time() -> None:
    first, second = (page_of(made.made(against=True)) for _ in range(2))
    assert first == second


def _numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all numbers in a JSON value."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _numbers(inner, (*path, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


SMALL = made.made(blocks=2, prompts=2, expected=True, against=True, nearest=True)
SMALL["kl_histogram"] = {"edges": [0.001, 0.01, 0.1], "counts": [5, 7]}
SMALL["kl_by_position"] = SMALL["kl_by_position"][:2]
SMALL["answers"][0] |= {"seed": 7, "same": False, "first_difference": {"token": 1, "character": 1}}
NOT_SHOWN = {("schema_version",)}


@pytest.mark.parametrize("path", sorted(set(_numbers(SMALL)) - NOT_SHOWN, key=str), ids=str)
def test_every_number_moves_the_text(path: tuple[Any, ...]) -> None:
    changed = copy.deepcopy(SMALL)
    place: Any = changed
    for key in path[:-1]:
        place = place[key]
    value = place[path[-1]]
    place[path[-1]] = value * 3 + 2 if isinstance(value, int) else value * 1.37
    assert words(changed) != words(SMALL)


def test_values_are_those_of_the_verification() -> None:
    text = words(made.made(against=True))
    for said in ("14.43\xa0GB", "4.010\xa0GB", "0.02130", "0.02002 to 0.02258", "8,176", "1.197"):
        assert said in text


def test_who_the_model_is_comes_from_the_manifest() -> None:
    pinned = words(made.made(), repo="org/model")
    assert "org/model" in pinned
    assert str(made.manifest().source.commit) in pinned
    local = words(made.made(), commit=False)
    assert "8782b5c5" not in local
    assert made.manifest().source.content_sha256 in local


def how(calibration: dict[str, Any]) -> str:
    """The page of an artifact that was calibrated so."""
    verification = parse_verification(made.made(nearest=True))
    page = render(made.manifest(calibrated=calibration), verification, {})
    Parsed(page)
    return page


def test_how_the_codes_were_chosen_comes_from_the_manifest() -> None:
    text = how(made.calibration())
    assert "16,384 tokens that the 16-bit model wrote itself (64 sequences, sha256 c0dec0" in text
    assert "5 weights: transformer.h.0.mlp.dense_4h_to_h.weight (no token came" in text
    assert "what is said of rounding from <code>manifest.json</code>" in text
    assert "alibrated" not in words(made.made())
    assert "manifest.json</code>; the hash" not in words(made.made())
    plain = how({**made.calibration(), "fallbacks": {}, "kept": []})
    assert "Not calibrated" not in plain
    assert "left in 16 bit" not in plain
    hostile = how({**made.calibration(), "fallbacks": {made.HOSTILE[0]: made.HOSTILE[1]}})
    assert "<script>" not in hostile


@pytest.mark.parametrize("path", sorted(_numbers(made.calibration()), key=str), ids=str)
def test_every_number_of_calibration_moves_the_text(path: tuple[Any, ...]) -> None:
    changed = made.calibration()
    place: Any = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = place[path[-1]] * 3 + 2_000_000
    assert how(changed) != how(made.calibration())


def test_round_to_nearest_stands_beside() -> None:
    text = words(made.made(nearest=True))
    assert "Compared with round to nearest" in text
    assert "its mean KL is × 0.3797 (0.3645 to 0.3949) that of round to nearest" in text
    assert "This artifact is closer" in text
    assert "round to nearest" not in words(made.made(against=True)).lower()


def test_the_source_is_a_link_only_where_it_is_a_repo_of_the_hub() -> None:
    address = f"https://huggingface.co/org/model/tree/{COMMIT}"
    assert f'href="{address}"' in words(made.made(), repo="org/model")
    for name in ("a", "a/b/c", "../x", "a/b c", 'a/"><script>', "a/mödel", "javascript:x/y"):
        assert "huggingface.co" not in words(made.made(), repo=name), name
    assert "huggingface.co" not in words(made.made(), repo="org/model", commit=False)


def test_the_day_is_said() -> None:
    text = words(made.made())
    assert "verified on <time>2026-11-26</time>" in text
    older = made.made()
    del older["date"]
    assert "verified on" not in words(older)


def test_the_artifact_stands_among_known_quantizations() -> None:
    """Where its KL puts it, whatever that is; a KL that is not finite compares with nothing."""
    for kl, after in ((1e-9, None), (0.008, "Q6_K"), (0.05, "Q4_K_M"), (9.0, "Q2_K, importance")):
        rows = kl_scale.scale(kl)
        assert [row.kl for row in rows] == sorted(row.kl for row in rows)
        place = next(i for i, row in enumerate(rows) if row.is_own)
        assert (place == 0) if after is None else rows[place - 1].name.startswith(after)
    text = words(made.made())
    assert kl_scale.SOURCE in text
    table = text[text.index("Q5_K_M") :]
    assert table.index("this artifact") < table.index("Q4_0")
    assert "Here one token in 13 has another first choice" in text
    assert kl_scale.SOURCE not in words(made.nulls())


def test_the_worst_tokens_are_quoted_with_both_distributions() -> None:
    parsed = Parsed(words(made.made()))
    text = "".join(parsed.text)
    first = made.made()["worst_tokens"][0]
    assert f"…{first['before']}" in text
    assert " day" in parsed.marked
    for chance in first["chances"][:3]:
        assert f"{chance['16bit'] * 100:.2f}\xa0%" in text
        assert f"{chance['4bit'] * 100:.2f}\xa0%" in text
    assert "it is not quoted, because this page may be published" in text
    older = made.made()
    del older["worst_tokens"]
    assert "worst tokens" not in words(older)


def test_answers_that_differ_come_before_those_that_do_not() -> None:
    verification = made.made()
    for answer in verification["answers"][:2]:
        answer |= {"answer_4bit": answer["answer_16bit"], "same": True, "first_difference": None}
    text = words(verification)
    places = [text.index(prompt.split("\n")[0]) for prompt, _ in made.PROMPTS]
    assert places[0] == max(places)
    assert places[1:] == sorted(places[1:])


def test_failing_checks_come_first_and_nothing_else_is_claimed() -> None:
    page = page_of(made.failed_gate())
    assert page.count("✗ FAIL") == 2
    assert "2 of 2 checks failed:" in page
    assert "nothing was measured" in page
    assert "<svg" not in page
    behaviour = page_of(made.failed_behaviour())
    assert 0 < behaviour.index("✗ FAIL") < behaviour.index("✓ passed")


def test_nothing_hostile_acts() -> None:
    verification = made.hostile()
    page = page_of(verification, "<b>evil</b>")
    parsed = Parsed(page)
    text = "".join(parsed.text)
    assert "b" not in parsed.tags
    assert made.HOSTILE[0] in text
    assert "{{ 7*7 }}" in text
    assert "--> ]]>" in text
    assert "w" * 5000 in text
    assert "many\n\n\n\tlines" in text
    for hidden in ("\x00", "\x1b", "\ud800", "\r"):
        assert hidden not in page


def test_the_first_difference_is_marked_in_both_answers() -> None:
    verification = made.made(prompts=1)
    first = verification["answers"][0]
    parsed = Parsed(words(verification))
    at = first["first_difference"]["character"]
    assert first["answer_16bit"][at:] in parsed.marked
    assert first["answer_4bit"][at:] in parsed.marked
    assert first["answer_16bit"] not in parsed.marked


def test_an_answer_that_stops_says_so() -> None:
    verification = made.made(prompts=1)
    verification["answers"][0] |= {
        "answer_16bit": "Run",
        "answer_4bit": "Run away.",
        "first_difference": {"token": 1, "character": 3},
    }
    marked = Parsed(words(verification)).marked
    assert "(ends here)" in marked
    assert " away." in marked


def test_a_long_answer_is_cut_and_can_be_opened() -> None:
    verification = made.made(prompts=1)
    verification["answers"][0] |= {"answer_16bit": "abc " * 1000, "same": True}
    verification["answers"][0]["first_difference"] = None
    text = words(verification)
    assert "All 4,000 characters" in text
    assert "abc " * 1000 in text
    assert "abc " * 150 + '<span class="cut">…</span>' in text


def test_right_and_wrong_answers_and_the_lost_one_first() -> None:
    text = words(made.sample())
    assert "49 of 50" in text
    assert text.count("✗ wrong") == 1
    assert text.index("✗ wrong") < text.index("✓ right", text.index("✗ wrong"))
    assert "3 plus 35" in text[: text.index("3 plus 4?")]
    assert "47 more prompts" in text
    assert "No GPU" not in text
    assert "no GPU was used" in text


def test_numbers_that_are_not_finite() -> None:
    text = words(made.nulls())
    assert text.count("not finite") > 20
    assert "None" not in text
    assert ">nan" not in text


def test_a_checkpoint_without_tokenizer_or_blocks() -> None:
    text = words(made.without_tokenizer())
    assert "No prompt was asked: the checkpoint has no tokenizer." in text
    assert "random token ids, since the checkpoint has no tokenizer" in text
    assert "Where the error comes from" not in text


@pytest.mark.parametrize(
    ("part", "called"), [("against", "The other artifact"), ("nearest", "Round to nearest")]
)
@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.001, 0.002, " is closer"),
        (-0.002, -0.001, "This artifact is closer"),
        (-0.001, 0.001, "does not tell them apart"),
        (None, None, "not finite"),
    ],
)
def test_a_comparison_says_who_is_closer(
    part: str, called: str, low: float | None, high: float | None, said: str
) -> None:
    verification = made.made(against=part == "against", nearest=part == "nearest")
    verification[part]["difference"]["mean_kl"] = {"value": low, "low": low, "high": high}
    assert said in words(verification)
    assert (f"<strong>{called} is" in words(verification)) is (low is not None and low > 0)


def test_a_name_that_a_document_lacks_is_an_error_not_a_blank() -> None:
    from jinja2 import UndefinedError

    verification = parse_verification(made.made())
    template = page_module._environment().from_string("{{ v.sizes.no_such_bytes|bytes }}")
    with pytest.raises(UndefinedError, match="no_such_bytes"):
        template.render(v=verification)
