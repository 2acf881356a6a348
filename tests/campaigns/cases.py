"""What people give to `nf4 build`, kind by kind, and what has to come of it.

Every `Case` makes one input in a folder, mostly from a good Llama in one file and its tokenizer.
Either an artifact comes of it, which has to be the right one, or one error that fits, before
anything is written.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from nf4_pipeline.manifest.read import read_manifest
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    LlamaConfig,
    LongcatFlashConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
)
from transformers.convert_slow_tokenizer import import_protobuf

from tests.support import sources as s
from tests.support.checkpoints import VOCABULARY, read_tensors
from tests.support.tiny import copy_of, nf4

BUILT: Final = "built"
STAGES: Final = ("download", "quantize", "serialize", "verify", "attest")
NORM: Final = "model.norm.weight"
_COMMIT: Final = "c0ffee" * 6 + "c0ff"
_GONE: Final = "dead" * 10
_ATTENTION: Final = "model.layers.{}.self_attn.{}"

Right = Callable[[Path, Path], bool]
"""Of the folder that was given and the export: whether the artifact is the right one."""


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        case: what is the matter with it.
        kind: which of several that are alike.
        change: what is done to a copy of the good checkpoint.
        error: what the one error line has to match; "" if an artifact has to come of it.
        warning: what a line of the build has to match, if an artifact comes of it.
        right: what is asked of the artifact besides the verdict "pass".
        given: the path that `build` is given, within the folder.
    """

    case: str
    kind: str
    change: s.Change
    error: str = ""
    warning: str = ""
    right: Right = lambda model, export: True
    given: str = "."


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
        text: the verdict and the warnings, or the error.
        stopped: the stage that did not end, with "nothing written" if there is no build folder.
        seconds: how long the process took, in s.
        faults: what is not as expected.
    """

    text: str
    stopped: str
    seconds: float
    faults: tuple[str, ...]


def run_case(case: Case, good: Path, recipe: Path, folder: Path) -> Outcome:
    """Makes the input in a new folder and builds it in a process of its own."""
    folder.mkdir()
    model = copy_of(good, folder / "model")
    case.change(model)
    model = model / case.given
    build = folder / "build"
    begin = time.monotonic()
    options = ("--build-dir", build, "--recipe", recipe, "--device", "cpu")
    done = nf4("build", model, *options, cwd=folder, timeout=600)
    seconds = time.monotonic() - begin
    lines = [line.strip() for line in re.split(r"[\r\n]+", done.err) if line.strip()]
    errors = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
    ended = {path.stem for path in (build / "records").glob("*.json")}
    unfinished = next((stage for stage in STAGES if stage not in ended), "")
    stopped = unfinished if build.exists() else f"{unfinished}, nothing written"
    if done.status == 0 and not unfinished:
        warnings = [line for line in lines if line.startswith("Warning: ")]
        verdict = json.loads((build / "export" / "verification.json").read_text())["verdict"]
        text = ". ".join([f"{BUILT}: {verdict}", *warnings])
        faults = list(_faults_of_artifact(case, model, build / "export", verdict, lines))
    else:
        text = errors[0] if errors else " ".join(lines[-1:])
        faults = list(_faults_of_error(case, done.status, lines, errors, build))
    return Outcome(text.replace(f"{folder}/", ""), stopped, seconds, tuple(faults))


def _faults_of_artifact(
    case: Case, model: Path, export: Path, verdict: str, lines: list[str]
) -> Iterator[str]:
    if case.error:
        yield "built, and should have been refused"
    if verdict != "pass":
        yield f"the verdict is {verdict}"
    if case.warning and not any(re.search(case.warning, line) for line in lines):
        yield f"no line matches {case.warning!r}"
    if not case.error and not case.right(model, export):
        yield "the artifact is not the right one"


def _faults_of_error(
    case: Case, status: int, lines: list[str], errors: list[str], build: Path
) -> Iterator[str]:
    if not case.error:
        yield "refused, and should have been built"
    if status != 1:
        yield f"exit code {status}"
    if len(errors) != 1 or lines[-1] != f"Error: {errors[0]}":
        yield f"{len(errors)} error lines"
    elif not re.search(case.error, errors[0]):
        yield f"the error does not match {case.error!r}"
    if build.exists():
        yield "something was written"


# Changes of the good checkpoint that other tests have no use for.


def model_of(config: PreTrainedConfig) -> s.Change:
    """Another random model in place of the Llama, in bf16, with the same tokenizer."""

    def change(folder: Path) -> None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        (folder / s.SINGLE).unlink()
        model.save_pretrained(folder)

    return change


def lacks_shard(folder: Path) -> None:
    """Older shards, of which one is gone, and their index."""
    s.sharded(folder, add=1.0)
    (folder / "model-00002-of-00002.safetensors").unlink()


def has_biases(folder: Path) -> None:
    """Biases of every attention, of which config.json says nothing."""
    weights = load_file(folder / s.SINGLE)
    names = [_ATTENTION.format(n, f"{part}_proj") for n in (0, 1) for part in "qkvo"]
    biases = {f"{name}.bias": weights[f"{name}.weight"][:, 0].clone() for name in names}
    s.save_tensors(folder / s.SINGLE, weights | biases)


def floats(*parts: str) -> s.Change:
    """Stores the tensors whose names have one of the parts in float32."""
    return s.retensor(
        lambda tensors: {
            name: tensor.float() if any(part in name for part in parts) else tensor
            for name, tensor in tensors.items()
        }
    )


def without_tokenizer(folder: Path) -> None:
    """Takes the tokenizer away."""
    for path in folder.glob("tokenizer*"):
        path.unlink()


def with_own_code(folder: Path) -> None:
    """A tokenizer that only code of the repository can read."""
    without_tokenizer(folder)
    (folder / "tiktoken.model").write_text("IQ== 0\nIg== 1\n")
    (folder / "tokenization_own.py").write_text("class OwnTokenizer: ...\n")
    config = {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def with_sentencepiece(folder: Path) -> None:
    """Only tokenizer.model: BPE whose unknown letters fall back to bytes, as early Llamas have."""
    without_tokenizer(folder)
    format_ = import_protobuf()
    model = format_.ModelProto()
    kinds = format_.ModelProto.SentencePiece
    pieces = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    pieces += [(f"<0x{number:02X}>", kinds.BYTE) for number in range(256)]
    pieces += [(letter, kinds.NORMAL) for letter in "▁etaoinshrdlucmfwygpbvkxqjz"]
    for rank, (text, kind) in enumerate(pieces):
        model.pieces.add(piece=text, score=-float(rank), type=kind)
    spec = model.trainer_spec
    spec.model_type = format_.TrainerSpec.BPE
    spec.vocab_size = len(pieces)
    spec.byte_fallback = True
    spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id = 0, 1, 2, -1
    model.normalizer_spec.name = "identity"
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "unk_token": "<unk>"}))


def only_adapter(folder: Path) -> None:
    """A LoRA adapter where a model should be."""
    for name in (s.SINGLE, "config.json"):
        (folder / name).unlink()
    low = {
        f"base_model.model.{_ATTENTION.format(0, 'q_proj')}.lora_{side}.weight": torch.zeros(shape)
        for side, shape in (("A", (8, 136)), ("B", (136, 8)))
    }
    s.save_tensors(folder / "adapter_model.safetensors", low)
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 8}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def unmerged(folder: Path) -> None:
    """The names of a model with an adapter inside of it."""
    s.renamed(lambda name: f"base_model.model.{name.replace('q_proj', 'q_proj.base_layer')}")(
        folder
    )
    stem = f"base_model.model.{_ATTENTION.format(0, 'q_proj')}"
    sides = {f"{stem}.lora_A.default.weight": (8, 136), f"{stem}.lora_B.default.weight": (136, 8)}
    s.retensor(lambda ts: ts | {name: torch.zeros(shape) for name, shape in sides.items()})(folder)


def fp8_with_scales(folder: Path) -> None:
    """FP8 in every MLP, the scales beside it, and only ModelOpt's own file says so."""

    def edit(tensors: s.Tensors) -> s.Tensors:
        made: s.Tensors = {}
        for name, tensor in tensors.items():
            if ".mlp." not in name:
                made[name] = tensor
                continue
            scale = tensor.float().abs().max() / 448
            made[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            made[f"{name}_scale"] = scale
        return made

    s.retensor(edit)(folder)
    (folder / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}})
    )


