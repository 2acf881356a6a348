"""A worker that lets a fork of the warm process do its work, and is else as it would be.

It has the process id, the parent, the command line and the environment that its parent gave it. It
lives as long as the fork and ends as that does; if it is killed first, the system kills the fork.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import sys
from contextlib import suppress
from importlib.util import find_spec

OURS = "nf4_pipeline."
FORKED = (f"{OURS}processes.child_side", f"{OURS}processes.fork_server")
SCRIPT = "nf4_pipeline/readers/stock_reader.py"
LIMITS = [number for name, number in vars(resource).items() if name.startswith("RLIMIT_")]


def stand_in_for(command: list[str]) -> None:
    """Returns if this is no such worker, or if the warm process is of no use to it."""
    if command[1:2] != ["-P"]:
        return
    descriptors = [0, 1, 2]
    module = command[3] if command[2:3] == ["-m"] and command[3] in FORKED else ""
    if module == FORKED[1]:
        descriptors.append(int(command[4]))
    workers = command[4 + len(descriptors) - 3 :] if module else []
    if not all(worker.startswith(OURS) for worker in workers):
        return  # one of a test's own
    if not module and not command[2].endswith(SCRIPT):
        return
    ends, alive = os.pipe()  # its other end is closed when this process ends, however that is
    try:
        warm = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        warm.connect(os.environ["NF4_TESTS_WARM"])
        order = json.dumps(_order(command, descriptors)).encode()
        socket.send_fds(warm, [order], [*descriptors, ends])
        begun = warm.recv(1 << 10) == b"begun"
    except OSError:
        begun = False
    os.close(ends)
    if not begun:
        os.close(alive)
        warm.close()
        return
    # What the worker does first, too: see `nf4_pipeline.processes.child_side`.
    signal.signal(signal.SIGINT, signal.SIG_IGN if module else signal.SIG_DFL)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    for descriptor in descriptors:  # the fork has them; when it ends, they are at their end
        os.close(descriptor)
    status = 1
    with suppress(OSError):
        status = int(warm.recv(1 << 10) or b"1")
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _order(command: list[str], descriptors: list[int]) -> dict[str, object]:
    umask = os.umask(0)
    os.umask(umask)
    return {
        "command": command,
        "descriptors": descriptors,
        "environment": dict(os.environ),
        "folder": os.getcwd(),  # noqa: PTH109 (pathlib takes as long as all the rest)
        "path": sys.path,
        "package": found.origin if (found := find_spec("nf4_pipeline")) else None,
        "parent": os.getppid(),
        "umask": umask,
        "processors": sorted(os.sched_getaffinity(0)),
        "limits": [[number, *resource.getrlimit(number)] for number in LIMITS],
    }
