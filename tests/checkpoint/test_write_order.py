"""The order of write, fsync, rename and fsync of the folder, which no kill can show."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from nf4_pipeline.build_folder import Build, Record
from nf4_pipeline.records import ATTEST, QUANTIZE, SERIALIZE, VERIFY, AttestFacts

from tests.support.jobs import PASSED
from tests.support.syscalls import Event, traced
from tests.support.tiny import copy_of, environment, nf4

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")

RECORDS = "records"


def trace(build: Build, stage: str, *options: str) -> list[Event]:
    """Runs a stage; gives what it did to the build folder, in order."""
    command = [
        sys.executable,
        "-m",
        "nf4_pipeline",
        stage,
        "--build-dir",
        str(build.root),
        *options,
    ]
    log = build.root.parent / "trace.txt"
    events = traced(command, log, environment(build.root.parent))
    return [event for event in events if event.path.is_relative_to(build.root)]


def first(events: list[Event], kind: str, path: Path, after: int = -1) -> Event:
    return next(e for e in events if e.kind == kind and e.path == path and e.start > after)


def check_order(events: list[Event], root: Path) -> list[Path]:
    """Every name that appears stands for synced bytes, and is synced itself; gives the names."""
    appeared = []
    renames = [event for event in events if event.kind == "rename" and event.target]
    records = [e for e in renames if e.target and e.target.parent.name == RECORDS]
    for event in events:
        if event.kind not in ("rename", "exchange", "link"):
            continue
        assert event.target is not None
        if event.kind == "rename":
            writes = [e for e in events if e.kind == "write" and e.path == event.path]
            written = [e for e in writes if e.start < event.start]
            assert written, event
            synced = first(events, "fsync", event.path, max(e.end for e in written))
            assert synced.end < event.start
        named = first(events, "fsync", event.target.parent, event.end)
        later = [e for e in records if e.start > event.end]
        assert all(named.end < e.start for e in later)  # the record comes last
        appeared.append(event.target)
    # Nothing is ever written under the name by which others find it.
    written_names = {e.path for e in events if e.kind == "write"} - {root / ".lock"}
    assert all(".partial" in str(path.relative_to(root)) for path in written_names)
    return appeared


@pytest.fixture
def build(downloaded_falcon: Path, tmp_path: Path) -> Build:
    return Build(copy_of(downloaded_falcon, tmp_path / "build"))


def last_is_record(build: Build, stage: str, appeared: list[Path]) -> None:
    assert appeared[-1] == build.root / RECORDS / f"{stage}.json"
    records = [path.stem for path in appeared if path.parent.name == RECORDS]
    # Serialize made hard links to what quantize left, whose record then says how it looks now.
    assert records in ([stage], ["quantize", stage])


def test_quantize(build: Build) -> None:
    appeared = check_order(trace(build, "quantize"), build.root)
    last_is_record(build, "quantize", appeared)
    record = build.need(QUANTIZE)
    assert {build.root / name for name in record.outputs} <= set(appeared)
    # A shard's note comes after the shard.
    for name in record.outputs:
        path = build.root / name
        assert appeared.index(path) < appeared.index(path.with_name(f"{path.name}.facts.json"))


@pytest.mark.parametrize("options", [(), ("--max-shard-size", "20KB")])
def test_serialize(build: Build, options: tuple[str, ...]) -> None:
    assert nf4("quantize", "--build-dir", build.root, cwd=build.root.parent).status == 0
    events = trace(build, "serialize", *options)
    renamed = next(e for e in events if e.target == build.export)
    # The folder itself is the last that takes its place, and stands for synced files only.
    partial = build.root / ".export.partial"
    for name in build.need(SERIALIZE).outputs:
        path = partial / Path(name).name
        appearance = next(e for e in events if e.target == path)
        assert first(events, "fsync", partial, appearance.end).end < renamed.start
    assert first(events, "fsync", build.root, renamed.end)
    inside = [event for event in events if event is not renamed]
    last_is_record(build, "serialize", check_order(inside, build.root))


def test_serialize_over_an_earlier_export(build: Build) -> None:
    for stage in ("quantize", "serialize"):
        assert nf4(stage, "--build-dir", build.root, cwd=build.root.parent).status == 0
    build.write_record(Record(VERIFY, "", {}, PASSED, 0.0, 0))
    build.write_record(Record(ATTEST, "", {}, AttestFacts(), 0.0, 0))
    events = trace(build, "serialize", "--max-shard-size", "20KB", "--replace")
    swap = next(e for e in events if e.kind == "exchange")
    assert (swap.path, swap.target) == (build.root / ".export.partial", build.export)
    folder = build.root / RECORDS
    for stage in ("serialize", "verify", "attest"):
        gone = first(events, "unlink", folder / f"{stage}.json")
        assert first(events, "fsync", folder, gone.end).end < swap.start
    synced = first(events, "fsync", build.root, swap.end)
    record = next(e for e in events if e.target == folder / "serialize.json")
    assert synced.end < record.start


def test_the_check_itself_sees_a_wrong_order(build: Build) -> None:
    events = trace(build, "quantize")
    check_order(events, build.root)
    without = [e for e in events if not (e.kind == "fsync" and e.path.suffix == ".partial")]
    with pytest.raises(StopIteration):
        check_order(without, build.root)
    without = [e for e in events if not (e.kind == "fsync" and e.path.name == "quantized")]
    with pytest.raises(StopIteration):
        check_order(without, build.root)
