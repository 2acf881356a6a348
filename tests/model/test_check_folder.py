"""The door to a model folder: what leads out of it, and what asks for more than it holds."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from nf4_pipeline.checkpoint.source import open_checkpoint
from nf4_pipeline.errors import PipelineError
from nf4_pipeline.model.check_folder import check_headers, check_model_fits, check_small_files
from nf4_pipeline.runtime.artifact import open_folder
from nf4_pipeline.runtime.loader import load, load_tokenizer
from nf4_pipeline.runtime.prompt import prompt
from nf4_pipeline.sample import MODEL_DIR

from tests.support.forks import Forks, forks
from tests.support.tiny import INDEX, SHARDS, copy_of, edit_json

WIDE: Final = 2**20
TOGETHER: Final = "do not belong together"

CONFIGS: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "a million layers": ({"num_hidden_layers": 10**6}, TOGETHER),
    "a million layers by another name": ({"n_layer": 10**6}, TOGETHER),
    "layers beyond numbers": ({"num_hidden_layers": 1e300}, TOGETHER),
    "a thousand layers": (
        {"num_hidden_layers": 1024, "hidden_size": 2048},
        f"{TOGETHER}|takes longer",
    ),
    "a vocabulary": ({"vocab_size": 10**9}, TOGETHER),
    "a vocabulary that is believed": ({"vocab_size": WIDE}, TOGETHER),
    "a width": ({"hidden_size": 2**30}, TOGETHER),
    "a width that is believed": ({"hidden_size": WIDE}, TOGETHER),
    "an inner width": ({"ffn_hidden_size": WIDE}, TOGETHER),
    "another model": (
        {"model_type": "llama", "intermediate_size": WIDE, "hidden_size": WIDE},
        TOGETHER,
    ),
    "layers of a model inside": (
        {"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**6}},
        TOGETHER,
    ),
    "a large model inside": (
        {"model_type": "gemma3", "text_config": {"num_hidden_layers": 99, "hidden_size": WIDE}},
        f"{TOGETHER}|takes longer",
    ),
    "experts": (
        {"model_type": "mixtral", "num_local_experts": 1024, "num_hidden_layers": 1024},
        f"{TOGETHER}|takes longer",
    ),
    "a head's width": ({"model_type": "llama", "head_dim": WIDE}, TOGETHER),
    "a text for a number": ({"num_hidden_layers": "2"}, "not a valid falcon config"),
    "no heads": ({"num_attention_heads": 0}, "not a valid falcon config"),
    "a list for a number": ({"hidden_size": [64]}, "not a valid falcon config"),
    "a type that is none": ({"dtype": "x" * 100}, "not a valid falcon config"),
    "a function that is none": ({"activation": "os.system"}, "cannot build a falcon"),
    "code of its own": (
        {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "x.Y"}},
        "Code that comes with a checkpoint is never run",
    ),
    "weights elsewhere": ({"transformers_weights": "../x.safetensors"}, "plain name"),
    "an index elsewhere": ({"transformers_weights": "/x.safetensors.index.json"}, "plain name"),
    "a name that is none": ({"transformers_weights": 7}, "plain name"),
}


@pytest.fixture(scope="module")
def children() -> Iterator[Forks]:
    with forks() as found:
        yield found


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case: str, children: Forks, tiny_falcon: Path, tmp_path: Path) -> None:
    changes, message = CONFIGS[case]
    folder = copy_of(tiny_falcon, tmp_path / "model")
    edit_json(folder / "config.json", **changes)
    # On a busy machine only those end by their limit that are meant to.
    found = children.ask(folder, "config", 2 if "takes longer" in message else 60)
    assert "FOREIGN" not in found.error
    assert any(part in found.error for part in message.split("|"))
    assert "\n" not in found.error
    assert found.peak < 2**28
    assert found.seconds < 120


def test_models_that_fit_are_let_in(tiny_falcon: Path, exported_falcon: Path) -> None:
    for folder in (tiny_falcon, exported_falcon / "export", MODEL_DIR):
        check_small_files(folder)
        check_headers(folder)
        check_model_fits(open_checkpoint(folder))


def _index(name: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        value = json.loads((folder / INDEX).read_text())
        value["weight_map"] = dict.fromkeys(value["weight_map"], name)
        (folder / INDEX).write_text(json.dumps(value))

    return damage


def _pickle(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _sparse(name: str) -> Callable[[Path], object]:
    return lambda folder: os.truncate(_touched(folder / name), 3 * 2**30)


def _touched(path: Path) -> Path:
    path.unlink(missing_ok=True)
    path.touch()
    return path


def _link_out(name: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        target = folder.parent / f"outside-{name}"
        (folder / name).rename(target)
        (folder / name).symlink_to(target)

    return damage


def _names(*names: object) -> Callable[[Path], object]:
    return lambda folder: edit_json(
        folder / "tokenizer_config.json", fast_tokenizer_files=list(names)
    )


def _pipe(name: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def _edit(name: str, **changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / name, **changes)


DAMAGE: Final[dict[str, tuple[Callable[[Path], object], str]]] = {
    "an index that leads out": (_index("../model.safetensors"), "plain name of a .safetensors"),
    "an absolute index": (_index("/etc/model.safetensors"), "plain name of a .safetensors"),
    "an index of a pickle": (_index("pytorch_model.bin"), "plain name of a .safetensors"),
    "an index of nothing": (_index("model-9.safetensors"), "lacks 1 of the 1 shards"),
    "a pickle": (_pickle, "only as Python pickles.*nf4 build .* --allow-pickle"),
    "a linked shard": (_link_out(SHARDS[0]), "a link out of its folder"),
    "a sparse template": (_sparse("chat_template.jinja"), "no real chat_template.jinja has more"),
    "an adapter": (
        lambda folder: (folder / "adapter_config.json").write_text(
            '{"base_model_name_or_path": "some/other", "peft_type": "LORA"}'
        ),
        "adapter_config.json out of the folder",
    ),
    "a million layers": (_edit("config.json", num_hidden_layers=10**6), TOGETHER),
    "a wide model": (_edit("config.json", hidden_size=WIDE), TOGETHER),
    "a format of others": (
        _edit("config.json", quantization_config={"quant_method": "awq"}),
        "gives 'awq' as the method",
    ),
    "a format that is none": (
        _edit("config.json", quantization_config=["x"]),
        "not by bitsandbytes",
    ),
}
"""What a model is refused for."""

OF_THE_TOKENIZER: Final[dict[str, tuple[Callable[[Path], object], str]]] = {
    "a name that leads out": (_names("../tokenizer.4.0.0.json"), "plain names of files beside"),
    "an absolute name": (_names("/tmp/tokenizer.4.0.0.json"), "plain names of files beside"),
    "a name behind a good one": (
        _names("tokenizer.json", "tokenizer.4.0.0.json/../../x.json"),
        "plain names of files beside",
    ),
    "a number for a name": (_names(7), "plain names of files beside"),
    "a text for names": (
        _edit("tokenizer_config.json", fast_tokenizer_files="../tokenizer.1.json"),
        "plain names of files beside",
    ),
    "a linked tokenizer": (_link_out("tokenizer.json"), "a link out of its folder"),
    "a linked config": (_link_out("config.json"), "a link out of its folder"),
    "a sparse file": (_sparse("tokenizer_config.json"), "no real tokenizer_config.json has more"),
    "a sparse tokenizer": (_sparse("tokenizer.json"), "no real tokenizer.json has more"),
    "a pipe": (_pipe("tokenizer.json"), "is not a file"),
    "a pipe for a config": (_pipe("config.json"), "is not a file|no config.json"),
    "a list for a config": (
        lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
        "holds a list",
    ),
}
"""What a model and a tokenizer alike are refused for."""


@pytest.mark.parametrize("case", [*DAMAGE, *OF_THE_TOKENIZER])
def test_every_door_is_the_same(case: str, tiny_falcon: Path, tmp_path: Path) -> None:
    damage, message = {**DAMAGE, **OF_THE_TOKENIZER}[case]
    folder = copy_of(tiny_falcon, tmp_path / "model")
    damage(folder)
    doors: list[Callable[[], object]] = [lambda: load(folder, device="cpu")]
    if case not in LATER:
        doors += [lambda: open_folder(folder), lambda: prompt("Hello", folder, device="cpu")]
    if case in OF_THE_TOKENIZER:
        doors.append(lambda: load_tokenizer(folder))
    for door in doors:
        with pytest.raises(PipelineError, match=message):
            door()


LATER: Final = ("a wide model", "a format of others", "a format that is none")
"""Known only where the model is built: in a child, if it is asked for an answer."""


OUTSIDE: Final = ("/etc/passwd", "../secret.txt", "vocab.txt", "", {"content": "/etc/passwd"}, 7)
ARGUMENTS: Final = (
    *("vocab", "merges", "vocab_file", "merges_file", "tokenizer_file", "spm_file", "source_spm"),
    *("target_spm", "src_vocab_file", "emoji_file", "word_shape_file", "added_tokens_file"),
)


@pytest.mark.parametrize("value", OUTSIDE, ids=str)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_map_of_tokens_names_no_file(
    name: str, value: object, tiny_falcon: Path, tmp_path: Path
) -> None:
    """transformers lets it go over the paths of the tokenizer's own files."""
    folder = copy_of(tiny_falcon, tmp_path / "model")
    path = folder / "special_tokens_map.json"
    path.write_text(json.dumps({"eos_token": "a/file", "profile_token": "/etc", name: value}))
    with pytest.raises(PipelineError, match=f"as '{name}', and a tokenizer would open it"):
        check_small_files(folder)
    path.write_text(json.dumps({"eos_token": "a/file", "profile_token": "/etc", name: None}))
    check_small_files(folder)


