"""Checkpoints made to harm: each kind is refused by name, before anything is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nf4_pipeline.errors import SourceError
from nf4_pipeline.job import run_stage
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import Recipe

from tests.support.jobs import CPU, download
from tests.support.tiny import INDEX, SHARDS, copy_of, edit_json

pytestmark = pytest.mark.usefixtures("workers_here")

Damage = Callable[[Path], object]

SHARD = SHARDS[0]


def header_of(model: Path) -> tuple[dict[str, Any], bytes]:
    content = (model / SHARD).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def with_header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Changes the header of the first shard, as parsed."""

    def damage(model: Path) -> None:
        header, data = header_of(model)
        change(header)
        write_header(model, json.dumps(header).encode(), data)

    return damage


def raw_header(text: bytes, *, keep_data: bool = False) -> Damage:
    def damage(model: Path) -> None:
        write_header(model, text, header_of(model)[1] if keep_data else b"")

    return damage


def write_header(model: Path, text: bytes, data: bytes) -> None:
    (model / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + data)


def tensor(header: dict[str, Any], number: int = 0) -> dict[str, Any]:
    """A tensor's entry, in the order of the bytes."""
    entries = [value for name, value in header.items() if name != "__metadata__"]
    chosen: dict[str, Any] = sorted(entries, key=lambda e: e["data_offsets"])[number]
    return chosen


def set_in(number: int, **values: Any) -> Damage:
    return with_header(lambda header: tensor(header, number).update(values))


def rename_to(name: str) -> Damage:
    def change(header: dict[str, Any]) -> None:
        old = next(key for key in header if key != "__metadata__")
        header[name] = header.pop(old)

    return with_header(change)


def shift(number: int, by: int) -> Damage:
    def change(header: dict[str, Any]) -> None:
        begin, end = tensor(header, number)["data_offsets"]
        tensor(header, number)["data_offsets"] = [begin + by, end + by]

    return with_header(change)


def twice_in_header(model: Path) -> None:
    header, data = header_of(model)
    name = next(key for key in header if key != "__metadata__")
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
    write_header(model, text.encode(), data)


def cut(count: int) -> Damage:
    return lambda model: (model / SHARD).write_bytes((model / SHARD).read_bytes()[:count])


def longer(model: Path) -> None:
    (model / SHARD).write_bytes((model / SHARD).read_bytes() + b"more")


def length(value: int) -> Damage:
    def damage(model: Path) -> None:
        content = (model / SHARD).read_bytes()
        (model / SHARD).write_bytes(value.to_bytes(8, "little") + content[8:])

    return damage


