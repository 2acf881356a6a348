"""What is untouched since it was hashed is not hashed again, and whatever was touched is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.progress import SilentReporter
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.records import QUANTIZE, Reading
from nf4_pipeline.stages.download import Download, Downloaded
from nf4_pipeline.stages.download_request import DownloadRequest
from nf4_pipeline.stages.quantize import Quantize
from nf4_pipeline.stages.run_recorded import Stage
from nf4_pipeline.stages.serialize import Serialize

from tests.support.checkpoints import make_checkpoint
from tests.support.jobs import CPU
from tests.support.tiny import copy_of, edit_json

pytestmark = pytest.mark.usefixtures("workers_here")


class Listener(SilentReporter):
    """Remembers the titles of tasks."""

    def __init__(self) -> None:
        self.titles: list[str] = []

    @contextmanager
    def task(self, title: str, total: int | None, *, unit: str = "bytes") -> Iterator[Any]:
        self.titles.append(title)
        with super().task(title, total, unit=unit) as task:
            yield task


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint, which nobody may change."""
    return make_checkpoint(tmp_path_factory.mktemp("sources") / "llama", "llama")


@pytest.fixture
def source(model: Path, tmp_path: Path) -> Path:
    return copy_of(model, tmp_path / "llama")


def again(source: Path, **options: Any) -> tuple[Downloaded, bool]:
    """Downloads; what came of it, and whether the source was hashed."""
    listener = Listener()
    request = DownloadRequest(str(source), source.parent / "artifacts", **options)
    return Download(request, listener).run(), "hash source" in listener.titles


def test_nothing_is_hashed_twice(source: Path) -> None:
    first, hashed = again(source)
    assert (first.ran, hashed) == (True, True)
    second, hashed = again(source)
    assert (second.ran, hashed) == (False, False)
    assert (second.record.key, second.record.outputs) == (first.record.key, first.record.outputs)
    assert second.build.root == first.build.root


def test_unless_it_is_asked_for(source: Path) -> None:
    again(source)
    done, hashed = again(source, check=True)
    assert (done.ran, hashed) == (False, True)


def flip(path: Path) -> None:
    """Changes a byte; size and time of modification stay."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


TOUCHED: dict[str, Callable[[Path], object]] = {
    "a byte of the weights": lambda folder: flip(folder / "model.safetensors"),
    "the config": lambda folder: edit_json(folder / "config.json", made_up=1),
    "the same bytes in another file": lambda folder: shutil.copy2(
        shutil.move(folder / "config.json", folder.parent), folder / "config.json"
    ),
    "a file more": lambda folder: (folder / "LICENSE").write_text("mine"),
    "a template more": lambda folder: (folder / "chat_template.jinja").write_text("{{ 1 }}"),
    "a file less": lambda folder: (folder / "generation_config.json").unlink(),
    "a touch": lambda folder: (folder / "tokenizer.json").touch(),
    "a hard link": lambda folder: os.link(folder / "config.json", folder.parent / "other"),
}


@pytest.mark.parametrize("case", TOUCHED)
def test_what_was_touched_is_hashed(case: str, source: Path) -> None:
    again(source)
    TOUCHED[case](source)
    _, hashed = again(source)
    assert hashed
    _, hashed = again(source)
    assert not hashed


def test_another_reading_of_the_same_is_looked_at(source: Path) -> None:
    again(source)

    _, hashed = again(source, reading=Reading(allow_unused=("nothing",)))
    assert hashed


def test_links_of_the_build_that_lead_elsewhere_are_put_right(source: Path) -> None:
    done, _ = again(source)
    link = done.build.source / "config.json"
    other = copy_of(source, source.parent / "other")
    link.unlink()
    link.symlink_to(other / "config.json")
    _, hashed = again(source)
    assert hashed
    assert link.resolve() == (source / "config.json").resolve()


def test_what_is_linked_into_an_export_is_not_hashed_again(source: Path) -> None:
    done, _ = again(source)
    stages: list[Stage] = [Quantize(done.build, Recipe(), CPU), Serialize(done.build, Recipe())]
    for stage in stages:
        stage.run()
    (file,) = done.build.quantized.glob("*.safetensors")
    assert file.stat().st_nlink == 2
    listener = Listener()
    for stage in stages:
        state = done.build.state(stage.kind, stage.key(), listener, check=False)
        assert state.status == "done"
    assert listener.titles == []


@pytest.mark.parametrize("check", [False, True])
def test_outputs(check: bool, source: Path) -> None:
    done, _ = again(source)
    stage = Quantize(done.build, Recipe(), CPU)
    stage.run()

    def state() -> tuple[str, list[str]]:
        listener = Listener()
        build = Build(done.build.root)
        return build.state(QUANTIZE, stage.key(), listener, check=check).status, listener.titles

    assert state() == ("done", ["check quantize"] if check else [])
    (file,) = done.build.quantized.glob("*.safetensors")
    file.touch()
    assert state() == ("done", ["check quantize"])
    flip(file)
    assert state() == ("stale", ["check quantize"])
    record = done.build.root / "records" / "quantize.json"
    value = json.loads(record.read_text())
    for entry in value["outputs"].values():  # as an older version left it
        entry.pop("ctime_ns")
    record.write_text(json.dumps(value))
    assert state() == ("stale", ["check quantize"])
