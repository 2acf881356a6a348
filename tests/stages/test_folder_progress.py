"""How far several processes are, as their folder shows it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.atomic import partial_of, write_json
from nf4_pipeline.progress import ProgressEvent, SilentReporter, Task, reporting_to
from nf4_pipeline.records import FileFacts
from nf4_pipeline.stages import folder_progress
from nf4_pipeline.stages.folder_progress import FolderView, watched
from nf4_pipeline.stages.quantize import FACTS_SUFFIX

KEY: Final = "key"
SIZES: Final = {
    f"{name}.safetensors": size for name, size in (("a", 10**6), ("b", 10**6), ("c", 5))
}


@pytest.fixture
def build(tmp_path: Path) -> Build:
    (tmp_path / "quantized").mkdir()
    return Build(tmp_path)


def finish(build: Build, name: str, key: str = KEY) -> None:
    """A file becomes whole."""
    (build.quantized / name).write_bytes(b"")
    facts = FileFacts(key=key, size=SIZES[name], sha256="", tensors={}, relative_rmse={})
    write_json(build.quantized / f"{name}{FACTS_SUFFIX}", facts.to_json())


def write_half(build: Build, name: str) -> None:
    """A file has its whole length, of which half is written."""
    path = partial_of(build.quantized / name)
    path.write_bytes(b"x" * (SIZES[name] // 2))
    with path.open("r+b") as file:
        file.truncate(SIZES[name])
        os.fsync(file.fileno())


def test_what_is_seen(build: Build) -> None:
    view = FolderView(build, KEY, SIZES)
    seen = view.look()
    assert (seen.whole, seen.nbytes, seen.workers, seen.retries) == (frozenset(), 0, 0, 0)
    with build.making(["a.safetensors", "b.safetensors"]):
        write_half(build, "a.safetensors")
        seen = view.look()
        assert (len(seen.whole), seen.workers, seen.retries) == (0, 1, 0)
        assert 5 * 10**5 <= seen.nbytes < 6 * 10**5
        finish(build, "a.safetensors")
        finish(build, "c.safetensors", key="of another recipe")
        seen = view.look()
        assert (list(seen.whole), seen.nbytes, seen.workers) == (["a.safetensors"], 10**6, 1)
        finish(build, "b.safetensors")
        assert view.look().workers == 0  # it has no more to do
    with build.making(["c.safetensors", "a stranger"]):
        pass
    with build.making(["c.safetensors"]):
        finish(build, "c.safetensors")
        seen = view.look()
        assert (len(seen.whole), seen.nbytes, seen.retries) == (3, sum(SIZES.values()), 1)
        assert seen.at_work == "0 workers, 1 retry"


def test_what_a_dead_process_left_is_not_being_written(build: Build) -> None:
    write_half(build, "a.safetensors")
    path = partial_of(build.quantized / "a.safetensors")
    os.utime(path, (0, 0))
    (build.quantized / f"b.safetensors{FACTS_SUFFIX}").write_text("{")
    (build.root / ".lock.b.safetensors").write_text("4194304 on nowhere\n4194305 on nowhere\n")
    seen = FolderView(build, KEY, SIZES).look()
    assert (seen.whole, seen.nbytes, seen.workers, seen.retries) == (frozenset(), 0, 1, 1)


def events_of(build: Build, own: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks of a part that waits until it was looked at, and what they come to."""
    monkeypatch.setattr(folder_progress, "_EVERY", 0.01)
    events: list[ProgressEvent] = []
    with reporting_to(events.append) as reporter, build.making(["a.safetensors"]):
        with watched(build, KEY, SIZES, reporter, own=own):
            finish(build, "a.safetensors")
    return [f"{e.task} {e.done}/{e.total} {e.unit}" for e in events if e.kind == "task_end"]


def test_what_is_shown(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = events_of(build, (), monkeypatch)
    assert ended[-3:] == [
        "0 workers, 0 retries 0/None bytes",
        "whole files 1/3 files",
        "write quantized files 1000000/2000005 bytes",
    ]


def test_a_part_alone_shows_nothing_of_others(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert events_of(build, ("a.safetensors",), monkeypatch) == []
    finish(build, "c.safetensors")
    assert "whole files 2/3 files" in events_of(build, ("a.safetensors",), monkeypatch)


def test_what_was_shown_never_falls(build: Build) -> None:
    """What a killed worker had written is gone, and made again."""
    amounts: list[int] = []

    class Recorder(SilentReporter):
        @contextmanager
        def task(self, title: str, total: int | None, *, unit: str = "bytes") -> Iterator[Task]:
            class Recorded:
                def advance(self, amount: int) -> None:
                    amounts.append(amount)

            yield Recorded()

    view = FolderView(build, KEY, SIZES)
    with folder_progress._opened(SIZES, Recorder()) as shown:
        write_half(build, "a.safetensors")
        shown.update(view.look())
        partial_of(build.quantized / "a.safetensors").unlink()
        shown.update(view.look())
        finish(build, "a.safetensors")
        shown.update(view.look())
    assert min(amounts) > 0
    assert sum(amounts) == 10**6 + 1
