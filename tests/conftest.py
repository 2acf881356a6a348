"""What tests share: a tiny checkpoint, made once, that nobody may change (see `copy_of`)."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from nf4_pipeline.build_folder import Build
from nf4_pipeline.job import run_build, run_stage
from nf4_pipeline.processes.in_process import in_process
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import QuantizeRecipe, Recipe, load_recipe
from nf4_pipeline.stages.download_request import DownloadRequest

from tests.support import warm
from tests.support.jobs import CPU, download
from tests.support.tiny import copy_of, write_falcon, write_recipe

# Here and in every process that a test starts: matrices so small wait longer for a second thread
# than they compute. torch reads it once, when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long earlier jobs took is kept in the user's cache, and said by later ones: not of tests that
# run beside or ran before, nor to the user.
_CACHE = tempfile.TemporaryDirectory(prefix="nf4-tests-")
atexit.register(_CACHE.cleanup)
os.environ["XDG_CACHE_HOME"] = _CACHE.name

_SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGALRM]


def pytest_configure(config: pytest.Config) -> None:
    """One warm process for all that run tests: xdist's workers inherit its name."""
    if not hasattr(config, "workerinput"):
        stack = ExitStack()
        stack.enter_context(warm.serving())
        config.add_cleanup(stack.close)


def pytest_collection_finish() -> None:
    """What all imports made stays to the end: no collection of garbage looks at it again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """No test leaves a signal ignored: all that is started here later would be deaf to it."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    yield
    after = {number: signal.getsignal(number) for number in _SIGNALS}
    assert after == before, f"{item.nodeid} left other handlers of signals"


# One fixed set of examples: a run that fails, fails again.
settings.register_profile(
    "fixed",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("fixed")


@pytest.fixture(scope="module")
def workers_here() -> Iterator[None]:
    """Workers run in this process: a child imports torch each time."""
    with in_process():
        yield


@pytest.fixture(scope="module")
def warm_workers() -> Iterator[None]:
    """Workers are forks of a process that has imported (see `tests.support.warm`)."""
    with warm.workers():
        yield


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """A variable that only the processes of this test inherit: other tests run beside it."""
    value = uuid.uuid4().hex
    monkeypatch.setenv("NF4_TEST_MARK", value)
    return f"NF4_TEST_MARK={value}"


@pytest.fixture(scope="session")
def tiny_falcon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Falcon of two layers in two shards."""
    return write_falcon(tmp_path_factory.mktemp("models") / "tiny-falcon")


@pytest.fixture(scope="session")
def downloaded_falcon(tiny_falcon: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder of it in which `download` is done (see `copy_of`)."""
    with in_process():
        build, *_ = download(tiny_falcon, tmp_path_factory.mktemp("artifacts"))
    return build.root


@pytest.fixture(scope="session")
def exported_falcon(downloaded_falcon: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder of it that lacks nothing but `verify` (see `copy_of`)."""
    build = Build(copy_of(downloaded_falcon, tmp_path_factory.mktemp("exported") / "build"))
    with in_process():
        for stage in ("quantize", "serialize"):
            run_stage(build, stage, Recipe(), CPU, SILENT)
    return build.root


@pytest.fixture(scope="session")
def quick_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that verifies in little time and passes a random model."""
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="session")
def verified(
    tiny_falcon: Path, quick_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A build whose verdict is "pass" (see `copy_of`)."""
    recipe = load_recipe(quick_recipe)
    folder = tmp_path_factory.mktemp("verified")
    with in_process(), warm.workers():
        build, results = run_build(DownloadRequest(str(tiny_falcon), folder), recipe, CPU, SILENT)
    assert results["verify"].record.facts.verdict == "pass"
    return build.root


@pytest.fixture(scope="session")
def calibrated_sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole build of the sample, calibrated on 4,096 tokens of its own (see `copy_of`)."""
    recipe = Recipe(QuantizeRecipe(calibrate="self", calibration_tokens=4096))
    request = DownloadRequest("sample", tmp_path_factory.mktemp("calibrated-sample"))
    with in_process(), warm.workers():
        build, _ = run_build(request, recipe, CPU, SILENT)
    return build.root
