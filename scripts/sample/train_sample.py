"""Train the bundled sample model from scratch and write it as a Hub checkpoint.

The text comes from the grammar in ``sample_corpus.py``; nothing is downloaded. The result is
a small Falcon built as falcon-7b is (multi-query attention, parallel attention and MLP,
rotary positions, tied embeddings), rounded to bfloat16 and written in the shape that
published Falcon checkpoints have: two shards with an index, a stored copy of the tied output
head, and a configuration that points at custom code which is not there.

    python scripts/sample/train_sample.py --out pipeline/nf4_pipeline/sample/model \\
        --questions pipeline/nf4_pipeline/sample/questions.jsonl

The bundled checkpoint took five minutes on one H100 with 16 processor cores, a minute of it
for the text, while a second run shared the machine. It also runs on a CPU: the same recipe
takes about half a day on two cores, at 12 s a step. To try the script out there,
``--steps 300 --rows 16 --chunks 8`` takes about five minutes and answers far less.
Accuracy on questions about a told context comes late and suddenly (here between steps 1600
and 1800); with a peak learning rate of 6e-4 it had not come after 4000 steps, nor with 3e-3
after 3000. The same seed on other hardware gives other weights.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from sample_corpus import (
    KINDS,
    NAMES,
    Item,
    Segment,
    chat_prompt,
    document,
    draw_question,
    held_out_questions,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import FalconConfig, FalconForCausalLM

EOS = "<|endoftext|>"
VOCAB_SIZE = 1024
ROW_TOKENS = 256
CHUNK_DOCUMENTS = 10_000
TEXT_DOCUMENTS = 160
ANSWER_TOKENS = 24
# What a token's loss counts for. Prompts are drawn at random, so there is little to learn in
# them; answers are few tokens among many story tokens.
WEIGHTS = {"padding": 0.0, "prompt": 0.1, "story": 1.0, "answer": 4.0}
ROLES = tuple(WEIGHTS)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Assistant: ' }}{% else %}{{ 'User: ' }}{% endif %}"
    "{{ message['content'] }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class Rows(NamedTuple):
    """Packed training text: every row holds whole documents."""

    tokens: NDArray[np.uint16]
    roles: NDArray[np.uint8]
    documents: NDArray[np.uint8]


# --- text ------------------------------------------------------------------------------------


def chunk_documents(seed: int, chunk: int) -> list[list[Segment]]:
    """Generate one chunk of documents, the same whichever process does it."""
    rng = random.Random(f"{seed}:{chunk}")
    return [document(rng) for _ in range(CHUNK_DOCUMENTS)]


def end_token(tokenizer: Tokenizer) -> int:
    """Number of the token that ends every document."""
    number = tokenizer.token_to_id(EOS)
    assert number is not None
    return number


def train_tokenizer(seed: int) -> Tokenizer:
    """Train a byte-level BPE on generated text, as Falcon's tokenizer is built."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ("".join(part.text for part in parts) for parts in chunk_documents(seed, 0))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([EOS])
    return tokenizer


def encode_documents(
    tokenizer: Tokenizer, documents: list[list[Segment]]
) -> Iterator[tuple[list[int], list[int]]]:
    """Turn documents into token and role numbers, each closed by the end token."""
    parts = [part for parts in documents for part in parts]
    encoded = iter(tokenizer.encode_batch([part.text for part in parts]))
    eos = end_token(tokenizer)
    for document_parts in documents:
        tokens: list[int] = []
        roles: list[int] = []
        for part in document_parts:
            ids = next(encoded).ids
            tokens += ids
            roles += [ROLES.index(part.role)] * len(ids)
        if len(tokens) < ROW_TOKENS:
            yield [*tokens, eos], [*roles, ROLES.index("answer")]


def pack_chunk(arguments: tuple[str, int, int]) -> Rows:
    """Generate, encode and pack one chunk."""
    tokenizer_json, seed, chunk = arguments
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_str(tokenizer_json)
    shape = (CHUNK_DOCUMENTS, ROW_TOKENS)
    rows = Rows(np.zeros(shape, np.uint16), np.zeros(shape, np.uint8), np.zeros(shape, np.uint8))
    row, used, count = 0, 0, 0
    for tokens, roles in encode_documents(tokenizer, chunk_documents(seed, chunk)):
        if used + len(tokens) > ROW_TOKENS:
            row, used, count = row + 1, 0, 0
        span = slice(used, used + len(tokens))
        count += 1
        rows.tokens[row, span] = tokens
        rows.roles[row, span] = roles
        rows.documents[row, span] = count
        used += len(tokens)
    # The last row is rarely full, so it is left out.
    return Rows(rows.tokens[:row].copy(), rows.roles[:row].copy(), rows.documents[:row].copy())


