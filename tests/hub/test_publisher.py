"""Pushing as a trusted publisher: a CI job's identity for a token of an hour, and no other secret.

Issuer, tokens, their checks and every request are real; each case has a repo of its own, as the
client keeps a token for as long as it is good.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.support import hub_uploads
from tests.support.hub_client import isolated, run
from tests.support.hub_server import TOKEN, Answer, HubServer
from tests.support.hub_worker import Outcome, Worker
from tests.support.identities import Issuer, end_tokens, trust
from tests.support.tiny import copy_of

assert hub_uploads  # its routes are registered by importing it

_numbers = count()


@dataclass
class Job:
    """A CI job that pushes to a repo of its own, at a Hub and with an issuer that others share."""

    hub: HubServer
    issuer: Issuer
    worker: Worker
    files: Path
    repo_id: str = field(default_factory=lambda: f"me/model-{next(_numbers)}")

    def __post_init__(self) -> None:
        self.repo = self.hub.store.add(self.repo_id, {"a": b"a"})
        self.before = self.repo.refs["main"]
        self.asked = len(self.hub.seen)

    def trusted(self, **claims: str) -> None:
        """Makes the job a publisher of its repo."""
        self.issuer.trusted_by(self.hub, self.repo_id, **(claims or {"repository": "me/code"}))

    def push(self, variables: dict[str, str] | None = None, **options: Any) -> Outcome:
        """Pushes in the environment of a job; looks whether anybody saw what is not theirs."""
        variables = self.issuer.variables if variables is None else variables
        outcome = self.worker.publish(self.files, self.repo_id, variables=variables, **options)
        self.look(outcome.message + json.dumps(outcome.value) + self.worker.log.read_text())
        return outcome

    def look(self, text: str) -> None:
        secrets = [*self.issuer.handed_out, *self.hub.store.users]
        assert not [secret for secret in secrets if secret in text or secret[:40] in text]
        assert not any(self.issuer.request_token in seen.bearer for seen in self.hub.seen)
        assert not any(seen.bearer for seen in self.hub.seen if seen.cdn)
        assert not any("hf_" in bearer for bearer in self.issuer.bearers)

    @property
    def exchanges(self) -> int:
        return sum(seen.path == "/oauth/token" for seen in self.hub.seen[self.asked :])

    def pushed(self, outcome: Outcome) -> None:
        assert outcome.error == "", outcome.message
        held = self.repo.head.files
        assert {path.name: path.read_bytes() for path in self.files.iterdir()} == {
            name: blob.data for name, blob in held.items() if name != "a"
        }

    def refused(self, outcome: Outcome, *words: str) -> None:
        assert outcome.error == "HubError", outcome
        assert [word for word in words if word not in outcome.message] == [], outcome.message
        assert outcome.message.isprintable()
        assert self.repo.refs["main"] == self.before
        assert self.repo.pull_requests == []


@dataclass
class World:
    hub: HubServer
    worker: Worker
    files: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("publisher")
    files = folder / "files"
    files.mkdir()
    (files / "model.safetensors").write_bytes(b"weights" * 100)
    (files / "config.json").write_text("{}")
    with (
        HubServer() as hub,
        Worker(folder / "hf", hub.url, HF_HUB_DOWNLOAD_TIMEOUT="1") as worker,
    ):
        hub.store.users[TOKEN] = "me"
        yield World(hub, worker, files)


@pytest.fixture
def job(world: World) -> Iterator[Job]:
    trust(world.hub).answer = None
    trust(world.hub).life = 3600
    with Issuer() as issuer:
        yield Job(world.hub, issuer, world.worker, world.files)


# What goes well.


def test_a_push_with_a_token_of_an_hour(job: Job) -> None:
    job.trusted(repository="me/code", ref="refs/heads/main")
    job.pushed(job.push())
    assert job.exchanges == len(job.issuer.bearers) == 1
    again = job.push()
    job.pushed(again)
    assert not again.value["committed"]
    assert job.exchanges == 1  # the token is good for an hour


def test_as_the_client_is_told(job: Job) -> None:
    job.trusted()
    job.pushed(job.push(job.issuer.variables | {"HF_OIDC_RESOURCE": job.repo_id}))


def test_with_an_id_token_that_ci_made(job: Job) -> None:
    """As GitLab's `id_tokens` are: there is nobody who could be asked."""
    job.trusted()
    job.pushed(job.push({"HF_OIDC_ID_TOKEN": job.issuer.token(job.hub.url)}))
    assert job.issuer.bearers == []


