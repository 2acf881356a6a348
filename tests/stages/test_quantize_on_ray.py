"""Files as tasks: of Ray where it is installed, and of a stand-in that keeps Ray's promises."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from nf4_pipeline.api.options import make_machine
from nf4_pipeline.build_folder import Build
from nf4_pipeline.calibration.block_store import BlockStore
from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.cluster.ray_tasks import Claim
from nf4_pipeline.engine.parts import Part
from nf4_pipeline.errors import BuildError, CheckpointError, ResourceError, UsageError
from nf4_pipeline.job import run_build, run_stage
from nf4_pipeline.machine import Machine
from nf4_pipeline.object_store import ObjectStore
from nf4_pipeline.progress import SILENT, ProgressEvent, reporting_to
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.records import QUANTIZE, FileFacts
from nf4_pipeline.stages import quantize as quantize_stage
from nf4_pipeline.stages import quantize_on_ray
from nf4_pipeline.stages.download_request import DownloadRequest
from nf4_pipeline.stages.outgoing import StaysHere
from nf4_pipeline.stages.quantize import Quantize
from nf4_pipeline.stages.quantize_on_ray import (
    Order,
    QuantizeOnRay,
    claim_of,
    claim_of_all,
    make_file,
)
from safetensors.torch import load_file, save_file

from tests.support.calibrated import settings
from tests.support.command_line import run_nf4
from tests.support.jobs import CPU, download
from tests.support.stand_in_cluster import (
    StandIn,
    everything,
    standing_in,
    without_files,
    without_folder,
    without_ray,
)
from tests.support.stores import fresh_url
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


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with standing_in() as cluster:
        yield cluster


def write_text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("".join(chr(32 + (i * i) % 90) for i in range(3000)))
    return path


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
    link = build.source / "config.json"
    there = link.readlink()
    link.unlink()
    link.symlink_to("/home/me/hf/config.json")  # as on a node that has no such cache
    with pytest.raises(ResourceError, match=r"leads to /home/me/hf/.* Set HF_HOME to a folder"):
        make_file(order, part)
    link.unlink()
    link.symlink_to(there)
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
    ("auto", 0, 64, 8, 14, 16, Claim(4)),
    ("auto", 0, 64, 8, 360, 16, Claim(1, 0.5)),
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
    without_ray(monkeypatch)
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


def test_calibrated_codes_are_one_task(
    build: Build, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the record of the local engine; and another one goes on where one ended."""
    recipe = settings(write_text(tmp_path))
    local = Build(copy_of(build.root, tmp_path / "local"))
    quantize(local, CPU, recipe)
    chosen: list[str] = []
    write = BlockStore.write

    def write_one(self: BlockStore, block: str, *rest: Any) -> None:
        if len(chosen) == 2:
            raise ResourceError("The worker is lost")
        chosen.append(block)
        write(self, block, *rest)

    with monkeypatch.context() as lost:
        lost.setattr(BlockStore, "write", write_one)
        with pytest.raises(ResourceError, match="lost"):
            quantize(build, recipe=recipe)
    assert build.record(QUANTIZE) is None
    again: list[str] = []

    def write_more(self: BlockStore, block: str, *rest: Any) -> None:
        again.append(block)
        write(self, block, *rest)

    monkeypatch.setattr(BlockStore, "write", write_more)
    quantize(build, recipe=recipe)
    assert not {*chosen} & {*again}
    assert len(chosen) == len(again) == 2
    assert hashes(build) == hashes(local)
    mine, theirs = build.need(QUANTIZE), local.need(QUANTIZE)
    assert mine.key == theirs.key
    assert mine.facts.calibration is not None
    assert stand_in.claims == [Claim(2), Claim(2)]
    assert not run_stage(build, "quantize", recipe, RAY, SILENT).ran
    assert [path.name for path in build.calibration.iterdir()] == ["tokens.json"]

    # A file that is gone, or has other bytes, is made again.
    whole = hashes(build)
    for damage in (Path.unlink, lambda path: path.write_bytes(b"other")):
        damage(next(build.quantized.glob("*.safetensors")))
        quantize(build, recipe=recipe)
        assert hashes(build) == whole
        build.check_inputs(QUANTIZE)


NODES: Final = [
    # device, workers, CPUs and GPUs of the largest node -> claim
    ("cpu", 0, Claim(64, 8), Claim(64)),
    ("cpu", 3, Claim(64, 8), Claim(3)),
    ("auto", 0, Claim(4), Claim(4)),
    ("auto", 0, Claim(64, 8), Claim(8, 8)),
    ("cuda", 0, Claim(2, 1), Claim(2, 1)),
    ("cuda", 0, Claim(4), Claim(4, 1)),  # which no node has: it is said so
]


