"""A process that has torch and transformers imported, and forks the workers of `nf4` processes.

    warm.variables(environment)      an `nf4` of this environment has workers that begin at once
    with warm.workers(): ...         so has what this process does meanwhile

Importing both takes four seconds of processor time, which each worker of each command would spend
anew. What is tested of a command is seldom that. With these variables, Python imports
`warm_site/sitecustomize.py` as it starts; a worker then stays the process that its parent started,
and a fork does its work, with its environment, streams, folder and limits (`warm_proxy.py` there).
The package, and whatever libraries read from the environment as they are imported, must be the same
here and there; else the worker goes on by itself, as it does where nobody listens.

Not for tests of how workers start and end, of what they import, or of their memory. pytest starts
this process, once for all of xdist's workers, and it imports when it is asked first.

    python -P -m tests.support.warm SOCKET
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import random
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any, Final, NoReturn
from unittest import mock

import nf4_pipeline
from nf4_pipeline.machine import may_have_cuda
from nf4_pipeline.processes.child_side import end_with_parent
from nf4_pipeline.processes.worker import Environment
from nf4_pipeline.quiet_libraries import quiet_libraries

_ADDRESS: Final = "NF4_TESTS_WARM"
_LISTENS: Final = "NF4_TESTS_WARM_LISTENS"
_PATH: Final = "PYTHONPATH"
_SITE: Final = Path(__file__).with_name("warm_site")
_ROOT: Final = Path(__file__).parents[2]
_LONGEST_ORDER: Final = 1 << 20
_STREAMS: Final = 5
_HIGH: Final = 500  # descriptors from here on stand in nobody's way

_IMPORTED: Final = (
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.falcon.modeling_falcon",
    "transformers.models.llama.modeling_llama",
    "transformers.quantizers.auto",
    "transformers.generation.utils",
    "accelerate",
    "bitsandbytes",
    "peft",
    "nf4_pipeline.nf4.cpu",
    "nf4_pipeline.processes.fork_server",
    "nf4_pipeline.model.probe_worker",
    "nf4_pipeline.verification.source_worker",
    "nf4_pipeline.verification.artifact_worker",
    "nf4_pipeline.runtime.prompt_worker",
)

_READ_AT_IMPORT: Final = (
    *("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TORCH", "PYTORCH_", "NUMBA_", "BNB_", "CUDA_"),
    *("OMP_", "MKL_", "OPENBLAS_", "TOKENIZERS_", "ACCELERATE_", "MPL", "LC_", "LANG", "LD_"),
    *("PYTHON", "NF4_"),
)
_NEVER_ASKED: Final = frozenset(
    {
        *("HF_HOME", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_DISABLE_XET"),
        *("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT", "HF_HUB_DISABLE_TELEMETRY"),
        *(_PATH, "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED", _ADDRESS, _LISTENS),
        "TORCHINDUCTOR_CACHE_DIR",  # torch sets it itself, in pytest for all that it starts
    }
    | (set() if may_have_cuda() else {"CUDA_VISIBLE_DEVICES"})
)
"""What may differ: where the Hub is and what it left, for no worker asks it, and what is no
matter once all is imported."""


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which the workers of `nf4` are forks, if somebody listens."""
    if _LISTENS not in os.environ:
        return dict(environment)
    path = os.pathsep.join([str(_SITE), *_paths(environment)])
    return {**environment, _ADDRESS: os.environ[_LISTENS], _PATH: path}


