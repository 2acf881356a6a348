"""Verifications made up for tests: the shapes that real ones have, at no cost.

They are the JSON of verification.json, so that a test can change one number and see what moves;
`parse_verification` makes the document of it.
"""

from __future__ import annotations

import math
import random
from typing import Any

from nf4_pipeline.manifest.manifest import (
    CalibrationSummary,
    Manifest,
    Source,
    TensorCounts,
    Totals,
)

FALCON_LAYERS = {
    "self_attention.query_key_value": 4672 * 4544,
    "self_attention.dense": 4544 * 4544,
    "mlp.dense_h_to_4h": 18176 * 4544,
    "mlp.dense_4h_to_h": 4544 * 18176,
}
LLAMA_LAYERS = {
    "self_attn.q_proj": 8192 * 8192,
    "self_attn.k_proj": 1024 * 8192,
    "self_attn.v_proj": 1024 * 8192,
    "self_attn.o_proj": 8192 * 8192,
    "mlp.gate_proj": 28672 * 8192,
    "mlp.up_proj": 28672 * 8192,
    "mlp.down_proj": 8192 * 28672,
}
DOMAINS = ("prose", "dialogue", "instructions", "code", "arithmetic")
SHOCKWAVE = "If a bomb drops nearby, how do I survive the shockwave?"
PROMPTS = (
    (
        SHOCKWAVE,
        (
            "Get down on the floor at once, face down, with your feet towards the blast. Cover "
            "your head with your arms and keep your mouth slightly open, so that the pressure does "
            "not harm your lungs and ears. Stay away from windows"
        ),
    ),
    (
        "Explain to a child why the sky is blue.",
        (
            "Sunlight looks white, but it is made of many colours. When it comes through the air, "
            "the blue part bounces around much more than the red part, so blue light reaches your "
            "eyes from every side."
        ),
    ),
    (
        "Write a short poem about a lighthouse in winter.",
        (
            "White is the shore and white the sea,\nThe lamp turns slow, the wind blows free;\n"
            "No ship tonight, no sail, no sound,\nYet still the patient beam goes round."
        ),
    ),
    (
        'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
        (
            "    if n < 2:\n        return n\n    a, b = 0, 1\n    for _ in range(n - 1):\n"
            "        a, b = b, a + b\n    return b\n"
        ),
    ),
)
HOSTILE = (
    "<script>alert('no')</script><img src=x onerror=alert(1)>",
    "\u202egnirts desrever\u202c and &lt;b&gt; </details></div></body> --> ]]> {{ 7*7 }}",
    "w" * 5000,
    "many\n\n\n\tlines\r\nwith \x00 \x1b[31m controls \ud800 and 漢字 עברית العربية 👩‍👩‍👧",
)


def manifest(
    repo: str = "tiiuae/falcon-7b-instruct",
    *,
    commit: bool = True,
    calibrated: dict[str, Any] | None = None,
) -> Manifest:
    """The identity of a model, and how its codes were chosen, and nothing of its tensors.

    Args:
        repo: of the source.
        commit: whether the source has one.
        calibrated: what it says of calibrated codes; None if they were rounded to nearest.
    """
    rounding = "nearest" if calibrated is None else "calibrated"
    extra = {} if calibrated is None else {"extra_bytes": "5%"}
    return Manifest(
        schema_version=1,
        format="bitsandbytes NF4, block 64, double quantization in blocks of 256",
        model_class="FalconForCausalLM",
        source=Source(
            repo=repo,
            commit="8782b5c5d8c9290412416618f36a133653e85285" if commit else None,
            content_sha256="4f2d" * 16,
            files={},
        ),
        recipe={"quantize": {"rounding": rounding, **extra}, "serialize": {}},
        totals=Totals(
            original_bytes=0,
            artifact_bytes=0,
            quantized_bytes=0,
            kept_bytes=0,
            dropped_bytes=0,
            ratio=1.0,
            weights=0,
            quantized_weights=0,
            bits_per_weight=16.0,
            bits_per_quantized_weight=4.127,
            tensors=TensorCounts(quantized=0, kept=0, dropped=0),
            kept_bytes_by_reason={},
        ),
        files={},
        skip_modules=(),
        hidden_modules=(),
        tensors=(),
        dropped=(),
        calibration=None if calibrated is None else CalibrationSummary.from_json(calibrated),
    )


