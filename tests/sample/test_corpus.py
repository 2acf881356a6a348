"""The sample grammar: its split, its determinism, and the truth of its answers.

Every question is answered a second time here, from its text alone, by code that shares
nothing with the generator but the tables of the invented world.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter

import pytest
from nf4_pipeline.sample import QUESTIONS

from tests.support.grammar import corpus

DRAWS = 400

ACTOR = r"[A-Z][a-z]+|[Tt]he [a-z]+"
PLACE = r"(?:in|by|on|at|behind|under) the [a-z]+"


def low(text: str) -> str:
    """Write "The fox" as "the fox" and leave names alone."""
    return text.replace("The ", "the ")


def the_one(answers: set[str]) -> str:
    """Insist that exactly one answer is right."""
    assert len(answers) == 1, answers
    return answers.pop()


def solve_arithmetic(question: str) -> str:
    left, right = (int(number) for number in re.findall(r"\d+", question))
    falls = re.search(r"\b(eats|gives|go away|minus)\b", question)
    rises = re.search(r"\b(gets|together|come|plus)\b", question)
    assert bool(falls) != bool(rises)
    return str(left - right if falls else left + right)


def clauses(question: str) -> tuple[list[str], str]:
    """Split into told clauses and the question at the end."""
    *told, asked = re.split(r"(?<=\.) ", question)
    return [part for line in told for part in low(line.rstrip(".")).split(" and ")], asked


def solve_who(question: str) -> str:
    told, asked = clauses(question)
    if match := re.fullmatch(r"Who (gave|got) the (\w+)\?", asked):
        verb, thing = match.groups()
        gifts = [re.fullmatch(r"(\w+) gave a (\w+) to (\w+)", clause) for clause in told]
        group = 1 if verb == "gave" else 3
        return the_one({gift[group] for gift in gifts if gift and gift[2] == thing})
    wanted = asked.removeprefix("Who ").rstrip("?").replace("has the", "has a")
    verb, _, rest = wanted.partition(" ")
    return the_one(
        {
            clause.partition(f" {verb} ")[0]
            for clause in told
            if re.search(rf" {verb} (.* )?{rest}( |$)", clause)
        }
    )


def solve_what(question: str) -> str:
    told, asked = clauses(question)
    if match := re.fullmatch(r"What did (\w+) (?:give to (\w+)|get)\?", asked):
        giver, taker = match.groups() if match[2] else (r"\w+", match[1])
        pattern = rf"{giver} gave (a \w+) to {taker}"
    else:
        match = re.fullmatch(rf"What (?:does|is) ({ACTOR}) (?:have|like|doing)\?", asked)
        assert match
        pattern = rf"{match[1]} (?:has|likes|is) (a \w+|\w+)(?: {PLACE})?"
    found = {hit[1] for clause in told if (hit := re.fullmatch(pattern, clause))}
    return the_one(found)


def solve_where(question: str) -> str:
    told, asked = clauses(question)
    match = re.fullmatch(rf"Where (?:is|does) ({ACTOR})(?: \w+)?\?", asked)
    assert match
    return the_one(
        {
            place[0]
            for clause in told
            if clause.startswith(f"{match[1]} ") and (place := re.search(f"{PLACE}$", clause))
        }
    )


def solve_colour(question: str) -> str:
    told, asked = clauses(question)
    if match := re.fullmatch(r"What colour is the (\w+)\?", asked):
        pattern = rf"the {match[1]} is (\w+)"
    else:
        match = re.fullmatch(r"What colour is (\w+)'s (\w+)\?", asked)
        assert match
        pattern = rf"{match[1]} has a (\w+) {match[2]}"
    return the_one({hit[1] for clause in told if (hit := re.fullmatch(pattern, clause))})


def solve_opposite(question: str) -> str:
    match = re.search(r"opposite of (\w+)\?$|^\w+ says (\w+)\.", question)
    assert match
    word = match[1] or match[2]
    both = [pair for pair in corpus.OPPOSITES if word in pair]
    return the_one({str(other) for pair in both for other in pair} - {word})


def solve_sequence(question: str) -> str:
    if "counts" in question:
        first, second, third = (int(number) for number in re.findall(r"\d+", question))
        assert third - second == second - first
        return str(third + third - second)
    step = 1 if re.search(r"after|tomorrow|next day", question) else -1
    if number := re.search(r"\d+", question):
        return str(int(number[0]) + step)
    for names in (corpus.DAYS, corpus.SEASONS):
        for index, name in enumerate(names):
            if re.search(rf"\b{name}\b", question):
                return str(names[(index + step) % len(names)])
    raise AssertionError(question)


def solve_comparison(question: str) -> str:
    numbers = [int(number) for number in re.findall(r"\d+", question)]
    told, asked = clauses(question)
    if not told:
        return str(max(numbers) if "bigger" in question else min(numbers))
    if numbers:
        assert numbers[0] != numbers[1]
        owners = [clause.split(" ")[0] for clause in told]
        best = max(numbers) if re.search(r"more|older", asked) else min(numbers)
        return owners[numbers.index(best)]
    orders = {word: row for row in corpus.COMPARATIVES for word in row}
    above: set[tuple[str, str]] = set()
    for clause in told:
        hit = re.fullmatch(rf"({ACTOR}) is (\w+) than ({ACTOR})", clause)
        assert hit
        more = hit[2] == orders[hit[2]][0]
        above.add((hit[1], hit[3]) if more else (hit[3], hit[1]))
    superlative = asked.rstrip("?").split()[-1]
    most = superlative == orders[superlative][1]
    # One end of the chain is never below, the other never above.
    ahead, behind = {pair[0] for pair in above}, {pair[1] for pair in above}
    return the_one(ahead - behind if most else behind - ahead)


def solve_fact(question: str) -> str:
    known = {
        villager
        for villager in corpus.LUMO
        if any(
            re.search(rf"\b{word}\b", question)
            for word in (villager.name, f"the {villager.animal}", villager.home, villager.work)
        )
        or question.endswith(f"likes to eat {villager.food}?")
    }
    assert len(known) == 1, question
    villager = known.pop()
    if re.search(r"[wW]hich animal", question):
        return f"the {villager.animal}"
    if "called" in question:
        return str(villager.name)
    if re.search(r"[wW]here", question):
        return str(villager.home)
    return str(villager.food if "eat" in question else villager.work)


def solve_tracking(question: str) -> str:
    *told, asked = re.split(r"(?<=\.) ", question)
    text = " ".join(told)
    index = 0 if "first" in asked else -1
    if "put" in text:
        containers = re.findall(r"(?:in|to) the (\w+)", text)
        return f"in the {containers[index]}"
    if asked.startswith("Who"):
        owners = [text.split(" ")[0], *re.findall(r"to (\w+)\.", text)]
        return str(owners[index])
    name = asked.split(" ")[2]
    sentences = [line for line in told if re.search(rf"\b{name}\b", line)]
    return str(re.findall(PLACE, sentences[-1])[-1])


SOLVERS = {
    "arithmetic": solve_arithmetic,
    "who": solve_who,
    "what": solve_what,
    "where": solve_where,
    "colour": solve_colour,
    "opposite": solve_opposite,
    "sequence": solve_sequence,
    "comparison": solve_comparison,
    "fact": solve_fact,
    "tracking": solve_tracking,
}


@pytest.mark.parametrize("kind", corpus.KINDS)
@pytest.mark.parametrize("held_out", [False, True])
def test_every_answer_follows_from_its_question(kind: str, held_out: bool) -> None:
    rng = random.Random(kind)
    for _ in range(DRAWS):
        item = corpus.draw_question(rng, kind, held_out=held_out)
        assert SOLVERS[kind](item.question) == item.answer, item.question


@pytest.mark.parametrize("kind", corpus.KINDS)
def test_a_question_never_has_two_answers(kind: str) -> None:
    rng = random.Random(f"{kind} again")
    answers: dict[str, str] = {}
    for _ in range(3000):
        item = corpus.draw_question(rng, kind, held_out=False)
        assert answers.setdefault(item.question, item.answer) == item.answer


def bare(prompt: str) -> str:
    """Take the chat framing off a prompt."""
    return prompt.strip().removeprefix("User: ").removesuffix("\nAssistant:")


def training_questions(seed: int, documents: int) -> set[str]:
    """Every question asked in some training documents."""
    rng = random.Random(seed)
    prompts = [
        part.text
        for _ in range(documents)
        for part in corpus.document(rng)
        if part.role == "prompt"
    ]
    return {bare(prompt) for prompt in prompts}


@pytest.mark.parametrize(("train_seed", "test_seed"), [(1, 1), (1, 2), (7, 50)])
def test_train_and_test_are_disjoint_for_any_seeds(train_seed: int, test_seed: int) -> None:
    asked = training_questions(train_seed, 4000)
    held_out = {item.question for item in corpus.held_out_questions(test_seed, per_kind=20)}
    assert len(asked) > 3000
    assert not asked & held_out
    assert not any(corpus.is_held_out(question) for question in asked if "story" not in question)


def test_the_split_ignores_case_and_spacing_and_holds_out_a_tenth() -> None:
    rng = random.Random(3)
    drawn = [corpus.who(rng)[0] for _ in range(4000)]
    sides = [corpus.is_held_out(question) for question in drawn]
    assert sides == [corpus.is_held_out(f"  {text.upper()} ".replace(" ", "  ")) for text in drawn]
    assert 0.08 < sum(sides) / len(sides) < 0.12


def test_the_same_seed_gives_the_same_text() -> None:
    first, second, other = (
        [corpus.document(rng) for _ in range(200)]
        for rng in (random.Random(5), random.Random(5), random.Random(6))
    )
    assert first == second
    assert first != other
    assert corpus.held_out_questions(5, 3) == corpus.held_out_questions(5, 3)


def test_each_word_has_one_opposite() -> None:
    words = Counter(word for pair in corpus.OPPOSITES for word in pair)
    assert set(words.values()) == {1}


def test_lumo_has_no_fact_twice() -> None:
    for field in ("animal", "name", "home", "food", "work"):
        assert len({getattr(villager, field) for villager in corpus.LUMO}) == len(corpus.LUMO)
    assert not {villager.name for villager in corpus.LUMO} & set(corpus.NAMES)


def test_stories_are_short_and_bring_their_characters_back() -> None:
    rng = random.Random(9)
    for _ in range(500):
        cast = corpus.make_cast(rng)
        text = corpus.story(rng, cast)
        assert 2 <= corpus.sentence_count(text) <= corpus.LONGEST_STORY, text
        assert cast.friend.name in text
        assert len(re.findall(rf"\b{cast.hero.name}\b", text)) >= 1
        assert re.search(rf"\b{cast.hero.kind}\b", text)
        named = set(re.findall(r"\b[A-Z][a-z]+\b", text)) & set(corpus.NAMES)
        assert named == {cast.hero.name, cast.friend.name}
        assert "  " not in text
        assert text[0].isupper()
        assert text[-1] in '.!"'


def test_most_things_named_in_a_story_are_named_again() -> None:
    rng = random.Random(10)
    again = 0
    for _ in range(500):
        cast = corpus.make_cast(rng)
        text = corpus.lost(rng, cast)
        again += " ".join(text).count(cast.thing) >= 3
    assert again == 500


def test_a_story_request_names_its_hero_and_gets_that_hero() -> None:
    rng = random.Random(11)
    for _ in range(300):
        cast = corpus.make_cast(rng)
        request = corpus.story_request(rng, cast)
        text = corpus.story(rng, cast)
        if request != "Tell me a story.":
            assert re.search(rf"\b{cast.hero.kind}\b", request)
            assert re.search(rf"\b{cast.hero.kind}\b", text)
    assert corpus.article("owl") == "an owl"
    assert corpus.article("fox") == "a fox"


def test_conversations_alternate_and_follow_the_chat_format() -> None:
    rng = random.Random(12)
    for _ in range(200):
        parts = corpus.conversation(rng)
        assert [part.role == "prompt" for part in parts] == [True, False] * (len(parts) // 2)
        text = "".join(part.text for part in parts)
        for line in text.split("\n"):
            assert re.match(r"User: \S|Assistant: \S", line)


def test_the_bundled_questions_are_the_held_out_ones() -> None:
    lines = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    assert len({line["prompt"] for line in lines}) == len(lines) == 50
    items = corpus.held_out_questions(seed=50, per_kind=5)
    assert Counter(item.kind for item in items) == dict.fromkeys(corpus.KINDS, 5)
    for line, item in zip(lines, items, strict=True):
        assert set(line) == {"prompt", "expect"}
        assert line == {"prompt": item.prompt, "expect": item.answer}
        question = bare(line["prompt"])
        assert corpus.is_held_out(question)
        assert SOLVERS[item.kind](question) == line["expect"]
