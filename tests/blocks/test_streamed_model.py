"""A model run block by block computes what the whole model computes, to the last bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from nf4_pipeline.blocks.find_blocks import find_blocks
from nf4_pipeline.blocks.lockstep import Lockstep
from nf4_pipeline.blocks.streamed_model import STEM, StreamedModel
from nf4_pipeline.checkpoint.safetensors_header import read_header
from nf4_pipeline.errors import CheckpointError
from nf4_pipeline.progress import SILENT
from nf4_pipeline.quiet_libraries import quiet_loading
from nf4_pipeline.selection import Plan
from nf4_pipeline.stages.streamed_bytes import StreamedBytes
from nf4_pipeline.streaming.passing import Passing
from nf4_pipeline.streaming.serving import Stretches, serving
from nf4_pipeline.streaming.stretches import Fetch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.checkpoints import KINDS, make_checkpoint
from tests.support.decoders import DECODERS, write_decoder
from tests.support.tiny import copy_of

LENGTHS = (20, 20, 31)


def tokens(length: int) -> torch.Tensor:
    return (torch.arange(length) * 9 % 250)[None]


def whole(folder: Path) -> Any:
    with quiet_loading():
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def block_by_block(folder: Path, lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}

    def run(number: int, model: Any) -> Callable[[], None]:
        def forward() -> None:
            found[number] = model(tokens(lengths[number]), use_cache=False).logits

        return forward

    with StreamedModel(folder, "cpu") as streamed:
        lockstep = Lockstep([streamed.blocks], streamed.open, streamed.close)
        lockstep.run([run(number, streamed.model) for number in range(len(lengths))])
    return [found[number] for number in range(len(lengths))]


def assert_equal(folder: Path) -> None:
    reference = whole(folder)
    for length, logits in zip(LENGTHS, block_by_block(folder), strict=True):
        with torch.inference_mode():
            expected = reference(tokens(length), use_cache=False).logits
        assert logits.dtype == expected.dtype
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str, tmp_path: Path) -> None:
    assert_equal(make_checkpoint(tmp_path / kind, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_served_model_comes_once(kind: str, tmp_path: Path) -> None:
    """The stem is what the files hold, whatever loading did with it; then it is let go."""
    folder = make_checkpoint(tmp_path / kind, kind, stored_head=kind.startswith("falcon"))
    asked: list[tuple[int, int]] = []

    def fetch(file: str, start: int, end: int) -> bytes:
        asked.append((start, end))
        return (folder / file).read_bytes()[start:end]

    with serving(passed_whole(folder, fetch), tmp_path / "socket"):
        asked.clear()
        with StreamedModel(folder, "cpu", served=tmp_path / "socket") as streamed:
            stem = streamed.stored(STEM)
            assert stem
            assert streamed.stored(STEM) == {}
            promised = StreamedBytes(streamed.checkpoint, {}, cast(Plan, None))
            for passes in (1, 2):
                for block in streamed.blocks:
                    streamed.open_ahead(block)
                    streamed.close(block)
                assert sum(end - start for start, end in asked) == promised.to_compare(passes)
                assert passes > 1 or len(asked) == len(set(asked))
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if name in stem:
                assert torch.equal(stem.pop(name), tensor)
    assert not stem


def passed_whole(folder: Path, fetch: Fetch) -> Stretches:
    """The files of a checkpoint, once they have passed by."""
    found = {}
    for path in folder.glob("*.safetensors"):
        headers = read_header(path)
        whole = path.read_bytes()
        start = whole[: headers[0].offset]
        with Passing.whole(path.name, len(whole), start, headers, (), fetch, SILENT) as passing:
            found[path.name] = passing.finish()
    return Stretches(found, fetch)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", ["falcon-7b", "llama", "gpt2"])
def test_every_dtype(kind: str, dtype: str, tmp_path: Path) -> None:
    assert_equal(make_checkpoint(tmp_path / kind, kind, dtype=dtype))


@pytest.mark.parametrize("name", DECODERS)
def test_other_decoders(name: str, tmp_path: Path) -> None:
    write_decoder(tmp_path / name, name)
    assert_equal(tmp_path / name)


def test_shards_tied_heads_and_bare_names(tmp_path: Path) -> None:
    assert_equal(
        make_checkpoint(tmp_path / "falcon", "falcon-7b", max_shard_size="60KB", stored_head=True)
    )
    assert_equal(make_checkpoint(tmp_path / "gpt2", "gpt2", bare_names=True))


def test_a_block_has_weights_only_while_it_is_open(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "falcon", "falcon-7b")
    with StreamedModel(folder, "cpu") as streamed:
        first, second = streamed.blocks

        def there(block: str) -> bool:
            return not any(p.is_meta for p in streamed.blocks[block].parameters())

        assert not any(p.is_meta for p in streamed.model.get_input_embeddings().parameters())
        assert (there(first), there(second)) == (False, False)
        streamed.open(first)
        assert (there(first), there(second)) == (True, False)
        streamed.close(first)
        assert (there(first), there(second)) == (False, False)
        streamed.hold(second)
        streamed.close(second)
        assert (there(first), there(second)) == (False, True)


def test_all_runs_pass_a_block_before_one_enters_the_next(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "llama", "llama")
    opened: list[str] = []
    with StreamedModel(folder, "cpu") as streamed:

        def note(block: str) -> None:
            opened.append(block)
            streamed.open(block)

        model = streamed.model
        lockstep = Lockstep([streamed.blocks], note, streamed.close)
        lockstep.run([lambda: model(tokens(5), use_cache=False)] * 4)
    assert opened == list(streamed.blocks)


def test_generation_in_lockstep_is_generation_alone(tmp_path: Path) -> None:
    """Greedy and sampled, each with its own seed, ending at different lengths."""
    folder = make_checkpoint(tmp_path / "llama", "llama", dtype="float32")
    options: list[dict[str, Any]] = [
        {"do_sample": False, "max_new_tokens": 6},
        {"do_sample": True, "max_new_tokens": 9},
        {"do_sample": True, "max_new_tokens": 4},
    ]

    def generate(model: Any, number: int) -> torch.Tensor:
        torch.manual_seed(number)
        ids = tokens(3 + number)
        written: torch.Tensor = model.generate(
            ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options[number]
        )
        return written

    found: dict[int, torch.Tensor] = {}
    with StreamedModel(folder, "cpu") as streamed:

        def run(number: int) -> Callable[[], None]:
            return lambda: found.update({number: generate(streamed.model, number)})

        lockstep = Lockstep([streamed.blocks], streamed.open, streamed.close)
        lockstep.run([run(number) for number in range(len(options))])
    reference = whole(folder)
    for number in range(len(options)):
        assert torch.equal(found[number], generate(reference, number))


def test_an_error_in_one_run_ends_all(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "llama", "llama")
    ended: list[str] = []
    with StreamedModel(folder, "cpu") as streamed:

        def good() -> None:
            try:
                streamed.model(tokens(5), use_cache=False)
            finally:
                ended.append("good")

        def bad() -> None:
            raise ValueError("the second run fails")

        lockstep = Lockstep([streamed.blocks], streamed.open, streamed.close)
        with pytest.raises(ValueError, match="second run"):
            lockstep.run([good, bad])
    assert ended == ["good"]


def test_a_file_that_becomes_shorter_is_named(tmp_path: Path) -> None:
    folder = copy_of(make_checkpoint(tmp_path / "llama", "llama"), tmp_path / "copy")
    with StreamedModel(folder, "cpu") as streamed:
        os.truncate(folder / "model.safetensors", 2000)
        last = list(streamed.blocks)[-1]
        with pytest.raises(CheckpointError, match=r"model\.safetensors ended in the middle of"):
            streamed.open(last)


def test_blocks_are_the_repeated_layers(tmp_path: Path) -> None:
    model = whole(make_checkpoint(tmp_path / "falcon", "falcon-7b"))
    assert list(find_blocks(model)) == ["transformer.h.0", "transformer.h.1"]
