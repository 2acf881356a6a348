"""Train a second model from scratch, on Python source, and write it as a Hub checkpoint.

The bundled sample reads a small invented language and has a Falcon's shape. This is a Llama
of 14 million weights (grouped-query attention, gated MLP, tied embeddings) that has read real
text: the source files of the standard library, which every machine with Python has, and of
installed packages that are named. Nothing is downloaded. Some modules of the standard library
are held out; beginnings of theirs are written beside the folder, as text on which two models
can be compared.

    python scripts/sample/train_second.py --out second --package torch --package sympy
    nf4 build second --recipe second.toml        # verify.eval_text = "second-eval.txt"

The defaults are meant to fill about three minutes of one H100, two of them with the training,
which ends after --limit seconds whatever --steps says. To try the script out on a CPU,
``--steps 20 --rows 4`` takes two or three minutes. With the same files a seed gives the same
tokenizer, first weights and batches; sums on a GPU, and a limit that is reached, still differ.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import math
import random
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

END = "<|endoftext|>"
VOCAB_SIZE = 4096
ROW_TOKENS = 512
MAX_SHARD_SIZE = "15MB"

# What is not the library's own, and tables rather than text.
SKIPPED = {"site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
SKIPPED_PATHS = ("lib2to3/tests/data/", "_sysconfigdata")
TESTS = {"test", "tests", "idle_test"}
DOCUMENT_CHARACTERS = range(200, 200_000)
TOKENIZER_CHARACTERS = 20_000_000
HELD_OUT_BATCHES = 4
HELD_OUT_PART = 20  # of 256
EVAL_BYTES = 60_000
EVAL_BYTES_PER_FILE = 6_000


# --- text ------------------------------------------------------------------------------------


def read_folder(folder: Path) -> dict[str, str]:
    """Read every source file under a folder, by its name there; long ones up to a limit."""
    texts = {}
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if SKIPPED & set(name.split("/")) or name.startswith(SKIPPED_PATHS):
            continue
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):  # tests of parsers hold files that are not UTF-8
            continue
        if len(text) >= DOCUMENT_CHARACTERS.start:
            texts[name] = text[: DOCUMENT_CHARACTERS.stop]
    return texts


def read_package(name: str) -> dict[str, str]:
    """Read the source of an installed package, without importing it."""
    found = importlib.util.find_spec(name)
    folders = found.submodule_search_locations if found is not None else None
    if not folders:
        raise click.UsageError(f"--package {name}: no such package is installed here.")
    return read_folder(Path(next(iter(folders))))


def name_hash(name: str) -> bytes:
    """Order files in a way that has nothing to do with what is in them."""
    return hashlib.sha256(name.encode()).digest()


def is_held_out(name: str) -> bool:
    """Tell whether a file of the standard library is kept from training; tests never are."""
    return name_hash(name)[0] < HELD_OUT_PART and not TESTS & set(name.split("/"))


def long_lines(text: str) -> set[str]:
    """Lines that are long enough to tell one file from another."""
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 30}


def training_texts(texts: Sequence[str], held_out: Sequence[str]) -> list[str]:
    """Drop what stands there twice, and files that mostly repeat what is held out."""
    hidden = set().union(*(long_lines(text) for text in held_out))

    def repeats(text: str) -> bool:
        lines = long_lines(text)
        return len(lines & hidden) > len(lines) / 2

    return [text for text in dict.fromkeys(texts) if not repeats(text)]


def beginning(text: str, size: int) -> str:
    """Take whole lines from the beginning of a text, at most so many bytes."""
    lines = text.splitlines(keepends=True)
    used = itertools.accumulate(len(line.encode()) for line in lines)
    return "".join(line for line, end in zip(lines, used, strict=True) if end <= size)


def eval_text(held_out: dict[str, str]) -> str:
    """Beginnings of held-out files, each after an end-of-text token, as in training."""
    found = ""
    for name in sorted(held_out, key=name_hash):
        room = EVAL_BYTES - len(found.encode())
        if room < EVAL_BYTES_PER_FILE:
            break
        found += END + beginning(held_out[name], EVAL_BYTES_PER_FILE)
    return found


# --- tokens ----------------------------------------------------------------------------------


def train_tokenizer(texts: Sequence[str], seed: int) -> Tokenizer:
    """Train a byte-level BPE that puts the end-of-text token in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    shuffled = random.Random(seed).sample(texts, len(texts))
    sizes = itertools.accumulate(len(text) for text in shuffled)
    some = [t for t, size in zip(shuffled, sizes, strict=True) if size <= TOKENIZER_CHARACTERS]
    tokenizer.train_from_iterator(some or shuffled, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, end_token(tokenizer))]
    )
    return tokenizer


