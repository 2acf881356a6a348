"""Ray tasks on a node that sees nothing of the driver's disk, and tasks that stream or calibrate.

    python scripts/campaigns/ray_elsewhere.py [url] [streamed] [calibrated] [verified]
        [--kills 10] [--rounds 2]

Needs the extras `nf4-pipeline[ray,s3]`, moto, and the right to make a mount namespace. A cluster of
two nodes on this host quantizes a Hub model into S3; from one of the nodes the folder is hidden in
which the driver has build, source and Hub cache, so that it fetches from the Hub (one of tests) and
leaves what it makes in S3 alone. Workers there, the node, the driver, and the server of S3 are
killed in mid-file. Then a streamed and a calibrated build on one node, of which workers are killed.
Every result must have the hashes of the local engine. At last the sample is verified by two nodes,
of which workers are killed: the figures must be those of one process. Exits 1 if anything was not
as it must be.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2]))

from nf4_pipeline.build_folder import Build
from nf4_pipeline.build_folder.makers import read_makers
from nf4_pipeline.checkpoint.atomic import PARTIAL_SUFFIX
from nf4_pipeline.job import run_stage
from nf4_pipeline.object_store import ObjectStore
from nf4_pipeline.processes.in_process import in_process
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.records import QUANTIZE
from ray.cluster_utils import Cluster
from ray_engine import cluster_of, half_written, raylet_of

from tests.support.calibrated import settings
from tests.support.hub_client import isolated
from tests.support.hub_server import HubServer, Seen
from tests.support.jobs import CPU, download
from tests.support.s3_server import S3Server
from tests.support.stores import served
from tests.support.tiny import copy_of, write_falcon

CAMPAIGNS: Final = ("url", "streamed", "calibrated", "verified")
REPO: Final = "me/falcon"
_LONGEST: Final = 300.0  # seconds, after which something hangs
_PAUSE: Final = 0.02  # seconds that the server of S3 waits in the middle of each object


@dataclass
class Elsewhere:
    """A Hub, a store, a place of the driver, and a place of whoever does not see that.

    Attributes:
        folder: for everything.
        hub: has the model.
        expected: name in quantized/ -> sha256, of the local engine.
        faults: what was not as it must be.
    """

    folder: Path
    hub: HubServer
    expected: dict[str, str]
    faults: list[str] = field(default_factory=list)

    @property
    def driver(self) -> Path:
        """Seen by the driver and the head."""
        return self.folder / "driver"

    @property
    def tasks(self) -> Path:
        """Where tasks elsewhere have their folders."""
        return self.folder / "elsewhere" / "tmp"

    def start(self, *args: str | Path) -> subprocess.Popen[str]:
        """Starts `nf4 ARGS` at the driver's place."""
        return subprocess.Popen(
            [sys.executable, "-m", "nf4_pipeline", *map(str, args), "--device", "cpu"],
            cwd=self.driver,
            env=isolated(self.driver / "hf", self.hub.url, CUDA_VISIBLE_DEVICES=""),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def fetch(self, *options: str | Path) -> None:
        args = [sys.executable, "-m", "nf4_pipeline", "download", REPO, *map(str, options), "-q"]
        env = isolated(self.driver / "hf", self.hub.url)
        subprocess.run(args, cwd=self.driver, env=env, check=True, stdout=subprocess.DEVNULL)

    @contextmanager
    def hidden_node(self, cluster: Cluster, address: str) -> Iterator[subprocess.Popen[bytes]]:
        """Another node on this host, for which the driver's place is an empty folder."""
        before = set(cluster.global_state._live_node_ids())
        self.tasks.mkdir(parents=True, exist_ok=True)
        hide = 'mount -t tmpfs none "$HIDDEN" && exec "$0" -m ray.scripts.scripts "$@"'
        start = ["start", "--address", address, "--num-cpus", "1", "--block"]
        node = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", hide, sys.executable, *start],
            env=isolated(
                self.tasks.parent / "hf",
                self.hub.url,
                HIDDEN=str(self.driver),
                TMPDIR=str(self.tasks),
                CUDA_VISIBLE_DEVICES="",
            ),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            end = time.monotonic() + _LONGEST
            while not set(cluster.global_state._live_node_ids()) - before:
                if time.monotonic() > end or node.poll() is not None:
                    raise RuntimeError("the node that sees nothing did not join")
                time.sleep(0.1)
            yield node
        finally:
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGTERM)
            node.wait()

    def half_written(self) -> int | None:
        """The process of a task elsewhere that is in the midst of a file; None for none."""
        for path in self.tasks.glob(f"nf4-task-*/build/quantized/*{PARTIAL_SUFFIX}"):
            with suppress(OSError):
                if path.stat().st_blocks:
                    for lock in path.parents[1].glob(".lock.model*"):
                        if (makers := read_makers(lock)) and makers.may_live:
                            return makers.pid
        return None

    def check(self, name: str, url: str, status: int, error: str) -> bool:
        """Holds what stands at a URL against what the local engine made."""
        found = [f"exit {status}: {error[-800:]}"] if status else []
        store = ObjectStore(url)
        names = set(store.names())
        facts = {f"quantized/{file}.facts.json" for file in self.expected}
        files = {f"quantized/{file}" for file in self.expected}
        if names != {"build.json", "records/quantize.json", *facts, *files}:
            found.append(f"stands there: {sorted(names)}")
        for file, expected in self.expected.items():
            content = store.read(f"quantized/{file}", 2**30) or b""
            if hashlib.sha256(content).hexdigest() != expected:
                found.append(f"other bytes: {file}")
        self.faults += [f"{name}: {fault}" for fault in found]
        return not found