@pytest.mark.parametrize(("device", "workers", "node", "claim"), NODES)
def test_what_one_task_for_all_claims(device: str, workers: int, node: Claim, claim: Claim) -> None:
    machine = Machine(device=device, workers=workers, engine="ray")
    assert claim_of_all(machine, node) == claim


@pytest.mark.usefixtures("stand_in")
def test_calibrated_codes_at_a_url_are_refused(source: Path, tmp_path: Path) -> None:
    """Said before anything is fetched or changed."""
    request = DownloadRequest(str(source), build_dir=tmp_path / "none", url=f"file://{tmp_path}/at")
    with pytest.raises(UsageError, match=r"--engine ray --calibrate: .* folder that all nodes see"):
        run_build(request, settings(), RAY, SILENT)
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / "at").exists()


@pytest.mark.parametrize("there", [everything, without_folder])
def test_tasks_elsewhere_put_their_files_to_the_url(
    there: Callable[[Order], Order],
    source: Path,
    whole: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In folders of their own, of which nothing is left; the driver's disk gets no file of them.

    scripts/campaigns/ray_engine.py has them on S3, and on a node that does not see the folder.
    """
    url = fresh_url("file", tmp_path)
    build, *_ = download(source, tmp_path, build_dir=tmp_path / "copy", url=url)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with standing_in(there):
        events: list[ProgressEvent] = []
        with reporting_to(events.append) as reporter:
            run_stage(build, "quantize", Recipe(), RAY, reporter)
        assert not list(tmp_path.glob("nf4-task-*"))
        assert hashes(build) == whole
        assert len(safetensors(build)) == (0 if there is without_folder else 7)
        files = {name for name in ObjectStore(url).names() if name != "build.json"}
        assert files == {"records/quantize.json", *whole, *(f"{n}.facts.json" for n in whole)}
        last = [e for e in events if e.kind == "task_end" and e.task == "whole files"]
        assert [(e.done, e.total) for e in last] == [(7, 7)]
        other, *_ = download(source, tmp_path, build_dir=tmp_path / "other", url=url)
        assert not run_stage(other, "quantize", Recipe(), CPU, SILENT).ran


def test_a_lost_driver_at_a_url_is_continued(
    source: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an empty disk: what tasks put to the URL is not made again."""
    url = fresh_url("file", tmp_path)
    made: list[str] = []
    make = quantize_stage._leave_facts

    def leave_facts(target: Path, *rest: Any) -> FileFacts:
        made.append(target.name)
        return make(target, *rest)

    monkeypatch.setattr(quantize_stage, "_leave_facts", leave_facts)
    with standing_in(without_folder) as cluster:
        first, *_ = download(source, tmp_path, build_dir=tmp_path / "first", url=url)
        run = cluster.run
        with monkeypatch.context() as lost:
            lost.setattr(cluster, "run", lambda call, items, *_: run(call, items[:3], *_))
            with pytest.raises(BuildError, match="3 of 7 parts"):
                quantize(first)
        second, *_ = download(source, tmp_path, build_dir=tmp_path / "second", url=url)
        quantize(second)
    assert hashes(second) == whole
    assert sorted(made) == sorted(name.partition("/")[2] for name in whole)


def test_a_node_without_the_cache_takes_a_folder_of_its_own_at_a_url(
    source: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sees the build folder, whose links to the source lead nowhere there."""
    monkeypatch.setattr(quantize_on_ray, "dangling", lambda folder: folder / "config.json")
    url = fresh_url("file", tmp_path)
    build, *_ = download(source, tmp_path, build_dir=tmp_path / "copy", url=url)
    with standing_in():
        quantize(build)
    assert hashes(build) == whole
    assert safetensors(build) == []  # none was made in the folder that both see


def test_a_source_that_a_node_does_not_see(source: Path, tmp_path: Path) -> None:
    build, *_ = download(
        source, tmp_path, build_dir=tmp_path / "copy", url=fresh_url("file", tmp_path)
    )
    with (
        standing_in(without_files),
        pytest.raises(ResourceError, match="Put the model where all nodes"),
    ):
        quantize(build)


@pytest.mark.usefixtures("stand_in")
def test_files_are_told_of_as_they_come(build: Build, whole: dict[str, str]) -> None:
    """So that --stream-output sends them while others are made."""
    told: list[str] = []

    class Told(StaysHere):
        def add(self, path: Path, digest: FileDigest) -> None:
            told.append(path.name)

    stage = Quantize(build, Recipe(), RAY, outgoing=Told())
    with build.locked():
        QuantizeOnRay(stage).run()
    assert {f"quantized/{name}" for name in told} == {*whole}
    assert len(told) >= 2 * len(whole)  # once more when all stand


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
