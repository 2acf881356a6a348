"""Whether a workflow that provenance names as builder signed: with a Sigstore of the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from nf4_pipeline.provenance.keyless import Instance
from nf4_pipeline.provenance.signing import SIGNATURE_FILE, sign_keyless
from nf4_pipeline.rebuilding import signature
from nf4_pipeline.rebuilding.signature import why_not_confirmed

from tests.support.identities import Issuer
from tests.support.sigstore_instance import Sigstore
from tests.support.tiny import content_of, copy_of

WORKFLOW: Final = "me/code/.github/workflows/publish.yml@refs/heads/main"
BUILDER: Final = f"https://github.com/{WORKFLOW}"


@pytest.fixture(scope="module")
def signed(
    exported_falcon: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Instance]]:
    """An artifact that the workflow signed, and whom to trust; GitHub's issuer is that of here."""
    folder = tmp_path_factory.mktemp("signed")
    artifact = copy_of(exported_falcon / "export", folder / "artifact")
    with (
        Issuer() as issuer,
        Sigstore(issuer) as sigstore,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name in ("GITHUB_ACTIONS", "GITLAB_CI", "SIGSTORE_ID_TOKEN"):
            patch.delenv(name, raising=False)
        patch.setattr(signature, "ISSUERS", {"github.com": issuer.url})
        instance = Instance(sigstore.write_trust(folder / "trust.json"))
        sign_keyless(artifact, issuer.token("sigstore", job_workflow_ref=WORKFLOW), instance)
        yield artifact, instance


def why(signed: tuple[Path, Instance], artifact: Path, tmp_path: Path, builder: str) -> str:
    """As a rebuilder asks: of a folder that holds links."""
    view = tmp_path / "view"
    for name in content_of(artifact):
        link = view / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(artifact / name)
    scratch = tmp_path / "scratch"
    return why_not_confirmed(view, content_of(artifact), builder, scratch, signed[1])


def test_the_workflow_that_signed_is_confirmed(
    signed: tuple[Path, Instance], tmp_path: Path
) -> None:
    before = content_of(signed[0])
    assert why(signed, signed[0], tmp_path, BUILDER) == ""
    assert content_of(signed[0]) == before


@pytest.mark.parametrize(
    "builder",
    [
        BUILDER.replace("main", "other"),
        BUILDER.replace("me/", "you/"),
        BUILDER.replace("github.com", "gitlab.com"),
    ],
)
def test_another_one_is_not(signed: tuple[Path, Instance], tmp_path: Path, builder: str) -> None:
    assert "is not what" in why(signed, signed[0], tmp_path, builder)


def test_nor_is_what_was_changed_or_never_signed(
    signed: tuple[Path, Instance], tmp_path: Path
) -> None:
    changed = copy_of(signed[0], tmp_path / "changed")
    (changed / "more.txt").write_text("more")
    assert "is not what" in why(signed, changed, tmp_path / "1", BUILDER)
    (changed / SIGNATURE_FILE).write_bytes(os.urandom(99))
    assert why(signed, changed, tmp_path / "2", BUILDER)
    (changed / SIGNATURE_FILE).unlink()
    assert why(signed, changed, tmp_path / "3", BUILDER) == f"there is no {SIGNATURE_FILE}"
