"""`nf4_pipeline` is found whatever else is called `pipeline`: a file, a package, an import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nf4_pipeline
import pytest

from tests.support.tiny import environment

TRAP = "raise SystemExit('another pipeline was imported')\n"
VERSION = ["-m", "nf4_pipeline", "--version"]
IMPORT = ["-c", "import nf4_pipeline; print(nf4_pipeline.__version__)"]


def run(arguments: list[str], folder: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    """Runs python in a folder, with others at the head of the module path."""
    package = str(Path(nf4_pipeline.__file__).parents[1])
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    names = [*map(str, path), *(inherited if package in inherited else [package])]
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(folder) | {"PYTHONPATH": os.pathsep.join(names)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """A folder that holds `pipeline.py`."""
    folder = tmp_path / "module"
    folder.mkdir()
    (folder / "pipeline.py").write_text(TRAP)
    return folder


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder that holds a package `pipeline`, as django-pipeline leaves one in site-packages."""
    folder = tmp_path / "package"
    (folder / "pipeline").mkdir(parents=True)
    (folder / "pipeline" / "__init__.py").write_text(TRAP)
    return folder


@pytest.mark.parametrize("arguments", [VERSION, IMPORT], ids=["version", "import"])
def test_another_pipeline_does_not_matter(
    arguments: list[str], module: Path, package: Path, tmp_path: Path
) -> None:
    for folder, path in ((module, ()), (tmp_path, (module,)), (tmp_path, (package,))):
        done = run(arguments, folder, *path)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.strip().endswith(nf4_pipeline.__version__)


def test_a_process_that_a_stage_starts_finds_the_package(module: Path) -> None:
    """The model's architecture is asked of a child; .ci/run does the rest from the wheel."""
    done = run(["-m", "nf4_pipeline", "download", "sample", "-q"], module, module)
    assert done.returncode == 0, done.stderr
    assert list(module.glob("artifacts/*/records/download.json"))


def test_the_names_of_the_api_import_nothing_heavy(tmp_path: Path) -> None:
    """Who only reads an artifact pays for what that needs, and only when it does."""
    heavy = "torch transformers numpy numba matplotlib jinja2 fastjsonschema greenlet rich click"
    code = (
        "import sys\n"
        "from nf4_pipeline import load, load_tokenizer, prompt\n"
        "import nf4_pipeline.runtime.prompt\n"
        f"print(*(name for name in {heavy.split()} if name in sys.modules))"
    )
    done = run(["-c", code], tmp_path)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "\n")
