"""What a model is asked, what is noted of its answers, and where two answers part."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import transformers
from nf4_pipeline.errors import RecipeError
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer
from nf4_pipeline.progress import SILENT
from nf4_pipeline.runtime.generate import Generator, Sampling
from nf4_pipeline.verification import batches
from nf4_pipeline.verification.batches import Draws, _drawn, cut_batches, may_be_padded
from nf4_pipeline.verification.generation import (
    SEED,
    Answered,
    Question,
    TimedAnswer,
    answer_all,
    answer_streamed,
    encode,
    find_first_difference,
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
        (b'{"prompt": "a"}\n{"prompt": \n', "line 2 is no JSON; expected a JSON object"),
        (b'["a"]\n', 'line 1: expected a JSON object on each line, with a text under "prompt"'),
        (
            b'{"prompt": 5}\n',
            'line 1: expected a JSON object on each line, with a text under "prompt"',
        ),
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


def answer_each(generator: Generator, asked: Sequence[Question], tokens: int) -> Answered:
    with SILENT.task("answer", len(asked)) as task:
        return answer_all(generator, asked, tokens, task)


def answer(generator: Generator, question: Question, tokens: int) -> TimedAnswer:
    return answer_each(generator, [question], tokens).answers[0]


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


def test_draws_are_as_likely_as_the_model_says() -> None:
    """A token whose probability is p is drawn about p times n, and none beyond the top k."""
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0])
    draws = 4_000
    drawn = _drawn(Draws(temperature=0.8, top_k=3, seeds=tuple(range(draws))))
    picked = drawn(None, logits.repeat(draws, 1)).argmax(-1)
    counts = torch.bincount(picked, minlength=5) / draws
    expected = torch.cat([(logits[:3] / 0.8).softmax(0), torch.zeros(2)])
    assert (counts - expected).abs().max() < 0.03


def test_answers_end_where_the_context_ends(generator: Generator) -> None:
    long = Question(Prompt("x" * (CONTEXT - 3)), None)
    assert len(answer(generator, long, 10).ids) == 3
    for count in (CONTEXT, CONTEXT + 5):
        full = Question(Prompt("x" * count), None)
        assert len(encode(generator, full.prompt)) == count
        assert answer(generator, full, 10) == TimedAnswer("", (), 0.0, None)
    beside = answer_each(generator, [long, HELLO, full], 10)
    assert [len(one.ids) for one in beside.answers] == [3, 10, 0]


TEXTS: Final = ("Hello there", "x", "Once upon a time", "y" * 30, "Hi", "no", "Once upon")


def test_answers_do_not_depend_on_the_others_of_a_batch(generator: Generator) -> None:
    prompts = [Prompt(text) for text in TEXTS]
    asked = [Question(prompt, seed) for prompt in prompts for seed in (None, SEED, 7)]
    found = answer_each(generator, asked, 9)
    assert found.together == 3 * len(TEXTS)  # greedy and drawn ones alike
    assert found.seconds > 0
    alone = [answer(generator, question, 9) for question in asked]
    assert [one.ids for one in found.answers] == [one.ids for one in alone]
    assert [one.text for one in found.answers] == [one.text for one in alone]


def _without_mask(forward: Callable[..., Any], **inputs: Any) -> Any:
    return forward(**inputs | {"attention_mask": None})


@pytest.mark.parametrize("kind", ["gpt2", "ctrl", "mamba", "maskless", "penalty"])
def test_what_may_not_be_padded_is_not(kind: str, generator: Generator, tmp_path: Path) -> None:
    lengths = [3, 9, 3, 5]
    model = generator.model
    if kind in ("ctrl", "mamba"):
        made = transformers.AutoConfig.for_model(
            kind, vocab_size=VOCABULARY, hidden_size=32, n_embd=32, n_head=2, num_hidden_layers=1
        )
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(made).eval()
    if kind == "maskless":  # an architecture that passes over what is masked
        model = copy.deepcopy(model)
        model.forward = partial(_without_mask, model.forward)
    other = Generator(model, generator.tokenizer)
    before = other.model.generation_config
    try:
        if kind == "penalty":
            other.model.generation_config = transformers.GenerationConfig(repetition_penalty=1.2)
        batches = list(cut_batches(other, lengths, 4, padded=may_be_padded(other, lengths)))
    finally:
        other.model.generation_config = before
    assert sorted(number for batch in batches for number in batch) == [0, 1, 2, 3]
    assert (len(batches) == 1) == (kind in ("gpt2", "ctrl"))
    if len(batches) > 1:
        assert all(len({lengths[number] for number in batch}) == 1 for batch in batches)


def test_a_batch_is_no_larger_than_its_cache_may_be(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_CACHE_BYTES", 2 * 2 * 32 * (5 + 4) * 3)  # three of the longest
    found = list(cut_batches(generator, [3, 4, 5, 3, 5, 5, 3], 4, padded=True))
    assert [len(batch) for batch in found] == [3, 3, 1]


def test_streamed_answers_are_those_of_the_whole_model(generator: Generator) -> None:
    asked = [Question(Prompt(text), seed) for text in TEXTS for seed in (None, SEED)]

    def run(functions: Sequence[Callable[[], None]]) -> None:
        for function in reversed(functions):
            function()

    streamed = answer_streamed(generator, asked, 5, run)
    whole = answer_each(generator, asked, 5)
    assert [one.ids for one in streamed.answers] == [one.ids for one in whole.answers]
    assert {one.seconds for one in streamed.answers} == {0.0}
    assert streamed.seconds == 0


def test_no_question(generator: Generator) -> None:
    assert answer_each(generator, [], 5) == Answered((), 0.0, 0)


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