@pytest.mark.parametrize(
    ("name", "value", "is_refused"),
    [
        ("vocab", "/nowhere", True),
        ("merges", "merges.txt", True),
        ("vocab_file", "/etc/passwd", True),
        ("tokenizer_file", "../../../../../../../../../../etc/passwd", True),
        ("spm_file", "/dev/zero", True),
        ("vocab_file", "/home/maker/.cache/vocab.json", False),
        ("vocab_file", "\0", False),
        ("vocab_file", "vocab.json", False),
        ("tokenizer_file", None, False),
        ("special_tokens_map_file", "/etc/passwd", False),
        ("vocab_size", 7, False),
        ("vocab", {"a": 0}, False),
    ],
    ids=str,
)
def test_files_that_a_tokenizer_config_names(
    name: str, value: object, is_refused: bool, tiny_falcon: Path, tmp_path: Path
) -> None:
    folder = copy_of(tiny_falcon, tmp_path / "model")
    edit_json(folder / "tokenizer_config.json", **{name: value})
    if not is_refused:
        check_small_files(folder)
        return
    with pytest.raises(PipelineError, match="a tokenizer would open it"):
        check_small_files(folder)


@pytest.mark.parametrize("prefix", ["", "_"])
@pytest.mark.parametrize("key", ["attn_implementation", "experts_implementation"])
@pytest.mark.parametrize(
    "value",
    ["ORG/code", "kernels-community/x@0123abc", "paged|ORG/code:f", {"": "ORG/code"}, ["ORG/code"]],
    ids=str,
)
def test_a_config_names_no_code_on_the_hub(
    prefix: str, key: str, value: object, tiny_falcon: Path, tmp_path: Path
) -> None:
    folder = copy_of(tiny_falcon, tmp_path / "model")
    said = {prefix + key: value}
    for changes in (said, {"text_config": said}, {"parts": [{"vision": said}]}):
        edit_json(folder / "config.json", **changes)
        with pytest.raises(PipelineError, match=f"names code on the Hub under '{prefix}{key}'"):
            check_small_files(folder)
    edit_json(folder / "config.json", **{prefix + key: "sdpa", "text_config": None, "parts": None})
    check_small_files(folder)
