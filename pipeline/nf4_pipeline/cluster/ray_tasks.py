"""Calls as tasks of a Ray cluster; Ray schedules them, and tries again what a lost worker had."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from nf4_pipeline.errors import PipelineError, ResourceError, UsageError

_RETRIES: Final = 20
"""Of one task, for workers and nodes that were lost; an error of its own is never tried again."""
_OBJECT_STORE: Final = 80 * 2**20  # bytes; files pass by it, so that the least is enough
_WAIT_FOR_HEAD: Final = 5.0  # seconds
_WAIT: Final = 1.0  # seconds, after which an interrupt is heard at the latest
_STARTS: Final = 3
"""Times that a cluster is started here: Ray gives up after half a minute, which may be too soon."""

_VARIABLES: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",  # of a cluster that is started here, nobody is told
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a task without a GPU keeps its node's variables
}
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Claim:
    """What a task takes of its node; of a GPU it may be a share."""

    cpus: int
    gpus: float = 0.0


def check_installed() -> None:
    """Refuses to begin without Ray.

    Raises:
        UsageError: Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise UsageError(
            "--engine ray needs the package ray, which is not installed: "
            "pip install 'nf4-pipeline[ray]'"
        )


def address_of(said: str | None) -> str | None:
    """Where the cluster is that would be used; None for one that is started on this host.

    Args:
        said: the address that the user named, if any.
    """
    return said or os.environ.get("RAY_ADDRESS") or None


@contextmanager
def connected(address: str | None) -> Iterator[Cluster]:
    """Connects to a cluster, or starts one on this host that ends with the body.

    Args:
        address: of it; None for the one that RAY_ADDRESS says, or else for one that is started now.

    Raises:
        ResourceError: there is no cluster, or it cannot be used from here.
        UsageError: Ray is not installed, or the address is of another kind.
    """
    check_installed()
    address = address_of(address)
    if address is not None:
        _check_address(address)
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    import ray

    heard = {number: signal.getsignal(number) for number in _SIGNALS}
    _init(ray, address)
    if threading.current_thread() is threading.main_thread():
        for number, handler in heard.items():  # Ray's own would abort the process
            signal.signal(number, handler)
    # Ray prints on stdout what becomes of workers, and there stands the result of a command.
    vars(ray._private.worker)["_worker_logs_enabled"] = False
    with redirect_stdout(sys.stderr):
        try:
            yield Cluster()
        finally:
            ray.shutdown()


def _init(ray: Any, address: str | None) -> None:
    """Connects to the cluster at an address, or starts one."""
    own = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE}
    for left in reversed(range(1 if address else _STARTS)):
        try:
            ray.init(
                address=address or "local",
                logging_level=logging.ERROR,
                log_to_driver=False,
                **({} if address else own),
            )
            return
        except Exception as error:  # it raises what it likes
            ray.shutdown()
            said = _first_line(error)
            if address is not None and "AuthToken" in f"{error}{error.__cause__}":
                raise ResourceError(
                    f"The Ray cluster at {address[:80]} asks for its token, and this process has "
                    "none, or another one. Copy ~/.ray/auth_token of the node where it was started "
                    "to this one, and set RAY_AUTH_MODE=token here."
                ) from error
            if address is not None:
                raise ResourceError(
                    f"The Ray cluster at {address[:80]} cannot be used: {said} Look at `ray "
                    "status` there; all its nodes need the Ray and the Python of this environment. "
                    "Without --ray-address, a cluster is started on this host."
                ) from error
            if not left:
                raise ResourceError(
                    f"Ray could not be started on this host, {_STARTS} times: {said} It gives "
                    "itself half a minute each time: try again when the host has less to do, or "
                    "leave --engine ray out."
                ) from error


def _check_address(address: str) -> None:
    """Refuses what no cluster can be at: Ray itself would try for minutes."""
    if "://" in address:
        raise UsageError(
            f"--ray-address {address[:80]!r}: expected the address that nodes join by, such as "
            "10.0.0.1:6379, or auto on one of the nodes; this program runs on one of them."
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), _WAIT_FOR_HEAD).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise ResourceError(
            f"No Ray cluster answers at {address[:80]}: {error}. Start one there with `ray start "
            "--head`, or leave --ray-address out: one is then started on this host."
        ) from error


