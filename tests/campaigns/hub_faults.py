"""Every fault at every endpoint, one at a time, into a download or a push by the real client.

A case goes well if the command ended right, or stopped with one error that has a type and says what
to do; if nothing wrong was left on either side meanwhile; and if the same command without the fault
then ends right. `scripts/campaigns/hub_faults.py` prints the table of all cases.
"""

from __future__ import annotations

import random
import re
import shutil
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import Any, Final

import nf4_pipeline.errors

from tests.support import hub_uploads
from tests.support.hub_server import TOKEN, Fault, HubServer
from tests.support.hub_store import Repo
from tests.support.hub_worker import Outcome, Worker
from tests.support.tiny import content_of

assert hub_uploads  # its routes are registered by importing it

SILENCE: Final = 6.0  # seconds: HF_HUB_DOWNLOAD_TIMEOUT is 1 where there is one

STATUSES: Final = (401, 403, 404, 409, 412, 429, 500, 503)

KINDS: Final[dict[str, dict[str, Any]]] = {
    **{str(status): {"status": status} for status in STATUSES},
    "reset": {"dropped": True},
    "answer lost": {"reset_after": 0},
    "cut": {"cut_after": 5},
    "stall": {"delay": SILENCE + 1.5},
    "corrupt": {"flip_bit": 77},
    "no ranges": {"cut_after": 50_000},
}
"""What goes wrong, by name; see `Fault`."""

_EVERYWHERE: Final = tuple(kind for kind in KINDS if kind not in ("corrupt", "no ranges"))

_FOR_GOOD: Final = 10_000
LFS_FILE: Final = "model.safetensors"
REGULAR_FILE: Final = "config.json"


@dataclass(frozen=True)
class Endpoint:
    """Where a fault is put: requests that match, made by a command."""

    name: str
    command: str  # "download", "push", or "push --create-pr"
    method: str
    path: str
    cdn: bool = False
    parts: bool = False  # the Hub takes large files in parts
    extra: tuple[str, ...] = ()  # kinds beside those that are tried everywhere


ENDPOINTS: Final = (
    Endpoint("look-up", "download", "GET", "/api/models/*/revision/*"),
    Endpoint("listing", "download", "GET", "/api/models/*/tree/*"),
    Endpoint("head, small file", "download", "HEAD", f"*/resolve/*/{REGULAR_FILE}"),
    Endpoint("head, LFS file", "download", "HEAD", f"*/resolve/*/{LFS_FILE}"),
    Endpoint("small file", "download", "GET", f"*/resolve/*/{REGULAR_FILE}", extra=("corrupt",)),
    Endpoint(
        "LFS file", "download", "GET", f"*/{LFS_FILE}", cdn=True, extra=("corrupt", "no ranges")
    ),
    Endpoint("look-up", "push", "GET", "/api/models/*/revision/*"),
    Endpoint("create repo", "push", "POST", "/api/repos/create"),
    Endpoint("listing", "push", "GET", "/api/models/*/tree/*"),
    Endpoint("validate card", "push", "POST", "/api/validate-yaml"),
    Endpoint("preupload", "push", "POST", "/api/models/*/preupload/*"),
    Endpoint("LFS batch", "push", "POST", "*/info/lfs/objects/batch"),
    Endpoint("LFS put", "push", "PUT", "/upload/*", cdn=True, extra=("corrupt",)),
    Endpoint("LFS verify", "push", "POST", "/api/lfs/*/verify"),
    Endpoint(
        "LFS put part", "push", "PUT", "/upload/*/1", cdn=True, parts=True, extra=("corrupt",)
    ),
    Endpoint("LFS complete", "push", "POST", "/api/lfs/*/complete", parts=True),
    Endpoint("commit", "push", "POST", "/api/models/*/commit/*"),
    Endpoint("pull requests", "push --create-pr", "GET", "/api/models/*/discussions"),
    Endpoint("preupload", "push --create-pr", "POST", "/api/models/*/preupload/*"),
    Endpoint("commit", "push --create-pr", "POST", "/api/models/*/commit/*"),
)


@dataclass(frozen=True)
class Case:
    """One fault at one endpoint: once, or with `stays` for as long as the command runs."""

    number: int
    endpoint: Endpoint
    kind: str
    stays: bool = False

    def faults(self) -> list[Fault]:
        """What the server is told."""
        at = self.endpoint
        options = dict(KINDS[self.kind])
        if self.kind == "corrupt" and at.method == "PUT":
            options = {"flip_sent": options["flip_bit"]}
        times = _FOR_GOOD if self.stays else 1
        found = [Fault(at.path, times, at.method, at.cdn, **options)]
        if self.kind == "no ranges":  # the rest is asked for, and everything comes again
            found.append(Fault(at.path, times, at.method, at.cdn, ignore_range=True))
        return found


