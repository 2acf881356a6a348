"""A fresh process that loads one model and does what is asked of it.

`python -m nf4_pipeline.verification.worker REQUEST.json`: reads it, writes the result beside it,
and says on stdout, one JSON line at a time, how far it is. Being a process of its own, it starts
from what is on disk alone, and its peak memory is its own.

- "source": the 16-bit checkpoint answers prompts. What does not fit the device is streamed.
- "artifact": the 4-bit one is loaded as anybody loads it, counted, answers the same prompts, and is
  held against the source on a text, block by block; round to nearest beside it, if that is wanted.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from nf4_pipeline.errors import PipelineError
from nf4_pipeline.fidelity.metrics import by_domain, by_position, compare, difference, histogram
from nf4_pipeline.library_output import quiet_libraries
from nf4_pipeline.resource_usage import available_memory, measured, peak_memory
from nf4_pipeline.runtime.generate import Generator
from nf4_pipeline.runtime.loader import load_tokenizer, load_with_report
from nf4_pipeline.runtime.threads import one_thread_if_small
from nf4_pipeline.verification import generation as asking
from nf4_pipeline.verification.eval_text import Text, cut, random_sequences
from nf4_pipeline.verification.prompts import Prompt

_SPARE: Final = 2 * 2**30
"""Bytes of the device's memory that the 16-bit model leaves for what it computes with."""


def main() -> None:
    """Runs the request named on the command line."""
    request_path = Path(sys.argv[1])
    request = json.loads(request_path.read_text("utf-8"))
    quiet_libraries()
    _limit_device_memory(request)
    try:
        result = {"source": _source, "artifact": _artifact}[request["kind"]](request)
    except PipelineError as error:
        result = {"error": str(error), "kind": type(error).__name__}
    Path(request["result"]).write_text(json.dumps(result), "utf-8")


def _source(request: dict[str, Any]) -> dict[str, Any]:
    """The 16-bit model's answers, and what they cost."""
    from nf4_pipeline.blocks.streamed import StreamedModel

    with measured() as usage:
        start = time.perf_counter()
        with StreamedModel(Path(request["source"]), request["device"]) as streamed:
            whole = _hold_what_fits(request, streamed)
            load_seconds = time.perf_counter() - start
            found: list[dict[str, Any]] = []
            if request["prompts"]:
                streamed.take_generation_config()
                with one_thread_if_small(streamed.footprint):
                    found = _answer_streamed(request, streamed, whole)
            result: dict[str, Any] = {
                "answers": found,
                "costs": _costs(found, load_seconds, streamed.footprint, streamed=not whole),
            }
    result["costs"] |= _peaks(request, usage.peak_memory)
    return result


def _artifact(request: dict[str, Any]) -> dict[str, Any]:
    """The 4-bit model: what came back from disk, its distance from the source, its answers."""
    with measured() as loading:
        start = time.perf_counter()
        model, report = load_with_report(request["artifact"], device=request["device"])
        load_seconds = time.perf_counter() - start
        result: dict[str, Any] = {
            "device": _device(model),
            "missing": list(report.missing),
            "unexpected": list(report.unexpected),
            "memory": _in_memory(model),
        }
        footprint = int(model.get_memory_footprint())
    on_load = _peaks(request, loading.peak_memory)
    # Before anything is asked: on some CPUs bitsandbytes repacks a weight when it is first used.
    with measured() as comparing, one_thread_if_small(footprint):
        result |= _distance(request, model)
    result["comparison"] = {"seconds": round(comparing.seconds, 3)}
    result["comparison"] |= _peaks(request, comparing.peak_memory)
    with measured() as answering, one_thread_if_small(footprint):
        found = _answer(request, _generator(request, model)) if request["prompts"] else []
    on_answer = _peaks(request, answering.peak_memory)
    result["answers"] = found
    result["costs"] = _costs(found, load_seconds, footprint, streamed=False)
    result["costs"] |= {name: max(on_load[name], on_answer[name]) for name in on_load}
    return result


