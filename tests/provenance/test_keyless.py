"""Artifacts signed by an identity: model-signing and sigstore for real, against a Sigstore here.

Certificates, their log, Rekor (1, and 2 with stamped times) and every check of them are real; the
keys at their roots are those of the tests. The public instance, its roots by TUF, is not asked.
"""

from __future__ import annotations

import base64
import json
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from nf4_pipeline.build_folder import Build
from nf4_pipeline.errors import ArtifactError, SignatureError, UsageError
from nf4_pipeline.provenance import keyless
from nf4_pipeline.provenance.keyless import Instance, Signer
from nf4_pipeline.provenance.signing import SIGNATURE_FILE, check_identity, sign, sign_keyless

from tests.support.command_line import without_progress
from tests.support.identities import Issuer
from tests.support.signed import TAMPERINGS, make_keys, tamper
from tests.support.sigstore_instance import Sigstore
from tests.support.tiny import content_of, copy_of, nf4

WORKFLOW = "me/code/.github/workflows/publish.yml@refs/heads/main"
IDENTITY = f"https://github.com/{WORKFLOW}"


@dataclass
class World:
    issuer: Issuer
    sigstore: Sigstore
    instance: Instance
    artifact: Path

    @property
    def signer(self) -> Signer:
        return Signer(IDENTITY, self.issuer.url)

    def token(self, **changes: Any) -> str:
        return self.issuer.token("sigstore", job_workflow_ref=WORKFLOW, **changes)

    def copy(self, folder: Path) -> Path:
        return copy_of(self.artifact, folder / "copy")


@contextmanager
def signed(export: Path, folder: Path, version: int) -> Iterator[World]:
    build = Build(copy_of(export, folder / "build"))
    with Issuer() as issuer, Sigstore(issuer, version=version) as sigstore:
        instance = Instance(sigstore.write_trust(folder / "trust.json"))
        found = World(issuer, sigstore, instance, build.export)
        assert sign_keyless(build.export, found.token(), instance) == found.signer
        yield found


