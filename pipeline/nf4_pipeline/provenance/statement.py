"""An in-toto statement with SLSA build provenance v1: what was made from what. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.manifest.manifest import Manifest
from nf4_pipeline.provenance.ci_run import CiRun
from nf4_pipeline.provenance.identifiers import model_purl

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://slsa.dev/provenance/v1"

BUILD_TYPE: Final = "pkg:pypi/nf4-pipeline?build_type=v1#docs/provenance.md"
"""What the parameters mean: docs/provenance.md of this package."""

BUILDER: Final = "pkg:pypi/nf4-pipeline?builder=local#docs/provenance.md"
"""Whoever ran the program, on a machine that nobody vouches for: SLSA Build L1 at most.

A public CI run is named instead, by its workflow.
"""

SCHEMA_FILE: Final = Path(__file__).with_name("provenance.schema.json")


def statement(
    manifest: Manifest,
    subjects: Mapping[str, FileDigest],
    tools: Mapping[str, str],
    started: str,
    finished: str,
    run: CiRun | None = None,
) -> dict[str, Any]:
    """Puts the statement together.

    Args:
        manifest: of the artifact.
        subjects: every file that is vouched for, by its path in the artifact.
        tools: name -> version of what was used.
        started: when quantizing began, as RFC 3339 in UTC.
        finished: when the artifact was verified, the same.
        run: the CI run that quantized; None if it was none, or nobody may know.
    """
    source = manifest.source.to_json()
    del source["files"]  # they are among the dependencies
    return {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": name, "digest": {"sha256": digest.sha256}}
            for name, digest in sorted(subjects.items())
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"source": source, "recipe": manifest.recipe},
                "internalParameters": _internal_parameters(manifest),
                "resolvedDependencies": _dependencies(manifest),
            },
            "runDetails": {
                "builder": {"id": run.builder if run else BUILDER, "version": dict(tools)},
                "metadata": {
                    **({"invocationId": run.invocation} if run else {}),
                    "startedOn": started,
                    "finishedOn": finished,
                },
            },
        },
    }


def _internal_parameters(manifest: Manifest) -> dict[str, str]:
    """What shapes the bytes and is no wish of the user: the kind of device that calibrated."""
    calibration = manifest.calibration
    return {} if calibration is None else {"calibration_device": calibration.device}


def _dependencies(manifest: Manifest) -> list[dict[str, Any]]:
    """The model at its commit, each of its files, and the recipe."""
    source = manifest.source
    purl = model_purl(source.repo, source.commit)
    dependencies: list[dict[str, Any]] = []
    if purl is not None:
        dependencies.append({"uri": purl, "digest": {"gitCommit": source.commit}})
    for name, digest in sorted(source.files.items()):
        file: dict[str, Any] = {"name": name, "digest": {"sha256": digest.sha256}}
        if purl is not None:
            file["uri"] = f"{purl}#{name}"
        dependencies.append(file)
    recipe = json.dumps(manifest.recipe, sort_keys=True, separators=(",", ":")).encode()
    dependencies.append(
        {
            "name": "recipe",
            "digest": {"sha256": hashlib.sha256(recipe).hexdigest()},
            "mediaType": "application/json",
        }
    )
    return dependencies