@dataclass(frozen=True)
class Result:
    """What came of a case; `problems` is what must not be."""

    case: Case
    outcome: Outcome
    seconds: float
    problems: tuple[str, ...]

    @property
    def cell(self) -> str:
        """For the table."""
        if self.problems:
            return "**WRONG**"
        return self.outcome.error or "right"


def all_cases(*, stays: Iterable[str] = ()) -> list[Case]:
    """Each kind at each endpoint once; and each kind of `stays` there for good."""
    pairs = [
        (endpoint, kind, False)
        for endpoint in ENDPOINTS
        for kind in (*_EVERYWHERE, *endpoint.extra)
    ]
    pairs += [(endpoint, kind, True) for endpoint in ENDPOINTS for kind in stays]
    return [Case(number, *pair) for number, pair in enumerate(pairs)]


def run_cases(cases: Sequence[Case], build: Path, folder: Path, *, lanes: int = 8) -> list[Result]:
    """Runs cases, several side by side, each lane with a Hub and a process of its own.

    Args:
        cases: which.
        build: a verified build; it is copied.
        folder: for caches and copies.
        lanes: how many at a time; they sleep more than they work.
    """
    stalls, others = Queue[Case](), Queue[Case]()
    for case in cases:
        (stalls if case.kind == "stall" else others).put(case)
    results: list[Result] = []
    failures: list[BaseException] = []

    def work(lane: int) -> None:
        try:
            with HubServer() as hub:
                hub.store.users[TOKEN] = "me"
                place = folder / f"lane-{lane}"
                place.mkdir(parents=True)
                # Only who meets a silence shall take one for the end: others are on a busy machine.
                for seconds, waiting in (("1", stalls), ("20", others)):
                    names = ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")
                    variables = {"HF_TOKEN": TOKEN, **dict.fromkeys(names, seconds)}
                    with (
                        suppress(Empty),
                        Worker(place / f"hf-{seconds}", hub.url, **variables) as worker,
                    ):
                        while True:
                            case = waiting.get_nowait()
                            results.append(_run(case, hub, worker, build, place))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(lane,)) for lane in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return sorted(results, key=lambda result: result.case.number)


def _run(case: Case, hub: HubServer, worker: Worker, build: Path, place: Path) -> Result:
    start = time.monotonic()
    if case.endpoint.command == "download":
        outcome, problems = _download(case, hub, worker)
    else:
        outcome, problems = _push(case, hub, worker, build, place)
    seconds = time.monotonic() - start
    if outcome.error:
        kind = getattr(nf4_pipeline.errors, outcome.error, None)
        if kind is None:
            problems.append(f"an error without a type: {outcome.error}")
        if not _REMEDY.search(outcome.message):
            problems.append(f"no remedy: {outcome.message}")
    cmdline = Path(f"/proc/{worker.pid}/cmdline").read_bytes()
    texts = [outcome.message, worker.log.read_text(), cmdline.decode()]
    if any(TOKEN in text for text in texts):
        problems.append("the token is in an error, on the terminal or in the process title")
    return Result(case, outcome, seconds, tuple(problems))


_REMEDY: Final = re.compile(
    r"(try|run) .*again|check |use a token|set HF_TOKEN|renew HF_TOKEN|look at|look for", re.I
)


def _download(case: Case, hub: HubServer, worker: Worker) -> tuple[Outcome, list[str]]:
    """A model of which an older commit is cached; never may that one come out."""
    repo_id = f"org/download-{case.number}"
    old = {REGULAR_FILE: b"{}", LFS_FILE: b"old"}
    new = {REGULAR_FILE: b'{"a": 1}' * 20, LFS_FILE: random.Random(case.number).randbytes(300_000)}
    repo = hub.store.add(repo_id, old)
    first = worker.download(repo_id)
    assert first.error == "", first.message
    repo.commit(new)

    def problems_of(outcome: Outcome) -> list[str]:
        if outcome.error:
            return []
        right = {path: repo.head.files[path].sha256 for path in new}
        wrong = outcome.value["commit"] != repo.refs["main"] or outcome.value["sha256"] != right
        return ["wrong files came out, and no error"] if wrong else []

    hub.seen.clear()
    hub.faults[:] = case.faults()
    outcome = worker.download(repo_id)
    problems = problems_of(outcome) + _unmet(hub, case)
    again = worker.download(repo_id)
    problems += problems_of(again)
    if again.error:
        problems.append(f"without the fault: {again.message}")
    return outcome, problems


