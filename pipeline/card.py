"""Manifest + verification -> the model card (README.md of the artifact). Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import yaml

_MAX_CARD_ANSWERS: Final = 4


def front_matter(text: str) -> dict[str, Any]:
    """The YAML between the first two `---` lines of a card; {} if none can be read."""
    if not text.startswith("---\n"):
        return {}
    block, found, _ = text[4:].partition("\n---")
    try:
        value = yaml.safe_load(block) if found else None
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def model_card(
    manifest: dict[str, Any], verification: dict[str, Any], source: dict[str, Any]
) -> str:
    """The card as Markdown with Hub metadata.

    Args:
        manifest: of the artifact.
        verification: what verify found.
        source: front matter of the source's card.
    """
    repo = manifest["source"]["repo"]
    name = repo.rpartition("/")[2]
    parts = [
        "---\n" + yaml.safe_dump(_metadata(manifest, source), sort_keys=False) + "---",
        f"# {name}, NF4",
        _what(manifest),
        _sizes(manifest),
        _quality(verification),
        _loading(manifest),
        _making(manifest),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(manifest: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "base_model": manifest["source"]["repo"],
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["nf4", "4-bit", "bitsandbytes"],
    }
    # Only what the source says of itself: a license is inherited, never invented.
    for key in ("license", "license_name", "license_link", "language"):
        if key in source:
            metadata[key] = source[key]
    if manifest["source"]["commit"] is None:
        del metadata["base_model"], metadata["base_model_relation"]
    return metadata


def _what(manifest: dict[str, Any]) -> str:
    source = manifest["source"]
    pinned = (
        f"at commit `{source['commit']}`"
        if source["commit"]
        else f"with content hash `{source['content_sha256'][:16]}…`"
    )
    totals = manifest["totals"]
    return (
        f"`{source['repo']}` ({pinned}) in 4 bit: bitsandbytes NF4 with double quantization, "
        f"{totals['tensors']['quantized']} linear layers quantized, the rest copied exactly."
    )


def _sizes(manifest: dict[str, Any]) -> str:
    totals = manifest["totals"]
    rows = [
        ("original checkpoint", _size(totals["original_bytes"])),
        ("this artifact", _size(totals["artifact_bytes"])),
        ("ratio", f"{totals['ratio']:.3f}"),
        ("bits per weight", f"{totals['bits_per_weight']:.3f}"),
        ("bits per quantized weight", f"{totals['bits_per_quantized_weight']:.3f}"),
    ]
    kept = ", ".join(
        f"{reason} ({_size(size)})" for reason, size in totals["kept_bytes_by_reason"].items()
    )
    return "## Size\n\n" + _table(("", ""), rows) + f"\n\nNot quantized: {kept}."


def _quality(verification: dict[str, Any]) -> str:
    checks = [
        (check["name"], check["found"], check["expected"], "pass" if check["passed"] else "FAIL")
        for check in verification["checks"]
    ]
    text = f"## Verification: {verification['verdict']}\n\n" + _table(
        ("check", "found", "expected", ""), checks
    )
    fidelity = verification.get("fidelity")
    if fidelity:
        text += f"\n\nMeasured on: {verification['device']}."
        before, after = fidelity["reference_perplexity"], fidelity["perplexity"]
        if before is not None and after is not None:
            text += f" Perplexity on the scored text: {before:.3f} in 16 bit, {after:.3f} in 4 bit."
        rows = [
            (_cell(a["prompt"]), _cell(a["answer_16bit"]), _cell(a["answer_4bit"]))
            for a in verification["answers"][:_MAX_CARD_ANSWERS]
        ]
        if rows:
            text += "\n\n" + _table(("prompt", "16 bit", "4 bit"), rows)
    return text


def _loading(manifest: dict[str, Any]) -> str:
    text = """## Use

With this package, on transformers 5.5 and newer:

```python
import pipeline  # pip install nf4-pipeline

model = pipeline.load("PATH_OR_REPO")
```

With transformers alone:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH_OR_REPO", device_map="auto")
```"""
    if not manifest["hidden_modules"]:
        return text
    return text + (
        "\n\nThe second snippet works as it stands on transformers 4.57. From 5.5 on, transformers "
        "quantizes a layer only if its class is exactly `nn.Linear`, and this architecture's are a "
        "subclass; loading then fails with a size mismatch. Before `from_pretrained`, run\n\n"
        + _patch(manifest)
    )


def _patch(manifest: dict[str, Any]) -> str:
    if not manifest["model_class"].startswith("Falcon"):
        return "the first snippet instead, which handles every such architecture."
    return (
        "```python\nimport torch\nfrom transformers.models.falcon import modeling_falcon\n\n"
        "modeling_falcon.FalconLinear = torch.nn.Linear\n```"
    )


def _making(manifest: dict[str, Any]) -> str:
    source = manifest["source"]
    name = source["repo"]
    revision = f" --revision {source['commit']}" if source["commit"] else ""
    return (
        f"## How it was made\n\n```\nnf4 build {name}{revision}\n```\n\n"
        "The same source and recipe give the same bytes on any machine; `manifest.json` lists the "
        "sha256 of every file and tensor. Rounding is to the nearest level, without calibration; "
        "what 4 bits cost this model is in the table above, and nothing is claimed beyond it."
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _cell(text: str) -> str:
    """Model output inside a table: one line, with nothing for Markdown or HTML to act on."""
    line = " ".join(text.split())
    short = line if len(line) <= 160 else line[:159] + "…"
    for mark, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;")):
        short = short.replace(mark, safe)
    return short.replace("`", "&#96;").replace("[", "&#91;").replace("*", "&#42;")


def _size(count: int) -> str:
    if count < 10**9:
        return f"{count / 1e6:.2f} MB ({count / 2**20:.2f} MiB)"
    return f"{count / 1e9:.3f} GB ({count / 2**30:.3f} GiB)"
