"""A SLSA verification summary (VSA): what somebody found who derived an artifact again. Pure.

It says of the files at one commit of a repo that they follow, byte for byte, from the source and
the recipe that they name. No build level follows from that: who built it, and where, is not seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.checkpoint.digest import json_sha256
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