def _distance(request: dict[str, Any], model: Any) -> dict[str, Any]:
    """How far the model is from its source; leaves the scores of all tokens in a file."""
    from nf4_pipeline.blocks.streamed import StreamedModel
    from nf4_pipeline.verification.compare import Comparison

    generator = Generator(model, _tokenizer(request))
    text = Text(request["text"]["name"], request["text"]["domains"])
    if text.domains:
        sequences = cut(text, generator.tokenizer, request["tokens"], generator.context)
    else:
        vocabulary = model.get_input_embeddings().num_embeddings
        sequences = random_sequences(vocabulary, request["tokens"], generator.context)
    _say(task="compare block by block", total=sum(len(s.ids) for s in sequences), unit="tokens")
    # Both sides compute in what the 4-bit one computes in.
    with StreamedModel(Path(request["source"]), request["device"], _dtype(model)) as streamed:
        comparison = Comparison(streamed, model, nearest=request["nearest"])
        scores = comparison.run(sequences, lambda count: _say(advance=count))
    lengths = [len(sequence.ids) - 1 for sequence in sequences]
    domains = [sequence.domain for sequence in sequences]
    np.savez(
        request["scores"],
        lengths=lengths,
        domains=domains,
        **{name: getattr(scores, name) for name in scores.__dataclass_fields__},
    )
    found = {
        "text": {
            "name": text.name,
            "sha256": text.sha256,
            "sequences": len(sequences),
            "tokens": len(scores),
            "length": max(len(sequence.ids) for sequence in sequences),
        },
        "fidelity": compare(scores, lengths).as_json(),
        "domains": by_domain(scores, lengths, domains),
        "kl_by_position": by_position(scores, lengths),
        "kl_histogram": histogram(scores),
        "blocks": [
            {
                "name": name,
                "relative_error": _finite(block.hidden.value),
                "modules": [_layer(layer, e, e.output.value) for layer, e in block.layers.items()],
            }
            for name, block in comparison.blocks.items()
        ],
        "outside": [_layer(name, error, None) for name, error in comparison.outside.items()],
        "kept": comparison.kept,
        "changed": comparison.changed,
    }
    if comparison.nearest is not None:
        found["nearest"] = {
            "fidelity": compare(comparison.nearest, lengths).as_json(),
            "domains": by_domain(comparison.nearest, lengths, domains),
            "difference": difference(scores, comparison.nearest, lengths, domains),
        }
    return found


def _layer(name: str, error: Any, output: float | None) -> dict[str, Any]:
    return {
        "name": name,
        "relative_error": None if output is None else _finite(output),
        "weight_error": _finite(error.weight),
        "worst": _finite(error.worst),
        "worst_at": error.worst_at,
        "scale": _finite(error.scale),
        "scale_at": error.scale_at,
        "reach": _finite(error.reach),
        "reach_at": error.reach_at,
    }


def _answer(request: dict[str, Any], generator: Generator) -> list[dict[str, Any]]:
    """Answers one question after the other."""
    asked = _questions(request)
    _say(task=f"answer in {request['bits']} bit", total=len(asked), unit="answers")
    found = []
    for question in asked:
        found.append(asking.answer(generator, question, request["max_new_tokens"]))
        _say(advance=1)
    return found


def _hold_what_fits(request: dict[str, Any], streamed: Any) -> bool:
    """Gives blocks their weights for good as long as there is memory; True if all have them."""
    largest = max((streamed.nbytes(block) for block in streamed.blocks), default=0)
    room = _free_memory(request) - _SPARE - largest  # of which one is streamed at a time
    for block in streamed.blocks:
        room -= streamed.nbytes(block)
        if room < 0:
            return False
        streamed.hold(block)
    return True


