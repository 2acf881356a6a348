"""What `download` says of a checkpoint before it reads the weights, kind by kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import pytest
import torch
from nf4_pipeline.build_folder import Build
from nf4_pipeline.errors import AlreadyQuantizedError, SourceError, UsageError
from nf4_pipeline.hub import RemoteFile, RemoteModel
from nf4_pipeline.job import run_stage
from nf4_pipeline.manifest.read import read_manifest
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.records import SERIALIZE, Reading
from nf4_pipeline.stages.download import Download
from nf4_pipeline.stages.download_request import DownloadRequest
from nf4_pipeline.stages.preflight import check_small_files
from safetensors.torch import load_file

from tests.support import sources as s
from tests.support.checkpoints import make_checkpoint, read_tensors
from tests.support.jobs import CPU, download
from tests.support.tiny import copy_of, edit_json

pytestmark = pytest.mark.usefixtures("workers_here")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint in one file, which nobody may change."""
    return make_checkpoint(tmp_path_factory.mktemp("sources") / "llama", "llama")


class Listener(type(SILENT)):  # type: ignore[misc]
    """Remembers what is noted."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


LAYER: Final = "model.layers.1.self_attn."
BIAS: Final = {"model__layers__0__self_attn__q_proj__bias": torch.ones(136)}

REFUSED: Final[dict[str, tuple[s.Change, str]]] = {
    "a class of its own": (
        s.configured(architectures=["MyLlamaForCausalLM"]),
        r"names the class MyLlamaForCausalLM.*would build LlamaForCausalLM",
    ),
    "biases without a place": (
        s.with_extra(**BIAS),
        r"no place for 1 tensors.*q_proj\.bias.*biases of its layers.*--allow-unused",
    ),
    "norms without a place": (
        s.with_extra(model__layers__0__mlp__inner_norm__weight=torch.ones(172)),
        r"normalizations.*--allow-unused 'model\.layers\.0\.mlp\.inner_norm\.weight'",
    ),
    "a layer more than the config counts": (
        s.configured(num_hidden_layers=1),
        r"no place for 9 tensors.*parts of 1 layers|no place for 9 tensors",
    ),
    "a layer less than the config counts": (
        s.configured(num_hidden_layers=3),
        r"They are the layers 2 to 2: config\.json counts 3 layers, and the checkpoint has 2",
    ),
    "no head": (s.without("lm_head"), r'"tie_word_embeddings": true'),
    "a prefix of torch.compile": (
        s.renamed(lambda name: f"_orig_mod.{name}"),
        r"'_orig_mod\.'.*torch\.compile.*--strip-prefix _orig_mod\.",
    ),
    "a prefix of DataParallel": (
        s.renamed(lambda name: f"module.{name}"),
        r"--strip-prefix module\.",
    ),
    "a prefix that nobody knows": (
        s.renamed(lambda name: f"outer.net.{name}"),
        r"--strip-prefix outer\.net\.",
    ),
    "an adapter that was not merged": (
        s.both(
            s.renamed(lambda n: f"base_model.model.{n.replace('q_proj', 'q_proj.base_layer')}"),
            s.with_extra(base_model__model__x__lora_A__default__weight=torch.ones(8, 8)),
        ),
        r"merge_and_unload",
    ),
    "a vocabulary of another size": (
        s.configured(vocab_size=300),
        r"has the shape \(257, 136\).*\"vocab_size\" must be 257",
    ),
    "weights of another model": (
        s.renamed(lambda name: f"{name[::-1]}"),
        r"lacks 21 tensors|lacks \d+ tensors",
    ),
    "a config that names a file that is not there": (
        s.configured(transformers_weights="other.safetensors"),
        r"names 'other\.safetensors'.*no such file",
    ),
    "a config that names a file elsewhere": (
        s.configured(transformers_weights="../model.safetensors"),
        r"expected the plain name of a \.safetensors file",
    ),
    "a pointer for weights": (s.with_file("model.safetensors", s.POINTER), "Git LFS pointer"),
    "a pointer for a tokenizer": (s.with_file("tokenizer.json", s.POINTER), "git lfs pull"),
    "a pointer that would only travel": (s.with_file("merges.txt", s.POINTER), "Git LFS pointer"),
    "a pointer for a license": (s.with_file("License.txt", s.POINTER), "Git LFS pointer"),
    "an adapter beside the model": (
        s.both(
            s.with_file("adapter_config.json", {"base_model_name_or_path": "a/b"}),
            s.with_file("adapter_model.safetensors", "x"),
        ),
        r"adapter \(PEFT\) of a/b.*A whole model lies beside it",
    ),
    "a tokenizer that is damaged": (
        s.with_file("tokenizer.json", '{"version": "1.0"}'),
        "does not load",
    ),
    "a tokenizer with words that the model lacks": (
        lambda folder: enlarge(folder / "tokenizer.json", 9),
        r"makes 9 tokens that the model has no row for: 'new0' has the id 257",
    ),
}


def enlarge(path: Path, count: int) -> None:
    """Adds words to the vocabulary of a tokenizer.json."""
    value = json.loads(path.read_text())
    vocabulary = value["model"]["vocab"]
    first = len(vocabulary)
    vocabulary |= {f"new{number}": first + number for number in range(count)}
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("kind", REFUSED)
def test_a_source_is_refused_for_what_it_is(kind: str, llama: Path, tmp_path: Path) -> None:
    change, message = REFUSED[kind]
    model = copy_of(llama, tmp_path / "model")
    change(model)
    with pytest.raises(SourceError, match=message) as caught:
        download(model, tmp_path / "artifacts")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "artifacts").exists()


QUANTIZED: Final = {
    "gptq": "GPTQ",
    "fp8": "FP8",
    "int8": "packed integers",
    "llm.int8": r"LLM\.int8",
    "nf4": "NF4",
    "mlx": "MLX",
    "packed": "compressed-tensors",
    "hqq": "HQQ",
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights_are_known_by_their_tensors(
    kind: str, llama: Path, tmp_path: Path
) -> None:
    model = copy_of(llama, tmp_path / "model")
    s.packed(kind)(model)
    with pytest.raises(AlreadyQuantizedError, match=f"already quantized, as .*{QUANTIZED[kind]}"):
        download(model, tmp_path / "artifacts")


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": {"quant_method": "awq"}},
        {"compression_config": {"quant_method": "compressed-tensors"}},
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
    ],
)
def test_quantized_weights_are_known_by_the_config(
    changes: dict[str, object], llama: Path, tmp_path: Path
) -> None:
    model = copy_of(llama, tmp_path / "model")
    edit_json(model / "config.json", **changes)
    with pytest.raises(
        AlreadyQuantizedError, match=r"quantization_config in|compression_config in"
    ):
        download(model, tmp_path / "artifacts")


BUILT: Final[dict[str, tuple[s.Change, str]]] = {
    "buffers": (
        s.with_extra(
            model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(17),
            model__layers__0__self_attn__bias=torch.ones(1, 1, 8, 8, dtype=torch.bool),
            model__layers__0__self_attn__masked_bias=torch.tensor(-1e9),
        ),
        "",
    ),
    "a multi-token prediction head": (
        s.with_extra(mtp__fc__weight=torch.ones(136, 136)),
        "multi-token prediction head",
    ),
    "a layer that predicts more tokens": (
        s.with_extra(
            model__layers__2__eh_proj__weight=torch.ones(136, 136),
            model__layers__2__mlp__up_proj__weight=torch.ones(172, 136),
        ),
        "multi-token prediction head",
    ),
    "a value head": (s.with_extra(v_head__summary__weight=torch.ones(1, 136)), "value head"),
}


def built(model: Path, folder: Path, reading: Reading | None = None) -> Build:
    """Downloads, quantizes and serializes; only download is told how to read the tensors."""
    build, *_ = download(model, folder, reading=reading or Reading())
    for stage in ("quantize", "serialize"):
        run_stage(build, stage, Recipe(), CPU, SILENT)
    return build


@pytest.mark.parametrize("kind", BUILT)
def test_what_the_model_has_no_place_for_is_named(kind: str, llama: Path, tmp_path: Path) -> None:
    change, reason = BUILT[kind]
    model = copy_of(llama, tmp_path / "model")
    change(model)
    build = built(model, tmp_path / "artifacts")
    left_out = build.need(SERIALIZE).facts.left_out
    assert [reason in part.reason for part in left_out] == ([True] if reason else [])
    assert read_manifest(build.export).dropped


def test_what_may_be_left_out_is_told(llama: Path, tmp_path: Path) -> None:
    model = copy_of(llama, tmp_path / "model")
    s.with_extra(score__weight=torch.ones(2, 136))(model)
    with pytest.raises(SourceError, match=r"--allow-unused 'score\.weight'"):
        download(model, tmp_path / "no")
    build = built(model, tmp_path / "yes", Reading(allow_unused=("score",)))
    manifest = read_manifest(build.export)
    assert manifest.recipe["quantize"]["allow_unused"] == ["score"]
    assert [tensor.name for tensor in manifest.dropped] == ["score.weight"]


def test_the_single_file_is_the_model(llama: Path, tmp_path: Path) -> None:
    """Shards and an index beside it, whole or not, are another set that nobody loads."""
    model = copy_of(llama, tmp_path / "model")
    s.sharded(model, add=1.0)
    (model / "model-00002-of-00002.safetensors").unlink()
    build = built(model, tmp_path / "artifacts")
    assert not [n for n in read_manifest(build.export).source.files if "index" in n]
    norm = "model.norm.weight"
    assert torch.equal(read_tensors(build.export)[norm], load_file(model / s.SINGLE)[norm])


def test_the_file_that_the_config_names_is_the_model(llama: Path, tmp_path: Path) -> None:
    model = copy_of(llama, tmp_path / "model")
    tensors = load_file(model / s.SINGLE)
    s.save_tensors(model / "tuned.safetensors", {n: t + 1 for n, t in tensors.items()})
    edit_json(model / "config.json", transformers_weights="tuned.safetensors")
    build = built(model, tmp_path / "artifacts")
    norm = "model.norm.weight"
    assert torch.equal(read_tensors(build.export)[norm], tensors[norm] + 1)
    assert "transformers_weights" not in json.loads((build.export / "config.json").read_text())


def test_a_prefix_is_stripped(llama: Path, tmp_path: Path) -> None:
    plain = built(llama, tmp_path / "plain")
    model = copy_of(llama, tmp_path / "model")
    s.renamed(lambda name: f"_orig_mod.{name}")(model)
    with pytest.raises(UsageError, match=r"no tensor of .* begins with it"):
        download(model, tmp_path / "no", reading=Reading(strip_prefix="module."))
    build = built(model, tmp_path / "stripped", Reading(strip_prefix="_orig_mod."))
    ours, theirs = read_tensors(build.export), read_tensors(plain.export)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_manifest(build.export).recipe["quantize"]["strip_prefix"] == "_orig_mod."


TEMPLATES: Final = {
    "good": (s.TEMPLATE, "works", ""),
    "list with a default": ([{"name": "default", "template": s.TEMPLATE}], "works", ""),
    "list without": ([{"name": "a", "template": s.TEMPLATE}], "fails", "no default"),
    "raises": ("{{ raise_exception('no users here') }}", "fails", "no users here"),
    "syntax": ("{% for m in messages %}{{ m", "fails", "unexpected"),
    "empty": ("{{ '' }}", "fails", "empty text"),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_chat_templates(kind: str, llama: Path, tmp_path: Path) -> None:
    template, status, why = TEMPLATES[kind]
    model = copy_of(llama, tmp_path / "model")
    s.templated(template)(model)
    listener = Listener()
    request = DownloadRequest(str(model), tmp_path / "artifacts")
    found = Download(request, listener).run().record.facts.tokenizer
    assert found is not None
    assert (found.status, found.template) == ("loads", status)
    assert [why in note for note in listener.notes] == ([True] if why else [])


def test_a_template_with_a_token_that_the_model_lacks(llama: Path, tmp_path: Path) -> None:
    model = copy_of(llama, tmp_path / "model")
    value = json.loads((model / "tokenizer.json").read_text())
    value["added_tokens"].append(
        {**value["added_tokens"][0], "id": 257, "content": "<|turn|>"},
    )
    (model / "tokenizer.json").write_text(json.dumps(value))
    s.templated("<|turn|>" + s.TEMPLATE)(model)
    listener = Listener()
    request = DownloadRequest(str(model), tmp_path / "artifacts")
    found = Download(request, listener).run().record.facts.tokenizer
    assert found is not None
    assert found.template == "fails"
    assert "no row 257" in found.template_problem
    assert found.beyond == ("'<|turn|>' (257)",)
    assert any("beyond the rows" in note for note in listener.notes)


def test_a_tokenizer_that_needs_code_of_its_own(llama: Path, tmp_path: Path) -> None:
    model = copy_of(llama, tmp_path / "model")
    (model / "tokenizer.json").unlink()
    (model / "words.own").write_text("x")
    config = {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    }
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    listener = Listener()
    build, *_ = Download(DownloadRequest(str(model), tmp_path / "artifacts"), listener).run()
    assert any("tokenization_own.py" in note and "never run" in note for note in listener.notes)
    for stage in ("quantize", "serialize"):
        run_stage(build, stage, Recipe(), CPU, SILENT)
    assert not [path for path in build.export.iterdir() if path.name.startswith("tokenizer")]


def test_terms_travel_in_any_spelling(llama: Path, tmp_path: Path) -> None:
    model = copy_of(llama, tmp_path / "model")
    terms = ("License.txt", "USE_POLICY.md", "Notice", "COPYING", "Third-Party-Notices.html")
    others = ("license.py", "terms_model.json", "usage.md")
    for name in (*terms, *others):
        (model / name).write_text(name)
    build = built(model, tmp_path / "artifacts")
    there = {path.name for path in build.export.iterdir()}
    assert there.issuperset(terms)
    assert not there.intersection(others)


def test_a_nan_in_what_is_copied_is_named_with_its_place(llama: Path, tmp_path: Path) -> None:
    model = copy_of(llama, tmp_path / "model")

    def spoil(tensors: s.Tensors) -> s.Tensors:
        tensors["model.embed_tokens.weight"][3, 5] = float("nan")
        return tensors

    s.retensor(spoil)(model)
    build, *_ = download(model, tmp_path / "artifacts")
    message = (
        r"'model\.embed_tokens\.weight' in model\.safetensors holds an infinity or a NaN, the "
        r"first at \[3, 5\] of \[257, 136\]"
    )
    with pytest.raises(SourceError, match=message):
        run_stage(build, "quantize", Recipe(), CPU, SILENT)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["manifest.json"], 'it is an artifact .*Use it: nf4 prompt me/model-nf4 "Hello"'),
        (["quant_config.json"], "Start from the 16-bit model"),
    ],
)
def test_what_is_quantized_on_the_hub_is_called_by_its_id(
    files: list[str], said: str, llama: Path, tmp_path: Path
) -> None:
    """Of its cache only that part is there which was needed to know."""
    model = copy_of(llama, tmp_path / "model")
    edit_json(model / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    listed = tuple(RemoteFile(name, 1, None, None) for name in ["config.json", *files])
    with pytest.raises(AlreadyQuantizedError, match=f"^me/model-nf4 is already .*{said}") as caught:
        check_small_files(model, RemoteModel("me/model-nf4", "ab" * 20, listed))
    assert str(tmp_path) not in str(caught.value)
