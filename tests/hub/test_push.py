"""Publishing an export over real HTTP: one commit, proved, and none if nothing changed."""

from __future__ import annotations

import json
import os
import re
import shlex
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.provenance.signing import check, sign
from nf4_pipeline.records import ATTEST, PUSH, VERIFY

from tests.support.hub_server import TOKEN, Fault, HubServer
from tests.support.hub_store import Repo
from tests.support.hub_worker import Outcome, Worker
from tests.support.signed import make_keys
from tests.support.tiny import content_of, copy_of, nf4

REPO = "me/tiny-nf4"
COMMIT = "/api/models/*/commit/*"


@pytest.fixture
def build(verified: Path, tmp_path: Path) -> Build:
    return Build(copy_of(verified, tmp_path / "build"))


def held(repo: Repo, branch: str = "main") -> dict[str, bytes]:
    """What a branch holds, without the file that the Hub puts into each repo."""
    files = repo.commits[repo.refs[branch]].files
    return {path: blob.data for path, blob in files.items() if path != ".gitattributes"}


def assert_pushed(outcome: Outcome, hub: HubServer, build: Build, branch: str = "main") -> None:
    assert outcome.error == "", outcome.message
    repo = hub.store.repos[REPO]
    assert held(repo, branch) == content_of(build.export)
    assert outcome.value["commit"] == repo.refs[branch]
    files = outcome.value["proof"]["files"]
    assert set(files) == set(content_of(build.export))
    assert all(entry["expected"] == entry["found"] for entry in files.values())


def commits(repo: Repo, branch: str = "main") -> int:
    """How many commits a branch has."""
    found, sha = 0, repo.refs.get(branch)
    while sha is not None:
        found, sha = found + 1, repo.commits[sha].parent
    return found


def test_a_new_repo_is_private_and_holds_the_export(
    hub: HubServer, build: Build, worker: Worker
) -> None:
    outcome = worker.push(build.root, REPO)
    assert_pushed(outcome, hub, build)
    repo = hub.store.repos[REPO]
    assert repo.private
    assert commits(repo) == 2  # the one that the Hub makes, and ours
    facts = outcome.value
    assert (facts["created"], facts["private"], facts["committed"]) == (True, True, True)
    assert facts["url"] == f"{hub.url}/{REPO}/commit/{repo.refs['main']}"
    assert facts["branch"] == "main"
    assert {entry["algorithm"] for entry in facts["proof"]["files"].values()} == {
        "sha256",
        "git-sha1",
    }
    record = build.record(PUSH)
    assert record is not None
    assert record.facts.to_json() == facts


def test_a_file_that_changes_while_it_is_sent_is_not_committed(
    hub: HubServer, build: Build, worker: Worker
) -> None:
    """It would be listed under the checksum that it had before."""
    weights = min(build.export.glob("*.safetensors"))
    hub.before("*/objects/batch", lambda: os.utime(weights))
    outcome = worker.push(build.root, REPO)
    assert outcome.error == "HubError"
    assert f"{weights.name} changed while it was uploaded to {REPO}" in outcome.message
    assert held(hub.store.repos[REPO]) == {}
    assert_pushed(worker.push(build.root, REPO), hub, build)


def test_a_second_push_commits_nothing(hub: HubServer, build: Build, worker: Worker) -> None:
    assert_pushed(worker.push(build.root, REPO), hub, build)
    repo = hub.store.repos[REPO]
    before = repo.refs["main"]
    asked = len(hub.seen)
    again = worker.push(build.root, REPO)
    assert_pushed(again, hub, build)
    assert repo.refs["main"] == before
    assert again.value["committed"] is False
    assert {seen.method for seen in hub.seen[asked:]} == {"GET"}


@pytest.mark.parametrize("private", [True, False])
def test_visibility_is_as_asked(
    hub: HubServer, build: Build, worker: Worker, private: bool
) -> None:
    outcome = worker.push(build.root, REPO, private=private)
    assert_pushed(outcome, hub, build)
    assert hub.store.repos[REPO].private is private


def test_a_repo_of_another_visibility_is_left_alone(
    hub: HubServer, build: Build, worker: Worker
) -> None:
    hub.store.add(REPO, {"a": b"a"}).writers = {"me"}
    outcome = worker.push(build.root, REPO, private=True)
    assert outcome.error == "HubError"
    assert f"{REPO} exists and is public; --private was asked" in outcome.message
    assert held(hub.store.repos[REPO]) == {"a": b"a"}
    assert worker.push(build.root, REPO).error == ""  # not asked: it stays as it is


