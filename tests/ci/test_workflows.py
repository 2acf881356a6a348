"""The workflows, run step by step: from a checkout to what a Hub holds, signed and attested."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support import hub_uploads, warm
from tests.support.hub_client import isolated
from tests.support.hub_server import TOKEN, HubServer
from tests.support.identities import Issuer
from tests.support.sigstore_instance import Sigstore
from tests.support.tiny import copy_of, nf4
from tests.support.workflow_commands import obeyed
from tests.support.workflow_expressions import ExpressionError, evaluate, fill_in, holds
from tests.support.workflow_runner import Platform, WorkflowError

assert hub_uploads  # its routes are registered by importing it

ROOT: Final = Path(__file__).parents[2]
PUBLISH: Final = ".github/workflows/build-and-publish.yml"
QUOTED: Final = ROOT / "scripts" / "ci" / "run_quoted.sh"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.store.users[TOKEN] = "me"
        yield server


@pytest.fixture
def platform(hub: HubServer, tmp_path: Path) -> Platform:
    """GitHub, with a Hub beside it."""
    (tmp_path / "caller").mkdir()
    return Platform(
        tmp_path / "platform",
        ROOT,
        tmp_path / "caller",
        environment=warm.variables(isolated(tmp_path / "hf", hub.url, CUDA_VISIBLE_DEVICES="")),
    )


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key.pem"
    command = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out"]
    subprocess.run([*command, path], check=True)
    return path


def test_the_sample_is_built_verified_signed_pushed_and_attested(
    platform: Platform, hub: HubServer, tmp_path: Path
) -> None:
    """Without a secret: two jobs say who they are, to a Sigstore and to the Hub."""
    (platform.caller / "recipe.toml").write_text("[verify]\neval_tokens = 512\n")
    hub.store.add("me/sample-nf4", {"README.md": b"Soon.\n"})
    inputs = {"model": "sample", "recipe": "recipe.toml", "repo": "me/sample-nf4", "parts": 2}
    with Issuer() as issuer, Sigstore(issuer) as sigstore:
        issuer.trusted_by(hub, "me/sample-nf4", repository="me/code")
        trust = sigstore.write_trust(tmp_path / "trust.json")
        platform.identity = issuer.variables | {"NF4_TRUST_CONFIG": str(trust)}
        jobs = platform.run(PUBLISH, inputs | {"python": sys.executable})
    log = "".join(job.log for job in jobs.values())
    assert {name: job.result for name, job in jobs.items()} == dict.fromkeys(jobs, "success"), log
    assert list(jobs) == ["plan", "part", "build", "sign", "push", "attest"]
    assert [command for job in jobs.values() for command in job.commands] == []
    assert issuer.bearers
    assert [secret for secret in (*issuer.handed_out, *hub.store.users) if secret in log] == []
    assert jobs["build"].outputs["verdict"] == "pass"
    assert 0 < float(jobs["build"].outputs["kl"]) < 0.1
    assert "Plan for nf4-pipeline/sample" in jobs["plan"].summary
    assert "[Report and pictures](https://github.com/" in jobs["build"].summary
    assert "Published: [me/sample-nf4](http" in jobs["push"].summary

    repo = hub.store.repos["me/sample-nf4"]
    assert jobs["push"].outputs["hub-commit"] == repo.refs["main"]
    held = {name: blob.data for name, blob in repo.head.files.items()}
    held.pop(".gitattributes", None)
    assert {name: hashlib.sha256(raw).hexdigest() for name, raw in held.items()} == (
        platform.attested
    )
    for name, raw in held.items():
        (tmp_path / "fetched" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fetched" / name).write_bytes(raw)
    who = ("--identity", issuer.claims["sub"], "--issuer", issuer.url)
    checked = nf4(
        "check", tmp_path / "fetched", *who, "--trust-config", trust, "--json", cwd=tmp_path
    )
    assert checked.value["signed"] is True, checked.err
    assert "me/sample-nf4" in held["README.md"].decode()
    subjects = json.loads(held["provenance.json"])["subject"]
    assert {subject["name"] for subject in subjects} == set(held) - {
        "provenance.json",
        "model.sig",
    }


SIGN: Final = """
on: {workflow_call: {secrets: {key: {required: true}}}}
permissions: {}
jobs:
  sign:
    permissions: {}
    steps:
      - uses: $/.
        with: {command: sign, build-dir: build, signing-key: "${{ secrets.key }}"}
