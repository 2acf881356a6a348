"""Times the whole job, ours against the same job done with stock tools, in turn and in one run.

"ours" is `nf4 build`: source hashed, quantized, written, both models asked and compared on a text,
every file and weight checked, report written; "again" is the same command with nothing changed.
"stock" is one process of transformers and bitsandbytes: source hashed, 16-bit model loaded and
asked, quantized while loading and saved, loaded again and asked. It compares nothing. Both ask the
same prompts, greedily and by draws. Checkpoints have the shapes of falcon-7b, random weights and
the sample's tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import click
from kept_ratios import show_beside_kept

_DROP_CACHES: Final = Path("/proc/sys/vm/drop_caches")
_STAGES: Final = ("download", "quantize", "serialize", "verify", "attest")


@click.group(invoke_without_command=True)
@click.option("--layers", default=2, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--eval-tokens", default=8192, show_default=True)
@click.option("--new-tokens", default=48, show_default=True, help="Of each answer, at most.")
@click.option("--contenders", default="stock,ours", show_default=True)
@click.option("--cold/--warm", default=False, help="Drop the page cache before each run.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the checkpoint is made.")
@click.option("--json", "as_json", type=click.Path(path_type=Path), help="Also write all figures.")
@click.pass_context
def main(
    context: click.Context,
    layers: int,
    rounds: int,
    device: str,
    eval_tokens: int,
    new_tokens: int,
    contenders: str,
    cold: bool,
    folder: Path | None,
    as_json: Path | None,
) -> None:
    """Time the whole job on a falcon-7b-shaped checkpoint."""
    if context.invoked_subcommand:
        return
    if cold and not os.access(_DROP_CACHES, os.W_OK):
        raise click.ClickException(f"--cold needs to write {_DROP_CACHES}: run it as root.")
    with tempfile.TemporaryDirectory(prefix="nf4-bench-") as temporary:
        work = folder or Path(temporary)
        source = work / f"falcon-{layers}-with-tokenizer"
        _make(source, layers)
        recipe = Path(temporary) / "recipe.toml"
        # The weights are random: how far 4 bits are from them decides nothing here.
        limits = "max_mean_kl = 100.0\nmin_sure_agreement = 0.0\nmax_perplexity_ratio = 1e9\n"
        sizes = f"eval_tokens = {eval_tokens}\nmax_new_tokens = {new_tokens}\n"
        recipe.write_text(f"[verify]\n{limits}{sizes}")
        found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders.split(",")}
        for number in range(rounds):
            for name, runs in found.items():
                out = Path(temporary) / "out"
                shutil.rmtree(out, ignore_errors=True)
                os.sync()
                if cold:
                    _DROP_CACHES.write_text("3")
                if name == "ours":
                    runs.append(_ours(source, out, device, recipe))
                else:
                    runs.append(_stock(source, out, device, new_tokens))
                click.echo(f"round {number + 1}, {name}: {runs[-1]['whole']:.1f} s", err=True)
        _show(found, layers, cold)
    if as_json:
        as_json.write_text(json.dumps(found, indent=2))


def _make(source: Path, layers: int) -> None:
    from falcon_shapes import make_checkpoint
    from nf4_pipeline.sample import MODEL_DIR

    if not (source / "config.json").exists():
        make_checkpoint(source, layers)
    for path in MODEL_DIR.iterdir():
        if "token" in path.name:
            shutil.copy(path, source)


def _ours(source: Path, out: Path, device: str, recipe: Path) -> dict[str, float]:
    command = [
        sys.executable, "-m", "nf4_pipeline", "build", str(source), "--build-dir", str(out),
        "--device", device, "--recipe", str(recipe), "--quiet",
    ]  # fmt: skip
    figures = {"whole": _timed(command)}
    figures["again"] = _timed(command)
    for stage in _STAGES:
        record = json.loads((out / "records" / f"{stage}.json").read_text())
        figures[stage] = record["seconds"]
    verification = json.loads((out / "export" / "verification.json").read_text())
    for side in ("16bit", "4bit"):
        costs = verification["models"][side]
        figures[f"load, {side}"] = costs["load_seconds"]
        figures[f"tokens/s, {side}"] = costs["tokens_per_second"] or 0.0
    figures["comparison"] = verification["comparison"]["seconds"]
    return figures


def _stock(source: Path, out: Path, device: str, new_tokens: int) -> dict[str, float]:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, "stock", str(source), str(out), device, str(new_tokens)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise click.ClickException(f"stock failed:\n{done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"whole": time.perf_counter() - start, **figures}


def _timed(command: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise click.ClickException(f"ours failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - start


@main.command("stock", hidden=True)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("device")
@click.argument("new_tokens", type=int)
def stock(source: Path, out: Path, device: str, new_tokens: int) -> None:
    """The same job with stock tools, as far as they do it."""
    took: dict[str, float] = {}
    start = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal start
        now = time.perf_counter()
        took[name], start = now - start, now

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from transformers.models.falcon import modeling_falcon

    modeling_falcon.FalconLinear = torch.nn.Linear
    place = "cuda:0" if device != "cpu" and torch.cuda.is_available() else "cpu"
    torch.zeros(1, device=place)
    lap("imports")
    for path in sorted(source.iterdir()):
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
    lap("hash source")
    tokenizer = AutoTokenizer.from_pretrained(source)
    options: dict[str, Any] = {"dtype": "auto", "device_map": {"": place}}
    model = AutoModelForCausalLM.from_pretrained(source, **options)
    lap("load 16 bit")
    _answer(model, tokenizer, new_tokens)
    lap("answers, 16 bit")
    del model
    if place != "cpu":
        torch.cuda.empty_cache()
    model = AutoModelForCausalLM.from_pretrained(
        source,
        **options,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    lap("load 4 bit, save")
    del model
    model = AutoModelForCausalLM.from_pretrained(out, device_map={"": place})
    lap("reload 4 bit")
    _answer(model, tokenizer, new_tokens)
    lap("answers, 4 bit")
    print(json.dumps(took))


def _answer(model: Any, tokenizer: Any, new_tokens: int) -> None:
    """One prompt after the other, as an example in a model card would."""
    import torch
    from nf4_pipeline.verification.prompts import REFERENCE, read_prompts

    torch.manual_seed(0)
    for prompt in read_prompts(REFERENCE):
        ids = tokenizer(prompt.prompt, return_tensors="pt").input_ids.to(model.device)
        for options in ({"do_sample": False}, {"do_sample": True, "top_k": 40}):
            written = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **options
            )
            tokenizer.decode(written[0], skip_special_tokens=True)


def _show(found: dict[str, list[dict[str, float]]], layers: int, cold: bool) -> None:
    click.echo(f"\nfalcon-7b shapes, {layers} layers, {'cold' if cold else 'warm'}; medians")
    for name, runs in found.items():
        click.echo(f"\n| {name} | s |\n| --- | --- |")
        for part in runs[0]:
            values = [run[part] for run in runs]
            spread = f"{min(values):.1f}-{max(values):.1f}"
            click.echo(f"| {part} | {statistics.median(values):.2f} ({spread}) |")
    if {"ours", "stock"} <= found.keys():
        ratios = [
            a["whole"] / b["whole"] for a, b in zip(found["ours"], found["stock"], strict=True)
        ]
        ratio = statistics.median(ratios)
        click.echo(f"\nours / stock, whole job: {ratio:.2f}")
        show_beside_kept(f"whole job, {layers} layers: stock / ours", 1 / ratio)


if __name__ == "__main__":
    main()