def test_weights_of_another_build_go_and_other_files_stay(
    hub: HubServer, build: Build, worker: Worker
) -> None:
    """transformers takes model.safetensors before shards: a leftover would be loaded."""
    repo = hub.store.add(
        REPO, {"model-00009-of-00009.safetensors": b"old", "notes.txt": b"mine", "README.md": b""}
    )
    repo.writers = {"me"}
    outcome = worker.push(build.root, REPO)
    assert outcome.error == "", outcome.message
    assert held(repo) == content_of(build.export) | {"notes.txt": b"mine"}
    assert outcome.value["proof"]["others"] == ["notes.txt"]
    assert commits(repo) == 2


def test_what_an_earlier_push_left_goes(hub: HubServer, build: Build, worker: Worker) -> None:
    extra = build.export / "pictures" / "old.png"
    extra.parent.mkdir(exist_ok=True)
    extra.write_bytes(b"png")
    record_file(build, extra)
    assert_pushed(worker.push(build.root, REPO), hub, build)
    assert "pictures/old.png" in held(hub.store.repos[REPO])
    extra.unlink()
    record_file(build, extra)
    assert_pushed(worker.push(build.root, REPO), hub, build)


def record_file(build: Build, path: Path) -> None:
    """Lets verify have written a file, or not."""
    from dataclasses import replace

    from nf4_pipeline.checkpoint.digest import digest_file

    name = path.relative_to(build.root).as_posix()
    record = build.need(VERIFY)
    outputs = {key: value for key, value in record.outputs.items() if key != name}
    if path.exists():
        outputs[name] = digest_file(path)
    build.write_record(replace(record, outputs=outputs))
    # A statement about what was there before would be refused.
    attested = build.record(ATTEST)
    for left in attested.outputs if attested else ():
        (build.root / left).unlink()
    build.forget(ATTEST)


# What stops it.


def test_no_token(hub: HubServer, build: Build, tmp_path: Path) -> None:
    with Worker(tmp_path / "other", hub.url) as anonymous:
        outcome = anonymous.push(build.root, REPO)
    assert outcome.error == "HubError"
    assert f"Pushing to {REPO} needs a token" in outcome.message
    assert "hf auth login" in outcome.message
    assert hub.seen == []