def weight_map(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(model: Path) -> None:
        index = json.loads((model / INDEX).read_text())
        change(index["weight_map"])
        (model / INDEX).write_text(json.dumps(index))

    return damage


def points_at(name: object) -> Damage:
    return weight_map(lambda found: found.update({"transformer.ln_f.weight": name}))


def write(name: str, content: bytes | str) -> Damage:
    raw = content.encode() if isinstance(content, str) else content
    return lambda model: (model / name).write_bytes(raw)


def config(**changes: Any) -> Damage:
    return lambda model: edit_json(model / "config.json", **changes)


def link_out(name: str) -> Damage:
    def damage(model: Path) -> None:
        secret = model.parent / "secret"
        (model / name).rename(secret) if (model / name).exists() else secret.write_text("{}")
        (model / name).symlink_to(secret)

    return damage


def link_folder_out(model: Path) -> None:
    secret = model.parent / "templates"
    secret.mkdir()
    (secret / "a.jinja").write_text("secret")
    (model / "additional_chat_templates").symlink_to(secret)


def dangling(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").symlink_to("nowhere.json")


def pipe(name: str) -> Damage:
    def damage(model: Path) -> None:
        (model / name).unlink()
        os.mkfifo(model / name)

    return damage


def folder_named(name: str) -> Damage:
    def damage(model: Path) -> None:
        (model / name).unlink()
        (model / name).mkdir()

    return damage


def sparse(name: str, size: int) -> Damage:
    def damage(model: Path) -> None:
        with (model / name).open("wb") as file:
            file.truncate(size)

    return damage


def deep(levels: int) -> str:
    return '{"a": ' + "[" * levels + "]" * levels + "}"


def two_names(model: Path) -> None:
    """A bare name beside the full one: both mean the same weight."""
    header, data = header_of(model)
    name = next(n for n in header if n.endswith("h.0.input_layernorm.weight"))
    entry = dict(header[name])
    begin, end = entry["data_offsets"]
    bare = name.removeprefix("transformer.")
    entry["data_offsets"] = [len(data), len(data) + end - begin]
    write_header(model, json.dumps({**header, bare: entry}).encode(), data + data[begin:end])


MIB = 2**20

KINDS: dict[str, tuple[Damage, str]] = {
    # Headers
    "an empty file": (cut(0), "is 0 bytes long, too short"),
    "seven bytes": (cut(7), "is 7 bytes long, too short"),
    "cut in the header": (cut(50), "is truncated: its header needs"),
    "cut in the data": (cut(9000), "is truncated: its tensors end at"),
    "bytes more": (longer, "has 4 bytes that belong to no tensor"),
    "a length of 2**63": (length(2**63), "claims a header of 9,223,372,036,854,775,808 bytes"),
    "a length beyond the file": (length(10 * MIB), "is truncated: its header needs 10,485,768"),
    "a length of 0": (length(0), "does not start with '{'"),
    "a list as header": (raw_header(b"[1, 2]"), "does not start with '{'"),
    "no JSON": (raw_header(b'{"a": '), "not valid JSON"),
    "no UTF-8": (raw_header(b'{"\xff": 1}'), "not valid JSON ('utf-8' codec"),
    "deep nesting": (raw_header(b'{"a": ' + b"[" * 100_000), "nested deeper than 64 levels"),
    "nesting of 100 levels": (raw_header(deep(100).encode()), "nested deeper than 64 levels"),
    "a million lists": (
        raw_header(b'{"a": [' + b"[]," * 10**6 + b"1]}"),
        "more than 500,000",
    ),
    "a million keys": (
        raw_header(b"{" + b",".join(b'"%d":1' % i for i in range(1_100_000)) + b"}"),
        "more than 500,000 keys",
    ),
    "a number of 5000 digits": (
        raw_header(b'{"a": ' + b"9" * 5000 + b"}"),
        "a number in it has 5,000 digits",
    ),
    "half a character": (rename_to("a\ud800"), "holds half a character"),
    "a tensor twice": (twice_in_header, "stands in it twice"),
    "metadata that is a list": (
        with_header(lambda header: header.update(__metadata__=[1])),
        "a __metadata__ entry that is not a map of strings",
    ),
    "a name that is empty": (rename_to(""), "an impossible name ''"),
    "a name of 5000 letters": (rename_to("n" * 5000), "an impossible name 'nnn"),
    "a name with a line break": (rename_to("a\nb"), "an impossible name 'a\\nb'"),
    "a name that writes backwards": (rename_to("a\u202eb"), "an impossible name 'a\\u202eb'"),
    "a name that is a path": (rename_to("/etc/passwd"), "a path out of a folder: '/etc/passwd'"),
    "a name with two dots": (rename_to("a/../../b"), "a path out of a folder: 'a/../../b'"),
    "a name with a backslash": (rename_to("a\\..\\b"), "a path out of a folder: 'a\\\\..\\\\b'"),
    "an entry that is a list": (
        with_header(lambda header: header.update(x=[1])),
        "describes 'x' by something else",
    ),
    "an entry with a key more": (set_in(0, strides=[1]), "by something else than dtype, shape"),
    "an unknown dtype": (set_in(0, dtype="F4"), "unknown dtype 'F4'"),
    "a dtype that is a list": (set_in(0, dtype=["BF16"]), "unknown dtype ['BF16']"),
    "a negative shape": (set_in(0, shape=[-1]), "impossible shape [-1]"),
    "a shape of 40 dimensions": (set_in(0, shape=[1] * 40), "impossible shape [1, 1, 1"),
    "a shape of 2**63": (set_in(0, shape=[2**63]), "impossible shape [9223372036854775808]"),
    "a shape that overflows": (set_in(0, shape=[2**40, 2**40]), "(1099511627776, 1099511627776)"),
    "a wrong byte count": (set_in(0, shape=[3, 3]), "shape (3, 3) of BF16 needs 18"),
    "three offsets": (set_in(0, data_offsets=[0, 1, 2]), "impossible data_offsets [0, 1, 2]"),
    "offsets that are negative": (set_in(0, data_offsets=[-2, 0]), "data_offsets [-2, 0]"),
    "offsets that are fractions": (set_in(0, data_offsets=[0.0, 2.0]), "data_offsets [0.0, 2.0]"),
    "offsets that are not numbers": (set_in(0, data_offsets=["0", "2"]), "data_offsets ['0', '2']"),
    "offsets swapped": (
        with_header(lambda h: tensor(h).update(data_offsets=tensor(h)["data_offsets"][::-1])),
        " -128 bytes; shape (64,) of BF16 needs 128",
    ),
    "a hole at the start": (shift(0, 2), "leaves a hole before"),
    "an overlap": (shift(1, -2), "overlaps at"),
    "offsets past the end": (shift(-1, 10**9), "leaves a hole before"),
    # Index files
    "an index that is a list": (write(INDEX, "[]"), "holds a list, expected a JSON object"),
    "an index without a map": (write(INDEX, '{"metadata": {}}'), "has no weight_map"),
    "an index with a key twice": (
        write(INDEX, f'{{"weight_map": {{"a": "{SHARD}", "a": "{SHARD}"}}}}'),
        "the key 'a' stands in it twice",
    ),
    "an index out of the folder": (points_at("../x.safetensors"), "names '../x.safetensors'"),
    "an index of an absolute path": (points_at("/x.safetensors"), "names '/x.safetensors'"),
    "an index into a folder": (points_at("sub/x.safetensors"), "names 'sub/x.safetensors'"),
    "an index of another kind": (points_at("weights.bin"), "names 'weights.bin'"),
    "an index with a control character": (points_at("a\0.safetensors"), "names 'a\\x00.safe"),
    "an index of a number": (points_at(7), "names '7' as a shard"),
    "an index of a shard that is not there": (
        points_at("model-00009-of-00009.safetensors"),
        "lacks 1 of the 3 shards",
    ),
    "an index that is huge": (sparse(INDEX, 33 * MIB), "no real model.safetensors.index.json has"),
    # Links and odd files
    "a shard that is a link out": (link_out(SHARD), f"{SHARD} is a link out of its folder"),
    "a tokenizer that is a link out": (link_out("tokenizer.json"), "tokenizer.json is a link out"),
    "a license that is a link out": (link_out("LICENSE"), "LICENSE is a link out"),
    "a folder that is a link out": (link_folder_out, "a.jinja is a link out"),
    "a link to nowhere": (dangling, "tokenizer.json is a dead link"),
    "a pipe": (pipe("tokenizer_config.json"), "tokenizer_config.json is not a file"),
    "a config that is a pipe": (pipe("config.json"), "config.json is not a file"),
    "a tokenizer that is a folder": (
        folder_named("tokenizer.json"),
        "tokenizer.json is not a file",
    ),
    # config.json
    "a config that is a list": (write("config.json", "[]"), "config.json holds a list"),
    "a config that is cut": (write("config.json", '{"a": '), "config.json is not valid JSON"),
    "a config that is huge": (sparse("config.json", 5 * MIB), "no real config.json has more than"),
    "a config nested deep": (
        write("config.json", deep(900)),
        "config.json is not valid JSON (it",
    ),
    "a config with a key twice": (
        write("config.json", '{"model_type": "falcon", "model_type": "gpt2"}'),
        "the key 'model_type' stands in it twice",
    ),
    "a hidden size of 10**9": (config(hidden_size=10**9), "says hidden_size = 1,000,000,000"),
    "10**7 layers": (config(num_hidden_layers=10**7), "num_hidden_layers = 10,000,000"),
    "10**9 heads": (config(num_attention_heads=10**9), "num_attention_heads = 1,000,000,000"),
    "a vocabulary of 10**12": (config(vocab_size=10**12), "vocab_size = 1,000,000,000,000"),
    "a size that is infinite": (config(ffn_hidden_size=float("inf")), "ffn_hidden_size = inf"),
    "an absurd size within a list": (config(layer_sizes=[[10**9]]), "layer_sizes[0][0] = 1,000"),
    "an absurd size within an object": (
        config(text_config={"num_layers": 10**8}),
        "text_config",
    ),
    "architectures that are a number": (config(architectures=7), "gives architectures as '7'"),
    "architectures that are a text": (config(architectures="X"), "gives architectures as 'X'"),
    "a model_type that is a list": (config(model_type=["falcon"]), "model_type ['falcon']"),
    "a model_type with a path": (config(model_type="../falcon"), "model_type '../falcon'"),
    "layers that are a text": (config(num_hidden_layers="many"), "is not a valid falcon config"),
    "a negative size": (config(hidden_size=-64), "falcon"),
    "already quantized": (
        config(quantization_config={"quant_method": "gptq"}),
        "already quantized",
    ),
    # Tokenizer and other small files
    "a tokenizer config that is a list": (
        write("tokenizer_config.json", "[]"),
        "tokenizer_config.json holds a list",
    ),
    "a tokenizer config that is cut": (
        write("tokenizer_config.json", '{"auto_map": '),
        "tokenizer_config.json is not valid JSON",
    ),
    "a tokenizer that is huge": (sparse("tokenizer.json", 300 * MIB), "no real tokenizer.json has"),
    "a chat template that is huge": (
        sparse("chat_template.jinja", 5 * MIB),
        "no real chat_template.jinja has",
    ),
    "a generation config that is text": (
        write("generation_config.json", '"x"'),
        "generation_config.json holds a str",
    ),
    "a license that is huge": (sparse("LICENSE", 17 * MIB), "no real LICENSE has more"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_checkpoint_is_refused_by_name(
    kind: str, tiny_falcon: Path, tmp_path: Path
) -> None:
    damage, message = KINDS[kind]
    model = copy_of(tiny_falcon, tmp_path / "model")
    damage(model)
    with pytest.raises(SourceError) as caught:
        download(model, tmp_path / "artifacts")
    text = str(caught.value)
    assert message in text, text
    assert len(text) < 700 + 2 * len(str(tmp_path))
    assert text.count("\n") == 0
    assert not (tmp_path / "artifacts").exists()


def test_two_names_of_one_weight(tiny_falcon: Path, tmp_path: Path) -> None:
    model = copy_of(tiny_falcon, tmp_path / "model")
    two_names(model)
    build, *_ = download(model, tmp_path / "artifacts")
    with pytest.raises(SourceError, match=r"both become 'transformer\.h\.0\."):
        run_stage(build, "quantize", Recipe(), CPU, SILENT)


def test_links_within_the_folder_and_in_the_hub_cache_are_fine(
    tiny_falcon: Path, tmp_path: Path
) -> None:
    model = copy_of(tiny_falcon, tmp_path / "model")
    (model / "tokenizer.json").rename(model / "elsewhere")
    (model / "tokenizer.json").symlink_to("elsewhere")
    download(model, tmp_path / "one")

    storage = tmp_path / "hub" / "models--org--name"
    snapshot = storage / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (storage / "blobs").mkdir()
    for number, path in enumerate(sorted(tiny_falcon.iterdir())):
        (storage / "blobs" / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    build, *_ = download(snapshot, tmp_path / "two")
    assert (build.source / SHARD).resolve().parent == storage / "blobs"
    (snapshot / "LICENSE").symlink_to(tmp_path / "model" / "config.json")
    with pytest.raises(SourceError, match="LICENSE is a link out"):
        download(snapshot, tmp_path / "three")


def test_numbers_that_real_configs_hold_are_fine(tiny_falcon: Path, tmp_path: Path) -> None:
    model = copy_of(tiny_falcon, tmp_path / "model")
    edit_json(
        model / "config.json",
        rope_theta=10**10,
        max_position_embeddings=10**8,
        time_step_limit=[0.0, float("inf")],
        model_max_length=10**6,
        layer_norm_epsilon=1e-5,
    )
    build, *_ = download(model, tmp_path / "artifacts")
    for stage in ("quantize", "serialize"):
        run_stage(build, stage, Recipe(), CPU, SILENT)
    written = json.loads((build.export / "config.json").read_text())
    assert written["time_step_limit"] == [0.0, float("inf")]
