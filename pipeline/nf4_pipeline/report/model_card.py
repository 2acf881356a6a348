"""Manifest + verification -> the model card (README.md of the artifact). Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import yaml

from nf4_pipeline.checkpoint.files import is_of_tokenizer
from nf4_pipeline.model.unused_tensors import left_out
from nf4_pipeline.report.calibration import at_what_size, chosen, exceptions
from nf4_pipeline.report.pictures import PICTURES, drawable

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
        _left_out(manifest),
        _sizes(verification),
        _quality(manifest, verification),
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
    return (
        f"`{source['repo']}` ({pinned}) in 4 bit: bitsandbytes NF4 with double quantization. "
        "What is not quantized is copied exactly."
    )


def _left_out(manifest: dict[str, Any]) -> str:
    """What the source has and the artifact lacks: heads that do not generate, its tokenizer."""
    repo = manifest["source"]["repo"]
    lines = [
        f"- {part['tensors']} tensors ({_size(part['bytes'])}): {part['reason']}."
        for part in left_out((item["reason"], item["bytes"]) for item in manifest["dropped"])
    ]
    if not any(is_of_tokenizer(name) for name in manifest["files"]):
        lines.append(
            "- A tokenizer: the source has none that loads without code of its own. What there is "
            f"of it is in `{repo}`."
        )
    return "\n".join(["## Not in this artifact", "", *lines]) if lines else ""


def _sizes(verification: dict[str, Any]) -> str:
    sizes = verification.get("sizes")
    if not sizes:
        return ""
    rows = [
        ("original checkpoint", _size(sizes["original_bytes"])),
        ("this artifact's weights", _size(sizes["artifact_bytes"])),
        ("on disk, all files", _size(sizes["disk_bytes"])),
        ("in memory, loaded (`get_memory_footprint()`)", _size(sizes["footprint_bytes"])),
        ("ratio", f"{sizes['ratio']:.3f}"),
        ("bits per weight", f"{sizes['bits_per_weight']:.3f}"),
        ("bits per quantized weight", f"{sizes['bits_per_quantized_weight']:.3f}"),
        ("quantized layers", str(sizes["layers"])),
    ]
    kept = ", ".join(
        f"{reason} ({_size(size)})" for reason, size in sizes["kept_bytes_by_reason"].items()
    )
    return (
        "## Size\n\n" + _table(("", ""), rows) + f"\n\nNot quantized: {kept}."
        f"\n\n![{PICTURES['sizes'].title}]({PICTURES['sizes'].file})"
    )


def _quality(manifest: dict[str, Any], verification: dict[str, Any]) -> str:
    checks = [
        (
            check["name"],
            _cell(check["found"]),
            check["expected"],
            "pass" if check["passed"] else "FAIL",
        )
        for check in verification["checks"]
    ]
    parts = [
        f"## Verification: {verification['verdict']}",
        _table(("check", "found", "expected", ""), checks),
    ]
    if "fidelity" in verification:
        parts += [
            _measured(verification),
            *([_nearest(manifest, verification)] if "nearest" in verification else []),
            *(
                f"![{picture.title}]({picture.file})\n\n{picture.caption}"
                for name, picture in drawable(verification).items()
                if picture.file and name != "sizes"
            ),
        ]
    if verification.get("against"):
        parts.append(_against(verification))
    rows = [
        (_cell(a["prompt"]), _cell(a["answer_16bit"]), _cell(a["answer_4bit"]))
        for a in verification.get("answers", [])[:_MAX_CARD_ANSWERS]
    ]
    if rows:
        parts.append(_table(("prompt", "16 bit", "4 bit"), rows))
    return "\n\n".join(parts)


def _measured(verification: dict[str, Any]) -> str:
    found, text, device = (verification[name] for name in ("fidelity", "text", "device"))
    rows = [
        ("KL from the 16-bit model, mean", _interval(found["mean_kl"])),
        ("median", _interval(found["median_kl"])),
        ("99th percentile", _interval(found["p99_kl"])),
        ("maximum", _interval(found["max_kl"])),
        ("same next token", _interval(found["top1_agreement"])),
        ("same where the 16-bit model is sure", _interval(found["sure_agreement"])),
        ("perplexity, 16 bit", _interval(found["perplexity_16bit"])),
        ("perplexity, 4 bit", _interval(found["perplexity_4bit"])),
        ("ratio of the two", _interval(found["perplexity_ratio"])),
    ]
    domains = [
        (
            _cell(domain["name"]),
            str(domain["tokens"]),
            _interval(domain["mean_kl"]),
            _interval(domain["top1_agreement"]),
        )
        for domain in verification["domains"]
    ]
    where = (
        f"Measured on {_cell(device['name'])} in {device['dtype']}, on {text['tokens']} tokens of "
        f"text ({_cell(text['name'])}), with {found['confidence']:.0%} bootstrap intervals; KL in "
        "nats per token."
    )
    return "\n\n".join(
        [
            where,
            _table(("", "value [interval]"), rows),
            _table(("text", "tokens", "mean KL", "same next token"), domains),
        ]
    )


def _nearest(manifest: dict[str, Any], verification: dict[str, Any]) -> str:
    other = verification["nearest"]
    gap = other["difference"]
    domains = [
        (
            _cell(own["name"]),
            _interval(own["mean_kl"]),
            _interval(theirs["mean_kl"]),
            _interval(part["mean_kl_ratio"]),
        )
        for own, theirs, part in zip(
            verification["domains"], other["domains"], gap["domains"], strict=True
        )
    ]
    names = ("calibrated (this artifact)", "round to nearest")
    ratio = _interval(gap["mean_kl_ratio"])
    size = at_what_size(manifest)
    return (
        "Mean KL over that of plain NF4, every layer rounded to nearest as bitsandbytes does: "
        f"{ratio}, {size}. Both were measured on the same text.\n\n"
        + _both(verification["fidelity"], other["fidelity"], names)
        + "\n\n"
        + _table(("mean KL", *names, "the one over the other"), domains)
    )


def _against(verification: dict[str, Any]) -> str:
    other = verification["against"]
    ratio = _interval(other["difference"]["mean_kl_ratio"])
    return (
        f"Beside another artifact of the same source (rounding: {_cell(other['rounding'])}, "
        f"manifest `{other['manifest_sha256'][:12]}…`), on the same text:\n\n"
        + _both(verification["fidelity"], other["fidelity"], ("this one", "the other"))
        + f"\n\nMean KL of this one over the other: {ratio}."
    )


def _both(own: dict[str, Any], other: dict[str, Any], names: tuple[str, str]) -> str:
    """The chief figures of two models beside each other."""
    rows = [
        (title, _interval(own[key]), _interval(other[key]))
        for key, title in (
            ("mean_kl", "mean KL"),
            ("top1_agreement", "same next token"),
            ("sure_agreement", "same where the 16-bit model is sure"),
            ("perplexity_4bit", "perplexity"),
        )
    ]
    return _table(("", *names), rows)


def _interval(found: dict[str, float | None]) -> str:
    value, low, high = (found[name] for name in ("value", "low", "high"))
    if value is None:
        return "not finite"
    if low is None or high is None:
        return f"{value:.4g}"
    return f"{value:.4g} [{low:.4g}, {high:.4g}]"


def _loading(manifest: dict[str, Any]) -> str:
    text = """## Use

