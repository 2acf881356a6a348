"""A fresh process that loads one model, answers prompts and scores text.

`python -m pipeline.proof.worker REQUEST.json`: reads it, writes the result beside it. Being
a process of its own, it starts from what is on disk alone, and its peak memory is its own.

The 16-bit run comes first: it writes answers, and the log-probabilities of those answers' tokens
into a file. The 4-bit run reads the tokens and compares.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError
from pipeline.fidelity.metrics import compare
from pipeline.measure import measured
from pipeline.proof.prompts import Prompt
from pipeline.runtime.generate import Generator, Sampling
from pipeline.runtime.loader import load, load_tokenizer
from pipeline.runtime.quiet import quiet_libraries

_RANDOM_LENGTH: Final = 64


def main() -> None:
    """Runs the request named on the command line."""
    request_path = Path(sys.argv[1])
    request = json.loads(request_path.read_text("utf-8"))
    quiet_libraries()
    try:
        result = run(request)
    except PipelineError as error:
        result = {"error": str(error), "kind": type(error).__name__}
    Path(request["result"]).write_text(json.dumps(result), "utf-8")


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Loads, counts, answers and scores one model.

    Args:
        request: model (folder), device, quantized (bool), prompts, max_new_tokens, score_tokens,
            reference (path of the .npz that the 16-bit run writes and the 4-bit run reads).
            Without prompts, random token ids are scored.
    """
    with measured() as usage:
        start = time.perf_counter()
        generator = _open(request)
        load_seconds = time.perf_counter() - start
        prompts = [Prompt(**prompt) for prompt in request["prompts"]]
        answers = _answer(generator, prompts, request["max_new_tokens"])
        result: dict[str, Any] = {
            "device": _device_name(generator),
            "load_seconds": round(load_seconds, 3),
            "footprint_bytes": int(generator.model.get_memory_footprint()),
            "linear4bit": _linear4bit(generator.model),
            "answers": answers,
        }
        reference = Path(request["reference"])
        if request["quantized"]:
            result["fidelity"] = _compare(generator, reference)
        elif prompts:
            sequences = _written(generator, prompts, answers, request["score_tokens"])
            _score_reference(generator, sequences, reference)
        else:
            sequences = _random_sequences(generator, request["score_tokens"])
            _score_reference(generator, sequences, reference)
    result["seconds"] = round(usage.seconds, 3)
    result["peak_memory_bytes"] = usage.peak_memory
    result["peak_device_memory_bytes"] = _device_peak(generator)
    return result


def _open(request: dict[str, Any]) -> Generator:
    model = load(request["model"], device=request["device"], quantize=False)
    # Without prompts no tokenizer is asked for: a checkpoint need not have one to be verified.
    return Generator(model, load_tokenizer(request["model"]) if request["prompts"] else None)


def _answer(
    generator: Generator, prompts: list[Prompt], max_new_tokens: int
) -> list[dict[str, Any]]:
    sampling = Sampling(max_new_tokens=max_new_tokens)
    answers = []
    for prompt in prompts:
        if generator.context and _length(generator, prompt) >= generator.context:
            answers.append({"text": "", "tokens": 0, "seconds": 0.0})  # longer than the model takes
            continue
        answer = generator.answer(prompt.prompt, sampling, chat=prompt.chat)[0]
        answers.append(
            {"text": answer.text, "tokens": answer.tokens, "seconds": round(answer.seconds, 4)}
        )
    return answers


def _length(generator: Generator, prompt: Prompt) -> int:
    return int(generator.encode(prompt.prompt, chat=prompt.chat).shape[1])


def _linear4bit(model: Any) -> list[str]:
    from bitsandbytes.nn import Linear4bit

    return [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]


def _written(
    generator: Generator, prompts: list[Prompt], answers: list[dict[str, Any]], limit: int
) -> list[NDArray[np.int64]]:
    """Prompts with their 16-bit answers as token ids, until `limit` tokens can be scored."""
    sequences: list[NDArray[np.int64]] = []
    left = limit
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = generator.encode(prompt.prompt, chat=prompt.chat)[0].cpu().numpy()
        written = generator.tokenizer(answer["text"], add_special_tokens=False).input_ids
        sequence = np.concatenate([ids, np.asarray(written, np.int64)])[: left + 1]
        sequence = sequence[: generator.context]
        if len(sequence) > 1:
            sequences.append(sequence)
            left -= len(sequence) - 1
        if left < 1:
            break
    return sequences


def _random_sequences(generator: Generator, limit: int) -> list[NDArray[np.int64]]:
    """Token ids to score where there is no tokenizer to make them from a text."""
    vocabulary = generator.model.get_input_embeddings().num_embeddings
    dice = np.random.default_rng(0)
    length = min(_RANDOM_LENGTH, generator.context or _RANDOM_LENGTH)
    count = max(1, limit // length)
    return list(dice.integers(0, vocabulary, (count, length), dtype=np.int64))


def _score_reference(generator: Generator, sequences: list[NDArray[np.int64]], path: Path) -> None:
    """Leaves token ids and their 16-bit log-probabilities for the 4-bit run."""
    np.savez(
        path,
        tokens=np.concatenate(sequences),
        lengths=np.array([len(sequence) for sequence in sequences]),
        log_probs=np.concatenate([_log_probs(generator, sequence) for sequence in sequences]),
    )


def _compare(generator: Generator, path: Path) -> dict[str, float]:
    with np.load(path) as reference:
        ends = np.cumsum(reference["lengths"])
        sequences = np.split(reference["tokens"], ends[:-1])
        scores = np.concatenate([_log_probs(generator, sequence) for sequence in sequences])
        targets = np.concatenate([sequence[1:] for sequence in sequences])
        return asdict(compare(reference["log_probs"], scores, targets))


def _log_probs(generator: Generator, sequence: NDArray[np.int64]) -> NDArray[np.float32]:
    """Log-probabilities of every next token, float32 [length - 1, vocabulary]."""
    import torch

    ids = torch.from_numpy(sequence.copy())[None].to(generator.model.device)
    with torch.inference_mode():
        logits = generator.model(ids).logits[0, :-1].float()
        scores: NDArray[np.float32] = torch.log_softmax(logits, dim=-1).cpu().numpy()
    return scores


def _device_name(generator: Generator) -> str:
    import torch

    device = generator.model.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _device_peak(generator: Generator) -> int:
    import torch

    device = generator.model.device
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


if __name__ == "__main__":
    main()
