"""A card is a stranger's: there is always an answer, soon, and it can be written down."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4_pipeline.checkpoint.source_card import SourceCard, parse_card, read_card

NOTHING: Final = SourceCard()
MIT: Final = SourceCard(license=("mit",))
SECONDS: Final = 20.0  # generous: every case takes milliseconds


def answer(text: str) -> SourceCard:
    """What a card says, with what must hold of every answer."""
    began = time.process_time()
    card = parse_card(text)
    assert time.process_time() - began < SECONDS
    metadata = card.metadata()
    dumped = yaml.safe_dump(metadata, sort_keys=False)
    assert yaml.safe_load(dumped) == metadata
    assert "\n---" not in dumped
    values = [v for value in metadata.values() for v in ([value] if type(value) is str else value)]
    assert all(type(value) is str and value.isprintable() for value in values)
    assert all(what.isprintable() for what in card.left_out)
    assert SourceCard.from_json(card.to_json()) == card
    return card


def front(*lines: str) -> str:
    return "\n".join(["---", *lines, "---", "# Words"])


READ: Final[dict[str, tuple[str, SourceCard]]] = {
    "plain": (front("license: mit"), MIT),
    "quoted": (front('"license": "mit"'), MIT),
    "single quotes": (front("'license': 'mit'"), MIT),
    "a comment": (front("# license: gpl", "license: mit # as ever"), MIT),
    "CRLF": (front("license: mit").replace("\n", "\r\n"), MIT),
    "CR": (front("license: mit").replace("\n", "\r"), MIT),
    "BOM": ("\ufeff" + front("license: mit"), MIT),
    "blank lines first": ("\n \n" + front("license: mit"), MIT),
    "dots end it": ("---\nlicense: mit\n...\nlicense: gpl\n", MIT),
    "several documents": (front("license: mit") + "\n---\nlicense: gpl-3.0\n---\n", MIT),
    "several licenses": (
        front("license:", "- mit", "- gpl-3.0"),
        SourceCard(license=("mit", "gpl-3.0")),
    ),
    "Norway": (front("language: no"), SourceCard(language=("no",))),
    "Norway in a list": (front("language: [no, en]"), SourceCard(language=("no", "en"))),
    "all of it": (
        front("license: other", "license_name: a b", "license_link: LICENSE", "language: en"),
        SourceCard(
            license=("other",), license_name="a b", license_link="LICENSE", language=("en",)
        ),
    ),
    "folded": (
        front("license_name: >-", "  a", "  b", "license: mit"),
        SourceCard(license=("mit",), license_name="a b"),
    ),
    "bombs in other keys": (
        front("a: &a [x, x]", "b: &b [*a, *a]", "c: *b", "d: !!python/name:x", "license: mit"),
        MIT,
    ),
    "no YAML in other keys": (front("a: [", "b: }{", "\tc", "license: mit", "d: 'x"), MIT),
    "huge numbers in other keys": (front("a: " + "9" * 5000, "b: 2001-13-45", "license: mit"), MIT),
    "many results": (front(*["- x: 1\n  y: [2]"] * 9000, "license: mit"), MIT),
    "merge keys": (front("<<: {license: gpl}", "license: mit"), MIT),
    "a key deeper": (front("x:", "  license: gpl", "license: mit"), MIT),
    "a key in a text": (front("x: |", "  license: gpl", "license: mit"), MIT),
    "a longer key": (front("license_: gpl", "licenses: gpl", "license: mit"), MIT),
    "no card": ("", NOTHING),
    "no front matter": ("# license: mit\n---\n", NOTHING),
    "empty front matter": ("---\n---\n", NOTHING),
    "another rule": ("----\nlicense: mit\n----\n", NOTHING),
    "a flow mapping": (front("{license: mit}"), NOTHING),
    "a list": (front("- license: mit"), NOTHING),
    "a complex key": (front("? [license, x]", ": mit"), NOTHING),
}


@pytest.mark.parametrize("case", READ)
def test_what_is_said_is_read(case: str) -> None:
    text, expected = READ[case]
    assert answer(text) == expected


ODD: Final[dict[str, tuple[str, str]]] = {
    "nothing": ("license:", "license: expected a text, got nothing"),
    "null": ("license: null", "got null"),
    "a tilde": ("license: ~", "got ~"),
    "true": ("license: true", "got true"),
    "a number": ("license: 7", "got 7"),
    "5,000 digits": ("license: " + "7" * 5000, "got 7777"),
    "infinity": ("license: .inf", "got .inf"),
    "not a number": ("license: .NaN", "got .NaN"),
    "hexadecimal": ("license: 0xff", "got 0xff"),
    "no date": ("license: 2001-13-45", "expected an identifier"),
    "a date": ("license: 2001-12-14", "expected an identifier"),
    "a mapping": ("license: {a: b}", "something deeper"),
    "a block mapping": ("license:\n  a: b", "something deeper"),
    "lists in a list": ("license: [[mit]]", "something deeper"),
    "10,000 lists": ("license: " + "[" * 10_000, "something deeper"),
    "10,000 mappings": ("license: " + "{a: " * 4_000, "something deeper"),
    "10,000 block lists": ("license:\n " + "- " * 5_000, "something deeper"),
    "an empty list": ("license: []", "an empty list"),
    "an anchor": ("license: &a mit", "an anchor or an alias"),
    "an alias": ("a: &a mit\nlicense: *a", "an anchor or an alias"),
    "a bomb": ("license: [&a [x, x], &b [*a, *a], *b]", "an anchor or an alias"),
    "a merge bomb": ("license: {<<: &a {x: y}}", "something deeper"),
    "a Python object": ("license: !!python/object/apply:os.system [id]", "a tag"),
    "binary": ("license: !!binary bWl0", "a tag"),
    "a set": ("license: !!set {mit}", "a tag"),
    "an ordered map": ("license: !!omap [a: b]", "a tag"),
    "a tag of its own": ("license: !x mit", "a tag"),
    "a text by a tag": ("license: !!str 7", "a tag"),
    "an unknown handle": ("license: !x!y mit", "not valid YAML"),
    "a tab": ("license: [\t\n\tmit", "not valid YAML"),
    "no end of a list": ("license: [mit", "not valid YAML"),
    "no end of a text": ('license: "mit', "not valid YAML"),
    "NUL": ("license: m\0it", "not valid YAML"),
    "a bell": ("license: m\x07it", "not valid YAML"),
    "half a character": ('license: "\\ud800"', "expected an identifier"),
    "beyond Unicode": ('license: "\\UFFFFFFFF"', "not valid YAML"),
    "a control character by escape": ('license: "\\e[31m"', "expected an identifier"),
    "two lines": ('license: "mit\\n---\\nx: y"', "expected an identifier"),
    "twice": ("license: mit\nlicense: mit", "it stands there twice"),
    "twice, once quoted": ("license: mit\n'license': gpl", "it stands there twice"),
    "a line break of YAML alone": ("license: mit\u2028language: en", "several entries"),
    "600 texts": ("license: [" + "mit, " * 600 + "]", "more than 512 texts"),
    "a huge text": ("license: " + "m" * 20_000, "no real one has 16,384"),
    "words": ("license: Apache License 2.0", "expected an identifier"),
    "HTML": ("license: <img src=x>", "expected an identifier"),
    "a script as a link": ("license_link: javascript:alert(1)", "license_link: expected an https"),
    "a path as a link": ("license_link: ../../etc/passwd", "license_link: expected an https"),
    "spaces in a link": ("license_link: https://x.org/a b", "license_link: expected an https"),
    "two links": ("license_link: [a, b]", "expected one text, got a list of 2"),
    "lines in a name": ("license_name: |\n  a\n  b", "license_name: expected a name in one line"),
    "marks of direction in a name": ('license_name: "\\u202eab"', "expected a name in one line"),
    "a region": ("language: zh-CN", "language: expected a code of ISO 639 such as en, got 'zh-CN'"),
    "numbers as languages": ("language: [1, 2]", "language: expected a text, got 1"),
}


@pytest.mark.parametrize("case", ODD)
def test_what_is_odd_is_left_out_with_a_word_and_the_rest_kept(case: str) -> None:
    text, said = ODD[case]
    card = answer(front("a: b", text, "license_name: kept" if "_name" not in text else "c: d"))
    assert len(card.left_out) == 1
    assert said in card.left_out[0]
    key = card.left_out[0].partition(":")[0]
    assert key not in card.metadata()
    assert ("license_name" in card.metadata()) == ("_name" not in text)


def test_of_a_list_what_fits_is_kept() -> None:
    card = answer(front("language: [en, zh-CN, de, en, Deutsch]"))
    assert card.language == ("en", "de")
    assert card.left_out == (
        "language: expected a code of ISO 639 such as en, got 'zh-CN', 'Deutsch'",
    )


@pytest.mark.parametrize("end", ["", "\n--", "\n ---", "\n" + "x: y\n" * 300_000 + "---"])
def test_front_matter_without_an_end_is_left_out(end: str) -> None:
    card = answer("---\nlicense: mit" + end)
    assert card == SourceCard(left_out=card.left_out)
    assert "no line `---` ends its head" in card.left_out[0]


SLOW: Final = {
    "spaces": " " * 2_000_000,
    "colons": "license" + ":" * 2_000_000,
    "one line": "license: " + "a" * 2_000_000,
    "dashes": "---\n" * 500_000,
    "quotes": front("license: " + "'" * 16_000),
    "flow commas": front("license: [" + "a," * 8_000),
    "questions": front("license: " + "? " * 8_000),
    "bangs": front("license: " + "!" * 16_000),
    "escapes": front('license_name: "' + "\\x41" * 4_000 + '"'),
    "folds": front("license_name: " + "a\n " * 5_000),
    "comments": front("license:" + "\n#" * 8_000),
    "many keys": front(*["license: mit"] * 70_000),
    "CR": "---\r" * 500_000,
    "empty lines": "---" + "\n" * 2_000_000,
}


@pytest.mark.parametrize("case", SLOW)
def test_no_card_takes_long(case: str) -> None:
    answer(SLOW[case])


def test_a_card_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    assert read_card(path) == NOTHING
    path.write_bytes(front("license: mit", "license_name: \xff").encode("latin-1"))
    card = read_card(path)
    assert card.license == ("mit",)
    assert "license_name" in card.left_out[0]
    with path.open("wb") as file:  # a sparse file beside a short head
        file.write(front("license: mit").encode())
        file.truncate(3 * 2**30)
    assert read_card(path) == MIT
    path.unlink()
    path.mkdir()
    (said,) = read_card(path).left_out
    assert said == "all of it: it cannot be read: it is a folder, not a plain file"


WORDS: Final = (
    "license license_name license_link language : - # [ ] { } , & * ! | > ' \" % @ ` ? ~ << "
    "&a *a !!str !!binary !!python/name:x mit en no 0o7 1e400 .nan 2001-13-45 \\ud800"
)
SPACES: Final = "\n", "\n  ", "\n- ", ": ", "\t", "\r\n", "\0", "\u2028", "\ud800", "\x85", "---\n"
PARTS: Final = st.one_of(st.sampled_from([*WORDS.split(), *SPACES]), st.text(max_size=3))


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(), st.lists(PARTS).map("".join)), st.booleans())
def test_any_text_has_an_answer(text: str, whole: bool) -> None:
    answer(text if whole else front("license: " + text, "language: " + text))