class Cluster:
    """The cluster that this process is connected to.

    Tasks that are left when a call or the user ends `run` end with the connection. They are not
    cancelled: in Ray 2.60, one that finishes just then aborts this process.
    """

    def __init__(self) -> None:
        import ray

        self._ray: Any = ray

    @property
    def cpus(self) -> int:
        """Of all its nodes."""
        return int(self._ray.cluster_resources().get("CPU", 0))

    @property
    def gpus(self) -> int:
        """Of all its nodes."""
        return int(self._ray.cluster_resources().get("GPU", 0))

    @property
    def largest(self) -> Claim:
        """All of one node: of one with the most GPUs, and of these, with the most processors."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus, cpus = max((int(node.get("GPU", 0)), int(node.get("CPU", 0))) for node in nodes)
        return Claim(cpus, gpus)

    def run(
        self,
        call: Callable[[T], R],
        items: Sequence[T],
        claim: Claim,
        check: Callable[[], None] = lambda: None,
        ended: Callable[[T], None] = lambda item: None,
    ) -> list[R]:
        """Calls with each item, in order as far as there is room; the first error ends all.

        Args:
            call: what can be pickled, and may be begun again after it was killed; it is sent once.
            items: what can be pickled.
            claim: what each of them takes.
            check: called here every moment; what it raises ends all, too.
            ended: called here with each item that is done.

        Returns:
            What each call returned, in the order of the items.

        Raises:
            ResourceError: no node has so much, or one call lost its worker too often, or the nodes
                have other packages than this host.
            PipelineError: what a call, `check` or `ended` raises.
        """
        ray = self._ray
        self._check_room(claim)
        task = ray.remote(
            num_cpus=claim.cpus,
            num_gpus=claim.gpus,
            max_retries=_RETRIES,
            scheduling_strategy="SPREAD",
        )(_run)
        sent = ray.put(call)
        of = {task.remote(sent, item): item for item in items}
        pending = list(of)
        results: dict[Any, R] = {}
        try:
            while pending:
                done, pending = ray.wait(pending, timeout=_WAIT)
                results |= zip(done, ray.get(done), strict=True)
                for reference in done:
                    ended(of[reference])
                check()
            return [results[reference] for reference in of]
        except ray.exceptions.RayTaskError as error:
            raise _cause_of(error) from error
        except ray.exceptions.RayError as error:
            raise ResourceError(
                f"The Ray cluster lost the worker of one task {_RETRIES + 1} times: "
                f"{_first_line(error)} Look at the memory of its nodes and at `ray status`, then "
                "run the same command again: what is finished is kept."
            ) from error

    def _check_room(self, claim: Claim) -> None:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(
            node.get("CPU", 0) >= claim.cpus and node.get("GPU", 0) >= claim.gpus for node in nodes
        ):
            found = "; ".join(
                f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes
            )
            raise ResourceError(
                f"A task takes {claim.cpus} CPUs and {claim.gpus:g} GPUs of one node, and no node "
                f"of the Ray cluster has them ({found}). Give it a smaller --workers, another "
                "--device, or nodes that have them."
            )


def _run(call: Callable[[T], R], item: T) -> R:
    """A task: on whichever node."""
    from nf4_pipeline.quiet_libraries import quiet_libraries

    quiet_libraries()
    return call(item)


def _cause_of(error: Any) -> BaseException:
    """What a task raised, as if it had been raised here."""
    cause: BaseException = error.cause
    if isinstance(cause, ImportError):
        return ResourceError(
            f"A Ray worker misses a package: {cause}. Install nf4-pipeline[ray] of the same "
            "version on each node."
        )
    if isinstance(cause, PipelineError | OSError | MemoryError):
        return cause
    return RuntimeError(f"a Ray task failed: {error}")


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return text if text.endswith(".") else f"{text}."
