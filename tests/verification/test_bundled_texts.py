"""The evaluation texts: sound files, no repetition, right sums, code that compiles, nothing shared.

code.txt holds snippets, each opened by a comment line that names its file: `# file: NAME`, or
`//` or `--` in place of `#`, as the language wants it.
"""

from __future__ import annotations

import json
import operator
import random
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Final

import nf4_pipeline.verification
import pytest
from nf4_pipeline.sample import QUESTIONS

from tests.support.grammar import corpus

TEXTS: Final = Path(nf4_pipeline.verification.__file__).with_name("texts")
DOMAINS: Final = ("prose", "dialogue", "instructions", "code", "arithmetic")

SNIPPET: Final = re.compile(r"^(?:#|//|--) file: (\S+)\n", re.MULTILINE)

# A fraction without spaces, such as 5/6, is one number. What stands directly beside a match must
# not belong to the same formula: "(2 + 3) × 4 = 20" and "2 + 3x = 8" are no plain equations.
NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?"
TERMS = rf"-?{NUMBER}(?: [-+×÷*/] {NUMBER})*"
EQUATION: Final = re.compile(
    rf"(?<![\w.,/^(+×÷*-])(?<![-+×÷*/] ){TERMS}(?: = {TERMS})+(?!\w|[.,/]\d| [-+×÷*/])"
)
PRODUCTS: Final[dict[str, Callable[[Fraction, Fraction], Fraction]]] = {
    "×": operator.mul,
    "*": operator.mul,
    "÷": operator.truediv,
    "/": operator.truediv,
}


def read(domain: str) -> str:
    return (TEXTS / f"{domain}.txt").read_text("utf-8")


def snippets() -> list[tuple[str, str]]:
    """The name and the text of every snippet."""
    before, *rest = SNIPPET.split(read("code"))
    assert before == ""
    return list(zip(rest[::2], rest[1::2], strict=True))


def value(terms: str) -> Fraction:
    """What a sum of products comes to, exactly."""
    first, *rest = terms.replace(",", "").split(" ")
    total, product = Fraction(0), Fraction(first)
    for sign, number in zip(rest[::2], map(Fraction, rest[1::2]), strict=True):
        if sign in PRODUCTS:
            product = PRODUCTS[sign](product, number)
        else:
            total, product = total + product, number if sign == "+" else -number
    return total + product


def wrong_equations(text: str) -> list[str]:
    return [
        equation
        for equation in EQUATION.findall(text)
        if len({value(side) for side in equation.split(" = ")}) > 1
    ]


def sentences(text: str) -> set[str]:
    """The sentences of at least three words, without case and outer punctuation."""
    parts = re.split(r"(?<=[.?!:])[\"')]*\s+|\n", text.lower())
    return {part.strip(" .?!:;\"'()>-") for part in parts if len(part.split()) >= 3}


def test_the_folder_holds_the_five_texts_and_nothing_else() -> None:
    assert sorted(path.name for path in TEXTS.iterdir()) == sorted(f"{d}.txt" for d in DOMAINS)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_text_is_a_clean_text_file(domain: str) -> None:
    text = (TEXTS / f"{domain}.txt").read_bytes().decode("utf-8", "strict")
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert not re.search(r"[\r\t\ufeff\ufffd\u00a0]", text)
    lines = text.split("\n")
    assert [line for line in lines if len(line) > 1000 or line != line.rstrip()] == []


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_text_is_long_enough_for_an_even_share_of_8192_tokens(domain: str) -> None:
    # A byte-level BPE of 65,000 entries was measured at 3.0 (arithmetic) to 4.3 (prose)
    # characters a token; 4.8 leaves room for a better one.
    assert len(read(domain)) > 8192 / len(DOMAINS) * 4.8


def test_no_paragraph_occurs_twice() -> None:
    paragraphs = Counter(
        " ".join(paragraph.split())
        for domain in DOMAINS
        for paragraph in re.split(r"\n\s*\n", read(domain))
    )
    assert [p for p, count in paragraphs.items() if len(p) > 60 and count > 1] == []


def test_every_python_snippet_compiles() -> None:
    names = [name for name, _ in snippets()]
    assert len(set(names)) == len(names)
    assert {Path(name).suffix for name in names} == {".py", ".c", ".mjs", ".sql", ".sh"}
    for name, text in snippets():
        if name.endswith(".py"):
            compile(text, name, "exec", dont_inherit=True)


def test_every_plain_equation_is_right() -> None:
    text = read("arithmetic")
    assert len(EQUATION.findall(text)) > 80
    assert wrong_equations(text) == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("She pays 2 + 3 × 4 = 14, not more.", []),
        ("She pays 2 + 3 × 4 = 20, not more.", ["2 + 3 × 4 = 20"]),
        ("1,000 ÷ 8 = 125\n1/3 + 1/6 = 1/2\n3 - 5 = -2", []),
        ("1,000 ÷ 8 = 12.5\n1/3 + 1/6 = 2/9", ["1,000 ÷ 8 = 12.5", "1/3 + 1/6 = 2/9"]),
        ("2 × 3 = 6 = 3 + 4", ["2 × 3 = 6 = 3 + 4"]),
        ("(2 + 3) × 4 = 20, 2 + 3x = 8, x - 2 + 1 = 4, 6 ÷ 3 = 6 × y", []),
    ],
)
def test_wrong_equations_are_found(text: str, wrong: list[str]) -> None:
    assert wrong_equations(text) == wrong


def test_no_sentence_is_shared_with_the_sample() -> None:
    rng = random.Random(0)
    drawn = ["".join(part.text for part in corpus.document(rng)) for _ in range(2000)]
    asked = [
        f"{item['prompt']} {item['expect']}"
        for item in map(json.loads, QUESTIONS.read_text("utf-8").splitlines())
    ]
    sample = sentences("\n".join(drawn + asked))
    assert len(sample) > 2000
    for domain in DOMAINS:
        assert sentences(read(domain)) & sample == set()
