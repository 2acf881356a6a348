"""Three ways to schedule one step, and what they leave when workers, nodes and drivers are killed.

    python scripts/campaigns/ray_engine.py [hashes] [kills] [node] [driver] [--kills 20]

Needs the extra `nf4-pipeline[ray]`. A random Falcon of 18 output files is quantized by the local
engine; by `--part` in 1, 3 and 8 processes; on Ray clusters of 1, 2 and 8 CPUs, of two nodes on
this host, and on one that `nf4` starts itself. Then processes are killed with SIGKILL while a file
is half written, and the same command (or Ray itself) goes on. Every result must have the hashes of
the local engine, and nothing else may lie in the build folder. Prints the tables of docs/scaling.md
and exits 1 if anything was not as it must be.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[2]))

import ray
from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.atomic import PARTIAL_SUFFIX, partial_of
from nf4_pipeline.records import QUANTIZE
from nf4_pipeline.stages.quantize import FACTS_SUFFIX
from ray.cluster_utils import Cluster

from tests.support.jobs import download
from tests.support.tiny import copy_of, environment, write_falcon

CAMPAIGNS: Final = ("hashes", "kills", "node", "driver")
_NO_START: Final = "Ray could not be started on this host"
"""What a busy host may say; then the same command is typed once more."""
_MOST_TRIES: Final = 4
_LONGEST: Final = 300.0  # seconds, after which something hangs


@dataclass
class Bench:
    """A downloaded build to copy, and what the local engine makes of it.

    Attributes:
        folder: for builds.
        downloaded: a build in which only `download` is done.
        expected: name in quantized/ -> sha256.
        faults: what was not as it must be.
    """

    folder: Path
    downloaded: Path
    expected: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def build(self, name: str) -> Build:
        return Build(copy_of(self.downloaded, self.folder / name))

    def check(self, name: str, build: Build, status: int = 0, error: str = "") -> bool:
        """Holds a finished build against the local engine's; deletes it."""
        found = []
        if status != 0:
            found.append(f"exit {status}: {error[-500:]}")
        if hashes(build) != self.expected:
            found.append("other bytes")
        record = build.record(QUANTIZE)
        outputs = record.outputs if record is not None else {}
        recorded = {Path(path).name: digest.sha256 for path, digest in outputs.items()}
        if recorded != self.expected:
            found.append("the record says something else")
        found += [f"left over: {path}" for path in strangers(build)]
        self.faults += [f"{name}: {fault}" for fault in found]
        shutil.rmtree(build.root)
        return not found

    def check_halfway(self, name: str, build: Build) -> int:
        """No file that counts as whole may be anything else; returns how many there are."""
        whole = [path for path in build.quantized.glob(f"*{FACTS_SUFFIX}")]
        for facts in whole:
            file = facts.name.removesuffix(FACTS_SUFFIX)
            if sha256(build.quantized / file) != self.expected[file]:
                self.faults.append(f"{name}: {file} counts as whole and is not")
        return len(whole)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(build: Build) -> dict[str, str]:
    return {path.name: sha256(path) for path in build.quantized.glob("*.safetensors")}


def strangers(build: Build) -> list[str]:
    """What lies in a build whose quantize is done, and should not."""
    found = [
        path.relative_to(build.root).as_posix()
        for path in build.root.rglob("*")
        if path.name.endswith(PARTIAL_SUFFIX) or path.name.startswith(".lock.")
    ]
    records = {path.name for path in (build.root / "records").iterdir()}
    return found + sorted(records - {"download.json", "quantize.json"})


