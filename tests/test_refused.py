"""What the system refuses: full, read-only and failing places end in errors of ours."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.errors import AccessError, PipelineError, ResourceError, of_system
from nf4_pipeline.job import run_stage
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import Recipe, SerializeRecipe
from nf4_pipeline.records import QUANTIZE

from tests.campaigns import disk
from tests.support.folder_state import content, leftovers
from tests.support.jobs import CPU, download
from tests.support.tiny import copy_of, nf4

pytestmark = pytest.mark.usefixtures("workers_here")

RECIPE = Recipe()
needs_mount = pytest.mark.skipif(not disk.can_mount(), reason="needs the right to mount")


@pytest.fixture(scope="module")
def quantized(downloaded_falcon: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = Build(copy_of(downloaded_falcon, tmp_path_factory.mktemp("quantized") / "build"))
    run_stage(build, "quantize", RECIPE, CPU, SILENT)
    return build.root


@pytest.fixture(scope="module")
def exported(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = Build(copy_of(quantized, tmp_path_factory.mktemp("exported") / "build"))
    run_stage(build, "serialize", RECIPE, CPU, SILENT)
    return build.root


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with disk.small_disk(tmp_path / "disk") as folder:
        yield folder


@needs_mount
@pytest.mark.parametrize("stage", ["quantize", "serialize"])
def test_a_full_disk(
    stage: str, downloaded_falcon: Path, exported: Path, small: Path, tmp_path: Path
) -> None:
    """Serialize has an export of another recipe standing there, which must stand afterwards."""
    before = downloaded_falcon if stage == "quantize" else exported
    command: list[str | Path] = [stage, "--build-dir", small / "build"]
    if stage == "serialize":
        command += ["--max-shard-size", "20KB", "--replace"]
    room, expected = disk.after(command, before, small)
    for number in range(4):
        found = disk.too_small(
            command, before, small, room * number // 4, blind=number % 2 == 1, expected=expected
        )
        assert found.faults == [], found


@needs_mount
def test_a_read_only_disk_and_one_that_is_gone(
    downloaded_falcon: Path, small: Path, tmp_path: Path
) -> None:
    shutil.copytree(downloaded_falcon, small / "build", symlinks=True)
    command = ("quantize", "--build-dir", small / "build")
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    done = nf4(*command, cwd=tmp_path)
    assert done.status == 1
    assert "Read-only file system" in done.err
    assert ".lock" in done.err
    assert "Traceback" not in done.err
    subprocess.run(["mount", "-o", "remount,rw", str(small)], check=True)
    assert nf4(*command, cwd=tmp_path).status == 0


@needs_mount
def test_another_user_without_rights(downloaded_falcon: Path, small: Path, tmp_path: Path) -> None:
    """Root may do anything, so the stage runs as nobody."""
    shutil.copytree(downloaded_falcon, small / "build", symlinks=True)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from nf4_pipeline.build_folder import Build\n"
        "from nf4_pipeline.job import run_stage\n"
        "from nf4_pipeline.progress import SILENT\n"
        "from nf4_pipeline.machine import Machine\n"
        "from nf4_pipeline.recipe import Recipe\n"
        "import os; os.setgid(65534); os.setuid(65534)\n"
        "from nf4_pipeline.errors import AccessError\n"
        "cpu = Machine(device='cpu')\n"
        "try: run_stage(Build(Path(sys.argv[1])), 'quantize', Recipe(), cpu, SILENT)\n"
        "except AccessError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(small / "build")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Permission denied" in done.stdout
    assert "Give this user the right to it" in done.stdout
    assert leftovers(Build(small / "build")) == []


def test_a_limit_of_the_session(downloaded_falcon: Path, tmp_path: Path) -> None:
    """`ulimit -f`: a file may not become as large as it must."""
    build = Build(copy_of(downloaded_falcon, tmp_path / "build"))
    command = f'ulimit -f 20; exec "{sys.executable}" -m nf4_pipeline quantize --build-dir "$1"'
    done = subprocess.run(
        ["bash", "-c", command, "bash", str(build.root)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "ulimit -f" in done.stderr
    assert leftovers(build) == []
    assert build.record(QUANTIZE) is None


def test_a_source_that_vanished(tiny_falcon: Path, tmp_path: Path, quantized: Path) -> None:
    model = copy_of(tiny_falcon, tmp_path / "model")
    build, *_ = download(model, tmp_path / "artifacts")
    shutil.rmtree(model)
    with pytest.raises(PipelineError, match=r"is a dead link: there is no .*model/config\.json"):
        run_stage(build, "quantize", RECIPE, CPU, SILENT)
    assert not build.quantized.exists()


def test_an_earlier_export_outlives_a_serialize_that_fails(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Build(copy_of(exported, tmp_path / "build"))
    before = content(build)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "somewhere")

    monkeypatch.setattr("nf4_pipeline.stages.serialize.assemble_files", fail)
    cut = Recipe(serialize=SerializeRecipe("20KB"))
    with pytest.raises(AccessError, match="serialize: somewhere: Input/output error"):
        run_stage(build, "serialize", cut, CPU, SILENT, replaces=True)
    assert content(build) == before
    assert leftovers(build) == []


CASES: dict[int, tuple[type[PipelineError], str]] = {
    errno.ENOSPC: (ResourceError, "the disk is full"),
    errno.EDQUOT: (ResourceError, "the disk is full"),
    errno.EFBIG: (ResourceError, "ulimit -f"),
    errno.EROFS: (AccessError, "Give this user the right"),
    errno.EACCES: (AccessError, "Give this user the right"),
    errno.ENOENT: (AccessError, "moved or deleted"),
    errno.EIO: (AccessError, "Look at the disk"),
}


@pytest.mark.parametrize("number", CASES)
def test_every_refusal_says_what_to_do(number: int) -> None:
    kind, words = CASES[number]
    found = of_system(OSError(number, os.strerror(number), "a/b"), "quantize")
    assert type(found) is kind
    assert words in str(found)
    assert str(found).startswith("quantize: a/b: ")
    assert "memory ran out" in str(of_system(MemoryError(), "quantize"))