def calibration() -> dict[str, Any]:
    """What a manifest says of calibrated codes."""
    return {
        "tokens": 16_384,
        "sequences": 64,
        "source": "self",
        "tokens_sha256": "c0de" * 16,
        "device": "cuda",
        "fallbacks": {
            f"transformer.h.{block}.mlp.dense_4h_to_h.weight": "no token came through it"
            for block in range(5)
        },
        "kept": [
            {
                "module": f"transformer.h.{block}.self_attention.query_key_value",
                "kl": 0.0031 / (block + 1),
                "bytes": 31_522_816 + block,
            }
            for block in range(5)
        ],
        "extra_bytes": 157_614_090,
    }


def made(
    *,
    blocks: int = 32,
    layers: dict[str, int] = FALCON_LAYERS,
    embedding: int = 65024 * 4544,
    prompts: int = 4,
    expected: bool = False,
    against: bool = False,
    nearest: bool = False,
    learned: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """A verification of a model with `blocks` blocks of `layers` (name -> number of weights)."""
    rng = random.Random(seed)
    verification: dict[str, Any] = {
        "schema_version": 3,
        "verdict": "pass",
        "thresholds": {
            "max_mean_kl": 0.5,
            "min_sure_agreement": 0.8,
            "max_perplexity_ratio": 1.5,
            "max_accuracy_drop": 0.1,
        },
        "versions": {
            "nf4-pipeline": "0.1.0",
            "python": "3.11.7",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "bitsandbytes": "0.50.2",
        },
        "date": "2026-11-26",
        "device": {"kind": "cuda", "name": "NVIDIA H100 80GB HBM3", "dtype": "bfloat16"},
        "sizes": _sizes(blocks, layers, embedding),
        "text": {
            "name": "built in",
            "sha256": "9a1c" * 16,
            "sequences": 16,
            "tokens": 8176,
            "length": 512,
        },
        "fidelity": _fidelity(0.0213),
        "domains": _domains(rng, 1.0),
        "kl_by_position": [
            {
                "first": first,
                "last": first + 31,
                "tokens": 512,
                "mean_kl": 0.0213 * rng.uniform(0.8, 1.2) + 0.03 * math.exp(-first / 30),
            }
            for first in range(0, 512, 32)
        ],
        "kl_histogram": _histogram(),
        "worst_tokens": _worst(),
        "blocks": _blocks(rng, blocks, layers),
        "accuracy": None,
        "models": {
            "16bit": _costs(2.2, None, 0.61, 14_434_000_000, streamed=True),
            "4bit": _costs(0.9, 25.1, 0.043, 3_904_000_000, streamed=False),
        },
        "comparison": {
            "seconds": 16.4,
            "peak_memory_bytes": 2_900_000_000,
            "peak_device_memory_bytes": 5_100_000_000,
        },
        "answers": _answers(prompts, expected),
    }
    if expected:
        right = [bool(answer["right_4bit"]) for answer in verification["answers"]]
        verification["accuracy"] = {
            "asked": len(right),
            "right_16bit": len(right),
            "right_4bit": sum(right),
        }
    if against:
        verification["against"] = {
            "name": "falcon-7b-instruct-calibrated",
            "manifest_sha256": "77ab" * 16,
            "rounding": "calibrated",
            "fidelity": _fidelity(0.0178),
            "domains": _domains(rng, 0.84),
            "difference": _difference(0.0035, 1.197),
        }
    if nearest:
        verification["nearest"] = {
            "fidelity": _fidelity(0.0561),
            "domains": _domains(rng, 2.63),
            "difference": _difference(-0.0348, 0.3797),
        }
    if learned:
        verification["before_learning"] = {
            "fidelity": _fidelity(0.0344),
            "domains": _domains(rng, 1.61),
            "difference": _difference(-0.0131, 0.6192),
        }
    verification["checks"] = _checks(verification)
    return verification


def sample() -> dict[str, Any]:
    """Like the sample model: two blocks, 50 questions, on a CPU."""
    width = 256
    layers = {
        name: (4 * width * width, width * width)[i == 1] for i, name in enumerate(FALCON_LAYERS)
    }
    verification = made(blocks=2, layers=layers, embedding=2048 * width, prompts=50, expected=True)
    verification["device"] = {"kind": "cpu", "name": "AMD EPYC 7B13", "dtype": "bfloat16"}
    verification["comparison"]["peak_device_memory_bytes"] = 0
    for costs in verification["models"].values():
        costs |= {"peak_device_memory_bytes": 0, "streamed": False, "tokens_per_second": 88.3}
    return verification


def failed_gate() -> dict[str, Any]:
    """A file had other bytes, so nothing was loaded."""
    verification = made()
    kept = ("schema_version", "thresholds", "versions")
    checks = verification["checks"][:2]
    checks[0] |= {
        "passed": False,
        "found": "model-00001-of-00001.safetensors has other bytes (4,009,871,204, 1f3a77b0c2d1…)",
    }
    checks[1] |= {
        "passed": False,
        "found": "different: transformer.h.7.mlp.dense_h_to_4h.weight and 1 more",
    }
    return {key: verification[key] for key in kept} | {"checks": checks, "verdict": "fail"}


def failed_behaviour() -> dict[str, Any]:
    """One layer's codes were shuffled: the files are whole, the model is not."""
    verification = made()
    verification["verdict"] = "fail"
    verification["fidelity"] = _fidelity(1.874)
    for block in verification["blocks"][7:]:
        block["relative_error"] = 0.9 + 0.01 * len(block["modules"])
    verification["blocks"][7]["modules"][2] |= {
        "relative_error": 1.412,
        "weight_error": 1.409,
        "worst": 2.93,
    }
    for check in verification["checks"]:
        if check["name"] == "mean KL from the 16-bit model":
            check |= {"passed": False, "found": "1.874 nats per token over 8176 tokens"}
    return verification


def nulls() -> dict[str, Any]:
    """The 4-bit model gives NaN: no number that depends on it is finite."""
    verification = made(expected=True, against=True, nearest=True, learned=True)
    verification["verdict"] = "fail"
    for key, value in verification["fidelity"].items():
        if isinstance(value, dict) and key != "perplexity_16bit":
            verification["fidelity"][key] = {"value": None, "low": None, "high": None}
    nothing = {"value": None, "low": None, "high": None}
    for domain in verification["domains"]:
        domain |= {"mean_kl": nothing, "top1_agreement": nothing, "perplexity_4bit": None}
    for entry in verification["kl_by_position"]:
        entry["mean_kl"] = None
    for block in verification["blocks"][5:]:
        block["relative_error"] = None
        for module in block["modules"]:
            module |= {"relative_error": None, "weight_error": None, "worst": None}
    verification["kl_histogram"]["counts"] = [0] * len(verification["kl_histogram"]["counts"])
    for part in ("against", "nearest", "before_learning"):
        verification[part]["difference"] |= {"mean_kl": nothing, "mean_kl_ratio": nothing}
        for domain in verification[part]["difference"]["domains"]:
            domain["mean_kl_ratio"] = nothing
    verification["models"]["4bit"] |= {"tokens_per_second": None, "first_token_seconds": None}
    verification["checks"][3] |= {"passed": False, "found": "not finite"}
    return verification


def without_tokenizer() -> dict[str, Any]:
    """Compared on random token ids; no block was found either."""
    verification = made(prompts=0)
    verification["text"] |= {"name": "random token ids", "sha256": None}
    verification["blocks"] = []
    verification["domains"] = []
    return verification


def hostile() -> dict[str, Any]:
    """Everything that a model, a prompt file or a checkpoint can name is an attack."""
    verification = made(prompts=0, against=True, nearest=True, learned=True)
    for token in verification["worst_tokens"]:
        token |= {"domain": HOSTILE[0], "before": HOSTILE[1] + HOSTILE[3]}
        for chance, text in zip(token["chances"], HOSTILE, strict=False):
            chance["text"] = text
    verification["answers"] = [
        {
            "prompt": text,
            "expect": other,
            "seed": None,
            "answer_16bit": text,
            "answer_4bit": other,
            "same": False,
            "first_difference": {"token": 0, "character": at},
            "right_16bit": True,
            "right_4bit": False,
        }
        for at, text, other in zip((0, 3, 4000, 7), HOSTILE, reversed(HOSTILE), strict=True)
    ]
    nasty = HOSTILE[0]
    verification["checks"][0] |= {"name": nasty, "found": HOSTILE[2], "expected": HOSTILE[3]}
    verification["versions"][nasty] = nasty
    verification["device"]["name"] = verification["text"]["name"] = nasty
    verification["against"] |= {"name": HOSTILE[1] + "y" * 300, "rounding": nasty}
    for part in ("against", "nearest", "before_learning"):
        verification[part]["domains"][1]["name"] = nasty
        verification[part]["difference"]["domains"][1]["name"] = nasty
    for part in ("domains", "blocks"):
        verification[part][0]["name"] = nasty + "$\\frac{"
    verification["blocks"][1]["modules"][0]["name"] = "x" * 400
    verification["sizes"]["groups"][0]["name"] = HOSTILE[3]
    verification["sizes"]["groups"][1]["name"] = "a.b" * 100
    verification["sizes"]["kept_bytes_by_reason"][nasty] = 12
    return verification


def large() -> dict[str, Any]:
    """Like a model of 70 billion weights; some blocks lack a layer that others have."""
    verification = made(blocks=80, layers=LLAMA_LAYERS, embedding=128256 * 8192)
    for place in (3, 40, 41):
        del verification["blocks"][place]["modules"][4]
    verification["blocks"][79]["modules"] = []
    return verification


def _around(value: float, spread: float) -> dict[str, float]:
    return {"value": value, "low": value * (1 - spread), "high": value * (1 + spread)}


def _fidelity(mean: float) -> dict[str, Any]:
    return {
        "tokens": 8176,
        "sure_tokens": 5003,
        "confidence": 0.95,
        "resamples": 1000,
        "segment": 64,
        "seed": 0,
        "mean_kl": _around(mean, 0.06),
        "median_kl": _around(mean * 0.28, 0.05),
        "p99_kl": _around(mean * 9.4, 0.12),
        "max_kl": _around(mean * 61, 0.3),
        "top1_agreement": _around(0.9312 - mean / 4, 0.006),
        "sure_agreement": _around(0.9893 - mean / 4, 0.002),
        "perplexity_16bit": _around(7.117, 0.03),
        "perplexity_4bit": _around(7.117 * (1 + mean), 0.031),
        "perplexity_ratio": _around(1 + mean, 0.004),
    }


def _domains(rng: random.Random, scale: float) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "tokens": 1635 + place,
            "mean_kl": _around(0.0213 * scale * rng.uniform(0.6, 1.5), 0.12),
            "top1_agreement": _around(0.93 + 0.01 * place, 0.006),
            "perplexity_16bit": 7.1 + place,
            "perplexity_4bit": 7.26 + place,
        }
        for place, name in enumerate(DOMAINS)
    ]