def start(build: Build, *options: str) -> subprocess.Popen[str]:
    quantize = [sys.executable, "-m", "nf4_pipeline", "quantize", "--build-dir", str(build.root)]
    return subprocess.Popen(
        [*quantize, "--device", "cpu", *options],
        env={**environment(build.root.parent), "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, error = process.communicate(timeout=_LONGEST)
    return process.returncode, error


def start_cluster(cpus: int) -> Cluster:
    """A cluster of one node; Ray gives up after half a minute, which a busy host may need."""
    for left in (2, 1, 0):
        try:
            return Cluster(
                initialize_head=True,
                head_node_args={"num_cpus": cpus, "include_dashboard": False},
            )
        except Exception as error:
            print(f"Ray did not start: {error}", file=sys.stderr)
            if not left:
                raise
    raise AssertionError


@contextmanager
def cluster_of(*cpus: int) -> Iterator[tuple[Cluster, list[Any], str]]:
    """A Ray cluster on this host with a node for each number of CPUs."""
    cluster = start_cluster(cpus[0])
    try:
        nodes = [cluster.add_node(num_cpus=count) for count in cpus[1:]]
        cluster.wait_for_nodes()
        yield cluster, [cluster.head_node, *nodes], cluster.address
    finally:
        cluster.shutdown()


def half_written(build: Build) -> tuple[str, int] | None:
    """A file that is being written, and the process that does; None for none."""
    for name, makers in build.makers().items():
        try:
            found = partial_of(build.quantized / name).stat()
        except OSError:
            continue
        if found.st_size > 2**20 and 0 < found.st_blocks * 512 and makers.may_live:
            return name, makers.pid
    return None


def wait_until_half_written(
    build: Build, process: subprocess.Popen[str], among: set[int] | None = None
) -> tuple[str, int]:
    """Waits for a file in the middle of being written, by one of some processes."""
    limit = time.monotonic() + _LONGEST
    while time.monotonic() < limit and process.poll() is None:
        found = half_written(build)
        if found is not None and (among is None or found[1] in among):
            return found
        time.sleep(0.0005)
    raise RuntimeError("no file was seen half written")


def raylet_of(pid: int) -> int:
    """The process that started a worker."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:"))


def watch_makers(build: Build, process: subprocess.Popen[str]) -> dict[int, int]:
    """The processes that make files until the driver ends, and the raylet of each."""
    found: dict[int, int] = {}
    while process.poll() is None:
        for makers in build.makers().values():
            if makers.pid not in found:
                with suppress(OSError):  # it ended
                    found[makers.pid] = raylet_of(makers.pid)
        time.sleep(0.002)
    return found


def run_hashes(bench: Bench, options: argparse.Namespace) -> None:
    print("| scheduled by | processes that made files | same hashes |\n| --- | --- | --- |")

    def say(name: str, made: int, good: bool) -> None:
        print(f"| {name} | {made} | {'yes' if good else 'NO'} |", flush=True)

    for count in (1, 3, 8):
        build = bench.build(f"part-{count}")
        order = list(range(1, count + 1))
        random.Random(count).shuffle(order)
        running = [start(build, "--part", f"{number}/{count}") for number in order]
        ended = [end(process) for process in running]
        pids = {makers.pid for makers in build.makers().values()}
        status, error = end(start(build, "--merge"))
        good = bench.check(f"--part of {count}", build, status, error)
        good = good and not any(failed for failed, _ in ended)
        say(
            f"`--part i/{count}`, in shuffled order",
            len(pids),
            good and not any(s for s, _ in ended),
        )
    for cpus in ((1,), (2,), (8,), (1, 1)):
        with cluster_of(*cpus) as (_, nodes, address):
            build = bench.build(f"ray-{'-'.join(map(str, cpus))}")
            process = start(build, "--engine", "ray", "--ray-address", address, "--workers", "1")
            makers = watch_makers(build, process)
            good = bench.check(f"Ray of {cpus}", build, *end(process))
            if len(set(makers.values())) != len(nodes):
                bench.faults.append(f"Ray of {cpus}: nodes {set(makers.values())} made files")
            name = f"{cpus[0]} workers" if len(cpus) == 1 else "two nodes of 1 CPU on one host"
            say(f"Ray, {name}".replace("1 workers", "1 worker"), len(makers), good)
    build = bench.build("ray-own")
    process = start(build, "--engine", "ray")
    makers = watch_makers(build, process)
    good = bench.check("Ray of its own", build, *end(process))
    say("Ray, a cluster that `nf4` starts", len(makers), good)


def run_kills(bench: Bench, options: argparse.Namespace) -> None:
    good = halfway = 0
    with cluster_of(2) as (_, _, address):
        for number in range(options.kills):
            build = bench.build(f"kill-{number}")
            process = start(build, "--engine", "ray", "--ray-address", address)
            skipped = random.Random(number).randrange(12)
            while bench_files(build) < skipped:
                time.sleep(0.001)
            name, pid = wait_until_half_written(build, process)
            os.kill(pid, signal.SIGKILL)
            halfway += partial_of(build.quantized / name).exists()
            bench.check_halfway(f"kill {number}", build)
            good += bench.check(f"kill {number}", build, *end(process))
    print(
        f"worker killed in mid-file: {good} of {options.kills} end with the same hashes; "
        f"{halfway} left half of a file behind",
        flush=True,
    )


def bench_files(build: Build) -> int:
    return len(list(build.quantized.glob(f"*{FACTS_SUFFIX}")))


def run_node(bench: Bench, options: argparse.Namespace) -> None:
    with cluster_of(1, 1) as (cluster, nodes, address):
        build = bench.build("node")
        process = start(build, "--engine", "ray", "--ray-address", address)
        raylet = nodes[1].all_processes["raylet"][0].process.pid
        while True:
            name, pid = wait_until_half_written(build, process)
            if raylet_of(pid) == raylet:
                break
        cluster.remove_node(nodes[1], allow_graceful=False)
        left = partial_of(build.quantized / name).exists()
        whole = bench.check_halfway("node", build)
        good = bench.check("node", build, *end(process))
    print(
        f"node removed in mid-file: {int(good)} of 1 ends with the same hashes "
        f"({whole} files were whole, half of one was left: {left})",
        flush=True,
    )


def run_driver(bench: Bench, options: argparse.Namespace) -> None:
    with cluster_of(2) as (_, _, address):
        there = ["--ray-address", address]
        for name, number, place in (
            ("killed on a cluster of its own", signal.SIGKILL, []),
            ("killed on a running cluster", signal.SIGKILL, there),
            ("asked to end (SIGTERM) on a cluster of its own", signal.SIGTERM, []),
            ("interrupted (SIGINT) on a running cluster", signal.SIGINT, there),
        ):
            build = bench.build("driver")
            process = start(build, "--engine", "ray", *place)
            while bench_files(build) < 5:
                time.sleep(0.001)
            wait_until_half_written(build, process)
            process.send_signal(number)
            status, error = end(process)
            if number != signal.SIGKILL and status != 128 + number:
                bench.faults.append(f"driver {name}: exit {status}: {error[-500:]}")
            whole = bench.check_halfway("driver", build)
            before = {p.name: p.stat().st_ino for p in build.quantized.glob("*.safetensors")}
            status, error, tries = -1, _NO_START, 0
            while _NO_START in error and tries < _MOST_TRIES:
                status, error = end(start(build, "--engine", "ray", *place))
                tries += 1
            after = {p.name: p.stat().st_ino for p in build.quantized.glob("*.safetensors")}
            kept = sum(after.get(name) == inode for name, inode in before.items())
            good = bench.check(f"driver {name}", build, status, error)
            print(
                f"driver {name} and started again: {int(good)} of 1 ends with the same hashes "
                f"({whole} files were whole, {kept} were kept; starts: {tries})",
                flush=True,
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("campaigns", nargs="*", default=CAMPAIGNS, metavar="CAMPAIGN")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=1024)
    options = parser.parse_args()
    # A job in the background ignores it, and would hand that down to the commands that are stopped.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="nf4-ray-") as temporary:
        folder = Path(temporary)
        model = write_falcon(folder / "model", hidden=options.hidden, layers=9, shards=30)
        build, *_ = download(model, folder / "artifacts")
        bench = Bench(folder, build.root)
        local = bench.build("local")
        status, error = end(start(local))
        bench.expected = hashes(local)
        bench.check("local", local, status, error)
        source = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        print(
            f"{len(bench.expected)} output files of a {source / 1e6:,.0f} MB checkpoint; "
            f"Ray {ray.__version__}, {os.cpu_count()} processors\n",
            flush=True,
        )
        for name in options.campaigns:
            {"hashes": run_hashes, "kills": run_kills, "node": run_node, "driver": run_driver}[
                name
            ](bench, options)
    for fault in bench.faults:
        print(fault, file=sys.stderr)
    return 1 if bench.faults else 0


if __name__ == "__main__":
    sys.exit(main())