def in_cache(folder: Path) -> None:
    """The cache's folder of a repository: a whole snapshot, and one whose weights' blob is gone."""
    root = folder / "models--org--name"
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(_COMMIT)
    for snapshot in (_COMMIT, _GONE):
        (root / "snapshots" / snapshot).mkdir(parents=True)
    for path in [path for path in folder.iterdir() if path.is_file()]:
        content = path.read_bytes()
        of_git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
        of_lfs = hashlib.sha256(content)
        digest = (of_lfs if path.name == s.SINGLE else of_git).hexdigest()
        path.rename(root / "blobs" / digest)
        for snapshot in (_COMMIT, _GONE):
            gone = snapshot == _GONE and path.name == s.SINGLE
            blob = f"../../blobs/{'gone' if gone else digest}"
            (root / "snapshots" / snapshot / path.name).symlink_to(blob)


def extra(**shapes: tuple[int, ...]) -> s.Change:
    """Adds random tensors in bf16; two underscores stand for a dot."""
    return lambda folder: s.with_extra(
        **{name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    )(folder)


def float_correction(folder: Path) -> None:
    """The router's correction in float32, as DeepSeek stores it."""
    floats("e_score_correction_bias")(folder)


# What is asked of an artifact.


def has_the_single_file(model: Path, export: Path) -> bool:
    """The weights are those of model.safetensors, not those of the shards."""
    return torch.equal(read_tensors(export)[NORM], load_file(model / s.SINGLE)[NORM])


def has_the_embedding(model: Path, export: Path) -> bool:
    """The one matrix is there, under a name that is not quantized."""
    stored = read_tensors(export)
    matrix = load_file(model / s.SINGLE)["lm_head.weight"]
    names = ("lm_head.weight", "model.embed_tokens.weight")
    return any(name in stored and torch.equal(stored[name], matrix) for name in names)


def in_one_dtype(model: Path, export: Path) -> bool:
    """What is computed with has the dtype that config.json gives."""
    tensors = read_tensors(export)
    return all(t.dtype == torch.bfloat16 for n, t in tensors.items() if "norm" in n)


def has_no_tokenizer(model: Path, export: Path) -> bool:
    """No file of a tokenizer that nobody could load."""
    return not [path for path in export.iterdir() if path.name.startswith("token")]


def keeps(*names: str) -> Right:
    """All weights whose names have one of the parts are in 16 bit or more; there are some."""

    def right(model: Path, export: Path) -> bool:
        dtypes = {
            tensor.dtype
            for name, tensor in read_tensors(export).items()
            if name.endswith(".weight") and any(part in name for part in names)
        }
        return bool(dtypes) and torch.uint8 not in dtypes

    return right


def names_dropped(prefix: str) -> Right:
    """The manifest names the tensors that were left out, and the card the head that they are."""

    def right(model: Path, export: Path) -> bool:
        dropped = [tensor.name for tensor in read_manifest(export).dropped]
        card = (export / "README.md").read_text("utf-8")
        named = bool(dropped) and all(name.startswith(prefix) for name in dropped)
        return named and "multi-token prediction head" in " ".join(card.split())

    return right


def names_the_snapshot(model: Path, export: Path) -> bool:
    """The manifest names repository and commit as the cache does."""
    source = read_manifest(export).source
    return (source.repo, source.commit) == ("org/name", _COMMIT)


def has_files(*names: str) -> Right:
    """The files are in the export as they are in the source."""
    return lambda model, export: all(
        (export / name).is_file() and (export / name).read_bytes() == (model / name).read_bytes()
        for name in names
    )


_SMALL: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 256,
}
_RANKS: Final[dict[str, Any]] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
}
_BLOOM: Final = BloomConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    n_layer=2,
    n_head=4,
    pretraining_tp=2,
    slow_but_exact=True,
    bos_token_id=256,
    eos_token_id=256,
)
_LONGCAT: Final = LongcatFlashConfig(
    **_SMALL,
    **_RANKS,
    num_layers=2,
    num_hidden_layers=4,
    ffn_hidden_size=96,
    expert_ffn_hidden_size=32,
    head_dim=16,
    zero_expert_num=2,
    moe_topk=2,
)
_QWEN: Final = Qwen3NextConfig(
    **_SMALL,
    num_hidden_layers=4,
    intermediate_size=128,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
)
_DEEPSEEK: Final = DeepseekV3Config(
    **_SMALL,
    **_RANKS,
    num_hidden_layers=3,
    intermediate_size=128,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    n_shared_experts=1,
)
_LLAMA: Final = LlamaConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
)