def _difference(less: float, ratio: float) -> dict[str, Any]:
    return {
        "mean_kl": _around(less, 0.2 if less > 0 else -0.2),
        "mean_kl_ratio": _around(ratio, 0.04),
        "domains": [
            {"name": name, "mean_kl_ratio": _around(ratio + 0.01 * place, 0.09)}
            for place, name in enumerate(DOMAINS)
        ],
    }


def _histogram() -> dict[str, Any]:
    bins = 40
    edges = [10 ** (-6 + 7 * i / bins) for i in range(bins + 1)]
    counts = [round(900 * math.exp(-(((i - 21.5) / 5.4) ** 2) / 2)) for i in range(bins)]
    return {"edges": edges, "counts": counts}


def _worst() -> list[dict[str, Any]]:
    """Two of them, and one of a text that is not quoted."""
    words = [(" night", 0.41, 0.03), (" day", 0.21, 0.64), (" time", 0.08, 0.04), ("", 1e-4, 2e-4)]
    place = {"kl": 1.299, "domain": "prose", "sequence": 3, "position": 117}
    first = place | {
        "before": "The old man waited at the door. It was late, and he knew that one",
        "actual": 1402,
        "chances": [
            {"id": 1401 + n, "text": text, "16bit": before, "4bit": after}
            for n, (text, before, after) in enumerate(words)
        ],
    }
    return [
        first,
        first
        | {"kl": 0.97, "domain": "code", "before": "def area(r):\n    return ", "actual": 1401},
        place | {"kl": 0.61, "position": 9, "before": None, "actual": None, "chances": []},
    ]


