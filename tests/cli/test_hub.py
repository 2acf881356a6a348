"""`nf4 download` and `nf4 push` against a Hub: what people read, and what leaks.

What depends on the process, its environment or its end runs in one of its own; other cases share
one, with everything real but the start.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from nf4_pipeline.build_folder import Build

from tests.support import hub_uploads, warm
from tests.support.checkpoints import make_checkpoint
from tests.support.command_line import without_progress
from tests.support.hub_client import isolated
from tests.support.hub_server import TOKEN, Fault, HubServer
from tests.support.hub_worker import Worker
from tests.support.sources import Change, with_extra, without
from tests.support.tiny import Done, content_of, copy_of

assert hub_uploads  # its routes are registered by importing it

REPO = "me/tiny"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.store.users[TOKEN] = "me"
        yield server


IMPATIENT: Final = """
import time
time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.2))
from nf4_pipeline.__main__ import main
main()
"""
"""`nf4`, which does not wait long between tries."""


class Shell:
    """Runs `nf4` in a folder, with a cache of its own and a token."""

    def __init__(self, folder: Path, hub: HubServer) -> None:
        self.folder = folder
        self.environment = isolated(
            folder / "hf", hub.url, HF_TOKEN=TOKEN, HF_HUB_DOWNLOAD_TIMEOUT="1"
        )

    def start(self, *args: str | Path, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", IMPATIENT, *map(str, args)],
            cwd=self.folder,
            env=self.environment | variables if variables else warm.variables(self.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *args: str | Path, **variables: str) -> Done:
        process = self.start(*args, **variables)
        out, err = process.communicate(timeout=300)
        return Done(process.returncode, out, err)


@dataclass(frozen=True)
class Shared:
    """One process for several cases, its cache, and its Hub, where each case has its own repo."""

    hub: HubServer
    worker: Worker
    home: Path

    def cached(self, repo: str) -> list[str]:
        """The names of files in its cache that belong to a repo."""
        folder = self.home / "hub" / f"models--{repo.replace('/', '--')}"
        return [path.name for path in folder.rglob("*")]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    home = tmp_path_factory.mktemp("shared") / "hf"
    with (
        HubServer() as server,
        Worker(home, server.url, HF_TOKEN=TOKEN, HF_HUB_DOWNLOAD_TIMEOUT="1") as worker,
    ):
        server.store.users[TOKEN] = "me"
        yield Shared(server, worker, home)


@pytest.fixture
def shell(hub: HubServer, tmp_path: Path) -> Shell:
    return Shell(tmp_path, hub)


def test_two_downloads_of_one_model_at_a_time(
    hub: HubServer, shell: Shell, tiny_falcon: Path
) -> None:
    hub.store.add(REPO, tiny_falcon)
    hub.pause = 0.02
    both = [shell.start("download", REPO, "--json") for _ in range(2)]
    ends = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    first, second = (json.loads(out) for out, _ in ends)
    assert first == second
    assert first["commit"] == hub.store.repos[REPO].refs["main"]
    source = shell.folder / first["build"] / "source"
    assert content_of(source) == {
        name: (tiny_falcon / name).read_bytes() for name in first["files"]
    }


def test_what_has_no_hash_is_refused_or_said(
    shared: Shared,
    tiny_falcon: Path,
    quick_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = shared.hub
    hub.store.add("me/unhashed", tiny_falcon)
    unhashed = {"generation_config.json", "tokenizer_config.json"}
    unhashed &= {path.name for path in tiny_falcon.iterdir()}
    assert unhashed
    monkeypatch.setattr(hub, "unhashed", unhashed)
    refused = shared.worker.nf4(tmp_path, "download", "me/unhashed")
    assert refused.status == 1
    assert "no hash of" in refused.err
    assert "--allow-unhashed" in refused.err
    command = ("build", "me/unhashed", "--allow-unhashed", "--recipe", quick_recipe, "--json")
    built = shared.worker.nf4(tmp_path, *command, with_readers=False)
    assert built.status == 0, built.err
    (root,) = (tmp_path / "artifacts").iterdir()
    record = json.loads((root / "records" / "download.json").read_text("utf-8"))
    manifest = json.loads((root / "export" / "manifest.json").read_text("utf-8"))
    assert record["facts"]["unchecked"] == manifest["source"]["unchecked"] == sorted(unhashed)
    assert "listed no hash of" in (root / "export" / "README.md").read_text("utf-8")


WRONG_WEIGHTS: dict[str, tuple[Change, str]] = {
    "scales of a quantization": (
        with_extra(model__layers__0__mlp__up_proj__weight_scale_inv=torch.ones(1)),
        "up_proj.weight_scale_inv",
    ),
    "a tensor without a place": (
        with_extra(model__somewhere=torch.ones(3)),
        "--allow-unused",
    ),
    "a tensor that is missing": (without("layers.1.mlp.up_proj"), "layers.1.mlp.up_proj"),
}


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_what_headers_tell_is_known_before_the_weights_are_fetched(
    case: str, shared: Shared, tmp_path: Path
) -> None:
    change, said = WRONG_WEIGHTS[case]
    model = make_checkpoint(tmp_path / "model", "llama")
    change(model)
    repo = f"me/{case.replace(' ', '-')}"
    shared.hub.store.add(repo, model)
    done = shared.worker.nf4(tmp_path, "download", repo)
    assert done.status == 1
    assert said in done.err
    assert "/tmp/nf4-" not in done.err
    cached = shared.cached(repo)
    assert "config.json" in cached
    assert "model.safetensors" not in cached


def test_headers_that_are_large_together_are_not_fetched(
    hub: HubServer, shell: Shell, tiny_falcon: Path
) -> None:
    model = copy_of(tiny_falcon, shell.folder / "model")
    shards = [f"model-{number}.safetensors" for number in range(5)]
    for name in shards:
        (model / name).write_bytes((16 << 20).to_bytes(8, "little") + b"{" + b" " * (200 << 10))
    index = {"metadata": {}, "weight_map": dict(zip(shards, shards, strict=True))}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.store.add(REPO, model)
    done = shell("download", REPO)
    assert done.status == 1
    assert "claim more than 67,108,864 bytes together" in done.err
    assert all(hub.count("GET", f"*/{name}", cdn=True) <= 2 for name in shards)


@pytest.mark.parametrize(
    "variables",
    [
        {"HTTP_PROXY": "::::"},
        {"HTTPS_PROXY": "ftp://x"},
        {"SSL_CERT_FILE": "/etc/passwd"},
        {"HF_HUB_DOWNLOAD_TIMEOUT": "a while"},
        {"HF_ENDPOINT": "http://[::1"},
    ],
    ids=str,
)
def test_an_environment_without_any_request(variables: dict[str, str], shell: Shell) -> None:
    done = shell("download", REPO, **variables)
    assert done.status == 1
    said = ("cannot begin in this environment", "cannot be imported", "expected a whole number of")
    assert any(words in done.err for words in said)
    assert "bug" not in done.err
    assert without_progress(done.err).count("\n") == 1


WRONG_HEADERS: dict[str, dict[str, Any]] = {
    "flipped": {"flip_bit": 8 * 300},
    "cut": {"cut_after": 50},
    "whole": {"ignore_range": True},
    "503": {"status": 503, "times": 2},
    "416": {"status": 416},
}


@pytest.mark.parametrize("case", WRONG_HEADERS)
def test_a_header_that_came_wrong_is_asked_for_again(
    case: str, shared: Shared, tiny_falcon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = f"me/header-{case}"
    shared.hub.store.add(repo, tiny_falcon)
    fault = Fault("*.safetensors", cdn=True, **WRONG_HEADERS[case])
    monkeypatch.setattr(shared.hub, "faults", [fault])
    done = shared.worker.nf4(tmp_path, "download", repo)
    assert done.status == 0, done.err
    assert fault.times == 0  # it did come


def test_offline_says_which_commit_it_takes(
    hub: HubServer, shell: Shell, tiny_falcon: Path
) -> None:
    repo = hub.store.add(REPO, tiny_falcon)
    old = repo.refs["main"]
    assert shell("download", REPO).status == 0
    repo.commit({"README.md": b"newer"})
    hub.faults.append(Fault("/api/models/*/revision/*", status=503, times=99))
    done = shell("download", REPO)
    assert done.status == 1
    assert f"--offline or HF_HUB_OFFLINE=1 uses the cached commit {old}" in done.err
    asked = len(hub.seen)
    done = shell("download", REPO, "--offline")
    assert done.status == 0, done.err
    assert f"offline: {REPO} at commit {old}, as cached in" in done.err
    assert old in done.out
    assert len(hub.seen) == asked


def test_a_push_says_what_it_did(hub: HubServer, shell: Shell, verified: Path) -> None:
    build = Build(copy_of(verified, shell.folder / "build"))
    push = ("push", "--repo-id", REPO, "--build-dir", build.root)
    plan = shell(*push, "--dry-run")
    assert plan.status == 0, plan.err
    assert hub.seen == []
    assert f"would upload to {REPO} (private if it has to be created)" in plan.out
    assert f'from_pretrained("{REPO}"' not in (build.export / "README.md").read_text()

    done = shell(*push)
    for name, content in content_of(build.export).items():
        assert f"{len(content):>14,}  {sha256(content).hexdigest()[:12]}  {name}\n" in plan.out
    card = (build.export / "README.md").read_text().splitlines()
    assert [line[4:] for line in plan.out.splitlines() if line.startswith("  |")] == card
    assert f'from_pretrained("{REPO}", device_map="auto")' in "\n".join(card)
    commit = hub.store.repos[REPO].refs["main"]
    count, total = len(content_of(build.export)), sum(map(len, content_of(build.export).values()))
    assert done.status == 0, done.err
    assert done.out.splitlines() == [
        f"pushed to {REPO} (private, new), main",
        f"commit        {hub.url}/{REPO}/commit/{commit}",
        f"proof         the Hub lists the expected checksum for all {count} files, {total:,} bytes",
    ]
    again = shell(*push, "--json")
    assert again.status == 0, again.err
    assert (again.value["commit"], again.value["committed"]) == (commit, False)
    assert again.value["proof"]["commit"] == commit


LEAKS: list[dict[str, Any]] = [
    {},
    {"path": "*/preupload/*", "status": 403, "message": f"the token {TOKEN} may not"},
    {"path": "*/commit/*", "status": 500, "message": f"Bearer {TOKEN}", "times": 99},
    {"path": "/upload/*", "status": 404, "message": f"at https://{TOKEN}@cdn/?token={TOKEN}"},
    {"path": "/api/repos/create", "dropped": True, "times": 99},
]


@pytest.mark.parametrize("fault", LEAKS, ids=["none", "403", "500", "404", "reset"])
def test_the_token_is_nowhere(
    hub: HubServer, shell: Shell, verified: Path, fault: dict[str, Any]
) -> None:
    build = Build(copy_of(verified, shell.folder / "build"))
    if fault:
        hub.faults.append(Fault(**fault))
    process = shell.start("push", "--repo-id", REPO, "--build-dir", build.root, "-v")
    hub.wait_until(lambda: bool(hub.seen) or process.poll() is not None)
    title = Path(f"/proc/{process.pid}/cmdline").read_bytes() if process.poll() is None else b""
    out, err = process.communicate(timeout=300)
    assert process.returncode == bool(fault), err
    assert "Traceback" not in err
    assert any(seen.authorized for seen in hub.seen)
    written = b"".join(content_of(build.root).values())
    for text in (out, err, title.decode(), written.decode(errors="replace")):
        assert TOKEN not in text
        assert TOKEN[3:] not in text
