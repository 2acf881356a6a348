"""What a model is asked, what is noted of its answers, and where two answers part."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
import torch
import transformers
from nf4_pipeline.errors import RecipeError
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer
from nf4_pipeline.progress import SILENT
from nf4_pipeline.runtime.generate import Generator, Sampling
from nf4_pipeline.verification.generation import (
    SEED,
    Question,
    TimedAnswer,
    answer,
    answer_all,
    answer_tasks,
    find_first_difference,
    length,
    questions,
)
from nf4_pipeline.verification.prompts import REFERENCE, Prompt, read_prompts

from tests.support.checkpoints import VOCABULARY, write_tokenizer

HELLO: Final = Question(Prompt("Hello there"), None)
CONTEXT: Final = 48


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    """A tiny GPT-2 that never ends by itself."""
    folder = tmp_path_factory.mktemp("answers")
    write_tokenizer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=CONTEXT,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Generator(transformers.GPT2LMHeadModel(config).eval(), LimitedTokenizer(tokenizer))


def test_what_has_one_right_answer_is_asked_greedily_and_all_else_by_draws_too() -> None:
    free, closed = Prompt("Tell me."), Prompt("1 + 1 =", expect="2")
    assert questions([free, closed]) == [
        Question(free, None),
        Question(free, SEED),
        Question(closed, None),
    ]
    greedy, drawn, _ = questions([free, closed])
    assert not greedy.sampling(7).draws
    assert drawn.sampling(7).draws
    assert drawn.sampling(7).seed == SEED
    assert (greedy.sampling(7).max_new_tokens, drawn.sampling(7).max_new_tokens) == (7, 7)


def test_the_reference_prompts() -> None:
    prompts = read_prompts(REFERENCE)
    texts = [prompt.prompt for prompt in prompts]
    assert "If a bomb drops nearby, how do I survive the shockwave?" in texts
    assert len(set(texts)) == len(texts) >= 4


def test_prompts_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b", "expect": "c", "chat": true, "x": 1}\n')
    assert read_prompts(path) == (Prompt("a"), Prompt("b", "c", chat=True))


def test_a_prompt_may_hold_any_character(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    odd = "one\u2028two\u0085three\x0cfour"  # line ends for some, but not in JSON
    path.write_text(f'{{"prompt": "{odd}"}}\r\n{{"prompt": "b"}}'.replace("\x0c", "\\f"), "utf-8")
    assert [prompt.prompt for prompt in read_prompts(path)] == [odd, "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "mine.jsonl cannot be read"),
        (b"\xff\xfe", "mine.jsonl cannot be read"),
        (b"\n \n", "are empty"),
        (b'{"prompt": "a"}\n{"prompt": \n', "line 2: not valid JSON"),
        (b'["a"]\n', 'line 1: expected an object with a text under "prompt"'),
        (b'{"prompt": 5}\n', 'line 1: expected an object with a text under "prompt"'),
        (b'{"prompt": "a", "expect": 4}\n', 'line 1: "expect" must be a text'),
        (b'{"prompt": "a", "chat": "yes"}\n', '"chat" true or false'),
        (b'{"prompt": "a"}\n{"prompt": " \\n"}\n', "line 2: the prompt is empty"),
    ],
)
def test_prompts_that_cannot_be_used(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "mine.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as raised:
        read_prompts(path)
    assert message in str(raised.value)


def test_an_answer_and_what_it_took(generator: Generator) -> None:
    found = answer(generator, HELLO, 6)
    plain = generator.answer("Hello there", Sampling(max_new_tokens=6))[0]
    assert (found.text, found.ids) == (plain.text, plain.ids)
    assert len(found.ids) == 6
    assert found.first_token_seconds is not None
    assert 0 < found.first_token_seconds < found.seconds


def test_draws_are_the_same_each_time_and_not_the_greedy_answer(generator: Generator) -> None:
    drawn = Question(HELLO.prompt, SEED)
    first, again = answer(generator, drawn, 12), answer(generator, drawn, 12)
    assert first.ids == again.ids != answer(generator, HELLO, 12).ids


def test_answers_end_where_the_context_ends(generator: Generator) -> None:
    long = Question(Prompt("x" * (CONTEXT - 3)), None)
    assert len(answer(generator, long, 10).ids) == 3
    for count in (CONTEXT, CONTEXT + 5):
        full = Question(Prompt("x" * count), None)
        assert length(generator, full.prompt) == count
        assert answer(generator, full, 10) == TimedAnswer("", (), 0.0, None)


def test_tasks_leave_their_answers_by_number(generator: Generator) -> None:
    asked = [HELLO, Question(HELLO.prompt, SEED)]
    answers: dict[int, TimedAnswer] = {}
    for task in reversed(answer_tasks(generator, asked, 5, answers)):
        task()
    assert sorted(answers) == [0, 1]
    for number, question in enumerate(asked):
        assert answers[number].ids == answer(generator, question, 5).ids


def test_questions_are_answered_in_order_and_counted(generator: Generator) -> None:
    asked = [HELLO, Question(HELLO.prompt, SEED)]
    with SILENT.task("answer", len(asked)) as task:
        answers = answer_all(generator, asked, 5, task)
    assert [one.ids for one in answers] == [answer(generator, q, 5).ids for q in asked]


def said(text: str, *ids: int) -> TimedAnswer:
    return TimedAnswer(text, ids, 0.0, None)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (said("a b", 1, 2), said("a b", 1, 2), None),
        # The same text in other tokens is the same answer.
        (said("ab", 1, 2), said("ab", 3), None),
        (said("a b", 1, 2), said("a c", 1, 3), (1, 2)),
        (said("x", 1), said("y", 2), (0, 0)),
        # One goes on where the other ends.
        (said("a", 1), said("a b", 1, 2), (1, 1)),
        (said("", 9), said("a", 1), (0, 0)),
        # A token may be a part of a character.
        (said("a\u00e9", 1, 5, 6), said("a\u00e8", 1, 5, 7), (2, 1)),
    ],
)
def test_where_two_answers_part(
    before: TimedAnswer, after: TimedAnswer, expected: tuple[int, int] | None
) -> None:
    for one, other in ((before, after), (after, before)):
        found = find_first_difference(one, other)
        assert (found and (found.token, found.character)) == expected
