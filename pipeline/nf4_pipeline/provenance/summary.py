"""A SLSA verification summary (VSA): what somebody found who derived an artifact again.

It says of the files at one commit of a repo that they follow, byte for byte, from the source and
the recipe that they name. No build level follows from that: who built it, and where, is not seen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.checkpoint.digest import FileDigest, json_sha256
from nf4_pipeline.checkpoint.source import read_json
from nf4_pipeline.documents import Document, schema_check
from nf4_pipeline.errors import ArtifactError, CheckpointError, UsageError
from nf4_pipeline.manifest.read import MANIFEST_FILE
from nf4_pipeline.provenance.statement import STATEMENT_TYPE

SUMMARY_TYPE: Final = "https://slsa.dev/verification_summary/v1"
SLSA_VERSION: Final = "1.1"

VERIFIER: Final = "pkg:pypi/nf4-pipeline?verifier=local#docs/rebuilding.md"
"""Whoever ran the program, on a machine that nobody vouches for."""

REPRODUCED: Final = "NF4_PIPELINE_REPRODUCED"
"""A level of our own: every byte that source and recipe decide was derived again, and is equal."""
_BUILD_NOT_LOOKED_AT: Final = "SLSA_BUILD_LEVEL_UNEVALUATED"

_POLICY: Final = "pkg:pypi/nf4-pipeline?policy=rebuild_v1#docs/rebuilding.md"

SCHEMA_FILE: Final = Path(__file__).with_name("summary.schema.json")

Subject = dict[str, Any]


def verification_summary(
    *,
    resource_uri: str,
    subjects: Sequence[Subject],
    passed: bool,
    verified: str,
    verifier: str,
    tools: Mapping[str, str],
    policy: Mapping[str, Any],
    attestations: Mapping[str, str],
) -> dict[str, Any]:
    """Puts the statement together.

    Args:
        resource_uri: the package URL of the artifact, at its commit.
        subjects: names and digests of everything that is there; at least one.
        passed: whether nothing differs.
        verified: when, as RFC 3339 in UTC.
        verifier: who did it, as a URI.
        tools: name -> version of what was used.
        policy: the data that the rules come down to; its hash goes in.
        attestations: sha256 of each attestation that was looked at, by its path in the artifact.
    """
    return {
        "_type": STATEMENT_TYPE,
        "subject": list(subjects),
        "predicateType": SUMMARY_TYPE,
        "predicate": {
            "verifier": {"id": verifier, "version": dict(tools)},
            "timeVerified": verified,
            "resourceUri": resource_uri,
            "policy": {"uri": _POLICY, "digest": {"sha256": json_sha256(policy)}},
            "inputAttestations": [
                {"uri": f"{resource_uri}#{name}", "digest": {"sha256": sha256}}
                for name, sha256 in sorted(attestations.items())
            ],
            "verificationResult": "PASSED" if passed else "FAILED",
            "verifiedLevels": [_BUILD_NOT_LOOKED_AT, REPRODUCED] if passed else ["FAILED"],
            "slsaVersion": SLSA_VERSION,
        },
    }


_ADDRESS: Final = re.compile(r"https?://[^\s<>\"'`\\|^{}()\[\]]{1,1000}")


@dataclass(frozen=True, kw_only=True)
class Rebuild(Document):
    """A summary by somebody who derived an artifact again and found it equal, for its card.

    Attributes:
        verifier: who, as a URI.
        verified: when, in UTC.
        url: where the summary stands.
    """

    verifier: str
    verified: str
    url: str


def read_summary(path: Path, url: str, manifest: FileDigest) -> Rebuild:
    """What a card may say of a summary: it passed, and speaks of this very manifest.

    Args:
        path: of the summary, as `nf4 rebuild` writes it.
        url: where others find it.
        manifest: digest of the manifest.json of the artifact that the card is for.

    Raises:
        UsageError: the address is none.
        ArtifactError: the file is no such summary, did not pass, or speaks of another artifact.
    """
    import fastjsonschema

    if not _ADDRESS.fullmatch(url):
        raise UsageError(f"{url[:120]!r} is no address at which others could read the summary.")
    try:
        value = read_json(path)
        schema_check(SCHEMA_FILE)(value)
    except (CheckpointError, fastjsonschema.JsonSchemaValueException) as error:
        raise ArtifactError(
            f"{path} is no verification summary of nf4 rebuild ({str(error)[:300]}). Take the file "
            "that ends with .vsa.json."
        ) from error
    predicate = value["predicate"]
    if predicate["verificationResult"] != "PASSED" or REPRODUCED not in predicate["verifiedLevels"]:
        raise ArtifactError(
            f"{path} says {predicate['verificationResult']}, and a card may name a summary that "
            "passed. results.json beside it says what differs."
        )
    subjects = {entry["name"]: entry["digest"] for entry in value["subject"]}
    said = subjects.get(MANIFEST_FILE, {}).get("sha256")
    if said != manifest.sha256:
        raise ArtifactError(
            f"{path} speaks of another artifact: its {MANIFEST_FILE} has sha256 {said}, and the "
            f"one here has {manifest.sha256}. Publish this one, and have it rebuilt."
        )
    verifier, verified = predicate["verifier"]["id"], predicate["timeVerified"]
    return Rebuild(verifier=verifier, verified=verified, url=url)
