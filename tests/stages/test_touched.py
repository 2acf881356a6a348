"""Files that change between two stages, or while one of them reads, with the same size and time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.digest import FileStamp
from nf4_pipeline.engine.quantize_checkpoint import QuantizationRun
from nf4_pipeline.errors import BuildError, PipelineError
from nf4_pipeline.job import run_stage, states
from nf4_pipeline.manifest.artifact_files import assemble_files
from nf4_pipeline.model.probe import Probe
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.records import DOWNLOAD, QUANTIZE, SERIALIZE
from nf4_pipeline.stages import serialize
from nf4_pipeline.stages.quantize import count_finished_files

from tests.support.jobs import CPU, download
from tests.support.tiny import SHARDS, copy_of

pytestmark = pytest.mark.usefixtures("workers_here")


@pytest.fixture
def model(tiny_falcon: Path, tmp_path: Path) -> Path:
    return copy_of(tiny_falcon, tmp_path / "model")


@pytest.fixture
def build(model: Path, tmp_path: Path) -> Build:
    made, *_ = download(model, tmp_path / "artifacts")
    return made


def change_and_keep_the_time(path: Path, position: int = -2) -> None:
    """One bit of a mantissa; what `ls -l` says stays as it was."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    now = path.stat()
    assert (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def replace_and_keep_the_time(path: Path) -> None:
    """Another file takes its place."""
    before, content = path.stat(), path.read_bytes()
    path.with_name("other").write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    path.with_name("other").replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = [change_and_keep_the_time, replace_and_keep_the_time]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", [*SHARDS, "config.json"])
def test_a_source_that_changed_is_not_quantized_under_its_old_hash(
    build: Build, model: Path, change: Callable[[Path], None], name: str
) -> None:
    change(model / name)
    with pytest.raises(BuildError, match=rf"{name} changed since .*expected .* `nf4 download`"):
        run_stage(build, "quantize", Recipe(), CPU, SILENT)
    assert states(build, Recipe(), CPU)["download"].status == "stale"


def test_a_source_of_links_is_looked_at_where_they_point(tiny_falcon: Path, tmp_path: Path) -> None:
    """As in the Hub cache: the folder holds links, and a blob changes."""
    real = copy_of(tiny_falcon, tmp_path / "model")
    blob = tmp_path / "model" / "blob.json"
    (real / "tokenizer.json").rename(blob)
    (real / "tokenizer.json").symlink_to("blob.json")
    build, *_ = download(real, tmp_path / "artifacts")
    change_and_keep_the_time(blob, 30)
    with pytest.raises(BuildError, match=r"tokenizer\.json changed since"):
        run_stage(build, "quantize", Recipe(), CPU, SILENT)


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changed_between_quantize_and_serialize(
    build: Build, model: Path, change: Callable[[Path], None]
) -> None:
    """What serialize copies of it would otherwise be pinned under its old hash."""
    run_stage(build, "quantize", Recipe(), CPU, SILENT)
    change(model / "tokenizer_config.json")
    with pytest.raises(PipelineError, match=r"tokenizer_config\.json changed since"):
        run_stage(build, "serialize", Recipe(), CPU, SILENT)
    assert build.record(SERIALIZE) is None
    assert not build.export.exists()


@pytest.mark.parametrize("change", CHANGES)
def test_quantized_weights_that_changed_are_not_serialized(
    build: Build, change: Callable[[Path], None]
) -> None:
    run_stage(build, "quantize", Recipe(), CPU, SILENT)
    change(build.quantized / SHARDS[0])
    with pytest.raises(BuildError, match=rf"{SHARDS[0]} changed since"):
        run_stage(build, "serialize", Recipe(), CPU, SILENT)


def test_weights_are_hashed_where_the_manifest_claims_their_hash(build: Build) -> None:
    """However much their record says that nobody touched them."""
    run_stage(build, "quantize", Recipe(), CPU, SILENT)
    path = build.quantized / SHARDS[0]
    change_and_keep_the_time(path)
    record = build.root / "records" / "quantize.json"
    value = json.loads(record.read_text())
    value["outputs"][f"quantized/{SHARDS[0]}"] |= FileStamp.of(path).to_json()
    record.write_text(json.dumps(value))
    build.check_inputs(QUANTIZE)
    with pytest.raises(BuildError, match=rf"{SHARDS[0]} changed since"):
        run_stage(build, "serialize", Recipe(), CPU, SILENT)


def test_a_source_that_changes_while_it_is_hashed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between hash and record: the record's stamp is from before."""
    wait = Probe.wait

    def change_then_wait(self: Probe) -> Any:
        change_and_keep_the_time(model / SHARDS[0])
        return wait(self)

    monkeypatch.setattr(Probe, "wait", change_then_wait)
    build, *_ = download(model, tmp_path / "artifacts")
    with pytest.raises(BuildError, match=rf"{SHARDS[0]} changed since"):
        run_stage(build, "quantize", Recipe(), CPU, SILENT)


@pytest.mark.parametrize("restored", [False, True])
def test_a_source_that_changes_while_it_is_quantized(
    build: Build, model: Path, monkeypatch: pytest.MonkeyPatch, restored: bool
) -> None:
    """Also if the old bytes are back before anybody hashes them again; no file is kept of it."""
    make = QuantizationRun.make

    def change_then_make(self: QuantizationRun, *args: Any) -> None:
        change_and_keep_the_time(model / SHARDS[1])
        if restored:
            change_and_keep_the_time(model / SHARDS[1])
        make(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(QuantizationRun, "make", change_then_make)
        with pytest.raises(BuildError, match=rf"{SHARDS[1]} was changed or touched while it was"):
            run_stage(build, "quantize", Recipe(), CPU, SILENT)
    assert build.record(QUANTIZE) is None
    assert count_finished_files(build) == 0
    if not restored:
        change_and_keep_the_time(model / SHARDS[1])
    assert run_stage(build, "quantize", Recipe(), CPU, SILENT).ran  # it hashes as it did


def test_a_source_that_changes_while_it_is_serialized(
    build: Build, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stage(build, "quantize", Recipe(), CPU, SILENT)

    def change_then_assemble(*args: Any) -> Any:
        change_and_keep_the_time(model / "tokenizer.json", 30)
        return assemble_files(*args)

    monkeypatch.setattr(serialize, "assemble_files", change_then_assemble)
    with pytest.raises(BuildError, match=r"tokenizer\.json was changed or touched while"):
        run_stage(build, "serialize", Recipe(), CPU, SILENT)
    assert not build.export.exists()


def test_what_was_not_touched_is_not_hashed_again(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, *_: Any) -> Any:
        raise AssertionError(f"{path} was hashed")

    monkeypatch.setattr("nf4_pipeline.build_folder.freshness.digest_file", fail)
    build.check_inputs(DOWNLOAD)
    build.check_inputs(DOWNLOAD, claimed=True)  # hashed by this process
    with pytest.raises(AssertionError, match="was hashed"):
        Build(build.root).check_inputs(DOWNLOAD, claimed=True)  # of which there is only a record


def test_a_record_without_stamps_counts_as_changed(build: Build, model: Path) -> None:
    """Records of earlier versions: everything is hashed."""
    path = build.root / "records" / "download.json"
    value = json.loads(path.read_text())
    for entry in value["outputs"].values():
        del entry["ctime_ns"], entry["inode"]
    path.write_text(json.dumps(value))
    build.check_inputs(DOWNLOAD)
    change_and_keep_the_time(model / SHARDS[0])
    with pytest.raises(BuildError, match=rf"{SHARDS[0]} changed since"):
        build.check_inputs(DOWNLOAD)
