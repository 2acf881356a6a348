"""Builds falcon-7b's shapes from a Hub that keeps the source, killed at random moments.

    python scripts/campaigns/streamed.py [--layers 8] [--files 2] [--kills 20] [--output] [--untied]

A Hub on this machine has the model, in two files as falcon-7b's own. `nf4 build --stream-source` is
killed with SIGKILL, run again, and so on, and at last left alone, while the disk that it takes is
sampled. Prints the table of docs/large-models.md. Exits 1 if the hashes are not those of an
ordinary build, the disk took more than `--dry-run` promised, without kills other bytes came over
the network than that (headers, and one in a thousand, aside), a file of the source passed by again
that had done so to its end, or, with --output, an object was sent twice, or anything but one whole
commit was ever to be seen in the repo of --stream-output.
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
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from falcon_shapes import make_checkpoint
from nf4_pipeline.checkpoint.digest import digest_file
from nf4_pipeline.processes.temporary import IN_MEMORY

from tests.support import hub_uploads
from tests.support.hub_client import isolated
from tests.support.hub_server import TOKEN, HubServer
from tests.support.tiny import write_tokenizer

assert hub_uploads  # its routes are registered by importing it

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


def write_model(folder: Path, layers: int, files: int, *, untied: bool) -> None:
    """Random weights of falcon-7b's shapes; two files are cut as its own are."""
    make_checkpoint(folder, layers, shards=files)
    write_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"bos_token_id": 256, "eos_token_id": 256}  # of this tokenizer
    config |= {"tie_word_embeddings": not untied}
    (folder / "config.json").write_text(json.dumps(config))


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
        self.outputs = 0
        self.sources: dict[str, int] = {}
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

    def passed(self) -> set[str]:
        """Files of the source that have passed by to their end."""
        folder = self.build / "streamed" / "passed"
        return {path.name.removesuffix(".json") for path in folder.glob("*.json")}

    @property
    def outgoing(self) -> bool:
        """Whether the repo of --stream-output was made by now."""
        return OUTPUT in self.hub.store.repos

    def stage(self) -> str:
        """What comes after the records that stand."""
        done = {path.stem for path in self.build.glob("records/*.json")}
        return next(stage for stage in STAGES if stage not in done)

    def fetched(self, since: int) -> tuple[int, int]:
        """Bytes of weights that were asked for, and in how many requests."""
        asked = [seen.range for seen in self.hub.seen[since:] if seen.cdn and seen.range]
        ends = [one.removeprefix("bytes=").split("-") for one in asked]
        return sum(int(end) - int(start) + 1 for start, end in ends), len(asked)

    def left(self, stage: str) -> int:
        """Bytes that are about to be fetched by a stage."""
        if stage == "quantize":
            passed = self.passed()
            return sum(size for name, size in self.sources.items() if name not in passed)
        again = 2 if self.outgoing else 1
        return again * sum(self.sources.values()) if stage == "verify" else 0

    def attempt(self, options: list[str | Path], kill_in: str = "", share: float = 0.0) -> bool:
        """One run; whether it came to its end.

        It dies when it has come to a stage, and has fetched a share of what that takes, or after
        two seconds of a stage that fetches nothing.
        """
        passed, before = self.passed(), len(self.hub.seen)
        process = self.start("build", REPO, *options)
        if kill_in:
            stage, at, began = "", before, 0.0
            while process.poll() is None:
                if stage != (now := self.stage()):
                    stage, at, began = now, len(self.hub.seen), time.monotonic()
                wanted = share * self.left(stage)
                enough = time.monotonic() - began > 2 * share if not wanted else False
                if STAGES.index(stage) >= STAGES.index(kill_in) and len(self.hub.seen) > before:
                    if enough or (wanted and self.fetched(at)[0] >= wanted):
                        self.killed.append(stage)
                        process.send_signal(signal.SIGKILL)
                        break
                time.sleep(0.02)
        out, err = process.communicate()
        begun = {
            seen.path.rpartition("/")[2]
            for seen in self.hub.seen[before:]
            if seen.cdn and seen.method == "GET" and seen.range.startswith("bytes=0-")
        }
        for commit in self.hub.store.repos[OUTPUT].commits.values() if self.outgoing else ():
            if commit.parent and len(commit.files) < self.outputs:
                self.problems.append(f"half of it is published: {sorted(commit.files)}")
        if again := begun & passed:
            self.problems.append(f"passed by again: {sorted(again)}")
        if process.returncode not in (0, -signal.SIGKILL):
            self.problems.append(f"ended with {process.returncode}: {out}{err}")
        return process.returncode == 0


