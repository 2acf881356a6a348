"""Files as tasks: of Ray where it is installed, and of a stand-in that keeps Ray's promises."""

from __future__ import annotations

import importlib.util
import pickle
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from nf4_pipeline.api.options import make_machine
from nf4_pipeline.build_folder import Build
from nf4_pipeline.cluster.ray_tasks import Claim
from nf4_pipeline.engine.parts import Part
from nf4_pipeline.errors import BuildError, CheckpointError, ResourceError, UsageError
from nf4_pipeline.job import run_build, run_stage
from nf4_pipeline.machine import Machine
from nf4_pipeline.progress import SILENT, ProgressEvent, reporting_to
from nf4_pipeline.recipe import QuantizeRecipe, Recipe
from nf4_pipeline.records import QUANTIZE
from nf4_pipeline.stages import quantize_on_ray
from nf4_pipeline.stages.find_source import DownloadRequest
from nf4_pipeline.stages.quantize import Quantize
from nf4_pipeline.stages.quantize_on_ray import Order, claim_of, make_file
from safetensors.torch import load_file, save_file

from tests.support.command_line import run_nf4
from tests.support.jobs import CPU, download
from tests.support.tiny import copy_of, nf4, write_falcon

pytestmark = pytest.mark.usefixtures("workers_here")

RAY: Final = Machine(device="cpu", engine="ray")
Call = Callable[[Any], None]

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs the extra nf4-pipeline[ray]"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Falcon in nine files, of which two hold nothing but norms and the tied head."""
    return write_falcon(tmp_path_factory.mktemp("on-ray") / "falcon", layers=4, shards=9)


@pytest.fixture(scope="module")
def downloaded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of it in which download is done."""
    build, *_ = download(source, tmp_path_factory.mktemp("downloaded"))
    return build.root


@pytest.fixture
def build(downloaded: Path, tmp_path: Path) -> Build:
    return Build(copy_of(downloaded, tmp_path / "build"))


@pytest.fixture(scope="module")
def whole(downloaded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name in quantized/ -> sha256, as the local engine makes it."""
    local = Build(copy_of(downloaded, tmp_path_factory.mktemp("whole") / "build"))
    run_stage(local, "quantize", Recipe(), CPU, SILENT)
    return hashes(local)


def hashes(build: Build) -> dict[str, str]:
    return {name: digest.sha256 for name, digest in build.need(QUANTIZE).outputs.items()}


@dataclass
class StandIn:
    """Two processors of another machine: calls come there as bytes, in any order, some twice.

    Attributes:
        seen_there: what that machine sees of an order: not everything need be there.
    """

    seen_there: Callable[[Order], Order] = lambda order: order
    cpus: int = 2
    gpus: int = 0
    largest: Claim = Claim(2)

    def run(
        self,
        call: partial[None],
        items: Sequence[Any],
        claim: Claim,
        check: Callable[[], None] = lambda: None,
        ended: Callable[[Any], None] = lambda item: None,
    ) -> None:
        sent = [pickle.dumps((call, item)) for item in items]
        again = random.Random(0).choices(sent, k=3)
        for both in random.Random(1).sample([*sent, *again], len(sent) + 3):
            there, item = pickle.loads(both)
            if isinstance(item, Order):
                there(self.seen_there(item))
            else:
                there.func(self.seen_there(there.args[0]), item)
            ended(item)
            check()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    cluster = StandIn()

    @contextmanager
    def connected(address: str | None) -> Iterator[StandIn]:
        yield cluster

    monkeypatch.setattr(quantize_on_ray, "connected", connected)
    monkeypatch.setattr("nf4_pipeline.job.check_installed", lambda: None)
    return cluster


def quantize(build: Build, machine: Machine = RAY, recipe: Recipe | None = None) -> None:
    run_stage(build, "quantize", recipe or Recipe(), machine, SILENT)