@contextmanager
def who_makes(it: Elsewhere, copy: Path) -> Iterator[Counter[str]]:
    """Counts the files that are begun, elsewhere and where the driver is, while the body runs."""
    seen: dict[str, set[str]] = {"elsewhere": set(), "beside the driver": set()}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            for lock in it.tasks.glob("nf4-task-*/build/.lock.model*"):
                seen["elsewhere"].add(lock.name)
            for lock in copy.glob(".lock.model*"):
                seen["beside the driver"].add(lock.name)

    thread = threading.Thread(target=watch)
    thread.start()
    counted = Counter[str]()
    try:
        yield counted
    finally:
        ended.set()
        thread.join()
        counted.update({where: len(names) for where, names in seen.items()})


def until(what: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """Waits for something to be seen while a process runs."""
    end = time.monotonic() + _LONGEST
    while time.monotonic() < end and process.poll() is None:
        if (found := what()) is not None:
            return found
        time.sleep(0.0005)
    raise RuntimeError(f"nothing was seen: {process.stderr.read() if process.stderr else ''}")


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, error = process.communicate(timeout=_LONGEST)
    return process.returncode, error


def run_url(it: Elsewhere, options: argparse.Namespace) -> None:
    """Builds in S3, by two nodes of which one sees nothing of the driver's disk."""
    numbers = iter(range(1000))
    with ExitStack() as stack:
        server = stack.enter_context(served(it.folder / "server", _PAUSE))
        cluster, _, address = stack.enter_context(cluster_of(1))
        ray = ["--engine", "ray", "--ray-address", address, "--workers", "1"]

        def begin() -> tuple[str, subprocess.Popen[str]]:
            server.forget("bucket")  # else what it must remember grows
            _begun(server).unlink(missing_ok=True)
            url = f"s3://bucket/runs/{next(numbers)}"
            it.fetch("--build-dir", url)
            return url, it.start("quantize", "--build-dir", url, *ray)

        def copy_at(url: str) -> Path:
            noted = {path: path.read_text() for path in it.driver.glob("artifacts/*/remote.json")}
            return next(path.parent for path, text in noted.items() if f'"{url}"' in text)

        def in_mid_file(url: str, process: subprocess.Popen[str], number: int) -> int:
            """Waits for a task elsewhere in the midst of a file, some files later each time."""
            skipped = random.Random(number).randrange(len(it.expected) // 2)
            until(lambda: _whole_at(url) >= skipped or None, process)
            pid: int = until(it.half_written, process)
            return pid

        def say(what: str, right: int, of: int, more: str = "") -> None:
            print(f"{what}: {right} of {of} {more}", flush=True)

        with it.hidden_node(cluster, address):
            url, process = begin()
            with who_makes(it, copy_at(url)) as made:
                good = it.check("url", url, *finish(process))
            say("S3, a node that sees nothing", int(good), 1, f"files begun: {dict(made)}")
            for where in ("elsewhere", "beside the driver"):
                if not made[where]:
                    it.faults.append(f"url: nothing was made {where}")
            right = 0
            for number in range(options.kills):
                url, process = begin()
                os.kill(in_mid_file(url, process, number), signal.SIGKILL)
                right += it.check(f"kill {number}", url, *finish(process))
            say("S3, worker elsewhere killed in mid-file", right, options.kills)
            right, stood = 0, []
            for number in range(options.rounds):
                url, process = begin()
                in_mid_file(url, process, number)
                process.kill()
                finish(process)
                stood.append(_whole_at(url))
                shutil.rmtree(copy_at(url))  # the next driver has an empty disk
                it.fetch("--build-dir", url)
                status = finish(it.start("quantize", "--build-dir", url, *ray))
                right += it.check(f"driver {number}", url, *status)
            say(
                "S3, driver killed, another with an empty disk",
                *(right, options.rounds, f"files that stood there: {stood}"),
            )
            right, cut = 0, []
            for number in range(options.rounds):
                url, process = begin()
                cut.append(_kill_in_mid_write(server, process))
                time.sleep(1.0)
                server.start()
                right += it.check(f"server {number}", url, *finish(process))
            say(
                "S3 lost in mid-write, back after a second",
                *(right, options.rounds, f"objects half sent: {cut}"),
            )
            url, process = begin()
            cut = [_kill_in_mid_write(server, process)]
            status, error = finish(process)
            server.start()
            stood = [_whole_at(url)]
            if status == 0 or "Traceback" in error:
                it.faults.append(f"server lost for good: exit {status}: {error[-800:]}")
            again = finish(it.start("quantize", "--build-dir", url, *ray))
            say(
                "S3 lost until the command gave up, which was typed again",
                *(int(it.check("server lost for good", url, *again)), 1),
                f"exit {status}, {error.strip().splitlines()[-1][:200]!r}; objects half sent: "
                f"{cut}; files that stood there: {stood}",
            )
        for number_of, name in ((signal.SIGKILL, "killed"), (signal.SIGTERM, "asked to stop")):
            right, stood = 0, []
            for number in range(options.rounds):
                with it.hidden_node(cluster, address) as node:
                    url, process = begin()
                    raylet = raylet_of(in_mid_file(url, process, number))
                    if number_of == signal.SIGKILL:
                        os.kill(raylet, signal.SIGKILL)
                    else:
                        os.killpg(node.pid, signal.SIGTERM)
                    stood.append(_whole_at(url))
                    right += it.check(f"node {name} {number}", url, *finish(process))
            say(
                f"S3, node elsewhere {name} in mid-file",
                *(right, options.rounds, f"files that stood there: {stood}"),
            )


def _whole_at(url: str) -> int:
    """How many files stand at a URL with their facts, so that they count."""
    names = ObjectStore(url).names()
    return sum(f"{name}.facts.json" in names for name in names)


def _begun(server: S3Server) -> Path:
    """Where it notes which objects begin to come, and which have come."""
    return server.notes.with_suffix(".begun")


def _kill_in_mid_write(server: S3Server, process: subprocess.Popen[str]) -> int:
    """Kills it while an object is half there; returns how many are."""
    notes = _begun(server)

    def sending() -> bool | None:
        lines = notes.read_text().split() if notes.exists() else []
        return True if lines.count("+") > lines.count("-") and len(lines) > 8 else None

    until(sending, process)
    return server.kill()


def run_streamed(it: Elsewhere, options: argparse.Namespace) -> None:
    """Files of the source come to the tasks and go; workers are killed in mid-file."""
    right, fetched = 0, 0
    sizes = {path.name: path.stat().st_size for path in it.driver.glob("model/*.safetensors")}
    of_nodes = {"HF_ENDPOINT": it.hub.url, "HF_HOME": str(it.driver / "hf")}
    with patch.dict(os.environ, of_nodes), cluster_of(2) as (_, _, address):
        for number in range(options.kills):
            build = Build(it.driver / f"streamed-{number}")
            it.fetch("--stream-source", "--build-dir", build.root)
            before = len(it.hub.seen)
            process = it.start(
                *("quantize", "--build-dir", build.root, "--engine", "ray"),
                *("--ray-address", address, "--workers", "1"),
            )
            skipped = random.Random(number).randrange(6)

            def seen(build: Build = build, skipped: int = skipped) -> tuple[str, int] | None:
                whole = len(list(build.quantized.glob("*.facts.json")))
                return half_written(build) if whole >= skipped else None

            os.kill(until(seen, process)[1], signal.SIGKILL)
            status, error = finish(process)
            record = build.record(QUANTIZE)
            outputs = record.outputs if record else {}
            found = {Path(name).name: digest.sha256 for name, digest in outputs.items()}
            left = list(build.root.rglob(f"*{PARTIAL_SUFFIX}")) + list(
                build.root.glob("streamed/spool*")
            )
            if status or found != it.expected or left:
                it.faults.append(f"streamed {number}: exit {status}: {error[-500:]} {left}")
            else:
                right += 1
            fetched += sum(_asked(seen, sizes) for seen in it.hub.seen[before:])
            shutil.rmtree(build.root)
    print(
        f"streamed, worker killed in mid-file: {right} of {options.kills}; the Hub was asked for "
        f"{fetched / options.kills / sum(sizes.values()):.2f} of the source's bytes",
        flush=True,
    )


def _asked(seen: Seen, sizes: dict[str, int]) -> int:
    """Bytes of weights that a request to the Hub asks for."""
    size = sizes.get(seen.path.rpartition("/")[2], 0)
    if not seen.cdn or seen.method != "GET":
        return 0
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", seen.range)
    return size if wanted is None else int(wanted[2] or size - 1) + 1 - int(wanted[1])


def run_calibrated(it: Elsewhere, options: argparse.Namespace) -> None:
    """One task does all; its worker, or the driver, is killed at each of some moments."""
    model = write_falcon(it.driver / "small", hidden=256, layers=4, shards=16)
    text = it.driver / "text.txt"
    text.write_text("".join(chr(32 + (i * i + i // 90) % 90) for i in range(20000)))
    recipe = it.driver / "recipe.toml"
    recipe.write_text(
        f'[quantize]\ncalibrate = "{text}"\ncalibration_tokens = 1024\neffort = "high"\n'
    )
    with in_process():
        fresh, *_ = download(model, it.driver / "small-build")
        local = Build(copy_of(fresh.root, it.driver / "small-local"))
        run_stage(local, "quantize", settings(text, effort="high"), CPU, SILENT)
    expected = local.need(QUANTIZE)
    learning = expected.facts.calibration and expected.facts.calibration.learning
    print(f"calibrated: {len(expected.outputs)} outputs; learned: {learning}", flush=True)
    quantize = ["quantize", "--recipe", str(recipe), "--engine", "ray", "--build-dir"]
    with cluster_of(2) as (_, _, address):
        there = ["--ray-address", address]
        for number, (victim, (moment, reached)) in enumerate(
            product(("worker", "driver"), MOMENTS.items())
        ):
            right = kept = 0
            for each in range(options.rounds):
                name = f"calibrated, {victim} killed {moment} ({each})"
                build = Build(copy_of(fresh.root, it.driver / f"calibrated-{number}-{each}"))
                process = it.start(*quantize, build.root, *there)
                pid = until(partial(_calibrating, build, reached), process)
                if victim == "worker":
                    os.kill(pid, signal.SIGKILL)
                else:
                    process.kill()
                    finish(process)
                before = {path: path.stat().st_mtime_ns for path in _blocks(build)}
                kept += len(before)
                if victim == "driver":
                    process = it.start(*quantize, build.root, *there)
                again: set[Path] = set()
                while process.poll() is None:
                    for path, changed in before.items():
                        with suppress(OSError):  # it has gone, since all is done
                            if path.stat().st_mtime_ns != changed:
                                again.add(path)
                    time.sleep(0.01)
                status, error = finish(process)
                record = build.record(QUANTIZE)
                left = [*build.root.rglob(f"*{PARTIAL_SUFFIX}"), *build.root.rglob("*.state")]
                if status or again or left or not record or record.outputs != expected.outputs:
                    it.faults.append(f"{name}: exit {status}: {error[-500:]} {again} {left}")
                else:
                    right += 1
                shutil.rmtree(build.root)
            print(
                f"calibrated, {victim} killed {moment}: {right} of {options.rounds}; {kept} blocks "
                "stood at the kills, and were kept",
                flush=True,
            )


def _blocks(build: Build) -> list[Path]:
    """The files of blocks whose codes are chosen, or have learned."""
    return list(build.calibration.glob("*/*.safetensors"))


def _learns(build: Build) -> bool:
    return any(build.calibration.glob("*/learning.state"))


MOMENTS: Final[dict[str, Callable[[Build], bool]]] = {
    "before the first block": lambda build: (build.calibration / "tokens.json").exists(),
    "after 2 blocks": lambda build: len(_blocks(build)) >= 2,
    "while codes learn": _learns,
    "while files are written": lambda build: any(build.quantized.glob("*")),
}
"""Of a calibrated build: name -> whether it has come."""


def _calibrating(build: Build, reached: Callable[[Build], bool]) -> int | None:
    """The worker that calibrates, once a moment has come."""
    maker = build.makers().get("calibration")
    return maker.pid if maker is not None and maker.may_live and reached(build) else None


def run_verified(it: Elsewhere, options: argparse.Namespace) -> None:
    """Two nodes compare the sample with its source; one of the workers is killed at it."""

    def figures(name: str) -> dict[str, Any]:
        path = it.driver / name / "export" / "verification.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        return {n: v for n, v in found.items() if n not in ("comparison", "models", "answers")}

    finish(it.start("build", "sample", "--build-dir", "alone"))
    expected = figures("alone")
    right = killed = 0
    with cluster_of(1, 1) as (_, _, address):
        for number in range(1 + options.kills):
            name = f"on-ray-{number}"
            job = ["build", "sample"]
            if number % 2:  # what stands there is verified again
                copy_of(it.driver / "alone", it.driver / name)
                job = ["verify"]
            process = it.start(
                *(*job, "--build-dir", name, "--engine", "ray", "--ray-address", address)
            )

            def comparing(name: str = name) -> int | None:
                folder = it.driver / name
                begun = (folder / "records" / "serialize.json").exists()
                verdict = (folder / "export" / "verification.json").exists()
                return _task_at_work() if begun and not verdict else None

            if number:  # the first one is left alone
                pid = until(comparing, process)
                time.sleep(random.Random(number).uniform(0.0, 3.0))
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
            status, error = finish(process)
            if status or figures(name) != expected:
                it.faults.append(f"verified {number}: exit {status}: {error[-500:]}")
            else:
                right += 1
            shutil.rmtree(it.driver / name)
    text = expected.get("text", {})
    print(
        f"verified by two nodes ({text.get('tokens')} tokens, {text.get('sequences')} sequences): "
        f"the figures of one process {right} of {1 + options.kills} times; {killed} workers killed",
        flush=True,
    )


def _task_at_work() -> int | None:
    """A worker of Ray that runs a task of ours; None if none does."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if path.read_bytes().startswith(b"ray::_run"):
                return int(path.parent.name)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("campaigns", nargs="*", default=CAMPAIGNS, metavar="CAMPAIGN")
    parser.add_argument("--kills", type=int, default=10, help="of workers")
    parser.add_argument("--rounds", type=int, default=2, help="of each other case")
    options = parser.parse_args()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # else ignored in a job in the background
    with tempfile.TemporaryDirectory(prefix="nf4-ray-") as temporary, HubServer() as hub:
        folder = Path(temporary)
        model = write_falcon(folder / "driver" / "model", hidden=1024, layers=6, shards=24)
        hub.store.add(REPO, model)
        with in_process():
            build, *_ = download(model, folder / "local")
            run_stage(build, "quantize", Recipe(), CPU, SILENT)
        outputs = build.need(QUANTIZE).outputs
        expected = {Path(name).name: digest.sha256 for name, digest in outputs.items()}
        it = Elsewhere(folder, hub, expected)
        print(f"{len(expected)} output files", flush=True)
        for name in options.campaigns:
            {
                "url": run_url,
                "streamed": run_streamed,
                "calibrated": run_calibrated,
                "verified": run_verified,
            }[name](it, options)
    for fault in it.faults:
        print(fault, file=sys.stderr)
    return 1 if it.faults else 0


if __name__ == "__main__":
    sys.exit(main())
