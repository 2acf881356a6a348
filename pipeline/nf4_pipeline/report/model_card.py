"""Manifest + verification -> the model card (README.md of the artifact). Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Final

import yaml

from nf4_pipeline.checkpoint.source_card import SourceCard
from nf4_pipeline.fidelity.metrics import Fidelity
from nf4_pipeline.manifest.manifest import Manifest
from nf4_pipeline.model.unused_tensors import left_out
from nf4_pipeline.printable import printable
from nf4_pipeline.provenance.summary import Rebuild
from nf4_pipeline.readers.document import ReaderResult
from nf4_pipeline.report.calibration import (
    describe_extra_bytes,
    describe_tokens,
    list_exceptions,
)
from nf4_pipeline.report.formatting import interval, is_finite, number, one_in, plain_size
from nf4_pipeline.report.markdown import code as _code
from nf4_pipeline.report.markdown import folded as _folded
from nf4_pipeline.report.markdown import in_cell as _cell
from nf4_pipeline.report.markdown import in_text as _text
from nf4_pipeline.report.markdown import table as _table
from nf4_pipeline.report.pictures import PICTURES, drawable
from nf4_pipeline.report.snippets import (
    generate_snippet,
    has_tokenizer,
    is_stock,
    load_snippet,
    own_snippet,
)
from nf4_pipeline.sample import SAMPLE_REPO
from nf4_pipeline.verification.document import (
    Against,
    MeasuredBaseline,
    MeasuredVerification,
    Sizes,
    Verification,
)

_MAX_CARD_ANSWERS: Final = 4


def model_card(
    manifest: Manifest,
    verification: Verification,
    source_card: SourceCard,
    *,
    repo_id: str | None = None,
    chat: bool = False,
    rebuilt: Rebuild | None = None,
) -> str:
    """The card as Markdown with Hub metadata; how to use it comes first, then what proves it.

    Args:
        manifest: of the artifact.
        verification: of the artifact.
        source_card: what the source's own card says.
        repo_id: the Hub repo that the snippets load from; None for the folder where the card lies.
        chat: the tokenizer has a chat template that works.
        rebuilt: who derived all of it again; None if nobody is known who did.
    """
    name = _text(manifest.source.repo.rpartition("/")[2])
    metadata = _metadata(manifest, verification, source_card, repo_id)
    measured = verification if isinstance(verification, MeasuredVerification) else None
    parts = [
        "---\n" + yaml.safe_dump(metadata, sort_keys=False) + "---",
        *_warning(verification, repo_id),
        f"# {name}, {manifest.codebook}",
        _what(manifest),
        _use(manifest, repo_id, chat),
        *([_readers(measured.readers)] if measured and measured.readers else []),
        *([_costs(measured)] if measured else []),
        *_left_out(manifest),
        _checks(verification),
        *(_quality(manifest, measured) if measured else []),
        _making(manifest),
        _checking(manifest, repo_id, rebuilt),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(
    manifest: Manifest, verification: Verification, source_card: SourceCard, repo_id: str | None
) -> dict[str, object]:
    metadata: dict[str, object] = {}
    if manifest.source.commit is not None:
        metadata |= {"base_model": manifest.source.repo, "base_model_relation": "quantized"}
    if repo_id is not None:
        metadata["quantized_by"] = repo_id.partition("/")[0]
    metadata |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [manifest.codebook.lower(), "4-bit", "bitsandbytes"],
    }
    metadata |= source_card.metadata()
    if isinstance(verification, MeasuredVerification):
        metadata["model-index"] = [_model_index(manifest, verification, repo_id)]
    return metadata


def _model_index(
    manifest: Manifest, verification: MeasuredVerification, repo_id: str | None
) -> dict[str, object]:
    """The chief figures where the Hub looks for results.

    Its newer `.eval_results/` is for data sets that are registered as benchmarks, which this text
    is not.
    """
    fidelity = verification.fidelity
    metrics = [
        {"type": kind, "name": name, "value": float(f"{figure.value:.6g}")}
        for kind, name, figure in (
            ("kl_divergence", "mean KL from the 16-bit model", fidelity.mean_kl),
            ("accuracy", "same next token as the 16-bit model", fidelity.top1_agreement),
            ("perplexity", "perplexity, 4 bit", fidelity.perplexity_4bit),
        )
        if is_finite(figure.value)
    ]
    result: dict[str, object] = {
        "task": {"type": "text-generation"},
        "dataset": {"type": "text", "name": _plain_name(verification.text.name)},
        "metrics": metrics,
    }
    if repo_id is not None:
        address = f"https://huggingface.co/{repo_id}/blob/main/verification.json"
        result["source"] = {"name": "verification.json", "url": address}
    name = (repo_id or manifest.source.repo).rpartition("/")[2]
    return {"name": _plain_name(name), "results": [result] if metrics else []}


def _warning(verification: Verification, repo_id: str | None) -> list[str]:
    """Before anything else, that an artifact did not pass."""
    if verification.verdict == "pass":
        return []
    checks = _cell(", ".join(check.name for check in verification.failed_checks))
    published = "It was published with `--allow-unverified`; " if repo_id else ""
    warning = (
        "> [!WARNING]\n> **This artifact did not pass verification: its verdict is "
        f'"{verification.verdict}".** Checks that failed: {checks}. {published}'
        "`verification.json` says what was measured."
    )
    return [warning]


def _what(manifest: Manifest) -> str:
    source = manifest.source
    pinned = (
        f"at commit `{source.commit[:12]}…`"
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
    if not has_tokenizer(manifest):
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


def _costs(verification: MeasuredVerification) -> str:
    """Sizes and fidelity in plain words; the figures are folded behind them."""
    sizes, fidelity = verification.sizes, verification.fidelity
    bytes_words = (
        f"**{plain_size(sizes.original_bytes)} become {plain_size(sizes.artifact_bytes)}**, "
        f"{1 - sizes.ratio:.0%} less, at {sizes.bits_per_weight:.3f} bits per weight."
    )
    words = [bytes_words]
    measures = (fidelity.mean_kl, fidelity.top1_agreement, fidelity.sure_agreement)
    kl, same, sure = (figure.value for figure in measures)
    if is_finite(kl) and is_finite(same):
        words.append(
            f"**KL {number(kl, 2)}: {one_in(same)} changes.** Of {fidelity.tokens:,} tokens of "
            f"text, so many have another most likely next token than in the 16-bit model"
            + (f"; of those where that model is sure, {one_in(sure)}." if is_finite(sure) else ".")
        )
    else:
        words.append("**Its predictions are not finite.**")
    return "## What 4 bits cost\n\n" + "\n\n".join([*words, _sizes(sizes)])


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
        _folded("Every size", _table(("", ""), rows) + f"\n\nNot quantized: {kept}.")
        + f"\n\n![{PICTURES['sizes'].title}]({PICTURES['sizes'].file})"
    )


def _checks(verification: Verification) -> str:
    rows = [
        (check.name, _cell(check.found), _cell(check.expected), "pass" if check.passed else "FAIL")
        for check in verification.checks
    ]
    table = _table(("check", "found", "expected", ""), rows)
    if verification.verdict == "pass":
        table = (
            f"All {len(rows)} checks passed. `report.html` shows what was measured, with pictures; "
            "it needs no network.\n\n" + _folded("Every check", table)
        )
    return f"## Verification: {verification.verdict}\n\n{table}"


def _quality(manifest: Manifest, verification: MeasuredVerification) -> list[str]:
    """What was measured: figures, pictures, comparisons, some answers."""
    parts = [_figures(verification)]
    if verification.nearest is not None:
        parts.append(_nearest(manifest, verification, verification.nearest))
    if verification.before_learning is not None:
        parts.append(_before_learning(verification, verification.before_learning))
    parts += [
        f"![{picture.title}]({picture.file})\n\n{picture.caption}"
        for name, picture in drawable(verification).items()
        if picture.file and name != "sizes"
    ]
    if verification.against is not None:
        parts.append(_against(verification, verification.against))
    greedy = [answer for answer in verification.answers if answer.seed is None]
    rows = [
        (_cell(answer.prompt), _cell(answer.answer_16bit), _cell(answer.answer_4bit))
        for answer in greedy[:_MAX_CARD_ANSWERS]
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
    tables = [
        _table(("", "value [interval]"), rows),
        _table(("text", "tokens", "mean KL", "same next token"), domains),
    ]
    return where + "\n\n" + _folded("Every figure", "\n\n".join(tables))


def _nearest(
    manifest: Manifest, verification: MeasuredVerification, nearest: MeasuredBaseline
) -> str:
    return (
        "Mean KL over that of plain NF4, every layer rounded to nearest as bitsandbytes does: "
        f"{interval(nearest.difference.mean_kl_ratio)}, {describe_extra_bytes(manifest)}. "
        "Both were measured on the same text.\n\n"
        + _beside(verification, nearest, ("calibrated (this artifact)", "round to nearest"))
    )


def _before_learning(verification: MeasuredVerification, before: MeasuredBaseline) -> str:
    return (
        "Mean KL over that of the same layers as calibration alone left them, before their codes "
        f"learned (the default level): {interval(before.difference.mean_kl_ratio)}, on the same "
        "text.\n\n" + _beside(verification, before, ("learned (this artifact)", "before learning"))
    )


def _beside(
    verification: MeasuredVerification, other: MeasuredBaseline, names: tuple[str, str]
) -> str:
    """The chief figures of both, and the mean KL of both by domain."""
    domains = [
        (
            _cell(own.name),
            interval(own.mean_kl),
            interval(theirs.mean_kl),
            interval(ratio.mean_kl_ratio),
        )
        for own, theirs, ratio in zip(
            verification.domains, other.domains, other.difference.domains, strict=True
        )
    ]
    return (
        _side_by_side(verification.fidelity, other.fidelity, names)
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


def _use(manifest: Manifest, repo_id: str | None, chat: bool) -> str:
    """Three snippets that are tested: load, generate, and the same with this package."""
    name = repo_id or "."
    stock = [_block(load_snippet(manifest, name))]
    if has_tokenizer(manifest):
        stock += ["Generate:", _block(generate_snippet(name, chat=chat))]
    own_head = (
        "With [nf4-pipeline](https://pypi.org/project/nf4-pipeline/) (`pip install nf4-pipeline`), "
        "on transformers 5.5 and newer:"
    )
    own = [own_head, _block(own_snippet(manifest, name))]
    if is_stock(manifest):
        head = "With transformers alone (`pip install transformers accelerate bitsandbytes`):"
        parts = [head, *stock, *own]
    else:
        head = (
            "With transformers alone, 4.57 and no newer: from 5.5 on it quantizes a layer only if "
            "its class is exactly `nn.Linear`, and this architecture's are a subclass, so that "
            "loading fails with a size mismatch."
        )
        parts = [*own, head, *stock]
    if repo_id is None:
        where = "Run where this card lies. `nf4 push` puts the name of the repo in its place."
        parts.insert(0, where)
    return "\n\n".join(["## Use", *parts])


def _block(code: str, language: str = "python") -> str:
    return f"```{language}\n{code}\n```"


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
    head = ("reader", "version", "outcome", "what it did", "logits: distance from our loader's")
    return "## Who reads it\n\nEach of these was tried on it as its users do:\n\n" + _table(
        head, rows
    )


def _making(manifest: Manifest) -> str:
    source, calibration = manifest.source, manifest.calibration
    options = f" --revision {source.commit}" if source.commit else ""
    if calibration:
        extra_bytes = manifest.recipe["quantize"].get("extra_bytes")
        options += f" --calibrate {'self' if calibration.source == 'self' else 'FILE'}"
        if extra_bytes:
            options += f" --extra-bytes {extra_bytes}"
        options += " --effort high" if calibration.learning else ""
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
    command = _block(f"nf4 build {_source_argument(manifest)}{options}", "sh")
    return (
        f"## How it was made\n\n{command}\n\n{rounding}\n\n{bytes_of} "
        "What 4 bits cost this model is in the tables above, and nothing is claimed beyond it."
    )


def _checking(manifest: Manifest, repo_id: str | None, rebuilt: Rebuild | None) -> str:
    """The commands that hold a download against the Hub, the source and a signature."""
    folder = "."
    lines = []
    local = manifest.source.commit is None and manifest.source.repo != SAMPLE_REPO
    if repo_id is not None:
        folder, repo = _argument(repo_id.rpartition("/")[2]), _argument(repo_id)
        if not local:
            lines += [
                "# all of this repo is derived again or accounted for, with a verdict:",
                f"nf4 rebuild {repo}",
            ]
        lines += [
            f"hf download {repo} --local-dir {folder}",
            "# every file has the checksum that the Hub lists:",
            f"hf cache verify {repo} --local-dir {folder}",
        ]
    lines += [
        "# every byte is derived again from the source:",
        f"nf4 reproduce {folder}" + (f" --source {_source_argument(manifest)}" if local else ""),
        "# if there is a model.sig, with the signer's public key:",
        f"nf4 check {folder} --key key.pub",
    ]
    parts = ["## Check it yourself", _block("\n".join(lines), "sh")]
    if rebuilt is not None:
        parts.insert(
            1,
            f"**Verified reproducible** by `{rebuilt.verifier}` on {rebuilt.verified}: "
            f"[summary](<{rebuilt.url}>). It is as good as who signs for it; the commands below "
            "need nobody.",
        )
    return "\n\n".join(parts)


def _source_argument(manifest: Manifest) -> str:
    """The source as `nf4 build` takes it: "sample", a folder, or a Hub id."""
    source = manifest.source
    if source.commit is None:
        return "sample" if source.repo == SAMPLE_REPO else _argument(f"./{source.repo}")
    return _argument(source.repo)


def _plain_name(text: str) -> str:
    """A name in the metadata, which the Hub shows as it likes: nothing but letters and digits."""
    plain = re.sub(r"[^\w .,:()+’-]", " ", text.replace("'", "’"))
    return " ".join(plain.split())[:80].strip(" -") or "unnamed"


def _argument(text: str) -> str:
    """A name in a line for the shell."""
    return shlex.quote(printable(" ".join(text.split())))


def _size(nbytes: int) -> str:
    return f"{plain_size(nbytes)} ({plain_size(nbytes, binary=True)})"