@pytest.mark.usefixtures("stand_in")
def test_tasks_leave_what_the_local_engine_leaves(build: Build, whole: dict[str, str]) -> None:
    events: list[ProgressEvent] = []
    with reporting_to(events.append) as reporter:
        result = run_stage(build, "quantize", Recipe(), RAY, reporter)
    assert len(whole) == 7
    assert result.ran
    assert hashes(build) == whole
    assert result.record.seconds > 0
    assert {path.name for path in (build.root / "records").iterdir()} == {
        "download.json",
        "quantize.json",
    }
    assert [path.name for path in build.root.glob(".lock*")] == [".lock"]
    ended = {e.task: e for e in events if e.kind == "task_end"}
    assert (ended["whole files"].done, ended["whole files"].total) == (7, 7)
    written = ended["write quantized files"]
    assert written.done == written.total == sum(p.stat().st_size for p in safetensors(build))
    assert not run_stage(build, "quantize", Recipe(), RAY, SILENT).ran
    assert "ray" not in sys.modules


def safetensors_planned(build: Build) -> list[str]:
    return list(Quantize(build, Recipe(), CPU).plan().layouts())


def safetensors(build: Build) -> list[Path]:
    return list(build.quantized.glob("*.safetensors"))


def test_the_next_one_goes_on_where_one_ended(
    build: Build, whole: dict[str, str], stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever that is: tasks, or the local engine."""

    def lose(call: Call, items: Sequence[Any], *_: object) -> None:
        for item in items[:4]:
            call(item)
        raise ResourceError("The cluster is lost")

    with monkeypatch.context() as lost:
        lost.setattr(stand_in, "run", lose)
        with pytest.raises(ResourceError, match="lost"):
            quantize(build)
    made = {path.name: path.stat().st_ino for path in safetensors(build)}
    assert len(made) == 4
    local = Build(copy_of(build.root, build.root.with_name("local")))
    quantize(build)
    quantize(local, CPU)
    assert hashes(build) == hashes(local) == whole
    assert made.items() <= {path.name: path.stat().st_ino for path in safetensors(build)}.items()


@pytest.mark.usefixtures("stand_in")
def test_tied_weights_that_differ_are_found_once(source: Path, tmp_path: Path) -> None:
    model = copy_of(source, tmp_path / "model")
    file = next(path for path in model.glob("*.safetensors") if "lm_head.weight" in load_file(path))
    tensors = load_file(file)
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, file, {"format": "pt"})
    builds = [download(model, tmp_path / name).build for name in ("local", "tasks")]
    for build, machine in zip(builds, (CPU, RAY), strict=True):
        quantize(build, machine)
        assert build.need(QUANTIZE).facts.untied == ("lm_head.weight",)
    assert hashes(builds[0]) == hashes(builds[1])


@pytest.mark.usefixtures("stand_in")
def test_what_a_task_finds_wrong_is_said_as_it_is(source: Path, tmp_path: Path) -> None:
    model = copy_of(source, tmp_path / "model")
    file = max(model.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    tensors = load_file(file)
    max(tensors.values(), key=lambda tensor: tensor.nbytes)[0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    build, *_ = download(model, tmp_path / "builds")
    with pytest.raises(CheckpointError, match="infinity or a NaN"):
        quantize(build)
    assert build.record(QUANTIZE) is None


def test_a_node_that_cannot_help_says_why(
    build: Build, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(stand_in, "run", lambda call, items, *_: calls.append((call, items)))
    with pytest.raises(BuildError, match="has no parts to merge"):
        quantize(build)
    [(call, items)] = calls
    [order], part = call.args, items[0]
    assert part == (Part(7, 1), min(safetensors_planned(build)))
    elsewhere = build.root.rename(build.root.with_name("elsewhere"))
    with pytest.raises(ResourceError, match=r"is not there on .* by the same paths"):
        make_file(order, part)
    elsewhere.rename(build.root)
    monkeypatch.setattr("nf4_pipeline.stages.quantize.CODE_VERSION", 0)
    with pytest.raises(ResourceError, match="another version of nf4-pipeline"):
        make_file(order, part)


@pytest.mark.usefixtures("stand_in")
def test_who_watches_can_end_it(build: Build) -> None:
    """A callback of the Python API raises: at the first look, or when the files are whole."""

    def stop(event: ProgressEvent) -> None:
        if "worker" in event.task:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"), reporting_to(stop) as reporter:
        run_stage(build, "quantize", Recipe(), RAY, reporter)
    assert build.record(QUANTIZE) is None
    quantize(build)


CLAIMS: Final = [
    # device, workers, CPUs, GPUs, GB of the source, files -> claim
    ("cpu", 0, 2, 0, 14, 16, Claim(1)),
    ("cpu", 0, 64, 8, 360, 16, Claim(4)),
    ("cpu", 0, 1024, 0, 14, 3, Claim(8)),
    ("cpu", 3, 1024, 0, 14, 3, Claim(3)),
    ("auto", 0, 0, 0, 14, 16, Claim(1)),
    ("auto", 0, 4, 1, 14, 16, Claim(1)),  # starting CUDA takes longer
    ("auto", 0, 4, 1, 360, 16, Claim(1, 0.5)),
    ("auto", 0, 64, 8, 360, 16, Claim(4)),
    ("auto", 5, 64, 8, 810, 16, Claim(1, 0.5)),
    ("auto", 0, 2, 8, 810, 16, Claim(1, 0.5)),
    ("cuda", 0, 64, 0, 14, 16, Claim(1, 0.5)),
]


@pytest.mark.parametrize(("device", "workers", "cpus", "gpus", "size", "files", "claim"), CLAIMS)
def test_what_a_task_claims(
    device: str, workers: int, cpus: int, gpus: int, size: int, files: int, claim: Claim
) -> None:
    machine = Machine(device=device, workers=workers, engine="ray")
    found = claim_of(machine, cpus, gpus, files=files, source_bytes=size * 10**9)
    assert found == claim


def test_without_ray_the_message_says_what_to_install(
    tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "ray" else found(name, *rest),
    )
    before = build.record(QUANTIZE)
    for command in (
        ("build", "sample", "--build-dir", tmp_path / "new"),
        ("quantize", "--build-dir", build.root),
    ):
        done = run_nf4(*command, "--engine", "ray")
        assert done.status == 2
        assert "pip install 'nf4-pipeline[ray]'" in done.err
    assert not (tmp_path / "new").exists()
    assert build.record(QUANTIZE) is before


@pytest.mark.usefixtures("stand_in")
def test_calibrated_codes_cannot_be_dealt_out(source: Path, build: Build, tmp_path: Path) -> None:
    """Said before anything is fetched or changed."""
    recipe = Recipe(quantize=QuantizeRecipe(calibrate="self"))
    said = (build.root / "build.json").read_bytes()
    with pytest.raises(UsageError, match=r"--engine ray: .* cannot be divided"):
        quantize(build, recipe=recipe)
    assert (build.root / "build.json").read_bytes() == said
    with pytest.raises(UsageError, match="cannot be divided"):
        run_build(DownloadRequest(str(source), tmp_path / "none"), recipe, RAY, SILENT)
    assert not (tmp_path / "none").exists()


OPTIONS: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "an engine that is none": ({"engine": "dask"}, "--engine 'dask': expected local or ray"),
    "an address without an engine": ({"ray_address": "auto"}, "add --engine ray"),
    "a GPU by number": ({"engine": "ray", "device": "cuda:1"}, "no number on a cluster"),
}


@pytest.mark.parametrize(("options", "said"), OPTIONS.values(), ids=OPTIONS.keys())
def test_options_that_mean_nothing(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_machine(**options)


@needs_ray
def test_ray_itself_makes_the_same_bytes(
    build: Build, whole: dict[str, str], tmp_path: Path
) -> None:
    """On a cluster that is started for it; scripts/campaigns/ray_engine.py has others."""
    done = nf4("quantize", "--build-dir", build.root, "--engine", "ray", "--json", cwd=tmp_path)
    assert done.status == 0, done.err
    assert done.value["ran"]
    assert hashes(build) == whole
    assert not list(build.root.rglob("*.partial"))
