"""How the texts begin that a model writes for its own calibration."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from nf4_pipeline.calibration.beginnings import MIX, Beginnings, Ids, Mix, begin_texts, read_seeds
from nf4_pipeline.calibration.drawing import batches, draw
from nf4_pipeline.calibration.sampling import make_tokens
from nf4_pipeline.errors import CheckpointError
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer
from nf4_pipeline.progress import SILENT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.support.checkpoints import make_checkpoint, make_model
from tests.support.tiny import edit_json

pytestmark = pytest.mark.usefixtures("workers_here")

CHAT: Final = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASCII: Final = [chr(number) for number in range(32, 127)] + ["\n", "\t"]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer of bytes, and with a chat template."""
    folder = make_checkpoint(tmp_path_factory.mktemp("beginnings") / "chatty", "llama")
    edit_json(folder / "tokenizer_config.json", chat_template=CHAT)
    return folder


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


def scripts(texts: Sequence[str]) -> set[str]:
    names = (unicodedata.name(c).split()[0] for text in texts for c in text if c.isalpha())
    return {"CJK" if name in ("HIRAGANA", "KATAKANA") else name for name in names}


def test_seeds_of_every_kind() -> None:
    seeds = read_seeds()
    assert list(seeds) == ["code", "prose", "languages", "tables", "arithmetic"]
    every = [text for texts in seeds.values() for text in texts]
    assert len(set(every)) == len(every)
    assert min(map(len, seeds.values())) >= 10
    assert all(8 <= len(text) <= 80 for text in every)
    assert not [text for text in every if text.endswith(" ")]
    assert len(scripts(seeds["languages"])) >= 10
    assert scripts(seeds["code"] + seeds["prose"] + seeds["tables"] + seeds["arithmetic"]) == {
        "LATIN"
    }


def test_each_kind_gets_its_share(chatty: Path, model: Any) -> None:
    tokenizer = LimitedTokenizer.open(chatty)
    known = Beginnings.of(tokenizer)
    begins = begin_texts(model, known, 80, 256, Mix(plain=0.25, chats=0.25, seeds=0.25))
    kinds = {ids: kind for kind, own in known.seeds.items() for ids in own}
    of_kind = Counter(kinds[ids] for ids in begins if ids in kinds)
    assert of_kind == dict.fromkeys(read_seeds(), 4)
    assert len({ids for ids in begins if ids in kinds}) == 20
    talks = [ids for ids in begins if ids in known.chats]
    assert {tokenizer.tokenizer.decode(ids)[:6] for ids in talks} == {"<user>"}
    assert {tokenizer.tokenizer.decode(ids)[-11:] for ids in talks} == {"<assistant>"}
    assert len(talks) == 20
    assert sum(len(ids) == 2 and ids[0] == 256 for ids in begins) == 20  # any token
    assert begins.count((256,)) == 20
    assert len(begins) == 80


SHARES: Final[dict[str, tuple[Mix, Sequence[str], dict[str, int]]]] = {
    "all there is": (Mix(0.25, 0.25, 0.25), ("chats", "seeds"),
                     {"plain": 25, "chats": 25, "any": 25, "seeds": 25}),
    "no template": (Mix(0.25, 0.25, 0.25), ("seeds",), {"plain": 25, "any": 50, "seeds": 25}),
    "no seeds": (Mix(0.25, 0.25, 0.25), ("chats",), {"plain": 25, "chats": 25, "any": 50}),
    "nothing known": (Mix(0.25, 0.25, 0.25), (), {"plain": 25, "any": 75}),
    "plain alone": (Mix(1, 0, 0), ("chats", "seeds"), {"plain": 100}),
    "chats alone": (Mix(0, 1, 0), ("chats", "seeds"), {"chats": 100}),
    "seeds alone": (Mix(0, 0, 1), ("chats", "seeds"), {"seeds": 100}),
    "any token alone": (Mix(0, 0, 0), ("chats", "seeds"), {"any": 100}),
    "one kind": (Mix(0, 0, 1, ("b",)), ("chats", "seeds"), {"seeds of b": 100}),
}  # fmt: skip