def test_offline(hub: HubServer, build: Build, tmp_path: Path) -> None:
    with Worker(tmp_path / "other", hub.url, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1") as offline:
        outcome = offline.push(build.root, REPO)
    assert outcome.error == "HubError"
    assert "HF_HUB_OFFLINE is set, and a push needs the Hub" in outcome.message


def test_somebody_elses_name(hub: HubServer, build: Build, worker: Worker) -> None:
    outcome = worker.push(build.root, "others/tiny-nf4")
    assert outcome.error == "HubError"
    assert "creating others/tiny-nf4" in outcome.message
    assert "Use a token that may write to others/tiny-nf4" in outcome.message
    assert "others/tiny-nf4" not in hub.store.repos


def test_an_organization_of_mine(hub: HubServer, build: Build, worker: Worker) -> None:
    hub.store.organizations["me"] = {"org"}
    assert worker.push(build.root, "org/tiny-nf4").error == ""
    assert held(hub.store.repos["org/tiny-nf4"]) == content_of(build.export)


def test_a_file_that_changed_since_it_was_verified(
    hub: HubServer, build: Build, worker: Worker
) -> None:
    with (build.export / "config.json").open("a") as file:
        file.write(" ")
    outcome = worker.push(build.root, REPO)
    assert outcome.error == "ArtifactError"
    assert "config.json is not what was verified" in outcome.message
    assert hub.seen == []


def fail_verification(build: Build) -> None:
    from dataclasses import replace

    record = build.need(VERIFY)
    document = record.facts.to_json()
    checks = [{**document["checks"][0], "passed": False}, *document["checks"][1:]]
    failed = VERIFY.parse(document | {"verdict": "fail", "checks": checks})
    build.write_record(replace(record, facts=failed))


def test_a_failed_verdict_is_refused_or_said_in_the_card(
    hub: HubServer, build: Build, worker: Worker
) -> None:
    fail_verification(build)
    outcome = worker.push(build.root, REPO)
    assert outcome.error == "VerificationError"
    assert "--allow-unverified" in outcome.message
    assert hub.seen == []
    outcome = worker.push(build.root, REPO, allow_unverified=True)
    assert outcome.error == "", outcome.message
    assert_pushed(outcome, hub, build)
    body = held(hub.store.repos[REPO])["README.md"].decode()[4:].partition("\n---\n")[2]
    assert body.lstrip().startswith("> [!WARNING]\n> **This artifact did not pass verification")
    assert build.need(VERIFY).facts.to_json()["checks"][0]["name"] in body.splitlines()[2]
    assert outcome.value["allow_unverified"] is True
    assert worker.push(build.root, REPO, allow_unverified=True).value["committed"] is False


# The card, and what speaks of it.


def test_the_card_names_the_repo_wherever_it_is_pushed(
    hub: HubServer, build: Build, worker: Worker
) -> None:
    """From the build that was attested without one, and again to another repo."""
    hub.store.organizations["me"] = {"org"}
    for repo in (REPO, "org/another"):
        outcome = worker.push(build.root, repo)
        assert outcome.error == "", outcome.message
        there = held(hub.store.repos[repo])
        assert there == content_of(build.export)
        card = there["README.md"].decode()
        assert f'from_pretrained("{repo}", device_map="auto")' in card
        assert f"quantized_by: {repo.partition('/')[0]}\n" in card
        assert not re.search("PATH|ORG/NAME", card)
        subjects = json.loads(there["provenance.json"])["subject"]
        for subject in subjects:
            assert sha256(there[subject["name"]]).hexdigest() == subject["digest"]["sha256"]
        assert {subject["name"] for subject in subjects} == there.keys() - {"provenance.json"}


def test_what_a_killed_attest_left_is_written_anew(
    hub: HubServer, build: Build, worker: Worker
) -> None:
    build.forget(ATTEST)
    (build.export / "README.md").write_text("# half of a card")
    (build.export / "bom.cdx.json").unlink()
    assert_pushed(worker.push(build.root, REPO), hub, build)


def test_a_signed_card_is_not_changed(
    hub: HubServer, build: Build, worker: Worker, tmp_path: Path
) -> None:
    """It is written for the repo before it is signed; then what is downloaded is what was."""
    private, public = make_keys(tmp_path, "key")
    sign(build.export, private)
    before = content_of(build.export)
    outcome = worker.push(build.root, REPO)
    assert outcome.error == "BuildError"
    assert f"signs a card that does not name {REPO}" in outcome.message
    assert content_of(build.export) == before
    assert hub.seen == []
    remedy = re.search(r"nf4 (attest --repo-id \S+ --build-dir \S+),", outcome.message)
    assert remedy
    assert nf4(*shlex.split(remedy[1]), cwd=tmp_path).status == 0
    sign(build.export, private)
    assert_pushed(worker.push(build.root, REPO), hub, build)
    assert check(build.export, public) == len(content_of(build.export)) - 1


# Other people.


def test_a_push_after_somebody_elses_stops(hub: HubServer, build: Build, worker: Worker) -> None:
    assert worker.push(build.root, REPO).error == ""
    repo = hub.store.repos[REPO]
    ours, theirs = repo.refs["main"], repo.commit({"README.md": b"theirs"})
    outcome = worker.push(build.root, REPO)
    assert outcome.error == "ConflictError"
    assert f"made commit {ours[:12]}, and main is at {theirs[:12]} now" in outcome.message
    assert "--force" in outcome.message
    assert repo.refs["main"] == theirs
    assert_pushed(worker.push(build.root, REPO, force=True), hub, build)
    assert commits(repo) == 4


def test_a_push_between_look_and_commit_stops(hub: HubServer, build: Build, worker: Worker) -> None:
    """The head moves while bytes are sent: the parent that was seen is stale."""
    repo = hub.store.add(REPO, {"a": b"a"})
    repo.writers = {"me"}
    hub.before(COMMIT, lambda: repo.commit({"a": b"b"}))
    outcome = worker.push(build.root, REPO)
    assert outcome.error == "ConflictError"
    assert "Somebody else changed me/tiny-nf4 meanwhile" in outcome.message
    assert held(repo) == {"a": b"b"}
    hub.before(COMMIT, lambda: repo.commit({"a": b"c"}))
    assert worker.push(build.root, REPO, force=True).error == ""
    assert held(repo) == content_of(build.export) | {"a": b"c"}


# Pull requests.


def test_a_pull_request_is_opened_once_and_then_added_to(
    hub: HubServer, build: Build, worker: Worker
) -> None:
    repo = hub.store.add(REPO, {"a": b"a"})  # of somebody else: nobody of us may write to it
    others = repo.open_pull_request("NF4 artifact of tiny-falcon", "somebody")
    repo.open_pull_request("Another thing", "me")
    outcome = worker.push(build.root, REPO, pull_request=True)
    assert outcome.error == "", outcome.message
    assert (outcome.value["pull_request"], outcome.value["branch"]) == (3, "refs/pr/3")
    assert outcome.value["pull_request_url"] == f"{hub.url}/{REPO}/discussions/3"
    assert held(repo, "refs/pr/3") == content_of(build.export) | {"a": b"a"}
    again = worker.push(build.root, REPO, pull_request=True)
    assert (again.value["pull_request"], again.value["committed"]) == (3, False)
    extra = build.export / "report.html"
    extra.write_text("<html></html>")
    record_file(build, extra)
    more = worker.push(build.root, REPO, pull_request=True)
    assert more.error == "", more.message
    assert (more.value["pull_request"], more.value["committed"]) == (3, True)
    assert held(repo, "refs/pr/3") == content_of(build.export) | {"a": b"a"}
    assert len(repo.pull_requests) == others.num + 2
    assert held(repo) == {"a": b"a"}


def test_a_closed_pull_request_is_not_taken_up(
    hub: HubServer, build: Build, worker: Worker
) -> None:
    repo = hub.store.add(REPO, {"a": b"a"})
    assert worker.push(build.root, REPO, pull_request=True).value["pull_request"] == 1
    repo.pull_requests[0].status = "closed"
    assert worker.push(build.root, REPO, pull_request=True).value["pull_request"] == 2


def test_a_pull_request_whose_answer_is_lost_is_found(
    hub: HubServer, build: Build, worker: Worker
) -> None:
    repo = hub.store.add(REPO, {"a": b"a"})
    hub.faults.append(Fault(COMMIT, reset_after=0))
    outcome = worker.push(build.root, REPO, pull_request=True)
    assert outcome.error == "", outcome.message
    assert outcome.value["pull_request"] == len(repo.pull_requests) == 1
    assert held(repo, "refs/pr/1") == content_of(build.export) | {"a": b"a"}


def test_a_pull_request_that_nobody_answers_for_is_not_asked_for_twice(
    hub: HubServer, build: Build, worker: Worker
) -> None:
    """It may come late: the second would be one too many."""
    repo = hub.store.add(REPO, {"a": b"a"})
    hub.faults.append(Fault(COMMIT, delay=8.0))
    outcome = worker.push(build.root, REPO, pull_request=True)
    assert outcome.error in ("", "HubError")
    assert hub.count("POST", COMMIT) == 1
    if outcome.error:
        assert "stopped answering" in outcome.message
        assert "does nothing twice" in outcome.message
    hub.wait_until(lambda: len(repo.pull_requests) == 1)
    again = worker.push(build.root, REPO, pull_request=True)
    assert again.value["pull_request"] == len(repo.pull_requests) == 1


# Answers that are lost, and other faults at the commit.


@pytest.mark.parametrize(
    "fault",
    [
        {"reset_after": 0},
        {"cut_after": 3},
        {"status": 504, "applied": True},
        {"status": 500, "applied": True},
    ],
    ids=["reset", "cut", "504", "500"],
)
def test_a_commit_whose_answer_is_lost_is_not_made_twice(
    hub: HubServer, build: Build, worker: Worker, fault: dict[str, Any]
) -> None:
    hub.faults.append(Fault(COMMIT, method="POST", **fault))
    outcome = worker.push(build.root, REPO)
    assert_pushed(outcome, hub, build)
    assert hub.count("POST", COMMIT) == 1
    assert commits(hub.store.repos[REPO]) == 2


def test_a_commit_is_tried_again_as_the_hub_asks(
    hub: HubServer, build: Build, worker: Worker
) -> None:
    hub.faults += [
        Fault(COMMIT, status=429, headers={"Retry-After": "1"}),
        Fault(COMMIT, status=503),
        Fault("/api/repos/create", status=429),
        Fault("/api/repos/create", status=502),
    ]
    outcome = worker.push(build.root, REPO)
    assert_pushed(outcome, hub, build)
    assert hub.count("POST", COMMIT) == 3
    assert hub.count("POST", "/api/repos/create") == 3
    assert commits(hub.store.repos[REPO]) == 2


def test_a_repo_whose_creation_is_not_answered_is_found(
    hub: HubServer, build: Build, worker: Worker
) -> None:
    hub.faults.append(Fault("/api/repos/create", reset_after=0))
    assert_pushed(worker.push(build.root, REPO), hub, build)
    assert hub.store.repos[REPO].private


def test_a_file_that_the_hub_keeps_wrong_is_noticed(
    hub: HubServer, build: Build, worker: Worker
) -> None:
    """The proof is what the Hub lists, not what it answered to the commit."""
    hub.after_commit = lambda files: files | {"config.json": b"{}"}
    outcome = worker.push(build.root, REPO)
    assert outcome.error == "HubError"
    assert "does not hold what was sent: 1 files differ, first config.json" in outcome.message
    assert build.record(PUSH) is None


def test_a_gitignore_in_the_repo_leaves_no_file_out(
    hub: HubServer, build: Build, worker: Worker
) -> None:
    repo = hub.store.add(REPO, {".gitignore": b"config.json\n"})
    repo.writers = {"me"}
    assert worker.push(build.root, REPO).error == ""
    assert held(repo) == content_of(build.export) | {".gitignore": b"config.json\n"}


def test_a_full_record_is_json_without_secrets(
    hub: HubServer, build: Build, worker: Worker
) -> None:
    worker.push(build.root, REPO)
    text = (build.root / "records" / "push.json").read_text()
    assert json.loads(text)["facts"]["repo_id"] == REPO
    assert TOKEN not in text