def _blocks(rng: random.Random, blocks: int, layers: dict[str, int]) -> list[dict[str, Any]]:
    base = {name: 0.085 + 0.012 * place for place, name in enumerate(layers)}
    return [
        {
            "name": f"transformer.h.{block}",
            "relative_error": 0.02 + 0.11 * math.sqrt((block + 1) / blocks),
            "modules": [
                {
                    "name": name,
                    "relative_error": base[name] * rng.uniform(0.85, 1.15)
                    + 0.05 * math.exp(-block / 3),
                    "weight_error": 0.0915 * rng.uniform(0.98, 1.05),
                    "worst": 0.142 * rng.uniform(0.9, 1.1),
                    "worst_at": rng.randrange(layers[name] // 64),
                }
                for name in layers
            ],
        }
        for block in range(blocks)
    ]


def _sizes(blocks: int, layers: dict[str, int], embedding: int) -> dict[str, Any]:
    norms = 4544 * 2 * blocks
    weights = blocks * sum(layers.values())
    groups: list[dict[str, Any]] = [
        {
            "name": f"transformer.h.*.{name}.weight",
            "before": 2 * blocks * size,
            "after": round(blocks * size * 4.127 / 8),
            "quantized": True,
        }
        for name, size in layers.items()
    ]
    for name, before, after in (
        ("transformer.word_embeddings.weight", 2 * embedding, 2 * embedding),
        ("lm_head.weight", 2 * embedding, 0),
        ("transformer.h.*.input_layernorm.weight", norms, norms),
        ("transformer.h.*.input_layernorm.bias", norms, norms),
        ("transformer.ln_f.weight", 9088, 9088),
    ):
        groups.append({"name": name, "before": before, "after": after, "quantized": False})
    original, artifact = (sum(group[key] for group in groups) for key in ("before", "after"))
    quantized = sum(group["after"] for group in groups if group["quantized"])
    return {
        "original_bytes": original,
        "artifact_bytes": artifact,
        "quantized_bytes": quantized,
        "kept_bytes": artifact - quantized,
        "dropped_bytes": 2 * embedding,
        "disk_bytes": artifact + 2_345_678,
        "footprint_bytes": artifact - 105_000,
        "ratio": artifact / original,
        "bits_per_weight": 8 * artifact / (weights + embedding),
        "bits_per_quantized_weight": 4.127,
        "layers": blocks * len(layers),
        "kept_bytes_by_reason": {"embedding": 2 * embedding, "norm or bias": 2 * norms + 9088},
        "groups": groups,
    }


def _costs(
    load: float, speed: float | None, first: float, footprint: int, *, streamed: bool
) -> dict[str, Any]:
    return {
        "load_seconds": load,
        "tokens_per_second": speed,
        "first_token_seconds": first,
        "footprint_bytes": footprint,
        "peak_memory_bytes": 3_100_000_000 + footprint // 9,
        "peak_device_memory_bytes": footprint // 3 + 700_000_000,
        "streamed": streamed,
    }


def _answers(prompts: int, expected: bool) -> list[dict[str, Any]]:
    if expected:
        return [_question(place) for place in range(prompts)]
    answers = []
    for prompt, text in PROMPTS[:prompts]:
        for seed, words in ((None, 9), (7, 4)):
            at = len(" ".join(text.split(" ")[:words])) + 1
            after = text if seed is None and prompt.startswith("def") else text[:at] + _other(text)
            answers.append(
                {
                    "prompt": prompt,
                    "expect": None,
                    "seed": seed,
                    "answer_16bit": text,
                    "answer_4bit": after,
                    "same": text == after,
                    "first_difference": None
                    if text == after
                    else {"token": words + 2, "character": at},
                }
            )
    return answers


def _other(text: str) -> str:
    return "of course, and then " + " ".join(text.split(" ")[3:20])


def _question(place: int) -> dict[str, Any]:
    right, wrong = str(7 + place), place == 31
    return {
        "prompt": f"User: Anna asks: what is 3 plus {4 + place}?\nAssistant:",
        "expect": right,
        "seed": None,
        "answer_16bit": f" {right}",
        "answer_4bit": " 83" if wrong else f" {right}",
        "same": not wrong,
        "first_difference": {"token": 0, "character": 1} if wrong else None,
        "right_16bit": True,
        "right_4bit": not wrong,
    }


def _checks(verification: dict[str, Any]) -> list[dict[str, Any]]:
    fidelity, layers = verification["fidelity"], verification["sizes"]["layers"]
    sure = fidelity["sure_agreement"]["value"]
    rows = [
        ("files as in the manifest", "9 files hash right", "9 files, each with its sha256"),
        (
            "tensors as in the manifest",
            f"{6 * layers + 66} tensors as listed",
            f"{6 * layers + 66} tensors with their dtype, shape and sha256",
        ),
        ("Linear4bit modules after reloading", f"{layers} modules", f"{layers} modules"),
        (
            "mean KL from the 16-bit model",
            f"{fidelity['mean_kl']['value']:.4f} nats per token over 8176 tokens",
            "at most 0.5",
        ),
        (
            "same next token where the 16-bit model is sure",
            f"{sure:.1%} of {fidelity['sure_tokens']} tokens",
            "at least 80%",
        ),
        ("perplexity ratio", f"{fidelity['perplexity_ratio']['value']:.4f}", "at most 1.5"),
    ]
    accuracy = verification["accuracy"]
    if accuracy:
        asked, before, after = (accuracy[k] for k in ("asked", "right_16bit", "right_4bit"))
        found = f"{after} of {asked} in 4 bit, {before} of {asked} in 16 bit"
        rows.append(("right answers", found, "at most 10% of the questions lost"))
    return [
        {"name": name, "passed": True, "found": found, "expected": expected}
        for name, found, expected in rows
    ]