def _answer_streamed(request: dict[str, Any], streamed: Any, whole: bool) -> list[dict[str, Any]]:
    """Answers one after the other if the model is there, else all together, a block at a time."""
    from nf4_pipeline.blocks.lockstep import Lockstep

    generator = _generator(request, streamed.model)
    if whole:
        return _answer(request, generator)
    asked = _questions(request)
    last = list(streamed.blocks)[-1]
    _say(task="answer in 16 bit, streamed", total=request["max_new_tokens"], unit="tokens")

    def closed(block: str) -> None:
        streamed.close(block)
        if block == last:
            _say(advance=1)

    found: dict[int, dict[str, Any]] = {}
    lockstep = Lockstep([streamed.blocks], partial(streamed.open_ahead, again=True), closed)
    lockstep.run(asking.tasks(generator, asked, request["max_new_tokens"], found))
    # All of them were held at every block, so the time of any one says nothing.
    return [
        found[number] | {"seconds": 0.0, "first_token_seconds": None}
        for number in range(len(asked))
    ]


def _questions(request: dict[str, Any]) -> list[asking.Question]:
    return asking.questions([Prompt(**prompt) for prompt in request["prompts"]])


def _generator(request: dict[str, Any], model: Any) -> Generator:
    import torch

    return Generator(model, _tokenizer(request), torch.device(request["device"]))


def _tokenizer(request: dict[str, Any]) -> Any:
    """None if there is none: a checkpoint need not have one to be verified."""
    wanted = request["prompts"] or request["text"]["domains"]
    return load_tokenizer(request["artifact"]) if wanted else None


def _in_memory(model: Any) -> dict[str, Any]:
    """What the loaded model is made of, by kind."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    kept = {id(p): p.numel() for p in model.parameters() if not isinstance(p, Params4bit)}
    stored = sum(
        buffer.numel()
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    )
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    codes = (layer.weight for layer in layers.values() if isinstance(layer.weight, Params4bit))
    return {
        "linear4bit": list(layers),
        "code_bytes": sum(p.numel() * p.element_size() for p in codes),
        "kept_weights": sum(kept.values()) + stored,
    }


def _costs(
    found: Sequence[dict[str, Any]], load_seconds: float, footprint: int, *, streamed: bool
) -> dict[str, Any]:
    seconds = sum(answer["seconds"] for answer in found)
    first = [a["first_token_seconds"] for a in found if a["first_token_seconds"] is not None]
    tokens = sum(len(answer["ids"]) for answer in found)
    return {
        "load_seconds": round(load_seconds, 3),
        "tokens_per_second": round(tokens / seconds, 2) if seconds else None,
        "first_token_seconds": round(median(first), 4) if first else None,
        "footprint_bytes": footprint,
        "streamed": streamed,
    }


def _peaks(request: dict[str, Any], peak_memory: int) -> dict[str, int]:
    """Peak memory of this process and of the device since the last call."""
    import torch

    peak = 0
    if request["device"] != "cpu":
        peak = torch.cuda.max_memory_allocated(request["device"])
        torch.cuda.reset_peak_memory_stats(request["device"])
    return {"peak_memory_bytes": peak_memory, "peak_device_memory_bytes": peak}


def _limit_device_memory(request: dict[str, Any]) -> None:
    """Makes a large GPU behave as a smaller one, if that was asked for."""
    import torch

    limit, device = request["device_memory"], request["device"]
    if limit and device != "cpu":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)


def _free_memory(request: dict[str, Any]) -> int:
    """Bytes of the device that may still be taken."""
    import torch

    limit, device = request["device_memory"], request["device"]
    if device == "cpu":
        free, taken = available_memory() or 0, peak_memory()
    else:
        (free, _), taken = torch.cuda.mem_get_info(device), torch.cuda.memory_allocated(device)
    return min(free, limit - taken) if limit else free


def _device(model: Any) -> dict[str, str]:
    import torch

    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"kind": device.type, "name": name, "dtype": str(_dtype(model)).removeprefix("torch.")}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {len(os.sched_getaffinity(0))} cores"


def _dtype(model: Any) -> Any:
    return model.get_input_embeddings().weight.dtype


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None


def _say(**news: Any) -> None:
    print(json.dumps(news), flush=True)  # to the process that started this one


if __name__ == "__main__":
    main()