def main() -> int:
    """Makes the model, builds it twice, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--files", type=int, default=2)
    parser.add_argument("--kills", type=int, default=len(MOMENTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--share", type=float, default=0.75, help="of what a stage fetches, at most, until a kill"
    )
    parser.add_argument("--output", action="store_true", help="with --stream-output")
    parser.add_argument("--untied", action="store_true", help="the head is no second embedding")
    args = parser.parse_args()
    dice = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="nf4-streamed-") as temporary, HubServer() as hub:
        folder = Path(temporary)
        model = folder / "model"
        model.mkdir()
        write_model(model, args.layers, args.files, untied=args.untied)
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
        options += ["--stream-output", OUTPUT] if args.output else []
        promise = json.loads(it.run("build", REPO, *options, "--dry-run", "--json", "-q"))
        it.outputs = len(promise["files"])
        it.sources = {path.name: path.stat().st_size for path in model.glob("*.safetensors")}
        began, first = time.monotonic(), len(hub.seen)
        with watched(it.build, it.home) as disk, watched(IN_MEMORY) as memory:
            for stage in MOMENTS[:: max(1, len(MOMENTS) // args.kills)] if args.kills else ():
                if it.attempt(options, stage, dice.uniform(0.0, args.share)):
                    break
                print(
                    f"{time.monotonic() - began:.0f} s: killed in {it.killed[-1]}; "
                    f"{len(it.passed())} files have passed by",
                    file=sys.stderr,
                    flush=True,
                )
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
            said = json.loads((it.build / "export" / "manifest.json").read_text())["files"]
            said = {name: one["sha256"] for name, one in said.items()}
            for path in (it.build / "export").rglob("*"):
                name = path.relative_to(it.build / "export").as_posix()
                said |= {name: digest_file(path).sha256} if path.is_file() else {}
            for name, sha256 in said.items():
                if name not in held or held[name].sha256 != sha256:
                    it.problems.append(f"{name} is not on the Hub")
            if left := list(it.build.rglob("model-*.safetensors")):
                it.problems.append(f"still on the disk: {sorted(map(str, left))}")
            if len(set(sent)) != len(sent):
                it.problems.append("an object was sent twice")
            print(f"| sent ahead | {len(set(sent))} objects in {len(sent)} requests |")
        stages = {stage: it.killed.count(stage) for stage in dict.fromkeys(it.killed)}
        of_source = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        fetched, requests = it.fetched(first)
        headers = sum(min(size, 2**17) for size in it.sources.values())
        if not args.kills and not 0 <= promise["fetch_bytes"] + headers - fetched < fetched / 1000:
            it.problems.append("other bytes over the network than promised")
        for name, value in (
            ("source", f"{of_source / 1e9:.3f} GB in {args.files} files"),
            ("result", f"{promise['quantized_bytes'] / 1e9:.3f} GB in {len(wanted)} files"),
            ("disk, promised", f"{promise['builds']['needed'] / 1e9:.3f} GB"),
            ("disk, seen at most", f"{disk.peak / 1e9:.3f} GB in {disk.samples:,} samples"),
            ("killed", f"{len(it.killed)} times: {stages}"),
            ("hashes", "as of an ordinary build" if found == wanted else "OTHERS"),
            ("verdict", verdict["verdict"]),
            ("mean KL", verdict["fidelity"]["mean_kl"]),
            ("memory in /dev/shm", f"{memory.peak / 1e9:.3f} GB"),
            ("fetched, all runs", f"{fetched / 1e9:.3f} GB in {requests:,} requests"),
            ("fetched, promised", f"{promise['fetch_bytes'] / 1e9:.3f} GB"),
            ("time", f"{seconds:.0f} s, all runs"),
        ):
            print(f"| {name} | {value} |")
        print("\n".join(["", f"{len(it.problems)} problems", *it.problems]))
    return 1 if it.problems else 0


if __name__ == "__main__":
    sys.exit(main())
