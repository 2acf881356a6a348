"""A tiny random Falcon as the Hub stores one, and real `nf4` processes to work on it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.support import warm

SHARDS: Final = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX: Final = "model.safetensors.index.json"
END_OF_TEXT: Final = "<|endoftext|>"

RECIPE: Final = """
[verify]
prompts = "{prompts}"
max_new_tokens = 3
eval_tokens = 64
max_mean_kl = 5.0
min_sure_agreement = 0.0
max_perplexity_ratio = 5.0
"""


def write_falcon(
    folder: Path, *, hidden: int = 64, layers: int = 2, shards: int = 2, seed: int = 0
) -> Path:
    """Writes a random Falcon in bf16: config, tokenizer, shards with an index, the tied head twice.

    Args:
        folder: where; made if it does not exist.
        hidden: a multiple of 4.
        layers: how many.
        shards: how many weight files.
        seed: of the weights.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import FalconConfig, FalconForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(folder)
    config = FalconConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        alibi=False,
        bias=False,
        multi_query=True,
        new_decoder_architecture=False,
        parallel_attn=True,
        bos_token_id=vocabulary - 1,
        eos_token_id=vocabulary - 1,
        tie_word_embeddings=True,
        architectures=["FalconForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in FalconForCausalLM(config).state_dict().items()}
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    dice = torch.Generator().manual_seed(seed)
    tensors = {
        name: (torch.randn(shape, generator=dice) * 0.05).to(torch.bfloat16)
        for name, shape in shapes.items()
        if name != "lm_head.weight"
    }
    tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"].clone()
    names = list(tensors)
    size = -(-len(names) // shards)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number * size : (number + 1) * size]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index), "utf-8")
    return folder


def write_tokenizer(folder: Path) -> int:
    """Writes a tokenizer that knows every byte and one special token; returns how many it knows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate([*alphabet, END_OF_TEXT])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT
    ).save_pretrained(folder)
    return len(vocabulary)


def write_recipe(folder: Path) -> Path:
    """Writes a recipe that verifies in little time and passes a random model."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hello there"}\n{"prompt": "One, two", "expect": "x"}\n')
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(prompts=prompts.as_posix()), "utf-8")
    return recipe


def copy_of(checkpoint: Path, folder: Path) -> Path:
    """A checkpoint or a build that a test may damage; files are copies, links stay links."""
    shutil.copytree(checkpoint, folder, symlinks=True)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON object in a file; None deletes one."""
    value = json.loads(path.read_text("utf-8"))
    for key, change in changes.items():
        if change is None:
            value.pop(key, None)
        else:
            value[key] = change
    path.write_text(json.dumps(value), "utf-8")


def flip_byte(path: Path, position: int = -1) -> None:
    """Changes one byte of a file in place."""
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


@dataclass(frozen=True)
class Done:
    """A finished `nf4` process."""

    status: int
    out: str
    err: str

    @property
    def value(self) -> Any:
        """The one JSON value on stdout."""
        return json.loads(self.out)


def environment(home: Path) -> dict[str, str]:
    """The environment of an `nf4` process: no network, a Hub cache of its own, no GPU."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTEST_"))
    }
    return {
        **warm.without(kept),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(home / "hf-home"),
        "XDG_CACHE_HOME": str(home / "xdg-cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }


def start_nf4(*args: str | Path, cwd: Path, cold: bool = False) -> subprocess.Popen[str]:
    """Starts `python -m nf4_pipeline ARGS` in a folder.

    Args:
        args: of the command.
        cwd: the folder.
        cold: whether each of its workers imports for itself (see `tests.support.warm`).
    """
    own = environment(cwd)
    return subprocess.Popen(
        [sys.executable, "-m", "nf4_pipeline", *map(str, args)],
        cwd=cwd,
        env=own if cold else warm.variables(own),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listen_to_interrupts,
    )


def listen_to_interrupts() -> None:
    """For a child of a job in the background: shells start it deaf to Ctrl-C, nohup to SIGHUP."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def nf4(*args: str | Path, cwd: Path, timeout: float = 600, cold: bool = False) -> Done:
    """Runs `python -m nf4_pipeline ARGS` in a folder until it ends; `cold` as in `start_nf4`."""
    process = start_nf4(*args, cwd=cwd, cold=cold)
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return Done(process.returncode, out, err)


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