With this package, on transformers 5.5 and newer:

```python
import nf4_pipeline  # pip install nf4-pipeline

model = nf4_pipeline.load("PATH_OR_REPO")
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
    options = f" --revision {source['commit']}" if source["commit"] else ""
    calibration = manifest.get("calibration")
    if calibration:
        asked = manifest["recipe"]["quantize"]
        options += f" --calibrate {'self' if calibration['source'] == 'self' else 'FILE'}"
        if asked.get("extra_bytes"):
            options += f" --extra-bytes {asked['extra_bytes']}"
        rounding = "\n\n".join(map(_text, [chosen(calibration), *exceptions(calibration)]))
        bytes_of = (
            "`nf4 reproduce` derives it again from the tokens in `calibration.json`, on the same "
            "kind of device: another processor, GPU or torch may choose a few other codes. "
            "`manifest.json` lists the sha256 of every file and tensor."
        )
    else:
        rounding = "Rounding is to the nearest level, without calibration."
        bytes_of = (
            "The same source and recipe give the same bytes on any machine; `manifest.json` lists "
            "the sha256 of every file and tensor."
        )
    return (
        f"## How it was made\n\n```\nnf4 build {name}{options}\n```\n\n"
        f"{rounding}\n\n{bytes_of} "
        "What 4 bits cost this model is in the tables above, and nothing is claimed beyond it."
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _cell(text: str) -> str:
    """Model output inside a table: one line, with nothing for Markdown or HTML to act on."""
    line = " ".join(text.split())
    return _text(line if len(line) <= 160 else line[:159] + "…")


def _text(text: str) -> str:
    """Words of others, as words."""
    line = " ".join(text.split())
    for mark, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;")):
        line = line.replace(mark, safe)
    return line.replace("`", "&#96;").replace("[", "&#91;").replace("*", "&#42;")


def _size(count: int) -> str:
    if count < 10**9:
        return f"{count / 1e6:.2f} MB ({count / 2**20:.2f} MiB)"
    return f"{count / 1e9:.3f} GB ({count / 2**30:.3f} GiB)"
