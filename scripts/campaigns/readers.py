"""Do exports of many architectures run in stock transformers, here and in 4.57.6, as they should?

For every kind, a tiny random causal LM is written, built up to the export, and read by two programs
that hold nothing of this package: the transformers of this environment, and 4.57.6 in one of its
own. What each computes is held against what it computes itself with the 16-bit checkpoint

- as it is: the distance is what 4 bits cost, and must be below --cost;
- with each quantized weight replaced by what its codes stand for, as the NumPy decoder reads them:
  only rounding may remain, at most --rounding. A layer that a reader took for something else, or a
  weight in the wrong place, cannot hide in the cost of 4 bits.

With --verify, the whole build runs instead, and its verdict must not be "pass" where a stock reader
fails (the models are random: limits on their fidelity are lifted).

    python scripts/campaigns/readers.py WORK [--kind NAME]... [--venv FOLDER] [--verify]
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
from check_transformers_4 import environment

KINDS: Final = """
afmoe apertus arcee aria_text biogpt bitnet cohere cohere2 cohere2_moe ctrl cwm deepseek_v2
deepseek_v3 diffllama doge ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon_h1 falcon_mamba flex_olmo
gemma gemma3_text glm glm4 glm4_moe gpt-sw3 gpt_bigcode gpt_neox_japanese gpt_oss granite granitemoe
granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe jetmoe lfm2 llama4_text longcat_flash
mimo_v2_flash minimax ministral mistral modernbert-decoder nanochat nemotron nemotron_h olmo olmo3
olmoe openai-gpt persimmon phimoe qwen3 qwen3_moe rwkv seed_oss smollm3 starcoder2 vaultgemma xglm
youtu
""".split()
"""Model types of transformers; none is among the kinds of the tests."""
SIZES: Final[dict[str, Any]] = {
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "hidden_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 64),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "num_key_value_heads"), 2),
    **dict.fromkeys(("first_k_dense_replace", "n_group", "topk_group"), 1),
    **dict.fromkeys(("head_dim", "state_size", "qk_rope_head_dim", "qk_nope_head_dim"), 16),
    "v_head_dim": 32,
    "sliding_window": 32,
}
"""Of everything that a config may have; each takes what it knows."""
RECIPE: Final = """
[verify]
max_new_tokens = 2
eval_tokens = 128
max_mean_kl = 100.0
min_sure_agreement = 0.0
max_perplexity_ratio = 1e9
max_accuracy_drop = 1.0
"""

# Runs in any environment: one JSON line a model on stdin, one on stdout.
READER: Final = """
import json, os, sys, warnings
answers = os.fdopen(os.dup(1), "w"); os.dup2(2, 1)
import torch, transformers
from bitsandbytes.nn import Linear4bit
warnings.filterwarnings("ignore"); transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
ids = (torch.arange(24) * 9 % 250 + 4).reshape(2, 12)
load = transformers.AutoModelForCausalLM.from_pretrained

def logits(model):
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # The same arithmetic on every CPU: on some, bitsandbytes rounds the scales to bf16.
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()

def off(one, other):
    return float((one - other).norm() / other.norm())

for line in sys.stdin:
    asked = json.loads(line)
    found = {"transformers": transformers.__version__}
    try:
        known = json.load(open(asked["source"] + "/config.json"))["model_type"]
        if known not in transformers.CONFIG_MAPPING:
            raise LookupError(known)
        key = "dtype" if transformers.__version__ >= "4.56" else "torch_dtype"
        full = logits(load(asked["source"], **{key: torch.bfloat16}))
    except LookupError:
        found["skipped"] = "this version does not have it"
    except Exception as error:
        found["skipped"] = f"the source does not run: {type(error).__name__}: {str(error)[:150]}"
    if "skipped" not in found:
        try:
            model, said = load(
                asked["export"], output_loading_info=True, device_map={"": "cpu"},
                **{key: torch.bfloat16},
            )
            four = logits(model)
            stands = logits(load(asked["dequantized"], **{key: torch.bfloat16}))
            found |= {
                "layers": sum(isinstance(m, Linear4bit) for m in model.modules()),
                "names": sorted(map(str, [*said["missing_keys"], *said["unexpected_keys"]]))[:3],
                "cost": off(four, full), "rounding": off(four, stands),
            }
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {str(error)[:200]}"
    print(json.dumps(found), file=answers, flush=True)
