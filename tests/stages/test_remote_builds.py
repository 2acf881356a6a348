"""Builds at a URL: what one machine put there, another one takes as done, and nothing else."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.build_folder.remote import REMOTE_FILE, read_url
from nf4_pipeline.engine.parts import Part
from nf4_pipeline.errors import BuildError, PipelineError, StoreError
from nf4_pipeline.job import merge_parts, run_part, run_stage, states
from nf4_pipeline.object_store import ObjectStore
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import PartialRecipe, QuantizeRecipe, Recipe, SerializeRecipe
from nf4_pipeline.records import QUANTIZE, SERIALIZE, part_records
from nf4_pipeline.stages import quantize as quantize_stage

from tests.support.command_line import run_nf4
from tests.support.jobs import CPU, download
from tests.support.s3_server import S3Server
from tests.support.stores import check_published, fresh_url, hashes, served
from tests.support.tiny import copy_of, flip_byte, write_falcon

pytestmark = pytest.mark.usefixtures("workers_here")

DEFAULT = PartialRecipe(Recipe(), frozenset())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Falcon in five files, of which four are left."""
    return write_falcon(tmp_path_factory.mktemp("remote") / "falcon", shards=5)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name -> sha256 of what the stages leave, as one machine makes it without any URL."""
    build, *_ = download(source, tmp_path_factory.mktemp("whole"))
    finish(build)
    return hashes(build)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with served(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        request.getfixturevalue("server")
    return fresh_url(request.param, tmp_path)


@pytest.fixture
def folder_url(tmp_path: Path) -> str:
    return fresh_url("file", tmp_path)


def begin(source: Path, machine: Path, url: str) -> Build:
    """A machine with an empty disk: download alone is done."""
    build, *_ = download(source, machine, build_dir=machine / "copy", url=url)
    return build


def finish(build: Build) -> None:
    for stage in ("quantize", "serialize"):
        run_stage(build, stage, Recipe(), CPU, SILENT)


class Dies(Exception):
    """The driver, in the middle of its work."""


def dies_after(files: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has quantize die when it has finished some files, before it says so of the next."""
    leave = quantize_stage._leave_facts
    done: list[object] = []

    def leave_facts(*args: object) -> object:
        if len(done) == files:
            raise Dies
        done.append(args)
        return leave(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(quantize_stage, "_leave_facts", leave_facts)


def test_a_lost_driver_is_continued_on_an_empty_disk(
    url: str,
    source: Path,
    whole: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the first one put there is not made again, and not fetched before it is needed."""
    build = begin(source, tmp_path / "first", url)
    with monkeypatch.context() as patch:
        dies_after(3, patch)
        with pytest.raises(Dies):
            finish(build)
    there = {name for name in ObjectStore(url).names() if name.endswith(".facts.json")}
    build = begin(source, tmp_path / "second", url)
    run_stage(build, "quantize", Recipe(), CPU, SILENT)
    made = {path.name for path in build.quantized.glob("*.safetensors")}
    assert there
    assert len(made) == 4 - len(there)
    assert not {f"quantized/{name}.facts.json" for name in made} & there
    run_stage(build, "serialize", Recipe(), CPU, SILENT)
    assert hashes(build) == whole
    check_published(url, whole)

    third = begin(source, tmp_path / "third", url)
    found = states(third, DEFAULT, CPU)
    assert [found[name].status for name in ("quantize", "serialize")] == ["done", "done"]
    assert not third.export.exists()
    third.fetch(SERIALIZE)
    assert {p.relative_to(third.root).as_posix() for p in third.export.iterdir()} == {
        name for name in whole if name.startswith("export/")
    }


def test_parts_on_machines_that_share_nothing_but_a_url(
    url: str, source: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    numbers = [1, 2, 3]
    random.Random(url).shuffle(numbers)
    for number in numbers:
        machine = begin(source, tmp_path / f"machine-{number}", url)
        run_part(machine, Part(3, number), DEFAULT, CPU, SILENT)
        again = run_part(machine, Part(3, number), DEFAULT, CPU, SILENT)
        assert not again.ran
    fourth = begin(source, tmp_path / "fourth", url)
    assert "3 of 3 parts are done" in states(fourth, DEFAULT, CPU)["quantize"].why
    merge_parts(fourth, DEFAULT, CPU, SILENT)
    assert not list(fourth.quantized.glob("*.safetensors"))
    assert not part_records(fourth)
    run_stage(fourth, "serialize", Recipe(), CPU, SILENT)
    assert hashes(fourth) == whole
    check_published(url, whole)


def test_a_part_that_is_missing_is_named(folder_url: str, source: Path, tmp_path: Path) -> None:
    for number in (1, 3):
        machine = begin(source, tmp_path / f"machine-{number}", folder_url)
        run_part(machine, Part(3, number), DEFAULT, CPU, SILENT)
    with pytest.raises(BuildError, match=r"2 of 3 parts; 2/3 are missing"):
        merge_parts(begin(source, tmp_path / "last", folder_url), DEFAULT, CPU, SILENT)


@pytest.mark.parametrize("when", ["quantized", "records/serialize"])
def test_a_server_that_dies_in_the_middle(
    when: str,
    server: S3Server,
    source: Path,
    whole: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The driver waits until it is back; no error, the same hashes."""
    server.forget("bucket")
    url = fresh_url("s3", tmp_path)
    place, comes_back = ObjectStore._place, threading.Timer(0.5, server.start)

    def place_at_last(self: ObjectStore, path: str, *args: object) -> None:
        if when in path and not killed:
            killed.append(path)
            server.kill()
            comes_back.start()
        place(self, path, *args)  # type: ignore[arg-type]

    killed: list[str] = []
    monkeypatch.setattr(ObjectStore, "_place", place_at_last)
    build = begin(source, tmp_path / "machine", url)
    finish(build)
    comes_back.join()
    assert killed
    assert hashes(build) == whole
    check_published(url, whole)


def test_a_server_that_stays_away_ends_it_and_nothing_is_lost(
    server: S3Server,
    source: Path,
    whole: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.forget("bucket")
    url = fresh_url("s3", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("nf4_pipeline.object_store.store.PATIENCE", 0.6)
        build = begin(source, tmp_path / "machine", url)
        server.kill()
        with pytest.raises(StoreError, match=r"tried for .* run the same command again"):
            finish(build)
    server.start()
    finish(build)
    assert hashes(build) == whole
    check_published(url, whole)


def other_model(source: Path, tmp_path: Path, url: str) -> None:
    begin(write_falcon(tmp_path / "other" / "falcon", layers=1, seed=5), tmp_path / "x", url)


def other_recipe(source: Path, tmp_path: Path, url: str) -> None:
    recipe = Recipe(QuantizeRecipe(skip_modules=("*mlp*",)))
    run_stage(begin(source, tmp_path / "x", url), "quantize", recipe, CPU, SILENT)


def no_build(source: Path, tmp_path: Path, url: str) -> None:
    store = ObjectStore(url)
    for name in list(store.names()):
        store.delete(name)
    store.write("data/table.csv", b"1,2\n")
    begin(source, tmp_path / "x", url)


def no_json(source: Path, tmp_path: Path, url: str) -> None:
    ObjectStore(url).write("build.json", b"{}")
    begin(source, tmp_path / "x", url)


def newer_version(source: Path, tmp_path: Path, url: str) -> None:
    store = ObjectStore(url)
    spec = json.loads(store.read("build.json", 2**20) or b"")
    store.write("build.json", json.dumps(spec | {"version": 2}).encode())
    begin(source, tmp_path / "x", url)


def other_url(source: Path, tmp_path: Path, url: str) -> None:
    begin(source, tmp_path / "machine", url)
    begin(source, tmp_path / "machine", f"{url}-2")


@pytest.mark.parametrize(
    ("foreign", "said"),
    [
        (other_model, r"store is another build: its source is falcon at"),
        (other_recipe, r"is another build: quantize.skip_modules is not set"),
        (no_build, r"holds 1 objects and no build.json, such as data/table.csv"),
        (no_json, r"build.json is not what a build notes there"),
        (newer_version, r"is of version 2; this program knows version 1"),
        (other_url, r"is the local copy of file://.*, not of"),
    ],
)
def test_what_stands_there_already(
    foreign: Callable[[Path, Path, str], None],
    said: str,
    source: Path,
    finished: Path,
    tmp_path: Path,
) -> None:
    url = f"file://{copy_of(finished, tmp_path / 'store')}"
    before = ObjectStore(url).names()
    with pytest.raises(PipelineError, match=said):
        foreign(source, tmp_path, url)
    if foreign in (other_model, other_recipe, other_url):
        assert ObjectStore(url).names() == before


def object_gone(store: ObjectStore, name: str) -> None:
    store.delete(name)


def object_cut(store: ObjectStore, name: str) -> None:
    store.write(name, (store.read(name, 2**30) or b"")[:-1])


def object_changed(store: ObjectStore, name: str) -> None:
    content = bytearray(store.read(name, 2**30) or b"")
    content[-1] ^= 1
    store.write(name, bytes(content))


def all_gone(store: ObjectStore, name: str) -> None:
    for other in store.names():
        store.delete(other)


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a store in which a build stands that is serialized (see `copy_of`)."""
    folder = tmp_path_factory.mktemp("finished")
    finish(begin(source, folder, f"file://{folder}/store"))
    return folder / "store"


QUANTIZED = "quantized/model-00002-of-00004.safetensors"
EXPORTED = "export/model-00002-of-00004.safetensors"


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (object_gone, QUANTIZED),
        (object_cut, QUANTIZED),
        (object_changed, QUANTIZED),
        (object_gone, EXPORTED),
        (object_cut, EXPORTED),
        (object_changed, EXPORTED),
        (object_gone, "records/quantize.json"),
        (object_cut, "records/quantize.json"),
        (object_cut, f"{QUANTIZED}.facts.json"),
        (all_gone, QUANTIZED),
    ],
)
def test_damage_at_the_url_is_found_and_made_good(
    damage: Callable[[ObjectStore, str], None],
    name: str,
    source: Path,
    finished: Path,
    whole: dict[str, str],
    tmp_path: Path,
) -> None:
    """By a machine with an empty disk; what is damaged is never taken for whole."""
    url = f"file://{copy_of(finished, tmp_path / 'store')}"
    store = ObjectStore(url)
    damage(store, name)
    if name.startswith("quantized/"):  # else nobody would need to look at it
        for record in ("records/quantize.json", "records/serialize.json"):
            if damage is not object_changed or record.endswith("serialize.json"):
                store.delete(record)
    second = begin(source, tmp_path / "second", url)
    for _ in range(3):
        with suppress(StoreError):  # it says: run again
            finish(second)
            second.fetch(SERIALIZE)
            break
    assert hashes(second) == whole
    check_published(url, whole)


def test_an_earlier_export_leaves_nothing_there(
    finished: Path, source: Path, tmp_path: Path
) -> None:
    url = f"file://{copy_of(finished, tmp_path / 'store')}"
    build = begin(source, tmp_path / "machine", url)
    recipe = Recipe(serialize=SerializeRecipe(max_shard_size="20KB"))
    run_stage(build, "serialize", recipe, CPU, SILENT, replaces=True)
    names = {name for name in ObjectStore(url).names() if name.startswith("export/")}
    assert names == set(build.need(SERIALIZE).outputs)


def test_nothing_of_this_machine_stands_there(finished: Path) -> None:
    store = ObjectStore(f"file://{finished}")
    for name in store.names():
        if name.endswith(".json"):
            content = store.read(name, 2**24) or b""
            assert str(finished.parent).encode() not in content, name
            assert b"inode" not in content, name
    assert "records/download.json" not in store.names()


@pytest.mark.parametrize("name", ["export/../../outside", "../outside", "/tmp/outside", "outside"])
def test_a_record_of_a_stranger_leads_nowhere(
    name: str, finished: Path, source: Path, tmp_path: Path
) -> None:
    """Whoever may write at the URL may not write anywhere else on this disk."""
    url = f"file://{copy_of(finished, tmp_path / 'store')}"
    store = ObjectStore(url)
    record = json.loads(store.read("records/serialize.json", 2**24) or b"")
    record["outputs"][name] = {"size": 4, "sha256": "0" * 64}
    store.write("records/serialize.json", json.dumps(record).encode())
    second = begin(source, tmp_path / "second", url)
    before = {path for path in tmp_path.rglob("*") if "second" not in str(path)}
    second.fetch(SERIALIZE)
    assert {path for path in tmp_path.rglob("*") if "second" not in str(path)} == before
    assert not (second.root / "outside").exists()
    assert states(second, DEFAULT, CPU)["serialize"].status == "stale"


def test_a_copy_that_was_changed_here_is_not_believed(
    finished: Path, source: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    url = f"file://{copy_of(finished, tmp_path / 'store')}"
    build = begin(source, tmp_path / "machine", url)
    build.fetch(QUANTIZE)
    flip_byte(build.quantized / "model-00002-of-00004.safetensors")
    finish(build)
    assert hashes(build) == whole
    assert read_url(build.root) == url
    check_published(url, whole)


def test_commands_take_a_url_where_a_path_may_stand(
    folder_url: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy_of(source, tmp_path / "model")
    for machine in ("one", "two", "three"):
        (tmp_path / machine).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    for streamed in (["--stream-source"], ["--stream-output", "me/it"]):
        ended = run_nf4("build", model, "--build-dir", folder_url, *streamed)
        assert (ended.status, "no other machine could go on" in ended.err) == (2, True), ended.err
    assert "there is no build" in run_nf4("status", folder_url).err
    assert not list(Path().iterdir())
    for machine, part in (("one", "1/2"), ("two", "2/2")):
        monkeypatch.chdir(tmp_path / machine)
        assert run_nf4("download", model, "--build-dir", folder_url).status == 0
        ended = run_nf4("quantize", "--build-dir", folder_url, "--part", part)
        assert ended.status == 0, ended.err
    monkeypatch.chdir(tmp_path / "three")
    ended = run_nf4("quantize", folder_url, "--merge")
    assert ended.status == 1
    assert f"Finish it: nf4 build MODEL --build-dir {folder_url}" in ended.err
    assert run_nf4("download", model, "--build-dir", folder_url).status == 0
    assert run_nf4("quantize", folder_url, "--merge").status == 0
    ended = run_nf4("serialize", "--build-dir", folder_url, "--json")
    assert ended.status == 0, ended.err
    root = Path(json.loads(ended.out)["build"])
    assert json.loads((root / REMOTE_FILE).read_text())["url"] == folder_url
    monkeypatch.chdir(tmp_path / "one")
    assert "query_key_value" in run_nf4("inspect", folder_url).out
    shown = run_nf4("status", folder_url)
    assert shown.out.count(" done ") == 3
    assert folder_url in shown.out