def end_token(tokenizer: Tokenizer) -> int:
    """Number of the token that stands in front of every document."""
    number = tokenizer.token_to_id(END)
    assert number is not None
    return number


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> NDArray[np.uint16]:
    """Turn documents into one stream of tokens, on all processors."""
    parts = []
    for start in range(0, len(texts), 1000):
        encoded = tokenizer.encode_batch_fast(list(texts[start : start + 1000]))
        parts += [np.asarray(document.ids, np.uint16) for document in encoded]
    return np.concatenate(parts)


class Stream:
    """Tokens of documents one after the other, cut into rows.

    Every row begins with the end-of-text token, also in the middle of a document, since that is
    how a text begins for whoever uses the model.
    """

    def __init__(self, tokens: NDArray[np.uint16], begin: int, device: str) -> None:
        if len(tokens) < 2 * ROW_TOKENS:
            raise click.ClickException(f"{len(tokens)} tokens of text are too few to train on.")
        self.tokens = torch.from_numpy(tokens.astype(np.int32)).to(device)
        self.begin = begin

    def rows(self, starts: NDArray[np.int64]) -> torch.Tensor:
        """Rows whose text begins at these places: int64 [rows, ROW_TOKENS]."""
        span = torch.arange(ROW_TOKENS - 1, device=self.tokens.device)
        places = torch.from_numpy(starts).to(self.tokens.device)[:, None] + span
        return F.pad(self.tokens[places].long(), (1, 0), value=self.begin)

    def starts(self, shift: int = 0) -> NDArray[np.int64]:
        """Where rows begin that share no token, after leaving out the first ones."""
        last = len(self.tokens) - (ROW_TOKENS - 1)
        return np.arange(shift, last + 1, ROW_TOKENS - 1, dtype=np.int64)

    def batches(self, size: int, seed: int) -> Iterator[torch.Tensor]:
        """Draw shuffled batches, epoch after epoch, each epoch cut at other places."""
        generator = np.random.default_rng(seed)
        waiting = np.empty(0, np.int64)
        while True:
            while len(waiting) < size:
                shift = int(generator.integers(ROW_TOKENS - 1))
                waiting = np.concatenate([waiting, generator.permutation(self.starts(shift))])
            yield self.rows(waiting[:size])
            waiting = waiting[size:]


# --- model -----------------------------------------------------------------------------------


SHAPES: Final = {
    "14M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8,
            "num_attention_heads": 6, "num_key_value_heads": 2},
    "100M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16,
             "num_attention_heads": 12, "num_key_value_heads": 4},
}  # fmt: skip


def make_model(end: int, shape: str) -> LlamaForCausalLM:
    """Build a Llama of one of the shapes with freshly drawn weights."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        **SHAPES[shape],
        max_position_embeddings=ROW_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        use_cache=True,
    )
    return LlamaForCausalLM(config)


def mean_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean loss of the next token, in nats."""
    kind = rows.device.type
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda"):
        logits = model(input_ids=rows, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: Stream, size: int) -> float:
    """Mean loss on rows of held-out text, always the same ones."""
    starts = stream.starts()[: HELD_OUT_BATCHES * size]
    parts = [starts[i : i + size] for i in range(0, len(starts), size)]
    total = sum(mean_loss(model, stream.rows(part)).item() * len(part) for part in parts)
    return total / len(starts)


def learning_rate(done: float, peak: float) -> float:
    """Warm up over a fiftieth of the training, then follow a cosine down to nearly nothing."""
    warmup = 0.02
    if done < warmup:
        return peak * max(done, 1e-4) / warmup
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))) / 2)


def make_optimizer(model: LlamaForCausalLM, peak: float) -> torch.optim.AdamW:
    """Decay matrices only, not the norms."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim != 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=model.device.type == "cuda")


def train(
    model: LlamaForCausalLM,
    training: Stream,
    held_out: Stream,
    *,
    steps: int,
    size: int,
    limit: float,
    peak: float,
    seed: int,
) -> None:
    """Train in place, reporting losses on the way."""
    optimizer = make_optimizer(model, peak)
    source = training.batches(size, seed)
    started = time.monotonic()
    every = max(10, steps // 20)
    recent = torch.zeros((), device=model.device)
    for step in range(1, steps + 1):
        # A machine that is too slow for the steps goes through the same schedule in fewer.
        done = max((step - 1) / steps, (time.monotonic() - started) / limit)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(min(1.0, done), peak)
        loss = mean_loss(model, next(source))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent += loss.detach()
        if step % every == 0 or step == steps or done >= 1:
            count = (step - 1) % every + 1
            click.echo(
                f"step {step:6d}  loss {recent.item() / count:.4f}  "
                f"held out {held_out_loss(model, held_out, size):.4f}  "
                f"{step * size * (ROW_TOKENS - 1):,} tokens  {time.monotonic() - started:.0f} s"
            )
            recent.zero_()
        if done >= 1:
            click.echo(f"ended by the limit of {limit:g} s, at step {step} of {steps}")
            break


# --- files -----------------------------------------------------------------------------------


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write readable JSON with a final newline."""
    path.write_text(f"{json.dumps(value, indent=2)}\n", encoding="utf-8")


