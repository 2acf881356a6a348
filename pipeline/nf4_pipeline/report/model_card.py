"""Manifest + verification -> the model card (README.md of the artifact). Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Final

import yaml

from nf4_pipeline.checkpoint.files import is_of_tokenizer
from nf4_pipeline.checkpoint.source_card import SourceCard
from nf4_pipeline.fidelity.metrics import Fidelity
from nf4_pipeline.manifest.manifest import Manifest
from nf4_pipeline.model.unused_tensors import left_out
from nf4_pipeline.printable import printable
from nf4_pipeline.readers.document import ReaderResult
from nf4_pipeline.readers.promises import published_lines
from nf4_pipeline.report.calibration import (
    describe_extra_bytes,
    describe_tokens,
    list_exceptions,
)
from nf4_pipeline.report.formatting import interval, plain_size
from nf4_pipeline.report.pictures import PICTURES, drawable
from nf4_pipeline.verification.document import (
    Against,
    MeasuredVerification,
    NearestBaseline,
    Sizes,
    Verification,
)

_MAX_CARD_ANSWERS: Final = 4


def model_card(manifest: Manifest, verification: Verification, source_card: SourceCard) -> str:
    """The card as Markdown with Hub metadata.

    Args:
        manifest: of the artifact.
        verification: of the artifact.
        source_card: what the source's own card says.
    """
    name = _text(manifest.source.repo.rpartition("/")[2])
    metadata = _metadata(manifest, source_card)
    measured = verification if isinstance(verification, MeasuredVerification) else None
    parts = [
        "---\n" + yaml.safe_dump(metadata, sort_keys=False) + "---",
        f"# {name}, {manifest.codebook}",
        _what(manifest),
        *_left_out(manifest),
        *([_sizes(measured.sizes)] if measured else []),
        _checks(verification),
        *(_quality(manifest, measured) if measured else []),
        _loading(manifest),
        *([_readers(measured.readers)] if measured and measured.readers else []),
        _making(manifest),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(manifest: Manifest, source_card: SourceCard) -> dict[str, object]:
    metadata: dict[str, object] = {
        "base_model": manifest.source.repo,
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [manifest.codebook.lower(), "4-bit", "bitsandbytes"],
    }
    metadata |= source_card.metadata()
    if manifest.source.commit is None:
        del metadata["base_model"], metadata["base_model_relation"]
    return metadata


def _what(manifest: Manifest) -> str:
    source = manifest.source
    pinned = (
        f"at commit `{source.commit}`"
        if source.commit
        else f"with content hash `{source.content_sha256[:16]}…`"
    )
    return (
        f"{_code(source.repo)} ({pinned}) in 4 bit: bitsandbytes {manifest.codebook} with double "
        f"quantization. What is not quantized is copied exactly{_but_for_casts(manifest)}."
        + _unchecked(source.unchecked or ())
    )


def _unchecked(names: Sequence[str]) -> str:
    """What nobody could check when the source was fetched."""
    if not names:
        return ""
    return (
        f" The Hub listed no hash of {len(names)} of its files ({_cell(', '.join(names))}), so "
        "nothing could tell whether they came as they were published."
    )


def _left_out(manifest: Manifest) -> list[str]:
    """What the source has and the artifact lacks: heads that do not generate, its tokenizer."""
    lines = [
        f"- {part.tensors} tensors ({_size(part.bytes)}): {_text(part.reason)}."
        for part in left_out((tensor.reason, tensor.bytes) for tensor in manifest.dropped)
    ]
    if not any(is_of_tokenizer(name) for name in manifest.files):
        lines.append(
            "- A tokenizer: the source has none that loads without code of its own. What there is "
            f"of it is in {_code(manifest.source.repo)}."
        )
    return ["\n".join(["## Not in this artifact", "", *lines])] if lines else []


def _but_for_casts(manifest: Manifest) -> str:
    cast = [t for t in manifest.tensors if not t.quantized and t.stored[0].dtype != t.dtype]
    if not cast:
        return ""
    return f", but for {len(cast)} tensors that were cast to the dtype in `config.json`"


def _sizes(sizes: Sizes) -> str:
    rows = [
        ("original checkpoint", _size(sizes.original_bytes)),
        ("this artifact's weights", _size(sizes.artifact_bytes)),
        ("on disk, all files", _size(sizes.disk_bytes)),
        ("in memory, loaded (`get_memory_footprint()`)", _size(sizes.footprint_bytes)),
        ("ratio", f"{sizes.ratio:.3f}"),
        ("bits per weight", f"{sizes.bits_per_weight:.3f}"),
        ("bits per quantized weight", f"{sizes.bits_per_quantized_weight:.3f}"),
        ("quantized layers", str(sizes.layers)),
    ]
    kept = ", ".join(
        f"{_text(reason)} ({_size(nbytes)})"
        for reason, nbytes in sizes.kept_bytes_by_reason.items()
    )
    return (
        "## Size\n\n" + _table(("", ""), rows) + f"\n\nNot quantized: {kept}."
        f"\n\n![{PICTURES['sizes'].title}]({PICTURES['sizes'].file})"
    )


def _checks(verification: Verification) -> str:
    rows = [
        (check.name, _cell(check.found), _cell(check.expected), "pass" if check.passed else "FAIL")
        for check in verification.checks
    ]
    table = _table(("check", "found", "expected", ""), rows)
    return f"## Verification: {verification.verdict}\n\n{table}"


def _quality(manifest: Manifest, verification: MeasuredVerification) -> list[str]:
    """What was measured: figures, pictures, comparisons, some answers."""
    parts = [_figures(verification)]
    if verification.nearest is not None:
        parts.append(_nearest(manifest, verification, verification.nearest))
    parts += [
        f"![{picture.title}]({picture.file})\n\n{picture.caption}"
        for name, picture in drawable(verification).items()
        if picture.file and name != "sizes"
    ]
    if verification.against is not None:
        parts.append(_against(verification, verification.against))
    rows = [
        (_cell(answer.prompt), _cell(answer.answer_16bit), _cell(answer.answer_4bit))
        for answer in verification.answers[:_MAX_CARD_ANSWERS]
    ]
    if rows:
        parts.append(_table(("prompt", "16 bit", "4 bit"), rows))
    return parts


def _figures(verification: MeasuredVerification) -> str:
    fidelity, text, device = verification.fidelity, verification.text, verification.device
    rows = [
        ("KL from the 16-bit model, mean", interval(fidelity.mean_kl)),
        ("median", interval(fidelity.median_kl)),
        ("99th percentile", interval(fidelity.p99_kl)),
        ("maximum", interval(fidelity.max_kl)),
        ("same next token", interval(fidelity.top1_agreement)),
        ("same where the 16-bit model is sure", interval(fidelity.sure_agreement)),
        ("perplexity, 16 bit", interval(fidelity.perplexity_16bit)),
        ("perplexity, 4 bit", interval(fidelity.perplexity_4bit)),
        ("ratio of the two", interval(fidelity.perplexity_ratio)),
    ]
    domains = [
        (
            _cell(domain.name),
            str(domain.tokens),
            interval(domain.mean_kl),
            interval(domain.top1_agreement),
        )
        for domain in verification.domains
    ]
    where = (
        f"Measured on {_cell(device.name)} in {device.dtype}, on {text.tokens} tokens of "
        f"text ({_cell(text.name)}), with {fidelity.confidence:.0%} bootstrap intervals; KL in "
        "nats per token."
    )
    return "\n\n".join(
        [
            where,
            _table(("", "value [interval]"), rows),
            _table(("text", "tokens", "mean KL", "same next token"), domains),
        ]
    )


def _nearest(
    manifest: Manifest, verification: MeasuredVerification, nearest: NearestBaseline
) -> str:
    difference = nearest.difference
    domains = [
        (
            _cell(own.name),
            interval(own.mean_kl),
            interval(theirs.mean_kl),
            interval(ratio.mean_kl_ratio),
        )
        for own, theirs, ratio in zip(
            verification.domains, nearest.domains, difference.domains, strict=True
        )
    ]
    names = ("calibrated (this artifact)", "round to nearest")
    return (
        "Mean KL over that of plain NF4, every layer rounded to nearest as bitsandbytes does: "
        f"{interval(difference.mean_kl_ratio)}, {describe_extra_bytes(manifest)}. "
        "Both were measured on the same text.\n\n"
        + _side_by_side(verification.fidelity, nearest.fidelity, names)
        + "\n\n"
        + _table(("mean KL", *names, "the one over the other"), domains)
    )


def _against(verification: MeasuredVerification, other: Against) -> str:
    return (
        f"Beside another artifact of the same source (rounding: {_cell(other.rounding)}, "
        f"manifest `{other.manifest_sha256[:12]}…`), on the same text:\n\n"
        + _side_by_side(verification.fidelity, other.fidelity, ("this one", "the other"))
        + f"\n\nMean KL of this one over the other: {interval(other.difference.mean_kl_ratio)}."
    )


def _side_by_side(own: Fidelity, other: Fidelity, names: tuple[str, str]) -> str:
    """The chief figures of two models beside each other."""
    rows = [
        ("mean KL", interval(own.mean_kl), interval(other.mean_kl)),
        ("same next token", interval(own.top1_agreement), interval(other.top1_agreement)),
        (
            "same where the 16-bit model is sure",
            interval(own.sure_agreement),
            interval(other.sure_agreement),
        ),
        ("perplexity", interval(own.perplexity_4bit), interval(other.perplexity_4bit)),
    ]
    return _table(("", *names), rows)


def _loading(manifest: Manifest) -> str:
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
    if not manifest.hidden_modules:
        return text
    return text + (
        "\n\nThe second snippet works as it stands on transformers 4.57. From 5.5 on, transformers "
        "quantizes a layer only if its class is exactly `nn.Linear`, and this architecture's are a "
        "subclass; loading then fails with a size mismatch. Before `from_pretrained`, run\n\n"
        + _patch(manifest)
    )


def _patch(manifest: Manifest) -> str:
    lines = published_lines(manifest.model_class, manifest.hidden_modules)
    if lines is None:
        return "the first snippet instead, which handles every such architecture."
    return f"```python\n{lines}```"


def _readers(readers: Sequence[ReaderResult]) -> str:
    """Who read it, and how that went."""
    rows = [
        (
            result.name,
            result.version or "",
            result.outcome if result.outcome != "failed" else "FAILED",
            _cell(result.why),
            "" if result.logits_distance is None else f"{result.logits_distance:.3g}",
        )
        for result in readers
    ]
    head = ("reader", "version", "", "", "logits, from our loader's")
    return "Each of these loaded it as its users do:\n\n" + _table(head, rows)


def _making(manifest: Manifest) -> str:
    source, calibration = manifest.source, manifest.calibration
    options = f" --revision {source.commit}" if source.commit else ""
    if calibration:
        extra_bytes = manifest.recipe["quantize"].get("extra_bytes")
        options += f" --calibrate {'self' if calibration.source == 'self' else 'FILE'}"
        if extra_bytes:
            options += f" --extra-bytes {extra_bytes}"
        sentences = [describe_tokens(calibration), *list_exceptions(calibration)]
        rounding = "\n\n".join(map(_text, sentences))
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
        f"## How it was made\n\n```\nnf4 build {_argument(source.repo)}{options}\n```\n\n"
        f"{rounding}\n\n{bytes_of} "
        "What 4 bits cost this model is in the tables above, and nothing is claimed beyond it."
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _cell(text: str) -> str:
    """Words of others inside a table."""
    line = " ".join(text.split())
    return _text(line if len(line) <= 160 else line[:159] + "…")


# What Markdown, HTML or a formula ($) begins with; an underscore only at the edge of a word.
_MARKS: Final = re.compile(r"[&<>|`\[\]*~$\\]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])|^[#+=-]")
_NAMED: Final = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def _text(text: str) -> str:
    """Words of others, as words: one line, with nothing for Markdown or HTML to act on."""
    line = printable(" ".join(text.split()))
    return _MARKS.sub(lambda mark: _NAMED.get(mark[0], f"&#{ord(mark[0])};"), line)


def _code(text: str) -> str:
    """A name as code; where backticks in it would end that, as words."""
    return f"`{printable(text)}`" if text.strip() and not set(text) & set("`\r\n") else _text(text)


def _argument(text: str) -> str:
    """A name in a line for the shell."""
    return shlex.quote(printable(" ".join(text.split())))


def _size(nbytes: int) -> str:
    return f"{plain_size(nbytes)} ({plain_size(nbytes, binary=True)})"
