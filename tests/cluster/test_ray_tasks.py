"""Ray's addresses and failures, as errors of ours; with Ray itself where it is installed."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from nf4_pipeline.cluster import ray_tasks
from nf4_pipeline.cluster.ray_tasks import connected
from nf4_pipeline.errors import ResourceError, UsageError

from tests.support.tiny import environment

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs the extra nf4-pipeline[ray]"
)


@pytest.fixture
def seems_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_tasks, "check_installed", lambda: None)


def no_one_listens() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.usefixtures("seems_installed")
@pytest.mark.parametrize("said", ["option", "variable"])
def test_an_address_where_nobody_answers(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known at once; Ray would try for minutes."""
    address = no_one_listens()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if said == "variable":
        monkeypatch.setenv("RAY_ADDRESS", address)
    expected = f"No Ray cluster answers at {address}.*`ray start --head`"
    with (
        pytest.raises(ResourceError, match=expected),
        connected(address if said == "option" else None),
    ):
        pass


@pytest.mark.usefixtures("seems_installed")
@pytest.mark.parametrize(
    "address", ["no.such.host.invalid:6379", "127.0.0.1:99999999", f"{'a' * 70}:1", ":1:1"]
)
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(ResourceError, match="No Ray cluster answers"), connected(address):
        pass


@pytest.mark.usefixtures("seems_installed")
def test_an_address_for_clients_elsewhere() -> None:
    with pytest.raises(UsageError, match="runs on one of them"), connected("ray://10.0.0.1:10001"):
        pass


class Refuses:
    """Ray where the cluster asks for a token."""

    def init(self, **_: object) -> None:
        reason = RuntimeError("Last connection error: InvalidAuthToken: token is missing")
        raise ConnectionError("Failed to connect to Ray cluster") from reason

    def shutdown(self) -> None:
        """Nothing was begun."""


def test_a_cluster_that_asks_for_its_token() -> None:
    with pytest.raises(ResourceError, match=r"10\.0\.0\.1:6379 asks for .* RAY_AUTH_MODE=token"):
        ray_tasks._init(Refuses(), "10.0.0.1:6379")


WITH_RAY = """
from functools import partial
from nf4_pipeline.cluster.ray_tasks import Claim, connected
from nf4_pipeline.errors import CheckpointError, PipelineError
import os, signal, sys, time
from pathlib import Path

def note(folder, number):
    with (folder / str(number)).open("a") as file:
        file.write(f"{os.getpid()}\\n")
    if number == 1 and len((folder / "1").read_text().split()) < 3:
        os.kill(os.getpid(), signal.SIGKILL)

def fail(folder):
    raise CheckpointError("no good")

def miss(folder):
    import a_package_that_nobody_has

folder = Path(sys.argv[1])
with connected(None) as cluster:
    ended = []
    cluster.run(partial(note, folder), range(5), Claim(1), ended=ended.append)
    assert sorted(ended) == [0, 1, 2, 3, 4]
    for call in (fail, miss):
        try:
            cluster.run(call, [folder], Claim(1))
        except PipelineError as error:
            print(type(error).__name__, error)
    try:
        cluster.run(partial(note, folder), [9], Claim(1, 64.0))
    except PipelineError as error:
        print(type(error).__name__, error)
"""


@needs_ray
def test_calls_are_run_and_those_of_killed_workers_again(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITH_RAY, tmp_path],
        env=environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tries = {path.name: len(path.read_text().split()) for path in tmp_path.glob("[0-9]")}
    assert tries == {"0": 1, "1": 3, "2": 1, "3": 1, "4": 1}
    assert done.stdout == ""  # whatever Ray says there of the killed workers
    said = done.stderr.splitlines()
    wrong, missing, room = [line for line in said if line.split(" ")[0].endswith("Error")]
    assert wrong == "CheckpointError no good"
    assert missing.startswith("ResourceError A Ray worker misses a package: No module named")
    assert room.startswith("ResourceError A task takes 1 CPUs and 64 GPUs of one node, and no node")