def write_model(model: LlamaForCausalLM, out: Path) -> None:
    """Write the weights, their index and the two configurations."""
    model.generation_config.pad_token_id = model.config.eos_token_id
    model.save_pretrained(out, max_shard_size=MAX_SHARD_SIZE)
    for path in out.glob("*.safetensors"):
        path.chmod(0o644)


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write the tokenizer so that transformers 4 and 5 both load it."""
    tokenizer.save(str(out / "tokenizer.json"))
    value = {
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": ROW_TOKENS,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(out / "tokenizer_config.json", value)


@torch.no_grad()
def continued(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, tokens: int) -> str:
    """Decode greedily after a prompt, and give both."""
    inputs = torch.tensor([tokenizer.encode(prompt).ids], device=model.device)
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=end_token(tokenizer),
    )
    text: str = tokenizer.decode(output[0].tolist(), skip_special_tokens=True)
    return text


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Checkpoint folder.")
@click.option("--eval-text", "eval_path", type=click.Path(path_type=Path),
              help="File for held-out text.  [default: OUT-eval.txt]")  # fmt: skip
@click.option("--package", "packages", multiple=True,
              help="Train also on the source of an installed package; repeatable.")  # fmt: skip
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--steps", type=click.IntRange(1), default=5000, show_default=True)
@click.option("--rows", "size", type=click.IntRange(1), default=64, show_default=True,
              help=f"Rows of {ROW_TOKENS} tokens in a batch.")  # fmt: skip
@click.option("--limit", type=click.FloatRange(1), default=120, show_default=True,
              help="Seconds after which training ends at the latest.")  # fmt: skip
@click.option("--peak", type=float, default=1.5e-3, show_default=True, help="Learning rate.")
@click.option("--shape", type=click.Choice(list(SHAPES)), default="14M", show_default=True,
              help="About how many weights the model has.")  # fmt: skip
@click.option("--seed", type=int, default=20, show_default=True)
def main(
    *,
    out: Path,
    eval_path: Path | None,
    packages: tuple[str, ...],
    device: str,
    steps: int,
    size: int,
    limit: float,
    peak: float,
    shape: str,
    seed: int,
) -> None:
    """Train the second model and write its checkpoint."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.monotonic()
    torch.manual_seed(seed)
    folder = Path(sysconfig.get_paths()["stdlib"])
    library = read_folder(folder)
    held_out = {name: text for name, text in library.items() if is_held_out(name)}
    if not held_out:
        raise click.ClickException(f"{folder} holds {len(library)} source files: none to hold out.")
    texts = [text for name, text in library.items() if name not in held_out]
    for package in packages:
        texts += read_package(package).values()
    texts = training_texts(texts, list(held_out.values()))
    random.Random(seed).shuffle(texts)
    click.echo(
        f"{len(texts)} files, {sum(map(len, texts)):,} characters; {len(held_out)} files held out, "
        f"{sum(map(len, held_out.values())):,} characters; {time.monotonic() - started:.0f} s"
    )

    tokenizer = train_tokenizer(texts, seed)
    end = end_token(tokenizer)
    training = Stream(encode(tokenizer, texts), end, device)
    unseen = Stream(encode(tokenizer, list(held_out.values())), end, device)
    click.echo(
        f"{len(training.tokens):,} tokens; {len(unseen.tokens):,} held out; "
        f"{time.monotonic() - started:.0f} s"
    )

    model = make_model(end, shape).to(device)
    click.echo(f"{model.num_parameters():,} parameters on {device}")
    train(model, training, unseen, steps=steps, size=size, limit=limit, peak=peak, seed=seed)
    model = model.to(torch.bfloat16).eval()
    click.echo(f"rounded to bfloat16: held out {held_out_loss(model, unseen, size):.4f}")

    click.echo(continued(model, tokenizer, "import json\n\n\ndef read_lines(path):\n", 80))
    write_model(model, out)
    write_tokenizer(tokenizer, out)
    eval_path = eval_path or out.with_name(f"{out.name}-eval.txt")
    eval_path.write_text(eval_text(held_out), encoding="utf-8")
    click.echo(f"wrote {out} and {eval_path} after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
