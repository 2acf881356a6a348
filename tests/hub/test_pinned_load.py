"""Which commit `load` and `prompt` take of a model on the Hub: resolved once, then pinned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.hub_client import isolated
from tests.support.hub_server import Fault, HubServer
from tests.support.tiny import content_of

REPO: Final = "some-org/tiny"
PROGRAM: Final = """
import json, sys
from nf4_pipeline.errors import PipelineError
from nf4_pipeline.runtime.artifact import open_folder
found = []
for options in json.loads(sys.argv[1]):
    try:
        found.append(["", open_folder("some-org/tiny", **options).name])
    except PipelineError as error:
        found.append([type(error).__name__, str(error)])
print(json.dumps(found))
"""


def opened(hub: HubServer, home: Path, *options: dict[str, Any]) -> list[list[str]]:
    """What each of some calls in one process finds: no error and a commit, or an error."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(options)],
        env=isolated(home, hub.url),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
    )
    found: list[list[str]] = json.loads(done.stdout)
    return found


def test_a_revision_is_a_commit_from_then_on(tiny_falcon: Path, tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.store.add(REPO, tiny_falcon)
        repo = hub.store.repos[REPO]
        first = repo.refs["v1"] = repo.refs["main"]
        second = repo.commit({**content_of(tiny_falcon), "README.md": b"# newer\n"})
        assert first != second == repo.refs["main"]
        assert opened(
            hub,
            tmp_path,
            {},
            {"revision": "main"},
            {"revision": "v1"},
            {"revision": first},
            {"revision": second, "weights": False},
        ) == [["", second], ["", second], ["", first], ["", first], ["", second]]
        third = repo.commit({**content_of(tiny_falcon), "README.md": b"# newest\n"})
        asked = hub.count("GET", "*")
        # Offline, each revision is the commit that it was when it was fetched.
        offline = [{"offline": True, "revision": name} for name in (None, "v1", first, second)]
        assert [commit for _, commit in opened(hub, tmp_path, *offline)] == [
            *(second, first, first, second)
        ]
        assert hub.count("GET", "*") == asked
        assert opened(hub, tmp_path, {}) == [["", third]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"revision": "v2"}, "NotFoundError", "v2"),
        ({"revision": "0" * 40}, "NotFoundError", "0000000"),
        ({"revision": "../main"}, "UsageError", "no branch, tag or commit"),
        ({"revision": "a b"}, "UsageError", "no branch, tag or commit"),
        ({"offline": True}, "HubError", "offline, and"),
        ({"offline": True, "revision": "v1"}, "HubError", "holds no some-org/tiny@v1"),
    ],
)
def test_a_revision_that_is_not_there(
    options: dict[str, Any], error: str, message: str, tiny_falcon: Path, tmp_path: Path
) -> None:
    with HubServer() as hub:
        hub.store.add(REPO, tiny_falcon)
        ((found, text),) = opened(hub, tmp_path, options)
    assert (found, message in text) == (error, True), text


def test_bytes_that_are_not_what_the_hub_lists(tiny_falcon: Path, tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.store.add(REPO, tiny_falcon)
        hub.faults.append(Fault("*", times=99, cdn=True, method="GET", flip_bit=5000))
        ((error, text),) = opened(hub, tmp_path, {})
    assert error == "HubError"
    assert "came wrong twice" in text


ENDED: Final = """
import sys
from nf4_pipeline.progress import reporting_to
from nf4_pipeline.runtime.artifact import open_folder
heard = []
def enough(event):
    heard.append(event.kind)
    if event.kind == "task_advance":
        raise ValueError("the callback's own")
try:
    with reporting_to(enough) as reporter:
        open_folder("some-org/tiny", reporter)
except ValueError as error:
    print(heard.count("task_advance"), error)
"""


def test_a_callback_ends_a_download(tiny_falcon: Path, tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.store.add(REPO, tiny_falcon)
        done = subprocess.run(
            [sys.executable, "-c", ENDED],
            env=isolated(tmp_path, hub.url),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert (done.stdout, done.stderr) == ("1 the callback's own\n", "")
        assert hub.count("GET", "*.safetensors") == 0