def test_a_pull_request_asks_nobody_whose_token_it_is(job: Job) -> None:
    job.trusted()
    made = job.push(pull_request=True)
    assert made.error == "", made.message
    assert made.value["branch"] == "refs/pr/1"
    again = job.push(pull_request=True)  # without a record: it is found by what it holds
    assert (again.value["branch"], again.value["committed"]) == ("refs/pr/1", False)
    assert len(job.repo.pull_requests) == 1
    assert not any(seen.path == "/api/whoami-v2" for seen in job.hub.seen)


@pytest.mark.parametrize("extra", [{"evil.py": b"1"}, {"a": b"changed"}, {"config.json": b"[]"}])
def test_a_strangers_pull_request_is_not_taken_for_ones_own(
    job: Job, extra: dict[str, bytes]
) -> None:
    job.trusted()
    assert job.push(pull_request=True).value["branch"] == "refs/pr/1"
    job.repo.pull_requests[0].author = "stranger"
    job.repo.commit(extra, "refs/pr/1")
    assert job.push(pull_request=True).value["branch"] == "refs/pr/2"


# Which token wins.


@pytest.mark.parametrize(
    ("resource", "exchanges"), [(False, 0), (True, 1)], ids=["by itself", "asked for"]
)
def test_a_stored_token_goes_first_unless_an_exchange_is_asked_for(
    job: Job, resource: bool, exchanges: int
) -> None:
    job.trusted()
    job.repo.writers.add("me")
    asked = {"HF_OIDC_RESOURCE": job.repo_id} if resource else {}
    job.pushed(job.push(job.issuer.variables | asked | {"HF_TOKEN": TOKEN}))
    assert job.exchanges == exchanges


@pytest.mark.parametrize("named", ["me/another", "me", "datasets/{repo}", "{repo}/"])
def test_a_token_for_something_else_is_not_asked_for(job: Job, named: str) -> None:
    job.trusted()
    resource = named.format(repo=job.repo_id)
    outcome = job.push(job.issuer.variables | {"HF_OIDC_RESOURCE": resource})
    job.refused(outcome, f"HF_OIDC_RESOURCE is {resource}", job.repo_id, "unset it")
    assert job.exchanges == 0


def test_downloads_exchange_where_it_is_asked_for(job: Job, home: Path) -> None:
    """In the midst of a file, too: this token is always due."""
    trust(job.hub).life = 200
    job.trusted()
    job.repo.private = True
    found = run(home, job.hub.url, job.repo_id, fetch=False, env=job.issuer.variables)
    assert found.error == "NotFoundError"
    job.repo.commit({"config.json": b"{}", "model.safetensors": bytes(100_000)})
    variables = job.issuer.variables | {"HF_OIDC_RESOURCE": job.repo_id}
    found = run(home, job.hub.url, job.repo_id, env=variables)
    assert found.error == "", found.message
    assert set(found.sha256) == {"config.json", "model.safetensors"}
    assert job.exchanges > 3
    job.look(found.text)


def test_a_token_of_one_repo_is_good_for_no_other(job: Job) -> None:
    job.trusted()
    job.pushed(job.push())
    token = next(
        token for token, user in job.hub.store.users.items() if user == f"[OIDC] {job.repo_id}"
    )
    other = Job(job.hub, job.issuer, job.worker, job.files)
    other.refused(other.push({"HF_TOKEN": token}), "403", "Use a token that may write")
    own = job.push({"HF_TOKEN": token})  # as CI may hand it on, until it ends
    assert (own.error, own.value["committed"]) == ("", False)


# A job without an identity.

