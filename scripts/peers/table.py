"""Results of a comparison -> the tables of docs/comparison.md."""

from __future__ import annotations

from typing import Any

_HEAD = (
    "| | bits per weight | file, MB | mean KL | ± | same next token | perplexity | CPU s | "
    "memory, MB |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def render(results: dict[str, Any]) -> str:
    """All tables, Markdown: rows by mean KL, failures at the end with their reasons."""
    parts = []
    for model in results["models"]:
        scored = [row for row in model["rows"] if "fidelity" in row]
        scored.sort(key=lambda row: row["fidelity"]["mean_kl"]["value"])
        lines = [f"**{model['name']}** ({model['about']}; {model['tokens']:,} tokens)", "", _HEAD]
        lines += [_line(row) for row in scored]
        failed = [row for row in model["rows"] if "error" in row]
        lines += [f"| {row['label']} | not measured: {row['error']} |||||||| " for row in failed]
        parts.append("\n".join(line.rstrip() for line in lines))
    return "\n\n".join(parts) + "\n"


def _line(row: dict[str, Any]) -> str:
    fidelity = row["fidelity"]
    kl, ratio = fidelity["mean_kl"], fidelity["perplexity_ratio"]
    cells = [
        row["label"],
        f"{row['bits_per_weight']:.2f}",
        f"{row['file_bytes'] / 1e6:.2f}",
        f"{kl['value']:.5f}",
        f"{(kl['high'] - kl['low']) / 2:.5f}",
        f"{fidelity['top1_agreement']['value']:.1%}",
        f"{fidelity['perplexity_4bit']['value']:.3f} (× {ratio['value']:.4f})",
        f"{row['processor_seconds']:.0f}" if "processor_seconds" in row else "–",
        f"{row['peak_bytes'] / 1e6:.0f}",
    ]
    return f"| {' | '.join(cells)} |"