def without(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which each worker of `nf4` is a process of its own."""
    kept = {name: value for name, value in environment.items() if name not in (_ADDRESS, _PATH)}
    path = _paths(environment)
    return kept | ({_PATH: os.pathsep.join(path)} if path else {})


def _paths(environment: Mapping[str, str]) -> list[str]:
    path = environment.get(_PATH, "")
    return [entry for entry in path.split(os.pathsep) if entry not in ("", str(_SITE))]


@contextmanager
def workers() -> Iterator[None]:
    """While the body runs, workers that this process starts are forks, if somebody listens."""
    with mock.patch.dict(os.environ, variables(os.environ)):
        yield


@contextmanager
def serving() -> Iterator[None]:
    """While the body runs, a process listens, for this one and all that it starts."""
    with tempfile.TemporaryDirectory(prefix="nf4-warm-") as folder:
        address = str(Path(folder) / "socket")
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, address],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdout is not None
        process.stdout.readline()  # it listens
        os.environ[_LISTENS] = address
        try:
            yield
        finally:
            del os.environ[_LISTENS]
            process.kill()
            process.communicate()


def _environment() -> dict[str, str]:
    """That of a worker which `tiny.environment` leads to."""
    from tests.support.tiny import environment

    path = os.pathsep.join([str(_ROOT), str(_ROOT / "pipeline")])
    return Environment().variables() | environment(Path("/nonexistent")) | {_PATH: path}


def _read_at_import(environment: dict[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_READ_AT_IMPORT) and name not in _NEVER_ASKED
    }


class _Warm:
    """The process, from inside."""

    def __init__(self, address: str) -> None:
        before = dict(os.environ)
        quiet_libraries()  # as a worker does first
        self._quiet = {n: value for n, value in os.environ.items() if n not in before}
        self._read = _read_at_import(dict(os.environ))
        self._forks: dict[int, socket.socket] = {}  # who waits for each, by its process id
        self._selector = DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(address)
        self._listener.listen(64)
        self._wake, write = os.pipe()
        for descriptor in (self._wake, write):
            os.set_blocking(descriptor, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(write)
        self._selector.register(self._listener, EVENT_READ)
        self._selector.register(self._wake, EVENT_READ)
        self._is_warm = False
        self._set_by_libraries: dict[str, str] = {}

    def run(self) -> NoReturn:
        """Answers until it is killed."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    connection, _ = self._listener.accept()
                    self._selector.register(connection, EVENT_READ)
                elif key.fileobj == self._wake:
                    with suppress(BlockingIOError):
                        os.read(self._wake, 4096)
                    self._reap()
                elif isinstance(key.fileobj, socket.socket):
                    self._hear(key.fileobj)

    def _hear(self, connection: socket.socket) -> None:
        """An order, or the end of who gave one."""
        data, descriptors = b"", list[int]()
        with suppress(ConnectionError):
            data, descriptors, _, _ = socket.recv_fds(connection, _LONGEST_ORDER, _STREAMS)
        if not data:
            self._selector.unregister(connection)
            if connection not in self._forks.values():
                connection.close()
            return
        order = json.loads(data)
        if not self._fits(order, connection):
            self._let_go(connection)
        else:
            if not self._is_warm:
                self._import()
            proxy = _peer(connection)[0]
            pid = os.fork()
            if pid == 0:
                self._work(order, descriptors, proxy)
            self._forks[pid] = connection
            with suppress(OSError):
                connection.send(b"begun")
        for descriptor in descriptors:
            os.close(descriptor)

    def _fits(self, order: dict[str, Any], connection: socket.socket) -> bool:
        pid, user, _ = _peer(connection)
        try:
            sees = Path(f"/proc/{pid}/ns/mnt").readlink() == Path("/proc/self/ns/mnt").readlink()
        except OSError:
            return False
        theirs = self._quiet | order["environment"]
        same = order["package"] == nf4_pipeline.__file__ and user == os.getuid()
        return sees and same and self._read == _read_at_import(theirs)

    def _import(self) -> None:
        before = dict(os.environ)
        for name in _IMPORTED:
            import_module(name)
        self._set_by_libraries = {n: value for n, value in os.environ.items() if n not in before}
        gc.collect()
        gc.freeze()
        threads = list(Path("/proc/self/task").iterdir())
        assert len(threads) == 1, "any other would be missing in a fork, with what it holds locked"
        self._is_warm = True

    def _let_go(self, connection: socket.socket) -> None:
        with suppress(KeyError):
            self._selector.unregister(connection)
        connection.close()

    def _reap(self) -> None:
        while self._forks:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            connection = self._forks.pop(pid)
            with suppress(OSError):
                connection.send(str(os.waitstatus_to_exitcode(status)).encode())
            self._let_go(connection)

    def _work(self, order: dict[str, Any], descriptors: list[int], proxy: int) -> NoReturn:
        status = 1
        try:
            self._become(order, descriptors, proxy)
            command = order["command"]
            if command[2] == "-m":
                sys.argv = command[3:]
                import_module(command[3]).main()
            else:
                sys.argv = command[2:]
                runpy.run_path(command[2], run_name="__main__")
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def _become(self, order: dict[str, Any], descriptors: list[int], proxy: int) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        *streams, alive = [os.dup2(d, _HIGH + n, False) for n, d in enumerate(descriptors)]
        os.closerange(0, _HIGH)
        for stream, target in zip(streams, order["descriptors"], strict=True):
            os.dup2(stream, target)
            os.close(stream)
        _end_with(alive)
        os.environ.clear()
        os.environ.update(self._set_by_libraries | order["environment"])
        os.chdir(order["folder"])
        os.umask(order["umask"])
        os.sched_setaffinity(0, order["processors"])
        for number, soft, hard in order["limits"]:
            resource.setrlimit(number, (soft, hard))
        sys.path[:] = order["path"]
        sys.orig_argv[:] = order["command"]
        tempfile.tempdir = None
        random.seed()
        itself, parent = os.getpid(), order["parent"]
        # Of a fork of this one, the parent is whom its own parent knows by that name.
        os.getppid = lambda: parent if os.getpid() == itself else proxy


def _end_with(alive: int) -> None:
    """Has the system kill this process when nobody holds the other end of a pipe any more."""
    fcntl.fcntl(alive, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(alive, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(alive, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        os.read(alive, 1)
        os._exit(1)  # it has ended already


def _peer(connection: socket.socket) -> tuple[int, int, int]:
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, user, group = (int.from_bytes(data[i : i + 4], sys.byteorder) for i in (0, 4, 8))
    return pid, user, group


def main(address: str) -> NoReturn:
    """Listens, and imports for the first who asks."""
    end_with_parent()
    warm = _Warm(address)
    print("listens", flush=True)
    warm.run()


if __name__ == "__main__":
    main(sys.argv[1])