@pytest.fixture(scope="module")
def world(exported_falcon: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with signed(exported_falcon, tmp_path_factory.mktemp("keyless"), 1) as found:
        yield found


@pytest.fixture(scope="module")
def world_2(exported_falcon: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """With Rekor 2, where the time comes from a timestamp authority."""
    with signed(exported_falcon, tmp_path_factory.mktemp("keyless"), 2) as found:
        yield found


@pytest.fixture(autouse=True)
def at_home(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """No CI around this, and nothing planned from the case before."""
    for name in ("GITHUB_ACTIONS", "GITLAB_CI", "BUILDKITE", "CIRCLECI", "SIGSTORE_ID_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    world.sigstore.planned.clear()
    world.sigstore.age = world.sigstore.late = 0
    world.issuer.answer = None


def checked(world: World, artifact: Path) -> int:
    return check_identity(artifact, world.signer, world.instance)


# Who signed, and what.


def test_what_an_identity_signed_is_accepted_wherever_it_lies(world: World, tmp_path: Path) -> None:
    copy = world.copy(tmp_path)
    (copy / ".gitattributes").write_text("x")
    assert checked(world, copy) == len(content_of(world.artifact)) - 1


@pytest.mark.parametrize("kind", TAMPERINGS)
def test_every_tampering_is_refused(world: World, tmp_path: Path, kind: str) -> None:
    copy = world.copy(tmp_path)
    dice = random.Random(1)
    for _ in range(4):
        with tamper(copy, kind, dice), pytest.raises(SignatureError, match=r"signed|signature"):
            checked(world, copy)
    assert checked(world, copy)


OTHERS: dict[str, tuple[str | None, str | None, str]] = {
    "another workflow": (IDENTITY.replace("publish", "evil"), None, "signed it, not"),
    "another branch": (IDENTITY + "-2", None, "signed it, not"),
    "a part of it": (IDENTITY.partition("@")[0], None, "signed it, not"),
    "another case": (IDENTITY.replace("me/", "Me/"), None, "signed it, not"),
    "a pattern": ("https://github.com/*", None, "signed it, not"),
    "a space more": (f"{IDENTITY} ", None, "signed it, not"),
    "another issuer": (None, "https://token.actions.githubusercontent.com", "vouches for"),
    "an issuer with a slash": (None, "{issuer}/", "vouches for"),
    "the two exchanged": ("{issuer}", IDENTITY, "vouches for"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_signer_is_refused(world: World, case: str) -> None:
    identity, issuer, words = OTHERS[case]
    asked = Signer(
        (identity or IDENTITY).format(issuer=world.issuer.url),
        (issuer or world.issuer.url).format(issuer=world.issuer.url),
    )
    with pytest.raises(SignatureError, match=words) as caught:
        check_identity(world.artifact, asked, world.instance)
    assert "Do not use it" in str(caught.value)


@pytest.mark.parametrize("nothing", ["", " ", "\t\n"])
def test_nobody_is_no_signer(world: World, nothing: str) -> None:
    """The library checks no issuer where none is named."""
    for signer in (Signer(IDENTITY, nothing), Signer(nothing, world.issuer.url)):
        with pytest.raises(UsageError, match="one of them is empty"):
            check_identity(world.artifact, signer, world.instance)


def test_a_stranger_may_sign_but_not_as_somebody_else(world: World, tmp_path: Path) -> None:
    copy = world.copy(tmp_path)
    stranger = "stranger/code/.github/workflows/publish.yml@refs/heads/main"
    token = world.issuer.token("sigstore", job_workflow_ref=stranger)
    assert sign_keyless(copy, token, world.instance).identity.endswith(stranger)
    with pytest.raises(SignatureError, match=f"{stranger}.* signed it, not {IDENTITY}"):
        checked(world, copy)


def test_a_certificate_that_ended_since_is_good_for_what_was_logged_in_time(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = world.copy(tmp_path)
    world.sigstore.age, world.sigstore.late = 3_660, -3_600
    hour = timedelta(hours=1)
    then = SimpleNamespace(now=lambda zone: datetime.now(zone) - hour)
    monkeypatch.setattr("sigstore.sign.datetime", then)
    sign_keyless(copy, world.token(), world.instance)
    assert checked(world, copy)


# Signatures that are changed, or of something else.


def bundle(artifact: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((artifact / SIGNATURE_FILE).read_text())
    return found


def rewritten(change: Callable[[dict[str, Any]], None]) -> Callable[[Path, World], None]:
    def act(artifact: Path, _: World) -> None:
        value = bundle(artifact)
        change(value)
        (artifact / SIGNATURE_FILE).write_text(json.dumps(value))

    return act


def entry(value: dict[str, Any]) -> dict[str, Any]:
    (found,) = value["verificationMaterial"]["tlogEntries"]
    assert isinstance(found, dict)
    return found


def flipped(text: str) -> str:
    data = bytearray(base64.b64decode(text))
    data[len(data) // 2] ^= 1
    return base64.b64encode(data).decode()


def without_entry(value: dict[str, Any]) -> None:
    value["verificationMaterial"]["tlogEntries"] = []


def two_entries(value: dict[str, Any]) -> None:
    value["verificationMaterial"]["tlogEntries"] *= 2


def without_promise(value: dict[str, Any]) -> None:
    del entry(value)["inclusionPromise"]


def without_proof(value: dict[str, Any]) -> None:
    del entry(value)["inclusionProof"]


def later(value: dict[str, Any]) -> None:
    found = entry(value)
    found["integratedTime"] = str(int(found["integratedTime"]) + 86_400)


def earlier(value: dict[str, Any]) -> None:
    found = entry(value)
    found["integratedTime"] = str(int(found["integratedTime"]) - 86_400)


def other_promise(value: dict[str, Any]) -> None:
    promise = entry(value)["inclusionPromise"]
    promise["signedEntryTimestamp"] = flipped(promise["signedEntryTimestamp"])


def other_root(value: dict[str, Any]) -> None:
    proof = entry(value)["inclusionProof"]
    proof["rootHash"] = flipped(proof["rootHash"])


def other_body(value: dict[str, Any]) -> None:
    found = entry(value)
    found["canonicalizedBody"] = flipped(found["canonicalizedBody"])


def other_certificate(value: dict[str, Any]) -> None:
    certificate = value["verificationMaterial"]["certificate"]
    certificate["rawBytes"] = flipped(certificate["rawBytes"])


def other_signature(value: dict[str, Any]) -> None:
    signature = value["dsseEnvelope"]["signatures"][0]
    signature["sig"] = flipped(signature["sig"])


def other_payload(value: dict[str, Any]) -> None:
    value["dsseEnvelope"]["payload"] = flipped(value["dsseEnvelope"]["payload"])


def without_signatures(value: dict[str, Any]) -> None:
    value["dsseEnvelope"]["signatures"] = []


def files_taken_out(value: dict[str, Any]) -> None:
    statement = json.loads(base64.b64decode(value["dsseEnvelope"]["payload"]))
    del statement["predicate"]["resources"][0]
    value["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()


def of_another_model(artifact: Path, world: World) -> None:
    other = artifact.parent / "other"
    shutil.copytree(artifact, other)
    (other / "config.json").write_text("{}")
    sign_keyless(other, world.token(), world.instance)
    (artifact / SIGNATURE_FILE).write_bytes((other / SIGNATURE_FILE).read_bytes())


def signed_after_the_certificate_ended(artifact: Path, world: World) -> None:
    """As somebody with the key of an old certificate would: the log says when it was."""
    world.sigstore.late = 3_600
    signed_unchecked(artifact, world)


def signed_before_it_began(artifact: Path, world: World) -> None:
    world.sigstore.late = -3_600
    signed_unchecked(artifact, world)


def of_another_instance(artifact: Path, world: World) -> None:
    with Sigstore(world.issuer) as other:
        trust = other.write_trust(artifact.parent / "other.json")
        sign_keyless(artifact, world.token(), Instance(trust))


def with_a_key(artifact: Path, world: World) -> None:
    private, _ = make_keys(artifact.parent, "key")
    sign(artifact, private)


def signed_unchecked(artifact: Path, world: World, **options: Any) -> None:
    """As another program than this one signs."""
    from model_signing import hashing, signing

    ignored = [SIGNATURE_FILE, *options.get("ignored", ())]
    config = signing.Config().set_hashing_config(
        hashing.Config().set_ignored_paths(paths=ignored, ignore_git_paths=False)
    )
    config.use_sigstore_signer(identity_token=world.token(), trust_config=world.instance.trust)
    config.sign(artifact, artifact / SIGNATURE_FILE)


def leaving_files_out(artifact: Path, world: World) -> None:
    """A signature may name paths that it does not cover, as model-signing reads it."""
    signed_unchecked(artifact, world, ignored=["config.json"])


def leaving_an_added_file_out(artifact: Path, world: World) -> None:
    (artifact / "evil.py").write_text("x")
    signed_unchecked(artifact, world, ignored=["evil.py"])


def replaced(text: bytes) -> Callable[[Path, World], None]:
    def act(artifact: Path, _: World) -> None:
        (artifact / SIGNATURE_FILE).write_bytes(text)

    return act


SIGNATURES: dict[str, tuple[Callable[[Path, World], None], str]] = {
    "expired, without a log entry": (rewritten(without_entry), "log entry"),
    "two log entries": (rewritten(two_entries), "log entry"),
    "without the log's promise": (rewritten(without_promise), "promise"),
    "without the log's proof": (rewritten(without_proof), "inclusionProof: Field required"),
    "logged later": (rewritten(later), "certificate"),
    "logged earlier": (rewritten(earlier), "certificate"),
    "promised by another": (rewritten(other_promise), "promise"),
    "in another tree": (rewritten(other_root), "inclusion proof"),
    "another entry": (rewritten(other_body), ""),
    "another certificate": (rewritten(other_certificate), ""),
    "another signature": (rewritten(other_signature), "signature"),
    "another payload": (rewritten(other_payload), ""),
    "nothing signed": (rewritten(without_signatures), ""),
    "a file taken out": (rewritten(files_taken_out), "signature"),
    "of another model": (of_another_model, "config.json has other bytes"),
    "signed after the certificate ended": (signed_after_the_certificate_ended, "certificate"),
    "signed before it began": (signed_before_it_began, "certificate"),
    "of another instance": (of_another_instance, "certificate"),
    "with a key": (with_a_key, "It was signed with a key: see --key"),
    "leaving files out": (leaving_files_out, "config.json was added"),
    "leaving an added file out": (leaving_an_added_file_out, "evil.py was added"),
    "nothing in it": (replaced(b""), ""),
    "no JSON": (replaced(b"\x00\xff"), ""),
    "a list": (replaced(b"[]"), ""),
    "nested": (replaced(b"[" * 100_000), ""),
}


@pytest.mark.parametrize("case", SIGNATURES)
def test_a_signature_that_says_something_else(world: World, tmp_path: Path, case: str) -> None:
    change, words = SIGNATURES[case]
    copy = world.copy(tmp_path)
    change(copy, world)
    with pytest.raises(SignatureError, match=f"(?s)is not what.* signed: .*{words}") as caught:
        checked(world, copy)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2_000
    assert "Do not use it" in str(caught.value)


def stamps(value: dict[str, Any]) -> list[dict[str, str]]:
    found: list[dict[str, str]]
    found = value["verificationMaterial"]["timestampVerificationData"]["rfc3161Timestamps"]
    return found


def without_time(value: dict[str, Any]) -> None:
    stamps(value).clear()


def time_twice(value: dict[str, Any]) -> None:
    stamps(value).extend(stamps(value))


def another_time(value: dict[str, Any]) -> None:
    data = bytearray(base64.b64decode(stamps(value)[0]["signedTimestamp"]))
    data[-5] ^= 1  # of the signature
    stamps(value)[0]["signedTimestamp"] = base64.b64encode(data).decode()


def time_of_another_signature(artifact: Path, world: World) -> None:
    value = bundle(artifact)
    sign_keyless(artifact, world.token(), world.instance)
    other = bundle(artifact)
    stamps(value)[0] = stamps(other)[0]
    (artifact / SIGNATURE_FILE).write_text(json.dumps(value))


SIGNATURES_2: dict[str, tuple[Callable[[Path, World], None], str]] = {
    "without a time": (rewritten(without_time), "timestamp"),
    "the time twice": (rewritten(time_twice), "duplicate timestamp"),
    "another time": (rewritten(another_time), "verified time"),
    "the time of another signature": (time_of_another_signature, "verified time"),
    "without a log entry": (rewritten(without_entry), "log entry"),
    "in another tree": (rewritten(other_root), "inclusion proof"),
    "another entry": (rewritten(other_body), ""),
    "another payload": (rewritten(other_payload), ""),
    "another signature": (rewritten(other_signature), ""),
    "signed after the certificate ended": (signed_after_the_certificate_ended, "certificate"),
    "signed before it began": (signed_before_it_began, "certificate"),
    "of another model": (of_another_model, "config.json has other bytes"),
    "of another instance": (of_another_instance, "certificate"),
    "leaving files out": (leaving_files_out, "config.json was added"),
}


@pytest.mark.parametrize("case", SIGNATURES_2)
def test_a_signature_with_a_stamped_time(world_2: World, tmp_path: Path, case: str) -> None:
    world_2.sigstore.late = 0
    change, words = SIGNATURES_2[case]
    copy = world_2.copy(tmp_path)
    assert checked(world_2, copy)
    change(copy, world_2)
    with pytest.raises(SignatureError, match=f"(?s)is not what.* signed: .*{words}"):
        checked(world_2, copy)


def test_an_artifact_without_a_signature_or_without_files(world: World, tmp_path: Path) -> None:
    copy = world.copy(tmp_path)
    signature = (copy / SIGNATURE_FILE).read_bytes()
    (copy / SIGNATURE_FILE).unlink()
    with pytest.raises(SignatureError, match="has no signature"):
        checked(world, copy)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ArtifactError, match="no manifest"):
        sign_keyless(empty, world.token(), world.instance)
    signed_unchecked(empty, world)  # a signature over nothing at all
    with pytest.raises(SignatureError, match="there is none"):
        checked(world, empty)
    (empty / SIGNATURE_FILE).write_bytes(signature)
    with pytest.raises(SignatureError, match="is missing"):
        checked(world, empty)


# Tokens that cannot sign. No message holds one.

TOKENS: dict[str, dict[str, Any]] = {
    "expired": {"iat": 1_700_000_000, "nbf": 1_700_000_000, "exp": 1_700_000_300},
    "not valid yet": {"nbf": 4_000_000_000, "exp": 4_000_000_300},
    "for another audience": {"aud": "https://huggingface.co"},
    "for no audience": {"aud": None},
    "without a subject": {"sub": None},
    "without an end": {"exp": None},
    "without an issuer": {"iss": None},
}


@pytest.mark.parametrize("case", [*TOKENS, "no token", "two parts", "a key"])
def test_an_identity_token_that_is_none(world: World, tmp_path: Path, case: str) -> None:
    copy = world.copy(tmp_path)
    texts = {"no token": "secret-text", "two parts": "eyJhbGciOiJ9.eyJzdWIiOiJ9", "a key": "\x00"}
    token = world.token(**TOKENS[case]) if case in TOKENS else texts[case]
    asked = len(world.sigstore.bearers)
    with pytest.raises(UsageError, match="identity token cannot be used") as caught:
        sign_keyless(copy, token, world.instance)
    assert "audience sigstore" in str(caught.value)
    assert token not in str(caught.value)
    assert len(world.sigstore.bearers) == asked
    assert content_of(copy) == content_of(world.artifact)


REFUSALS: dict[str, tuple[str, tuple[int, bytes] | None]] = {
    "a token of another issuer": ("token", None),
    "fulcio refuses": ("/api/v2/signingCert", (400, b'{"code": 3, "message": "no"}')),
    "fulcio fails": ("/api/v2/signingCert", (500, b"<html>")),
    "fulcio says nothing": ("/api/v2/signingCert", (200, b"")),
    "fulcio gives no certificate": ("/api/v2/signingCert", (200, b"{}")),
    "fulcio gives a chain of none": (
        "/api/v2/signingCert",
        (200, b'{"signedCertificateEmbeddedSct": {"chain": {"certificates": []}}}'),
    ),
    "rekor refuses": ("/api/v1/log/entries", (400, b'{"code": 400, "message": "no"}')),
    "rekor fails": ("/api/v1/log/entries", (503, b"")),
    "rekor gives no entry": ("/api/v1/log/entries", (201, b"{}")),
    "rekor gives a list": ("/api/v1/log/entries", (201, b"[]")),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_sigstore_that_does_not_do_its_part(world: World, tmp_path: Path, case: str) -> None:
    copy = world.copy(tmp_path)
    path, answer = REFUSALS[case]
    token = world.token()
    if answer is not None:
        world.sigstore.planned[path] = answer
    else:
        token = world.token(sign=by_another_key)
    with pytest.raises(SignatureError, match=r"was not signed: .* did not do its part") as caught:
        sign_keyless(copy, token, world.instance)
    text = str(caught.value)
    assert token not in text
    assert token.rpartition(".")[0] not in text
    assert text.isprintable()
    assert content_of(copy) == content_of(world.artifact)


def by_another_key(claims: dict[str, Any]) -> str:
    return jwt.encode(claims, ec.generate_private_key(ec.SECP256R1()), algorithm="ES256")


def test_a_log_that_promises_nothing_is_found_while_signing(world: World, tmp_path: Path) -> None:
    """The library takes what it says when it signs; only who downloads would see it."""
    copy = world.copy(tmp_path)
    real, world.sigstore.rekor = world.sigstore.rekor, ec.generate_private_key(ec.SECP256R1())
    try:
        with pytest.raises(SignatureError, match="was not signed"):
            sign_keyless(copy, world.token(), world.instance)
    finally:
        world.sigstore.rekor = real
    assert content_of(copy) == content_of(world.artifact)


def test_a_sigstore_that_says_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyless, "_PATIENCE", 0.3)
    copy = world.copy(tmp_path)
    given_up = threading.Event()
    monkeypatch.setattr(world.sigstore, "certify", lambda *_: given_up.wait(120) and None)
    try:
        with pytest.raises(SignatureError, match="did not answer in"):
            sign_keyless(copy, world.token(), world.instance)
    finally:
        given_up.set()


# A CI job's own identity.


def test_a_job_signs_as_itself(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = world.copy(tmp_path)
    monkeypatch.setitem(world.issuer.claims, "job_workflow_ref", WORKFLOW)
    for name, value in world.issuer.variables.items():
        monkeypatch.setenv(name, value)
    assert sign_keyless(copy, None, world.instance) == world.signer
    assert checked(world, copy)
    assert not any(world.issuer.request_token in bearer for _, bearer in world.sigstore.bearers)


@pytest.mark.parametrize(
    "missing", ["ACTIONS_ID_TOKEN_REQUEST_URL", "ACTIONS_ID_TOKEN_REQUEST_TOKEN", "GITHUB_ACTIONS"]
)
def test_a_job_without_an_identity(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name, value in world.issuer.variables.items():
        monkeypatch.delenv(name, raising=False)
        if name != missing:
            monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"`permissions: id-token: write`.*SIGSTORE_ID_TOKEN"):
        sign_keyless(world.copy(tmp_path), None, world.instance)


@pytest.mark.parametrize("status", [401, 403, 500, 200])
def test_an_issuer_that_gives_no_identity(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    for name, value in world.issuer.variables.items():
        monkeypatch.setenv(name, value)
    echo = f'{{"error": "{world.issuer.request_token} is wrong"}}'
    world.issuer.answer = (status, {}, echo.encode())
    with pytest.raises(UsageError, match="gives this job no identity") as caught:
        sign_keyless(world.copy(tmp_path), None, world.instance)
    assert world.issuer.request_token not in str(caught.value)


def test_an_issuer_that_leads_elsewhere_does_not_take_the_jobs_secret_there(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in world.issuer.variables.items():
        monkeypatch.setenv(name, value)
    with Issuer() as other:
        elsewhere = other.url.replace("127.0.0.1", "localhost")
        world.issuer.answer = (302, {"Location": f"{elsewhere}/job?audience=sigstore"}, b"")
        with pytest.raises(UsageError, match="gives this job no identity"):
            sign_keyless(world.copy(tmp_path), None, world.instance)
        assert not any(world.issuer.request_token in bearer for bearer in other.bearers)


def test_a_sigstore_that_is_not_there(world: World, tmp_path: Path) -> None:
    config = json.loads((world.instance.trust or tmp_path).read_text())
    for service in ("caUrls", "rekorTlogUrls"):
        config["signingConfig"][service][0]["url"] = "http://127.0.0.1:9"
    trust = tmp_path / "trust.json"
    trust.write_text(json.dumps(config))
    with pytest.raises(SignatureError, match=r"127\.0\.0\.1 cannot be reached\. Check"):
        sign_keyless(world.copy(tmp_path), world.token(), Instance(trust))
    # To check asks nobody: not the authority, not the log.
    assert check_identity(world.artifact, world.signer, Instance(trust))


# Files that say whom to trust.


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("", "no trust configuration"),
        ("{}", "no trust configuration"),
        ("[" * 10_000, "no trust configuration"),
        ('{"mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1"}', "no trust"),
    ],
)
def test_a_trust_configuration_that_is_none(
    world: World, tmp_path: Path, content: str | None, words: str
) -> None:
    path = tmp_path / "trust.json"
    if content is not None:
        path.write_text(content)
    for call in (
        lambda: check_identity(world.artifact, world.signer, Instance(path)),
        lambda: sign_keyless(world.copy(tmp_path / "x"), world.token(), Instance(path)),
    ):
        with pytest.raises(UsageError, match=words):
            call()
    with pytest.raises(UsageError, match="leave one out"):
        Instance(world.instance.trust, staging=True).check()


# The commands.


def test_the_commands(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = world.copy(tmp_path)
    trust = ("--trust-config", world.instance.trust or "")
    monkeypatch.setenv("SIGSTORE_ID_TOKEN", world.token())
    done = nf4("sign", copy, "--keyless", *trust, "--json", "-v", cwd=tmp_path)
    assert (done.status, without_progress(done.err)) == (0, "")
    assert done.value == {
        "signature": str(copy / SIGNATURE_FILE),
        "identity": IDENTITY,
        "issuer": world.issuer.url,
    }
    named = ("--identity", done.value["identity"], "--issuer", done.value["issuer"])
    done = nf4("check", copy, *named, *trust, "--json", cwd=tmp_path)
    assert done.value == {
        "artifact": str(copy),
        "signed": True,
        "identity": IDENTITY,
        "issuer": world.issuer.url,
        "files": len(content_of(world.artifact)) - 1,
    }
    (copy / "config.json").write_text("{}")
    done = nf4("check", copy, *named, *trust, cwd=tmp_path)
    assert done.status == 1
    assert "config.json has other bytes" in done.err
    for secret in world.issuer.handed_out:
        assert secret not in done.out + done.err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("sign",), "either --key FILE or --keyless"),
        (("sign", "--keyless", "--key", "key.pem"), "either --key FILE or --keyless"),
        (("sign", "--key", "key.pem", "--staging"), "are of --keyless"),
        (("check",), "--key FILE, or --identity and --issuer"),
        (("check", "--identity", "x"), "--issuer is missing"),
        (("check", "--issuer", "x"), "--identity is missing"),
        (("check", "--identity", "x", "--issuer", "y", "--key", "key.pem"), "--key FILE, or"),
        (("check", "--identity", "", "--issuer", "y"), "one of them is empty"),
        (("check", "--key", "key.pem", "--staging"), "are of --identity"),
    ],
)
def test_options_that_do_not_go_together(
    world: World, tmp_path: Path, command: tuple[str, ...], words: str
) -> None:
    (tmp_path / "key.pem").write_text("")
    done = nf4(command[0], world.artifact, *command[1:], cwd=tmp_path)
    assert done.status == 2
    assert words in done.err
