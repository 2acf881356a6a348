"""Builds falcon-7b's shapes from a Hub that keeps the source, killed at random moments.

    python scripts/campaigns/streamed.py [--layers 8] [--kills 20] [--output]

A Hub on this machine has the model in files of one layer each. `nf4 build --stream-source` is
killed with SIGKILL, run again, and so on, and at last left alone, while the disk that it takes is
sampled.
Prints the table of docs/large-models.md. Exits 1 if the hashes are not those of an ordinary build,
the disk took more than `--dry-run` promised, a file was fetched again that was finished, or, with
--output, anything but one whole commit was ever to be seen in the repo of --stream-output.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[2]))

from nf4_pipeline.checkpoint.digest import digest_file

from tests.support import hub_uploads
from tests.support.hub_client import isolated
from tests.support.hub_server import TOKEN, HubServer
from tests.support.tiny import INDEX, write_tokenizer

assert hub_uploads  # its routes are registered by importing it

HIDDEN: Final = 4544
REPO: Final = "me/falcon"
OUTPUT: Final = "me/falcon-nf4"
STAGES: Final = ("download", "quantize", "serialize", "verify", "attest", "done")
MOMENTS: Final = (
    *["download"] * 2,
    *["quantize"] * 12,
    "serialize",
    *["verify"] * 5,
)
"""In which stage a run is killed, at the earliest."""


def write_model(folder: Path, layers: int) -> None:
    """Random weights of falcon-7b's shapes, a file for each layer, the tied head twice."""
    import torch
    from safetensors.torch import save_file
    from transformers import FalconConfig, FalconForCausalLM

    write_tokenizer(folder)
    config = FalconConfig(
        vocab_size=65024,
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=71,
        alibi=False,
        bias=False,
        multi_query=True,
        new_decoder_architecture=False,
        parallel_attn=True,
        bos_token_id=256,
        eos_token_id=256,
        tie_word_embeddings=True,
        architectures=["FalconForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in FalconForCausalLM(config).state_dict().items()}
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    groups: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        groups.setdefault(".".join(parts[:3]) if "h" in parts else name, []).append(name)
    dice = torch.Generator().manual_seed(0)
    embedding = None
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups.values(), 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        part = {}
        for name in names:
            if name == "lm_head.weight":
                part[name] = embedding
            else:
                part[name] = torch.empty(shapes[name], dtype=torch.bfloat16).normal_(
                    0, 0.02, generator=dice
                )
            if "word_embeddings" in name:
                embedding = part[name].clone()
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8")


@dataclass
class Disk:
    """The most bytes that were seen in some folders, hard links once; how often it was looked."""

    peak: int = 0
    samples: int = 0


@contextmanager
def watched(*folders: Path) -> Iterator[Disk]:
    """Samples what folders take on the disk while the body runs."""
    disk, stop = Disk(), threading.Event()

    def sample() -> None:
        taken: dict[int, int] = {}
        for folder in folders:
            for parent, _, names in os.walk(folder):
                for path in (Path(parent) / name for name in names):
                    try:
                        found = path.lstat()
                    except FileNotFoundError:
                        continue
                    taken[found.st_ino] = found.st_blocks * 512
        disk.peak = max(disk.peak, sum(taken.values()))
        disk.samples += 1

    def repeat() -> None:
        while not stop.wait(0.02):
            sample()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield disk
    finally:
        stop.set()
        thread.join()


class Campaign:
    """One model on one Hub, and what was seen."""

    def __init__(self, folder: Path, hub: HubServer) -> None:
        self.folder, self.hub = folder, hub
        self.build, self.home = folder / "build", folder / "hf"
        self.problems: list[str] = []
        self.sources: list[str] = []
        self.outputs: list[str] = []
        self.killed: list[str] = []

    def start(self, *args: str | Path) -> subprocess.Popen[str]:
        """Starts `nf4 ARGS`."""
        return subprocess.Popen(
            [sys.executable, "-m", "nf4_pipeline", *map(str, args)],
            cwd=self.folder,
            env=isolated(self.home, self.hub.url, HF_TOKEN=TOKEN, CUDA_VISIBLE_DEVICES=""),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *args: str | Path) -> str:
        """Runs `nf4 ARGS` to its end."""
        process = self.start(*args)
        out, err = process.communicate()
        if process.returncode:
            sys.exit(f"{args} ended with {process.returncode}:\n{out}{err}")
        return out

    def finished(self) -> set[str]:
        """Files of the source whose outputs all stand."""
        passed = {p.name.removesuffix(".json") for p in self.build.glob("streamed/passed/*.json")}
        made = {path.name for path in self.build.glob("quantized/*.facts.json")}
        of_source = dict(zip(sorted(self.outputs), self.sources, strict=False))
        missing = {of_source[n] for n in self.outputs if f"{n}.facts.json" not in made}
        return passed - missing

    def plan(self, promise: dict[str, Any], sources: list[str]) -> None:
        """Notes which file is made of which: one each, but for the head, of which none is."""
        self.outputs, self.sources = list(promise["files"]), sources

    @property
    def outgoing(self) -> bool:
        """Whether the repo of --stream-output was made by now."""
        return OUTPUT in self.hub.store.repos

    def stage(self) -> str:
        """What comes after the records that stand."""
        done = {path.stem for path in self.build.glob("records/*.json")}
        return next(stage for stage in STAGES if stage not in done)

    def attempt(
        self, options: list[str | Path], kill_in: str = "", kill_after: float = 0.0
    ) -> bool:
        """One run; whether it came to its end. It dies so long after it has come to a stage."""
        finished, before = self.finished(), len(self.hub.seen)
        process = self.start("build", REPO, *options)
        if kill_in:
            while process.poll() is None and (
                len(self.hub.seen) == before or STAGES.index(self.stage()) < STAGES.index(kill_in)
            ):
                time.sleep(0.02)
            try:
                process.wait(kill_after)
            except subprocess.TimeoutExpired:
                self.killed.append(self.stage())
                process.send_signal(signal.SIGKILL)
        out, err = process.communicate()
        whole = {
            seen.path.rpartition("/")[2]
            for seen in self.hub.seen[before:]
            if seen.cdn and seen.method == "GET" and not seen.range
        }
        for commit in self.hub.store.repos[OUTPUT].commits.values() if self.outgoing else ():
            if commit.parent and len(commit.files) < len(self.outputs):
                self.problems.append(f"half of it is published: {sorted(commit.files)}")
        if again := whole & finished:
            self.problems.append(f"fetched again although finished: {sorted(again)}")
        if process.returncode not in (0, -signal.SIGKILL):
            self.problems.append(f"ended with {process.returncode}: {out}{err}")
        return process.returncode == 0


def main() -> int:
    """Makes the model, builds it twice, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--kills", type=int, default=len(MOMENTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--longest", type=float, default=5.0, help="seconds in a stage until a kill"
    )
    parser.add_argument("--output", action="store_true", help="with --stream-output")
    args = parser.parse_args()
    dice = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="nf4-streamed-") as temporary, HubServer() as hub:
        folder = Path(temporary)
        model = folder / "model"
        model.mkdir()
        write_model(model, args.layers)
        (folder / "recipe.toml").write_text(
            "[verify]\neval_tokens = 128\nmax_mean_kl = 5.0\nmin_sure_agreement = 0.0\n"
            "max_perplexity_ratio = 5.0\n",
            "utf-8",
        )
        hub.store.users[TOKEN] = "me"
        hub.store.add(REPO, model)
        it = Campaign(folder, hub)
        print("the model is there", file=sys.stderr, flush=True)
        it.run("download", model, "--build-dir", "ordinary", "-q")
        out = it.run("quantize", "--build-dir", "ordinary", "--json", "-q")
        wanted = {name: one["sha256"] for name, one in json.loads(out)["outputs"].items()}
        for path in (folder / "ordinary").glob("quantized/*.safetensors"):
            path.unlink()
        options: list[str | Path] = ["--stream-source", "--build-dir", "build", "--device", "cpu"]
        options += ["--recipe", folder / "recipe.toml"]
        promise = json.loads(it.run("build", REPO, *options, "--dry-run", "--json", "-q"))
        options += ["--stream-output", OUTPUT] if args.output else []
        it.plan(promise, sorted(path.name for path in model.glob("*.safetensors")))
        began, first = time.monotonic(), len(hub.seen)
        with watched(it.build, it.home) as disk:
            for stage in MOMENTS[:: max(1, len(MOMENTS) // args.kills)]:
                if it.attempt(options, stage, dice.uniform(0.0, args.longest)):
                    break
                print(f"killed in {it.killed[-1]}", file=sys.stderr, flush=True)
            done = it.attempt(options)
        seconds = time.monotonic() - began
        quantized = json.loads((it.build / "records" / "quantize.json").read_text())["outputs"]
        found = {name: one["sha256"] for name, one in quantized.items()}
        verdict = json.loads((it.build / "export" / "verification.json").read_text())
        if not done:
            it.problems.append("the last run did not end well")
        if found != wanted:
            it.problems.append("other hashes than the ordinary build")
        if disk.peak > promise["builds"]["needed"]:
            it.problems.append("more disk than promised")
        if args.output:
            held = hub.store.repos[OUTPUT].head.files
            sent = [seen.path for seen in hub.seen if seen.method == "PUT"]
            for path in (it.build / "export").rglob("*"):
                name = path.relative_to(it.build / "export").as_posix()
                if path.is_file() and (
                    name not in held or held[name].sha256 != digest_file(path).sha256
                ):
                    it.problems.append(f"{name} is not on the Hub")
            print(f"| sent ahead | {len(set(sent))} objects in {len(sent)} requests |")
        stages = {stage: it.killed.count(stage) for stage in dict.fromkeys(it.killed)}
        of_source = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        requests = sum(seen.cdn for seen in hub.seen[first:])
        for name, value in (
            ("source", f"{of_source / 1e9:.3f} GB in {len(it.sources)} files"),
            ("result", f"{promise['quantized_bytes'] / 1e9:.3f} GB in {len(wanted)} files"),
            ("disk, promised", f"{promise['builds']['needed'] / 1e9:.3f} GB"),
            ("disk, seen at most", f"{disk.peak / 1e9:.3f} GB in {disk.samples:,} samples"),
            ("killed", f"{len(it.killed)} times: {stages}"),
            ("hashes", "as of an ordinary build" if found == wanted else "OTHERS"),
            ("verdict", verdict["verdict"]),
            ("mean KL", verdict["fidelity"]["mean_kl"]),
            ("time", f"{seconds:.0f} s, all runs; {requests:,} requests for weights"),
        ):
            print(f"| {name} | {value} |")
        print("\n".join(["", f"{len(it.problems)} problems", *it.problems]))
    return 1 if it.problems else 0


if __name__ == "__main__":
    sys.exit(main())