_TERMS: Final = ("LICENSE.txt", "USE_POLICY.md", "Notice")
_PREFIXES: Final = {
    "torch.compile": "_orig_mod.",
    "DataParallel": "module.",
    "of a larger model": "language_model.",
}
_OLD: Final = {
    "GPTQ": ("gptq", s.with_file("quantize_config.json", {"bits": 4, "group_size": 128})),
    "AWQ": (
        "gptq",
        s.both(
            s.without("g_idx"),
            s.with_file("quant_config.json", {"w_bit": 4, "q_group_size": 128}),
        ),
    ),
    "MLX": ("mlx", s.configured(quantization={"group_size": 32, "bits": 4})),
    "compressed-tensors": (
        "packed",
        s.configured(compression_config={"quant_method": "compressed-tensors"}),
    ),
    "NF4": ("nf4", lambda folder: None),
}
_TEMPLATES: Final = {
    "refuses a user's turn": ("{{ raise_exception('a system turn first') }}", "system turn first"),
    "has a syntax error": ("{% for m in messages %}{{ m", "template fails"),
    "a list": ([{"name": "default", "template": s.TEMPLATE}], ""),
    "a list without a default": ([{"name": "rag", "template": s.TEMPLATE}] * 2, "template fails"),
}

CASES: Final[tuple[Case, ...]] = (
    Case(
        "two sets of weights",
        "older shards with their index beside one file",
        lambda folder: s.sharded(folder, add=1.0),
        right=has_the_single_file,
    ),
    Case(
        "two sets of weights",
        "an index of which a shard is gone beside one file",
        lacks_shard,
        right=has_the_single_file,
    ),
    Case(
        "another architecture",
        "config.json names a class of its own code",
        s.configured(
            architectures=["OwnForCausalLM"],
            auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
        ),
        error=r"names the class OwnForCausalLM.*would build LlamaForCausalLM",
    ),
    Case(
        "no place for tensors",
        "biases that config.json does not count",
        has_biases,
        error=r"no place for 8 tensors.*biases of its layers.*--allow-unused",
    ),
    Case(
        "no place for tensors",
        "normalizations that the model lacks",
        extra(model__layers__0__mlp__inner_norm__weight=(172,)),
        error=r"no place for 1 tensors.*normalizations.*--allow-unused",
    ),
    Case("mixed dtypes", "norms in float32", floats("norm"), right=in_one_dtype),
    Case(
        "mixed dtypes",
        "norms, embedding and a projection in float32",
        floats("norm", "embed", "layers.1.self_attn.q_proj"),
        right=in_one_dtype,
    ),
    Case(
        "tied",
        "only lm_head.weight is stored",
        s.both(s.without("embed_tokens"), s.configured(tie_word_embeddings=True)),
        right=has_the_embedding,
    ),
    Case(
        "tokenizer",
        "only tokenizer.model (SentencePiece)",
        s.both(model_of(_LLAMA), with_sentencepiece),
        error="" if importlib.util.find_spec("sentencepiece") else r"needs sentencepiece.*pip inst",
    ),
    Case(
        "tokenizer",
        "needs code of the repository",
        with_own_code,
        warning=r"tokenization_own\.py.*never run.*no tokenizer",
        right=has_no_tokenizer,
    ),
    *(
        Case(
            "chat template",
            kind,
            s.templated(template),
            warning=warning,
            right=has_files("tokenizer.json"),
        )
        for kind, (template, warning) in _TEMPLATES.items()
    ),
    *(
        Case(
            "LFS pointer",
            name,
            s.with_file(name, s.POINTER),
            error=rf"{re.escape(name)} is a Git LFS pointer.*git lfs pull",
        )
        for name in (s.SINGLE, "tokenizer.json", "tokenizer.model")
    ),
    Case(
        "quantized already",
        "FP8, and config.json is silent",
        fp8_with_scales,
        error=r"already quantized, as .*FP8",
    ),
    *(
        Case(
            "quantized already",
            kind,
            s.both(s.packed(packing), mark),
            error=rf"already quantized, as .*{kind}",
        )
        for kind, (packing, mark) in _OLD.items()
    ),
    Case(
        "adapter",
        "a LoRA adapter alone",
        only_adapter,
        error=r"adapter \(LORA\) of org/base.*merge",
    ),
    Case("prefix", "PEFT before merging", unmerged, error=r"merge_and_unload"),
    *(
        Case(
            "prefix",
            f"{kind} (`{prefix}`)",
            s.renamed(lambda name, prefix=prefix: f"{prefix}{name}"),  # type: ignore[misc]
            error=rf"prefix '{re.escape(prefix)}'.*--strip-prefix {re.escape(prefix)}",
        )
        for kind, prefix in _PREFIXES.items()
    ),
    Case(
        "weights used past their layer",
        "BLOOM with slices (`slow_but_exact`)",
        model_of(_BLOOM),
        right=keeps("dense_4h_to_h", "self_attention.dense"),
    ),
    Case(
        "weights used past their layer",
        "the router of LongCat Flash",
        model_of(_LONGCAT),
        right=keeps("router.classifier"),
    ),
    Case(
        "multi-token prediction",
        "`mtp.*` of a Qwen3-Next",
        s.both(model_of(_QWEN), extra(mtp__fc__weight=(64, 128), mtp__norm__weight=(64,))),
        right=names_dropped("mtp."),
    ),
    Case(
        "multi-token prediction",
        "one layer more of a DeepSeek-V3",
        s.both(
            model_of(_DEEPSEEK),
            s.both(
                float_correction,
                extra(
                    model__layers__3__eh_proj__weight=(64, 128),
                    model__layers__3__self_attn__o_proj__weight=(64, 64),
                    model__layers__3__enorm__weight=(64,),
                ),
            ),
        ),
        right=names_dropped("model.layers.3."),
    ),
    Case(
        "terms",
        ", ".join(_TERMS),
        s.both(*(s.with_file(name, f"These are {name}.") for name in _TERMS)),
        right=has_files(*_TERMS),
    ),
    Case(
        "Hub cache",
        "the repository's folder",
        in_cache,
        error=rf"Hub cache's folder for org/name.*snapshots/{_COMMIT}",
        given="models--org--name",
    ),
    Case(
        "Hub cache",
        "a whole snapshot",
        in_cache,
        right=names_the_snapshot,
        given=f"models--org--name/snapshots/{_COMMIT}",
    ),
    Case(
        "Hub cache",
        "a snapshot whose blob is gone",
        in_cache,
        error=r"model\.safetensors",
        given=f"models--org--name/snapshots/{_GONE}",
    ),
)
"""All of them, in the order of the table."""