@pytest.mark.parametrize("case", SHARES)
def test_what_there_is_none_of_begins_with_any_token(case: str, model: Any) -> None:
    mix, there, expected = SHARES[case]
    chats = ((1, 2, 3),) if "chats" in there else ()
    seeds: dict[str, tuple[Ids, ...]] = {"a": ((4,) * 5, (5,) * 5), "b": ((6,) * 5,)}
    known = Beginnings(chats=chats, seeds=seeds if "seeds" in there else {})
    found = Counter(
        {3: "chats", 1: "plain", 2: "any"}.get(
            len(ids), "seeds of b" if mix.kinds and ids == (6,) * 5 else "seeds"
        )
        for ids in begin_texts(model, known, 100, 128, mix)
    )
    assert found == expected


@pytest.mark.parametrize("sequences", [1, 2, 3, 5, 64, 199])
@pytest.mark.parametrize("length", [2, 3, 4, 12, 16, 128])
def test_as_many_as_were_asked_for_and_all_have_room(
    sequences: int, length: int, chatty: Path, model: Any
) -> None:
    known = Beginnings.of(LimitedTokenizer.open(chatty))
    begins = begin_texts(model, known, sequences, length)
    assert len(begins) == sequences
    assert begins[0] == (256,)
    assert all(len(ids) <= max(length // 2, 2) and len(ids) < length for ids in begins)
    if length == 2:  # no room for another token
        assert set(begins) == {(256,)}


@pytest.mark.parametrize(("known", "most"), [(0, 257), (40, 40), (99_999, 257)])
def test_any_token_that_model_and_tokenizer_know_may_come_first(
    known: int, most: int, model: Any
) -> None:
    begins = begin_texts(model, Beginnings(tokens=known), 2000, 128)
    drawn = [ids[1] for ids in begins if len(ids) == 2]
    assert len(drawn) == 1750
    assert (min(drawn), max(drawn)) == (0, most - 1)
    assert len(set(drawn)) > 0.9 * most
    assert begin_texts(model, Beginnings(tokens=known), 2000, 128) == begins


@pytest.mark.parametrize("eos", [None, 99_999, -1])
def test_a_model_that_knows_no_beginning(eos: int | None) -> None:
    model = make_model("llama")
    model.config.bos_token_id = None
    model.config.eos_token_id = eos
    begins = begin_texts(model, Beginnings(), 64, 128)
    assert len(begins) == 64
    assert len({ids[0] for ids in begins}) == 8
    assert all(0 <= token < 257 for ids in begins for token in ids)
    assert begin_texts(model, Beginnings(), 64, 128) == begins


@pytest.mark.parametrize(
    ("eos", "bos", "expected"),
    [([7, 8], None, {7: 64}), (7, 5, {7: 32, 5: 32}), (7, 7, {7: 64}), (None, 5, {5: 64})],
)
def test_ends_and_beginnings_take_turns(eos: Any, bos: Any, expected: dict[int, int]) -> None:
    model = make_model("llama")
    model.config.eos_token_id, model.config.bos_token_id = eos, bos
    assert Counter(ids[0] for ids in begin_texts(model, Beginnings(), 64, 128)) == expected


def test_tokens_of_another_model_are_not_used(model: Any) -> None:
    known = Beginnings(chats=((5, 257),), seeds={"a": ((5, -1), (9, 300)), "b": ((),)})
    found = begin_texts(model, known, 64, 128, Mix(seeds=0.5))
    assert {len(ids) for ids in found} == {1, 2}
    assert all(0 <= token < 257 for ids in found for token in ids)


def tokenizer(model: Any, **more: Any) -> LimitedTokenizer:
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return LimitedTokenizer(PreTrainedTokenizerFast(tokenizer_object=made, **more))


def numbered(words: Sequence[str]) -> dict[str, int]:
    return {word: number for number, word in enumerate(words)}


NARROW: Final[dict[str, Callable[[], LimitedTokenizer]]] = {
    "an unknown token": lambda: tokenizer(
        models.WordLevel(numbered([*ASCII, "[UNK]"]), "[UNK]"), unk_token="[UNK]"
    ),
    "characters are left out": lambda: tokenizer(models.BPE(numbered(ASCII), [])),
    "characters are refused": lambda: tokenizer(models.WordLevel(numbered(ASCII), "none")),
}


@pytest.mark.parametrize("kind", NARROW)
def test_a_tokenizer_that_does_not_know_a_script(kind: str) -> None:
    known = Beginnings.of(NARROW[kind]())
    texts = read_seeds()
    assert {len(known.seeds[name]) / len(texts[name]) for name in ("code", "tables")} == {1.0}
    latin = [text for text in texts["languages"] if scripts([text]) <= {"LATIN"}]
    assert 0 < len(known.seeds["languages"]) <= len(latin)


def test_a_script_in_bytes_is_known_but_has_no_room_in_short_texts(model: Any) -> None:
    folded = [*ASCII, *(f"<0x{number:02X}>" for number in range(256))]
    known = Beginnings.of(tokenizer(models.BPE(numbered(folded), [], byte_fallback=True)))
    assert len(known.seeds["languages"]) == len(read_seeds()["languages"])
    longest = max(map(len, known.seeds["languages"]))
    assert longest > 40
    model = make_model("llama")
    model.config.vocab_size = len(folded)
    for length in (60, 2 * longest):
        found = begin_texts(model, known, 400, length, Mix(0, 0, 1, ("languages",)))
        assert max(map(len, found)) <= length // 2
        assert set(found) == {ids for ids in known.seeds["languages"] if len(ids) <= length // 2}


def test_seeds_begin_as_the_tokenizer_begins_texts() -> None:
    plain = NARROW["characters are left out"]()
    begun = NARROW["characters are left out"]()
    begun.tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="~ $A", special_tokens=[("~", ASCII.index("~"))]
    )
    for kind, seeds in Beginnings.of(plain).seeds.items():
        expected = tuple((ASCII.index("~"), *ids) for ids in seeds)
        assert Beginnings.of(begun).seeds[kind] == expected


def test_seeds_survive_the_way_from_the_child(chatty: Path) -> None:
    known = Beginnings.of(LimitedTokenizer.open(chatty))
    assert known.seeds["code"]
    assert Beginnings.from_json(known.to_json()) == known


def test_texts_of_a_batch_begin_as_they_should(chatty: Path, model: Any) -> None:
    known = Beginnings.of(LimitedTokenizer.open(chatty))
    begins = begin_texts(model, known, 40, 80, Mix(seeds=0.25))
    parts = batches(begins, 32, 7)
    assert [(len(part.starts), part.seed) for part in parts] == [(20, 7), (20, 8)]
    rows = np.concatenate([draw(model, "cpu", part, 80, "") for part in parts])
    assert rows.shape == (40, 80)
    for row, ids in zip(rows, begins, strict=True):
        assert tuple(row[: len(ids)]) == ids
    assert len({row[-30:].tobytes() for row in rows}) == 40  # what follows is drawn


def test_a_nan_is_told_with_its_remedy(model: Any) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(CheckpointError, match=r"says NaN.*Take another one\."):
        draw(model, "cpu", batches([(1,), (2, 3, 4)], 8)[0], 16, "Take another one.")


def test_what_is_sampled_follows_the_mix(chatty: Path) -> None:
    rows = make_tokens(chatty, None, 16 * 128, "key", "cpu", SILENT).ids
    known = Beginnings.of(LimitedTokenizer.open(chatty))
    begins = begin_texts(make_model("llama"), known, 16, 128, MIX)
    assert [tuple(row[: len(ids)]) for row, ids in zip(rows, begins, strict=True)] == begins
