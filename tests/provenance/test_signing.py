"""Signed artifacts: any change to any file is refused."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.errors import ArtifactError, SignatureError, UsageError
from nf4_pipeline.provenance.signing import SIGNATURE_FILE, check, sign

from tests.support.command_line import without_progress
from tests.support.signed import TAMPERINGS, make_keys, tamper
from tests.support.tiny import content_of, copy_of, nf4


@dataclass(frozen=True)
class Signed:
    artifact: Path
    private: Path
    public: Path


@pytest.fixture(scope="module")
def signed(exported_falcon: Path, tmp_path_factory: pytest.TempPathFactory) -> Signed:
    folder = tmp_path_factory.mktemp("signed")
    build = Build(copy_of(exported_falcon, folder / "build"))
    private, public = make_keys(folder, "key")
    assert sign(build.export, private) == build.export / SIGNATURE_FILE
    return Signed(build.export, private, public)


def test_what_was_signed_is_accepted_wherever_it_lies(signed: Signed, tmp_path: Path) -> None:
    copy = copy_of(signed.artifact, tmp_path / "elsewhere")
    assert check(copy, signed.public) == len(content_of(signed.artifact)) - 1
    for name in (".gitattributes", ".cache/huggingface/download/x.lock"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("x")
    assert check(copy, signed.public) == len(content_of(signed.artifact)) - 1


@pytest.mark.parametrize("kind", TAMPERINGS)
def test_every_tampering_is_refused(signed: Signed, tmp_path: Path, kind: str) -> None:
    copy = copy_of(signed.artifact, tmp_path / "copy")
    dice = random.Random(0)
    for _ in range(10):
        with tamper(copy, kind, dice), pytest.raises(SignatureError, match=r"was signed|signature"):
            check(copy, signed.public)
    assert content_of(copy) == content_of(signed.artifact)
    assert check(copy, signed.public)


def test_what_a_signature_leaves_out_is_not_called_signed(signed: Signed, tmp_path: Path) -> None:
    """Another program may sign so; model-signing would pass over what is named there."""
    from model_signing import hashing, signing

    copy = copy_of(signed.artifact, tmp_path / "copy")
    (copy / "evil.py").write_text("x")
    for ignored in (["evil.py"], ["config.json", "evil.py"], ["."]):
        paths = hashing.Config().set_ignored_paths(
            paths=[*ignored, SIGNATURE_FILE], ignore_git_paths=False
        )
        config = signing.Config().set_hashing_config(paths)
        config.use_elliptic_key_signer(private_key=signed.private)
        config.sign(copy, copy / SIGNATURE_FILE)
        with pytest.raises(SignatureError, match=r"evil\.py was added|evil\.py, .* was added"):
            check(copy, signed.public)


def unsigned(artifact: Path) -> None:
    (artifact / SIGNATURE_FILE).unlink()


def empty(artifact: Path) -> None:
    (artifact / SIGNATURE_FILE).write_text("")


def not_a_bundle(artifact: Path) -> None:
    (artifact / SIGNATURE_FILE).write_text('{"verificationMaterial": 7}')


def linked(artifact: Path) -> None:
    (artifact / "config.json").rename(artifact.parent / "config.json")
    (artifact / "config.json").symlink_to(artifact.parent / "config.json")


def linked_folder(artifact: Path) -> None:
    (artifact / "more").symlink_to(artifact.parent)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "unsigned": (unsigned, r"has no signature.*nf4 reproduce .*nf4 sign .* --key"),
    "empty": (empty, "not what was signed"),
    "not a bundle": (not_a_bundle, "not what was signed"),
    "linked": (linked, "symbolic link"),
    "linked folder": (linked_folder, "symbolic link"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_or_missing_signature(signed: Signed, tmp_path: Path, case: str) -> None:
    damage, message = DAMAGES[case]
    copy = copy_of(signed.artifact, tmp_path / "copy")
    damage(copy)
    with pytest.raises(SignatureError, match=message):
        check(copy, signed.public)


def test_another_key_is_refused_and_bad_keys_are_named(signed: Signed, tmp_path: Path) -> None:
    _, public = make_keys(tmp_path, "other")
    with pytest.raises(SignatureError, match="not what was signed"):
        check(signed.artifact, public)
    bad = tmp_path / "bad.pem"
    bad.write_text("no key")
    with pytest.raises(UsageError, match="no public key"):
        check(signed.artifact, bad)
    with pytest.raises(UsageError, match=r"no private key.*openssl"):
        sign(signed.artifact, bad)
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        sign(tmp_path, signed.private)


def test_the_commands(signed: Signed, tmp_path: Path) -> None:
    copy = copy_of(signed.artifact, tmp_path / "copy")
    (copy / SIGNATURE_FILE).unlink()
    done = nf4("sign", copy, "--key", signed.private, cwd=tmp_path)
    assert (done.status, without_progress(done.err)) == (0, "")
    done = nf4("check", copy, "--key", signed.public, "--json", cwd=tmp_path)
    assert done.value == {
        "artifact": str(copy),
        "signed": True,
        "files": len(content_of(signed.artifact)) - 1,
    }
    (copy / "config.json").write_text("{}")
    done = nf4("check", copy, "--key", signed.public, cwd=tmp_path)
    assert done.status == 1
    said = without_progress(done.err)
    assert said.startswith(f"Error: {copy} is not what was signed")
    assert said.count("\n") == 1


def test_without_the_package_the_way_out_is_named(signed: Signed) -> None:
    program = (
        "import sys; sys.modules['model_signing'] = None\n"
        "from nf4_pipeline.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, "check", signed.artifact, "--key", signed.public]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'nf4-pipeline[sign]'" in done.stderr
    assert "Traceback" not in done.stderr