NO_IDENTITY: dict[str, tuple[set[str], tuple[str, ...]]] = {
    "no permission": (
        {"ACTIONS_ID_TOKEN_REQUEST_URL", "ACTIONS_ID_TOKEN_REQUEST_TOKEN"},
        ("needs a token", "id-token: write"),
    ),
    "no address": ({"ACTIONS_ID_TOKEN_REQUEST_URL"}, ("needs a token", "id-token: write")),
    "no token for it": ({"ACTIONS_ID_TOKEN_REQUEST_TOKEN"}, ("needs a token", "id-token: write")),
    "no GitHub": ({"GITHUB_ACTIONS"}, ("needs a token",)),
}


@pytest.mark.parametrize("asks", [False, True], ids=["by itself", "asked for"])
@pytest.mark.parametrize("case", NO_IDENTITY)
def test_a_job_without_an_identity(job: Job, case: str, asks: bool) -> None:
    missing, words = NO_IDENTITY[case]
    job.trusted()
    variables = {k: v for k, v in job.issuer.variables.items() if k not in missing}
    if asks:
        variables |= {"HF_OIDC_RESOURCE": job.repo_id}
        words = ("this job has no identity", "id-token: write", "HF_OIDC_ID_TOKEN")
    job.refused(job.push(variables), *words)
    assert job.exchanges == 0


# Identities that the Hub does not take.


def by_another_key(claims: dict[str, Any]) -> str:
    return jwt.encode(claims, ec.generate_private_key(ec.SECP256R1()), algorithm="ES256")


def by_no_key(claims: dict[str, Any]) -> str:
    return jwt.encode(claims, "", algorithm="none") + "c2lnbmF0dXJl"


def by_a_word(claims: dict[str, Any]) -> str:
    return jwt.encode(claims, "a password that is as long as one should be", algorithm="HS256")


FOREIGN: dict[str, dict[str, Any]] = {
    "expired": {"iat": 1_700_000_000, "nbf": 1_700_000_000, "exp": 1_700_000_300},
    "not valid yet": {"nbf": 4_000_000_000, "exp": 4_000_000_300},
    "without an end": {"exp": None},
    "for another audience": {"aud": "https://huggingface.co"},
    "for no audience": {"aud": None},
    "of another repository": {"repository": "stranger/code"},
    "of a fork": {"repository": "stranger/code", "repository_owner": "stranger"},
    "of another branch": {"ref": "refs/heads/main-2"},
    "of another workflow": {"workflow": "evil.yml"},
    "without a claim": {"workflow": None},
    "of another issuer": {"iss": "https://token.actions.githubusercontent.com"},
    "without a subject": {"sub": None},
    "without a number": {"jti": None},
    "signed by another key": {"sign": by_another_key},
    "signed by nobody": {"sign": by_no_key},
    "signed by a word": {"sign": by_a_word},
}
CLAIMED = {"repository": "me/code", "ref": "refs/heads/main", "workflow": "publish.yml"}


@pytest.mark.parametrize("case", FOREIGN)
def test_an_identity_that_is_not_taken(job: Job, case: str) -> None:
    job.trusted(**CLAIMED)
    token = job.issuer.token(job.hub.url, **FOREIGN[case])
    words = ("invalid_grant", f"{job.hub.url}/{job.repo_id}/settings", "Trusted Publishers")
    outcome = job.push({"HF_OIDC_ID_TOKEN": token, "CI_PROJECT_PATH": "me/code"})
    job.refused(outcome, *words, "HF_OIDC_ID_TOKEN", "project_path=me/code")
    if not callable(FOREIGN[case].get("sign")):
        job.issuer.changes = FOREIGN[case]
        job.refused(job.push(), *words, "repository=me/code", "run this again")
    assert job.exchanges in (1, 2)


def test_an_identity_is_taken_once(job: Job) -> None:
    """Who finds it in a log finds nothing that is of use."""
    job.trusted()
    token = job.issuer.token(job.hub.url)
    job.pushed(job.push({"HF_OIDC_ID_TOKEN": token}))
    thief = Job(job.hub, job.issuer, job.worker, job.files)
    thief.trusted()
    thief.refused(thief.push({"HF_OIDC_ID_TOKEN": token}), "invalid_grant", "once")


def test_a_repo_without_publishers_and_one_that_is_not_there(job: Job) -> None:
    job.refused(job.push(), "invalid_grant", "Trusted Publishers", "repository=me/code")
    job.repo_id = "me/missing"
    job.refused(job.push(), "invalid_grant", "me/missing/settings", "the repo has to exist")


