"""Loads an artifact as a user of transformers does, and perhaps trains it as one of PEFT does.

Run as a file, by any interpreter that has transformers 4.57 or newer, torch and bitsandbytes; it
imports nothing of the package that it lies in. A request comes on stdin, as JSON; the reply is the
last line on stdout:

    {"artifact": FOLDER, "device": "cpu" or "cuda:N", "threads": number or null,
     "lines": Python to run before loading, or null, "logits": FILE.npy or null, "lora": bool}
    {"reply": {"transformers", "torch", "bitsandbytes", "error", "linear4bit", "missing",
               "unexpected", "seconds", "lora": null or {"peft", "error", "loss"}}}

or, if the machine failed and not the artifact, {"error": {"name", "text"}}.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import io
import json
import os
import signal
import sys
import time
from importlib import metadata, util
from pathlib import Path
from typing import Any, TypedDict

RANK = 4
LENGTH, TEXTS = 12, 2
OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EIO, errno.EROFS)


class Asked(TypedDict):
    """The request."""

    artifact: str
    device: str
    threads: int | None
    lines: str | None
    logits: str | None
    lora: bool


class Trained(TypedDict):
    """What came of LoRA."""

    peft: str | None
    error: str | None
    loss: float | None


class Found(TypedDict):
    """The reply."""

    linear4bit: list[str]
    missing: list[str]
    unexpected: list[str]
    error: str | None
    lora: Trained | None
    transformers: str
    torch: str
    bitsandbytes: str
    seconds: float


def main() -> None:
    """Answers the one request."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes elsewhere
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    _end_with_parent()
    _import_what_is_there()  # while nobody has asked yet
    sent = sys.stdin.read()
    if not sent:
        os._exit(1)  # whoever might have asked has ended
    asked = json.loads(sent)
    if "parent" in asked:  # an envelope of the package's own
        if os.getppid() != asked["parent"]:
            os._exit(1)
        asked = asked["request"]
    try:
        said: dict[str, Any] = {"reply": look(asked)}
    except OSError as error:  # of the machine
        text = f"Loading {asked['artifact']} with transformers: {error}. Mend it, and run it again."
        said = {"error": {"name": "ResourceError", "text": text}}
    print(json.dumps(said), file=answers, flush=True)
    os._exit(0)


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _import_what_is_there() -> None:
    for name in ("bitsandbytes", "transformers.models.auto.modeling_auto", "peft"):
        try:
            importlib.import_module(name)
        except Exception:  # said where it is used
            continue


def look(asked: Asked) -> Found:
    """Loads, computes and trains, as far as it comes."""
    start = time.perf_counter()
    found: Found = {
        "linear4bit": [],
        "missing": [],
        "unexpected": [],
        "error": None,
        "lora": None,
        "transformers": metadata.version("transformers"),
        "torch": metadata.version("torch"),
        "bitsandbytes": metadata.version("bitsandbytes"),
        "seconds": 0.0,
    }
    try:
        model = load(asked, found)
        if asked["logits"] is not None:
            write_logits(model, asked["logits"])
    except Exception as error:
        if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
            raise
        found["error"] = words(error)
    if asked["lora"] and found["error"] is None:
        found["lora"] = train(model)
    found["seconds"] = round(time.perf_counter() - start, 3)
    return found


def load(asked: Asked, found: Found) -> Any:
    """The snippet on the card, and what it says."""
    import torch
    import transformers
    from bitsandbytes.nn import Linear4bit

    transformers.logging.set_verbosity_error()
    if asked["threads"]:
        torch.set_num_threads(asked["threads"])
    if asked["lines"]:
        exec(asked["lines"], {})
    model, said = transformers.AutoModelForCausalLM.from_pretrained(
        asked["artifact"], device_map={"": asked["device"]}, output_loading_info=True
    )
    found["missing"], found["unexpected"] = (
        sorted(map(str, said[key])) for key in ("missing_keys", "unexpected_keys")
    )
    found["linear4bit"] = [n for n, m in model.named_modules() if isinstance(m, Linear4bit)]
    return model.eval()


def token_ids(model: Any) -> Any:
    """The same few tokens for every model that knows at least so many."""
    import torch

    known = min(model.get_input_embeddings().weight.shape[0], 256)
    ids = torch.arange(TEXTS * LENGTH) * 9 % max(known - 4, 1) + min(4, known - 1)
    return ids.reshape(TEXTS, LENGTH).to(model.device)


def write_logits(model: Any, path: str) -> None:
    """Leaves the logits of those tokens in a file, float32 [texts, length, vocabulary]."""
    import numpy as np
    import torch

    with torch.no_grad():
        logits = model(input_ids=token_ids(model)).logits.float().cpu().numpy()
    content = io.BytesIO()  # NumPy does not say why it could not write to a file itself
    np.save(content, logits)
    Path(path).write_bytes(content.getbuffer())


def train(model: Any) -> Trained:
    """One step of LoRA on every 4-bit layer."""
    if util.find_spec("peft") is None:
        return {"peft": None, "error": "peft is not installed", "loss": None}
    found: Trained = {"peft": metadata.version("peft"), "error": None, "loss": None}
    try:
        found["loss"] = step(model)
    except Exception as error:
        found["error"] = words(error)
    return found


def step(model: Any) -> float:
    """The loss before it; every adapter must have got a finite gradient."""
    import torch
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, get_peft_model

    model.state_dict()  # on some CPUs inference repacks 4-bit weights; this puts them back
    layers = [n for n, m in model.named_modules() if isinstance(m, Linear4bit)]
    adapted = get_peft_model(model, LoraConfig(r=RANK, target_modules=layers)).train()
    weights = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=1e-3)
    ids = token_ids(model)
    loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    grown = [p.grad for p in weights if p.grad is not None]
    if not grown or not all(bool(g.isfinite().all()) for g in grown):
        raise ValueError("the gradients are not finite" if grown else "no adapter got a gradient")
    optimizer.step()
    return float(loss)


def words(error: Exception) -> str:
    """The first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


if __name__ == "__main__":
    main()
