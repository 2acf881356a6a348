"""What a model is asked: a text or chat messages, and where each of them goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest
from nf4_pipeline import prompt
from nf4_pipeline.errors import ArtifactError, PipelineError, UsageError
from nf4_pipeline.runtime.generate import Message, parse_query

from tests.support.hostile_tokenizers import write_template
from tests.support.tiny import copy_of

SHOWN: Final = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT: Final = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{{ m.content }}{% endfor %}"
)
USER: Final = {"role": "user", "content": "Hello"}
SYSTEM: Final = {"role": "system", "content": "One word."}
ANSWER: Final = {"role": "assistant", "content": "Hi"}


def test_a_conversation_is_read() -> None:
    expected = tuple(Message(m["role"], m["content"]) for m in (SYSTEM, USER, ANSWER, USER))
    assert parse_query([SYSTEM, USER, ANSWER, USER]) == expected
    assert parse_query((SYSTEM, USER, ANSWER, USER)) == expected
    assert parse_query("Hello") == "Hello"


WRONG: Final[dict[str, tuple[Any, str]]] = {
    "several texts": (["Hello", "there"], "For several prompts, call it once for each"),
    "a text among messages": ([USER, "there"], "entry 1 is 'there'"),
    "nothing": ([], "an empty list"),
    "None": (None, "is a NoneType"),
    "a number": (3, "is a int"),
    "bytes": (b"Hello", "is a bytes"),
    "one message alone": (USER, "is a dict"),
    "a set": ({"Hello"}, "is a set"),
    "no role": ([{"content": "Hello"}], "Message 0 is"),
    "another key": ([USER, {**USER, "name": "me"}], "Message 1 is"),
    "content in parts": (
        [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        "two texts",
    ),
    "no content": ([{"role": "user", "content": None}], "two texts"),
    "an answer last": ([USER, ANSWER], "nothing is left to answer"),
    "a list of conversations": ([[USER], [USER]], "once for each"),
    "a long list": (["x" * 10**6], "xxx…"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_query_is_refused_at_once(case: str) -> None:
    query, message = WRONG[case]
    with pytest.raises(UsageError) as caught:
        prompt(query, "no/such/model")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.fixture(scope="module")
def chat_model(tiny_falcon: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_of(tiny_falcon, tmp_path_factory.mktemp("chat") / "model")
    write_template(folder, SHOWN)
    return folder


def test_messages_go_into_the_template(chat_model: Path, workers_here: None) -> None:
    def ask(query: Any, **options: Any) -> list[str]:
        return prompt(query, chat_model, device="cpu", max_new_tokens=6, **options)

    by_hand = "<system>One word.<user>Hello<assistant>"
    assert ask([SYSTEM, USER]) == ask(by_hand, chat=False)
    assert ask("Hello") == ask([USER]) != ask("Hello", chat=False)
    with pytest.raises(UsageError, match="without chat=False"):
        ask([USER], chat=False)
    with pytest.raises(UsageError, match="empty"):
        ask([{"role": "user", "content": " \n"}])


def test_a_model_that_takes_no_such_messages(
    tiny_falcon: Path, tmp_path: Path, workers_here: None
) -> None:
    def refused(folder: Path, messages: list[dict[str, str]]) -> PipelineError:
        with pytest.raises(PipelineError) as caught:
            prompt(messages, folder, device="cpu", max_new_tokens=2)
        return caught.value

    without = refused(tiny_falcon, [USER])
    assert isinstance(without, UsageError)
    assert "has no chat template" in str(without)
    strict = copy_of(tiny_falcon, tmp_path / "strict")
    write_template(strict, STRICT)
    said = refused(strict, [SYSTEM, USER])
    assert isinstance(said, ArtifactError)
    assert "System role not supported" in str(said)
    assert "some take no system message" in str(said)  # and not: leave the template out
    assert "--raw" not in str(said)
    assert prompt([USER], strict, device="cpu", max_new_tokens=2)


def test_one_answer_is_streamed_and_seeds_repeat(chat_model: Path, workers_here: None) -> None:
    def ask(seed: int, **options: Any) -> list[str]:
        return prompt(
            "One two", chat_model, device="cpu", top_k=50, max_new_tokens=12, seed=seed, **options
        )

    pieces: list[str] = []
    (answer,) = ask(3, stream=pieces.append)
    assert "".join(pieces) == answer
    assert all(pieces)
    assert ask(3) == [answer]
    assert len({*ask(3), *ask(4), *ask(5)}) > 1
    with pytest.raises(UsageError, match="Only one answer can be streamed"):
        ask(3, stream=pieces.append, num_return_sequences=2)