"""


def test_signing_with_a_key(platform: Platform, verified: Path, key: Path, tmp_path: Path) -> None:
    (tmp_path / "sign.yml").write_text(SIGN)
    platform.action_inputs = {"python": sys.executable, "build-dir": "build"}
    copy_of(verified, tmp_path / "platform" / "jobs" / "sign" / "work" / "caller" / "build")
    done = platform.run(str(tmp_path / "sign.yml"), {}, {"key": key.read_text()})["sign"]
    assert done.result == "success", done.log
    assert "PRIVATE KEY" not in done.log
    left = [path.name for path in (platform.folder / "jobs" / "sign").rglob("*.pem")]
    assert left == []
    assert len(list((platform.folder / "jobs").rglob("export/model.sig"))) == 1


def test_what_fails_says_why_and_nothing_follows(platform: Platform, hub: HubServer) -> None:
    """A folder that holds no model, and whose name tries to pass for a command."""
    name = "##[set-output name=commit]forged"
    (platform.caller / name).mkdir()
    inputs = {"model": f"./{name}", "repo": "me/tiny", "parts": 2, "python": sys.executable}
    jobs = platform.run(PUBLISH, inputs)
    assert {job: done.result for job, done in jobs.items()} == {
        "plan": "failure",
        **dict.fromkeys(("part", "build", "sign", "push", "attest"), "skipped"),
    }
    (command,) = jobs["plan"].commands
    assert (command.name, command.properties) == ("error", {"title": "nf4: no artifact"})
    assert "config.json" in command.text
    assert "config.json" in jobs["plan"].summary
    assert jobs["plan"].outputs["commit"] == ""
    assert hub.store.repos == {}


@pytest.mark.parametrize(
    "text",
    [
        "::set-output name=verdict::pass",
        "  ::add-mask::a",
        "x ##[error]forged",
        "::stop-commands::other\n::error::forged",
        "a\r\n::error::forged\r\n",
        "::00000000000000000000000000000000::\n::error::forged",
    ],
)
@pytest.mark.parametrize("status", [0, 7])
def test_no_line_of_a_quoted_command_is_obeyed(text: str, status: int, tmp_path: Path) -> None:
    script = 'printf "%s\\n" "$1" >&2; echo out; exit "$2"'
    done = subprocess.run(
        [QUOTED, tmp_path / "log", "bash", "-c", script, "bash", text, str(status)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (status, "out\n")
    lines = done.stderr.splitlines()
    assert obeyed([*lines, "::error::ours"]) == obeyed(["::error::ours"])
    assert (tmp_path / "log").read_text() == f"{text}\n".replace("\r\n", "\n")


WORKFLOW: Final = """
on: {{workflow_call: {{inputs: {{name: {{type: string}}}}}}}}
permissions: {{}}
jobs:
  one:
    steps:
      - {step}
"""


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("uses: actions/stale@" + "a" * 40, "nothing is known"),
        ("uses: actions/checkout@v7", "not pinned"),
        ("{uses: actions/cache@" + "a" * 40 + ", with: {paht: x}}", "has no input"),
        ("{uses: actions/checkout@" + "a" * 40 + ", with: {}}", "leaves its token"),
        ("run: echo ${{ inputs.name }}", "pastes an expression"),
        ('run: echo "PATH=/tmp" >>"$GITHUB_ENV"', "GITHUB_ENV"),
        ("{run: 'true', shell: pwsh}", "no shell"),
        ("{uses: $/., with: {modle: sample}}", "has no input"),
        ('run: echo "no output" >>"$GITHUB_OUTPUT"', "is no output"),
    ],
)
def test_the_runner_refuses_what_it_does_not_know(step: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "tree" / "w.yml"
    path.parent.mkdir()
    path.write_text(WORKFLOW.format(step=step))
    (path.parent / "action.yml").write_text((ROOT / "action.yml").read_text())
    subprocess.run(["git", "init", "-q"], cwd=path.parent, check=True)
    (tmp_path / "caller").mkdir()
    platform = Platform(tmp_path / "p", path.parent, tmp_path / "caller")
    with pytest.raises(WorkflowError, match=said):
        platform.run("w.yml", {"name": "x"})


CONTEXTS: Final = {
    "inputs": {"a": "x", "n": 3, "empty": ""},
    "steps": {"one": {"outputs": {"list": "[1, 2]"}, "outcome": "skipped"}},
    **dict.fromkeys(("success", "always"), lambda: True),
    **dict.fromkeys(("failure", "cancelled"), lambda: False),
}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("inputs.a", "x"),
        ("inputs.a == 'X'", True),
        ("inputs.n > 1 && inputs.a || 'no'", "x"),
        ("inputs.n == '3'", True),
        ("inputs.empty || 'default'", "default"),
        ("inputs.none", None),
        ("steps.other.outputs.x", None),
        ("fromJSON(steps.one.outputs.list)", [1, 2]),
        ("!cancelled() && (steps.one.outcome != 'skipped' || inputs.n == 3)", True),
        ("format('{0}/{1}', inputs.a, inputs.n)", "x/3"),
    ],
)
def test_expressions(expression: str, value: object) -> None:
    assert evaluate(expression, CONTEXTS) == value
    assert fill_in(f"${{{{ {expression} }}}}", CONTEXTS) == value


@pytest.mark.parametrize("bad", ["nothing.x", "hashFiles('x')", "inputs.a ==", "a b", "inputs.a.b"])
def test_expressions_that_are_not_known(bad: str) -> None:
    with pytest.raises(ExpressionError):
        evaluate(bad, CONTEXTS)


def test_conditions_ask_for_success_unless_they_name_a_status() -> None:
    failed = CONTEXTS | {"success": lambda: False, "failure": lambda: True}
    assert not holds("inputs.a == 'x'", failed)
    assert holds("failure() && inputs.a == 'x'", failed)
    assert holds("${{ !cancelled() }}", failed)
    assert not holds(None, failed)