"""


def write_source(folder: Path, kind: str) -> None:
    """Writes a tiny random model in bf16, without a tokenizer."""
    import torch
    import transformers
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config_class = CONFIG_MAPPING[kind]
    known = config_class()
    config = config_class(**{k: v for k, v in SIZES.items() if hasattr(known, k)})
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder)


def build(source: Path, folder: Path, recipe: Path, verify: bool) -> str | None:
    """Builds it on the CPU; what went wrong, if anything did."""
    where = ["--build-dir", str(folder)]
    steps = [["download", str(source)], ["quantize", "--device", "cpu"], ["serialize"]]
    if verify:
        steps = [["build", str(source), "--device", "cpu", "--recipe", str(recipe)]]
    for step in steps:
        command = [sys.executable, "-m", "nf4_pipeline", *step, *where, "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        # A verdict "fail" is a result as well.
        if done.returncode != 0 and not (folder / "export" / "verification.json").is_file():
            return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"
    return None


def write_dequantized(source: Path, export: Path, folder: Path) -> None:
    """A copy of the source with each quantized weight as its codes have it, rounded to bf16."""
    import torch
    from nf4_pipeline.readers import numpy_decoder
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    tensors = numpy_decoder.open_tensors(export)
    weights: dict[str, Any] = {}
    for entry in json.loads((export / "manifest.json").read_text("utf-8"))["tensors"]:
        if not entry["quantized"]:
            continue
        name = entry["name"]
        state = json.loads(tensors[name + numpy_decoder.STATE].tobytes())
        values = np.concatenate(list(numpy_decoder.decode(tensors, name, state)))
        weight = torch.from_numpy(values).reshape(state["shape"]).to(torch.bfloat16)
        weights[entry["source_name"]] = weight.T.contiguous() if entry["transposed"] else weight
    for path in folder.glob("*.safetensors"):
        held = load_file(path)
        save_file({n: weights.get(n, t) for n, t in held.items()}, path, {"format": "pt"})


class Reader:
    """A process that reads one model after the other with the transformers of an environment."""

    def __init__(self, python: Path | str) -> None:
        self._python = str(python)
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [self._python, "-P", "-c", READER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def read(self, **folders: Path) -> dict[str, Any]:
        """What it says of an export, its source and its dequantized copy."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({k: str(v) for k, v in folders.items()}), file=self._process.stdin)
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        status = self._process.wait()
        self._start()
        return {"error": f"the process died with status {status}"}

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def judge(found: dict[str, Any], layers: int, cost: float, rounding: float) -> str:
    """ "ok", "skipped: …", or what is wrong."""
    if "skipped" in found:
        return f"skipped: {found['skipped']}"
    if "error" in found:
        return f"FAILS: {found['error']}"
    wrong = []
    if found["layers"] != layers:
        wrong.append(f"{found['layers']} 4-bit layers, not {layers}")
    if found["names"]:
        wrong.append(f"names {found['names']}")
    if not found["rounding"] <= rounding:
        wrong.append(f"rounding {found['rounding']:.3g}")
    if not found["cost"] <= cost:
        wrong.append(f"cost {found['cost']:.3g}")
    said = f"cost {found['cost']:.3f}, rounding {found['rounding']:.4f}"
    return f"FAILS: {'; '.join(wrong)}" if wrong else f"ok ({said})"


def examine(
    work: Path, kind: str, readers: list[Reader], verify: bool, cost: float, rounding: float
) -> Iterator[tuple[str, str]]:
    """What is said of one kind, by whom."""
    folder = work / kind
    shutil.rmtree(folder, ignore_errors=True)
    source, made = folder / "source", folder / "build"
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(RECIPE)
    write_source(source, kind)
    if (wrong := build(source, made, folder / "recipe.toml", verify)) is not None:
        yield "build", f"REFUSED: {wrong}"
        return
    export = made / "export"
    write_dequantized(source, export, folder / "dequantized")
    tensors = json.loads((export / "manifest.json").read_text("utf-8"))["tensors"]
    layers = sum(tensor["quantized"] for tensor in tensors)
    verdicts = []
    for reader in readers:
        found = reader.read(source=source, export=export, dequantized=folder / "dequantized")
        verdicts.append(judge(found, layers, cost, rounding))
        yield found.get("transformers", "?"), verdicts[-1]
    if verify:
        verification = json.loads((export / "verification.json").read_text("utf-8"))
        failed = [c["name"] for c in verification["checks"] if not c["passed"]]
        said = f"{verification['verdict']}{f' ({failed[0]})' if failed else ''}"
        if verification["verdict"] == "pass" and verdicts[0].startswith("FAILS"):
            said = f"FAILS: the verdict is pass, and stock transformers {verdicts[0]}"
        yield "verdict", said


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.argument("work", type=click.Path(file_okay=False, path_type=Path))
@click.option("--kind", "kinds", multiple=True, help="A model type; all if it is not given.")
@click.option("--venv", type=click.Path(file_okay=False, path_type=Path), help="For 4.57.6.")
@click.option("--verify", is_flag=True, help="Build with verify.")
@click.option("--cost", default=0.5, show_default=True, help="Distance from 16 bit, at most.")
@click.option("--rounding", default=0.05, show_default=True, help="Distance from the codes' own.")
def main(
    work: Path,
    kinds: tuple[str, ...],
    venv: Path | None,
    verify: bool,
    cost: float,
    rounding: float,
) -> None:
    readers = [Reader(sys.executable)]
    if venv is not None:
        readers.append(Reader(environment(venv.resolve())))
    bad = 0
    try:
        for kind in kinds or KINDS:
            for who, said in examine(work, kind, readers, verify, cost, rounding):
                click.echo(f"{kind:20}  {who:8}  {said}")
                bad += said.startswith("FAILS")
    finally:
        for reader in readers:
            reader.close()
    click.echo(f"{len(kinds or KINDS)} kinds, {bad} failures")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