# Issuers and Hubs that do not do their part.

NO_TOKEN = b'{"value": null}'
ISSUERS: dict[str, tuple[int, dict[str, str], bytes]] = {
    "401": (401, {}, b"{}"),
    "403": (403, {}, b'{"message": "forbidden"}'),
    "404 page": (404, {"Content-Type": "text/html"}, b"<html>"),
    "500": (500, {}, b""),
    "429": (429, {"Retry-After": "9999"}, b""),
    "no JSON": (200, {}, b"<html>"),
    "nothing": (200, {}, b""),
    "half of it": (200, {}, b'{"value": "eyJhbGciOiJFUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiJyZXBv'),
    "a list": (200, {}, b"[]"),
    "no token": (200, {}, NO_TOKEN),
    "a number": (200, {}, b'{"value": 7}'),
    "no JWT": (200, {}, b'{"value": "secret"}'),
    "two lines": (200, {}, b'{"value": "eyJh.eyJh.eyJh\\r\\nX-Evil: 1"}'),
    "a JWT without end": (200, {}, b'{"value": "' + b"a." * 20_000 + b'a"}'),
    "nested": (200, {}, b'{"value": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "two megabytes": (200, {}, b" " * (2 << 20) + NO_TOKEN),
    "in another encoding": (200, {"Content-Encoding": "br"}, b"abc"),
    "led elsewhere": (302, {"Location": "http://127.0.0.1:9/evil"}, b""),
    "led to itself": (302, {"Location": "?again"}, b""),
}


@pytest.mark.parametrize("case", [*ISSUERS, "endless", "not there"])
def test_an_issuer_that_gives_no_identity(job: Job, case: str) -> None:
    job.trusted()
    job.issuer.answer = ISSUERS.get(case)
    job.issuer.endless = case == "endless"
    variables = job.issuer.variables
    if case == "not there":
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            address = f"http://127.0.0.1:{nobody.getsockname()[1]}/job"
            outcome = job.push(variables | {"ACTIONS_ID_TOKEN_REQUEST_URL": address})
    else:
        outcome = job.push(variables)
        assert len(job.issuer.bearers) <= 3
    job.refused(outcome, "the issuer of id tokens that CI names", "permissions: id-token: write")
    assert job.exchanges == 0


def given(**changes: Any) -> Answer:
    body = {
        "access_token": "hf_jwt_PLANNED_0123456789_0123456789",
        "token_type": "bearer",
        "expires_in": 3600,
    }
    return Answer(body=body | changes)


HUBS: dict[str, Answer] = {
    "no token": given(access_token=None),
    "a token of two lines": given(access_token="hf_jwt_PLANNED\r\nX-Evil: 1"),
    "an empty token": given(access_token=""),
    "a token of letters that no header has": given(access_token="hf_jwt_PLANNED_ä€"),
    "a token without end": given(access_token="a" * 20_000),
    "of another kind": given(token_type="mac"),
    "of no kind": given(token_type=7),
    "for no time": given(expires_in=0),
    "for less": given(expires_in=-1),
    "for ever": given(expires_in=10**12),
    "for a word": given(expires_in="3600"),
    "for true": given(expires_in=True),
    "a list": Answer(body=[]),
    "half of it": Answer(body=b'{"access_token": "hf_jwt_PLANNED_0123456789'),
    "nothing": Answer(),
    "a page": Answer(200, b"<html>", {"Content-Type": "text/html"}),
    "led elsewhere": Answer(307, b"", {"Location": "http://127.0.0.1:9/oauth/token"}),
    "500": Answer(500, {"error": "later"}),
    "404": Answer(404, b"<html>", {"Content-Type": "text/html"}),
    "404 of a mirror": Answer(
        404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
    ),
}


@pytest.mark.parametrize("case", HUBS)
def test_a_hub_that_gives_no_token(job: Job, case: str) -> None:
    job.trusted()
    trust(job.hub).answer = HUBS[case]
    job.refused(job.push(), f"a token for {job.repo_id} in exchange for the identity", job.hub.url)
    assert 1 <= job.exchanges <= 3
    assert not any("PLANNED" in seen.bearer for seen in job.hub.seen)


# Tokens that end.


@pytest.mark.parametrize("place", ["*/preupload/*", "*/objects/batch", "*/verify", "*/commit/*"])
def test_a_token_that_ends_on_the_way_is_followed_by_another(job: Job, place: str) -> None:
    trust(job.hub).life = 200  # less than the client likes: it would ask for another with each call
    job.trusted()
    ended: list[int] = []

    def end() -> None:
        end_tokens(job.hub)
        ended.append(len(job.hub.store.ends))

    job.hub.before(place.replace("*", f"*{job.repo_id}*", 1), end)
    job.pushed(job.push())
    assert 0 < ended[0] < len(job.hub.store.ends)


@pytest.mark.parametrize("by_ci", [True, False], ids=["asked for", "made by CI"])
def test_a_token_that_nothing_follows(job: Job, by_ci: bool) -> None:
    job.trusted()
    job.hub.before(f"*{job.repo_id}*/preupload/*", lambda: end_tokens(job.hub))
    made = {"HF_OIDC_ID_TOKEN": job.issuer.token(job.hub.url)}
    outcome = job.push(job.issuer.variables if by_ci else made)
    job.refused(outcome, f"this CI job for {job.repo_id}", "it has ended", "does nothing twice")


def test_a_publisher_that_may_only_read(job: Job) -> None:
    job.trusted()
    job.hub.before(
        f"*{job.repo_id}*/preupload/*", lambda: job.repo.writers.discard(f"[OIDC] {job.repo_id}")
    )
    job.refused(job.push(), "403", "Trusted Publishers", "let it only read")


def test_no_variable_is_left_behind(job: Job) -> None:
    job.trusted()
    job.pushed(job.push())
    assert "HF_OIDC_RESOURCE" not in os.environ
    job.worker.publish(job.files, "me/unknown", variables={})
    outcome = job.push({})
    job.look(outcome.message)
    assert "needs a token" in outcome.message


# What a job leaves: its log, its build folder, its caches.


def left_behind(*places: Path) -> Iterator[tuple[Path, bytes]]:
    for place in places:
        for path in place.rglob("*"):
            if path.is_file():
                yield path, path.read_bytes()


def end(job: Job) -> None:
    job.hub.before("*/preupload/*", lambda: end_tokens(job.hub))


def answer_with_the_token(job: Job) -> None:
    echo = {"error": "invalid_grant", "error_description": job.issuer.request_token}
    trust(job.hub).answer = Answer(400, echo)


RUNS: dict[str, tuple[Callable[[Job], None] | None, int, str]] = {
    "pushed": (None, 0, "pushed to"),
    "the token ends": (end, 1, "it has ended"),
    "an answer with a token": (answer_with_the_token, 1, "Trusted Publishers"),
}


def test_no_token_is_left_anywhere(job: Job, verified: Path, tmp_path: Path) -> None:
    """Whatever comes of it, at -v and with the client's own log at its loudest."""
    build, home = copy_of(verified, tmp_path / "build"), tmp_path / "hf"
    variables = job.issuer.variables | {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug"}
    environment = isolated(home, job.hub.url, HF_HUB_DOWNLOAD_TIMEOUT="1", **variables)
    command = (sys.executable, "-m", "nf4_pipeline", "push", "-v", "--build-dir", str(build))
    for case, (prepare, status, words) in reversed(RUNS.items()):
        job.trusted()
        trust(job.hub).answer = None
        if prepare is not None:
            prepare(job)
        done = subprocess.run(
            [*command, "--repo-id", job.repo_id],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == status, (case, done.stderr)
        assert words in done.stdout + done.stderr, (case, done.stderr)
        assert "token: of this CI job" in done.stderr
        texts = {Path("output"): (done.stdout + done.stderr).encode()}
        texts |= dict(left_behind(build, home))
        for secret in (*job.issuer.handed_out, *job.hub.store.ends):
            assert [path for path, data in texts.items() if secret.encode() in data] == []
            assert [path for path, data in texts.items() if secret[8:40].encode() in data] == []
    assert len(job.issuer.handed_out) == 1 + len(RUNS)
    assert job.hub.store.repos[job.repo_id].refs["main"] != job.before