def make_rows(tokenizer: Tokenizer, seed: int, chunks: int) -> Rows:
    """Build the training text on all processors."""
    work = [(tokenizer.to_str(), seed, chunk) for chunk in range(chunks)]
    with multiprocessing.get_context("spawn").Pool() as pool:
        parts = pool.map(pack_chunk, work, chunksize=1)
    return Rows(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.roles for part in parts]),
        np.concatenate([part.documents for part in parts]),
    )


# --- model -----------------------------------------------------------------------------------


def make_model(hidden: int, layers: int, eos: int) -> FalconForCausalLM:
    """Build a falcon-7b in small, with freshly drawn weights."""
    config = FalconConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        multi_query=True,
        parallel_attn=True,
        bias=False,
        alibi=False,
        new_decoder_architecture=False,
        tie_word_embeddings=True,
        bos_token_id=eos,
        eos_token_id=eos,
    )
    return FalconForCausalLM(config)


def weighted_loss(
    model: FalconForCausalLM, tokens: torch.Tensor, roles: torch.Tensor, documents: torch.Tensor
) -> torch.Tensor:
    """Mean next-token loss, weighted by role, with no view across documents."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    length = tokens.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
    starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    steps = torch.arange(length, device=tokens.device)
    positions = steps - torch.where(starts, steps, 0).cummax(dim=1).values
    logits = model(
        input_ids=tokens, attention_mask=same & causal, position_ids=positions, use_cache=False
    ).logits
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
    )
    table = torch.tensor([WEIGHTS[role] for role in ROLES], device=tokens.device)
    inside = documents[:, 1:] == documents[:, :-1]
    weights = (table[roles[:, 1:]] * inside).flatten()
    return (losses * weights).sum() / weights.sum()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm up over the first steps, then follow a cosine down to nearly nothing."""
    warmup = min(300, max(1, steps // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def make_optimizer(model: FalconForCausalLM, peak: float, decay: float) -> torch.optim.AdamW:
    """Decay matrices only, not the norms."""
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    vectors = [weight for weight in model.parameters() if weight.ndim != 2]
    groups = [
        {"params": matrices, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), eps=1e-8)


def batches(rows: Rows, size: int, seed: int) -> Iterator[list[torch.Tensor]]:
    """Draw shuffled batches, epoch after epoch."""
    generator = np.random.default_rng(seed)
    for _ in itertools.count():
        order = generator.permutation(len(rows.tokens))
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            yield [torch.from_numpy(array[chosen].astype(np.int64)) for array in rows]


def train(
    model: FalconForCausalLM,
    rows: Rows,
    items: Sequence[Item],
    tokenizer: Tokenizer,
    *,
    steps: int,
    size: int,
    seed: int,
    peak: float,
    decay: float,
) -> None:
    """Train in place, reporting loss and held-out accuracy on the way."""
    device = model.device
    optimizer = make_optimizer(model, peak, decay)
    source = batches(rows, size, seed)
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        batch = [array.to(device, non_blocking=True) for array in next(source)]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = weighted_loss(model, *batch)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % max(1, steps // 20) == 0:
            right = sum(answered(model, tokenizer, items))
            click.echo(
                f"step {step + 1:6d}  loss {loss.item():.4f}  "
                f"held out {right}/{len(items)}  {time.monotonic() - started:.0f} s"
            )


# --- scoring ---------------------------------------------------------------------------------


@torch.no_grad()
def answered(
    model: FalconForCausalLM, tokenizer: Tokenizer, items: Sequence[Item], size: int = 256
) -> list[bool]:
    """Tell which items greedy decoding gets right, all answer tokens at once.

    Greedy decoding yields an answer exactly when every one of its tokens, and the line's end
    after it, is the likeliest next token. That needs one forward pass and no decoding loop.
    """
    eos = end_token(tokenizer)
    stops = torch.tensor([eos, tokenizer.encode("\n").ids[0]], device=model.device)
    results = []
    for start in range(0, len(items), size):
        part = items[start : start + size]
        prompts = [tokenizer.encode(item.prompt).ids for item in part]
        answers = [tokenizer.encode(f" {item.answer}").ids for item in part]
        lines = [
            torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)
        ]
        inputs = torch.nn.utils.rnn.pad_sequence(lines, batch_first=True).to(model.device)
        best = model(input_ids=inputs, use_cache=False).logits.argmax(-1)
        for line, prompt, answer in zip(best, prompts, answers, strict=True):
            end = len(prompt) + len(answer)
            same = line[len(prompt) - 1 : end - 1].tolist() == answer
            results.append(same and bool((line[end - 1] == stops).any()))
    return results


def per_kind(items: Sequence[Item], results: Sequence[bool]) -> str:
    """Write the share of right answers of each kind on one line."""
    right = Counter(item.kind for item, good in zip(items, results, strict=True) if good)
    total = Counter(item.kind for item in items)
    return "  ".join(f"{kind} {right[kind]}/{total[kind]}" for kind in KINDS)


@torch.no_grad()
def generate(model: FalconForCausalLM, tokenizer: Tokenizer, prompt: str, tokens: int) -> str:
    """Decode greedily after a prompt."""
    inputs = torch.tensor([tokenizer.encode(prompt).ids], device=model.device)
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=end_token(tokenizer),
    )
    return tokenizer.decode(output[0, inputs.shape[1] :].tolist(), skip_special_tokens=True)


def is_right(generated: str, expected: str) -> bool:
    """Compare the first generated line with the answer, ignoring case and a final period."""
    lines = generated.strip().splitlines() or [""]
    return lines[0].strip().removesuffix(".").lower() == expected.removesuffix(".").lower()


# --- files -----------------------------------------------------------------------------------


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write readable JSON with a final newline."""
    path.write_text(f"{json.dumps(value, indent=2)}\n", encoding="utf-8")


def split_state(state: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Cut the tensors into two shards of about equal size, in the model's order."""
    total = sum(tensor.nbytes for tensor in state.values())
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    used = 0
    for name, tensor in state.items():
        shards[int(used + tensor.nbytes > total // 2 or bool(shards[1]))][name] = tensor
        used += tensor.nbytes
    return shards


def write_weights(model: FalconForCausalLM, out: Path) -> None:
    """Write the two shards and their index, with the tied head stored a second time."""
    state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    embedding = state["transformer.word_embeddings.weight"]
    state.pop("lm_head.weight", None)
    state["lm_head.weight"] = embedding.clone()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(split_state(state), start=1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file(shard, out / name, metadata={"format": "pt"})
        (out / name).chmod(0o644)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(out / "model.safetensors.index.json", index)


def write_config(model: FalconForCausalLM, out: Path) -> None:
    """Write the configuration with the keys that published Falcon checkpoints have."""
    config = model.config
    eos = config.eos_token_id
    auto_map = {
        "AutoConfig": "configuration_falcon.FalconConfig",
        "AutoModel": "modeling_falcon.FalconModel",
        "AutoModelForSequenceClassification": "modeling_falcon.FalconForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_falcon.FalconForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_falcon.FalconForQuestionAnswering",
        "AutoModelForCausalLM": "modeling_falcon.FalconForCausalLM",
    }
    value = {
        "alibi": False,
        "apply_residual_connection_post_layernorm": False,
        "architectures": ["FalconForCausalLM"],
        "attention_dropout": 0.0,
        "auto_map": auto_map,
        "bias": False,
        "bos_token_id": eos,
        "eos_token_id": eos,
        "hidden_dropout": 0.0,
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "model_type": "falcon",
        "multi_query": True,
        "new_decoder_architecture": False,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "parallel_attn": True,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.27.4",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    write_json(out / "config.json", value)
    generation = {
        "bos_token_id": eos,
        "eos_token_id": eos,
        "pad_token_id": eos,
        "transformers_version": "4.27.4",
    }
    write_json(out / "generation_config.json", generation)


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write the tokenizer so that transformers 4 and 5 both load it."""
    tokenizer.save(str(out / "tokenizer.json"))
    special = {"bos_token": EOS, "eos_token": EOS, "pad_token": EOS}
    value = {
        "add_prefix_space": False,
        **special,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 2048,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(out / "tokenizer_config.json", value)
    write_json(out / "special_tokens_map.json", special)


def write_questions(items: Sequence[Item], path: Path) -> None:
    """Write the held-out questions, one JSON object per line."""
    lines = [json.dumps({"prompt": item.prompt, "expect": item.answer}) for item in items]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_text(path: Path) -> None:
    """Write unseen documents, closed as in training, on which two models can be compared."""
    rng = random.Random("text")
    texts = ("".join(part.text for part in document(rng)) for _ in range(TEXT_DOCUMENTS))
    path.write_text("".join(f"{text}{EOS}" for text in texts) + "\n", encoding="utf-8")


def sample_stories(model: FalconForCausalLM, tokenizer: Tokenizer) -> Iterator[str]:
    """Let the model tell a few stories."""
    prompts = [
        "Once upon a time",
        f"Once upon a time, there was a little fox named {NAMES[0]}",
        "One day, a brave mouse",
        chat_prompt("Tell me a story about a fox."),
        chat_prompt("Please tell me a short story about an owl."),
    ]
    for prompt in prompts:
        yield re.sub(r"\s+", " ", prompt + generate(model, tokenizer, prompt, 200))


def report(
    model: FalconForCausalLM, tokenizer: Tokenizer, questions: Sequence[Item], wide: Sequence[Item]
) -> None:
    """Print the accuracy of the rounded model and some of its stories."""
    results = answered(model, tokenizer, wide)
    click.echo(f"held out, {len(wide)} questions: {sum(results)} right")
    click.echo(f"  {per_kind(wide, results)}")
    results = [
        is_right(generate(model, tokenizer, item.prompt, ANSWER_TOKENS), item.answer)
        for item in questions
    ]
    click.echo(f"the {len(questions)} bundled questions: {sum(results)} right")
    click.echo(f"  {per_kind(questions, results)}")
    for text in sample_stories(model, tokenizer):
        click.echo(f"  {text}")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Checkpoint folder.")
@click.option(
    "--questions",
    "questions_path",
    type=click.Path(path_type=Path),
    help="Also write the 50 held-out questions to this file.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--steps", type=click.IntRange(1), default=4000, show_default=True)
@click.option("--rows", "size", type=click.IntRange(1), default=128, show_default=True,
              help=f"Rows of {ROW_TOKENS} tokens in a batch.")  # fmt: skip
@click.option("--chunks", type=click.IntRange(1), default=200, show_default=True,
              help=f"Training text, in chunks of {CHUNK_DOCUMENTS} documents.")  # fmt: skip
@click.option("--hidden", type=int, default=256, show_default=True, help="A multiple of 64.")
@click.option("--layers", type=click.IntRange(1), default=6, show_default=True)
@click.option("--peak", type=float, default=1e-3, show_default=True, help="Learning rate.")
@click.option("--decay", type=float, default=0.1, show_default=True, help="Weight decay.")
@click.option("--seed", type=int, default=20, show_default=True)
def main(
    *,
    out: Path,
    questions_path: Path | None,
    device: str,
    steps: int,
    size: int,
    chunks: int,
    hidden: int,
    layers: int,
    peak: float,
    decay: float,
    seed: int,
) -> None:
    """Train the sample model and write its checkpoint."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.monotonic()
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(seed)
    rows = make_rows(tokenizer, seed, chunks)
    click.echo(f"{rows.tokens.size:,} tokens of text after {time.monotonic() - started:.0f} s")

    # The questions have a seed of their own: they stay the same when the training changes.
    questions = held_out_questions(seed=50, per_kind=5)
    rng = random.Random(seed)
    wide = [draw_question(rng, kind, held_out=True) for kind in KINDS for _ in range(100)]
    model = make_model(hidden, layers, end_token(tokenizer)).to(device)
    click.echo(f"{model.num_parameters():,} parameters on {device}")
    train(model, rows, wide, tokenizer, steps=steps, size=size, seed=seed, peak=peak, decay=decay)

    model = model.to(torch.bfloat16).eval()
    report(model, tokenizer, questions, wide)
    out.mkdir(parents=True, exist_ok=True)
    write_weights(model, out)
    write_config(model, out)
    write_tokenizer(tokenizer, out)
    if questions_path is not None:
        write_questions(questions, questions_path)
        write_text(questions_path.with_name("text.txt"))
    click.echo(f"wrote {out} after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