def _push(
    case: Case, hub: HubServer, worker: Worker, build: Path, place: Path
) -> tuple[Outcome, list[str]]:
    """A push to a repo that is not there, or a pull request to one of somebody else."""
    repo_id = f"me/push-{case.number}"
    proposes = case.endpoint.command == "push --create-pr"
    folder = place / f"build-{case.number}"
    shutil.copytree(build, folder, symlinks=True)
    if proposes:
        hub.store.add(repo_id, {"a": b"a"})
    hub.part_size = 20_000 if case.endpoint.parts else None
    hub.seen.clear()
    hub.faults[:] = case.faults()
    waits = case.kind == "stall"  # the Hub has not done yet what it was asked
    outcome = worker.push(folder, repo_id, pull_request=proposes, waits=waits)
    export = content_of(folder / "export")  # with the repo's name in its card
    problems = _unmet(hub, case) + _state(hub.store.repos.get(repo_id), export, proposes)
    recorded = (folder / "records" / "push.json").exists()
    if recorded == bool(outcome.error):
        problems.append("a record without success" if recorded else "success without a record")
    hub.wait_until(lambda: hub.busy == 0)  # what the server was slow with, it does in the end
    again = worker.push(folder, repo_id, pull_request=proposes)
    if again.error:
        problems.append(f"without the fault: {again.message}")
    problems += _state(hub.store.repos[repo_id], export, proposes, complete=True)
    written = b"".join(content_of(folder).values())
    if TOKEN.encode() in written:
        problems.append("the token is in the build folder")
    shutil.rmtree(folder)
    return outcome, problems


def _unmet(hub: HubServer, case: Case) -> list[str]:
    """Faults that no request met would make a case mean nothing; none is left after this."""
    unmet = [fault for fault in hub.faults if fault.times in (1, _FOR_GOOD)]
    hub.faults.clear()
    problems = ["the fault was not met"] if unmet else []
    at = case.endpoint
    asked = hub.count(at.method, at.path)
    # One pull request is asked for once, and what is not asked again must have been given up.
    if case.kind == "stall" and asked < 2 and at != ENDPOINTS[-1]:
        problems.append("the stall was waited out")
    return problems


def _state(
    repo: Repo | None, export: Mapping[str, bytes], proposes: bool, *, complete: bool = False
) -> list[str]:
    """What is wrong with a repo: half an export, a second commit, a second pull request."""
    if repo is None:
        return []
    start = {"a"} if proposes else {".gitattributes"}
    problems = []
    for name, sha in repo.refs.items():
        held = {path: blob.data for path, blob in repo.commits[sha].files.items()}
        ours = {path: data for path, data in held.items() if path not in start}
        if ours not in ({}, dict(export)):
            problems.append(f"{name} is half published")
        if complete and not ours and proposes == (name != "main"):
            problems.append(f"{name} is empty after success")
    if len(repo.pull_requests) > (1 if proposes else 0):
        problems.append(f"{len(repo.pull_requests)} pull requests")
    if len(repo.commits) > 2:
        problems.append(f"{len(repo.commits)} commits")
    return problems


def table(results: Sequence[Result]) -> str:
    """All cases as Markdown: a row for each endpoint, a column for each fault."""
    lines = []
    for stays in (False, True):
        some = [result for result in results if result.case.stays is stays]
        if not some:
            continue
        kinds = [kind for kind in KINDS if any(result.case.kind == kind for result in some)]
        lines += [
            "The fault stays:" if stays else "The fault comes once:",
            "",
            "| command | endpoint | " + " | ".join(kinds) + " |",
            "|" + " --- |" * (len(kinds) + 2),
        ]
        for endpoint in ENDPOINTS:
            cells = {r.case.kind: r.cell for r in some if r.case.endpoint == endpoint}
            if cells:
                row = [f"`{endpoint.command}`", endpoint.name]
                lines.append("| " + " | ".join(row + [cells.get(k, "") for k in kinds]) + " |")
        lines.append("")
    right = sum(not r.problems and not r.outcome.error for r in results)
    stopped = sum(not r.problems and bool(r.outcome.error) for r in results)
    lines.append(
        f"{len(results)} cases: {right} ended right at once, {stopped} stopped with a typed error "
        f"that says what to do, {len(results) - right - stopped} were wrong."
    )
    return "\n".join(lines)


def messages(results: Sequence[Result]) -> str:
    """Each different error message once, with what varies from case to case taken out."""
    found: dict[str, str] = {}
    for result in results:
        if result.outcome.error:
            text = re.sub(r"http://127.0.0.1:\d+", "https://HUB", result.outcome.message)
            text = re.sub(r"(download|push)-\d+", r"\1", re.sub(r"\b[0-9a-f]{12,64}\b", "…", text))
            found.setdefault(f"{result.outcome.error}: {text}", "")
    return "\n".join(f"- {text}" for text in sorted(found))
