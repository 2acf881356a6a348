"""An artifact's manifest, checked against the schema."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.checkpoint.source import read_json
from nf4_pipeline.documents import DocumentError, schema_check
from nf4_pipeline.errors import ArtifactError, CheckpointError
from nf4_pipeline.manifest.manifest import Manifest

MANIFEST_FILE: Final = "manifest.json"
SCHEMA_FILE: Final = Path(__file__).with_name("manifest.schema.json")


def read_manifest(artifact: Path) -> Manifest:
    """Reads and validates `manifest.json` of an artifact.

    Raises:
        ArtifactError: the file is missing, no plain file or no JSON, or departs from the schema;
            the text says where.
    """
    path = artifact / MANIFEST_FILE
    if not os.path.lexists(path):
        raise ArtifactError(
            f"{artifact} has no {MANIFEST_FILE}, so it is not an artifact of this pipeline. "
            "Name the export/ folder of a build; `nf4 build` makes one."
        )
    try:
        content = read_json(path, finite=True)
        _check_schema(content, path)
        return Manifest.from_json(content)
    except CheckpointError as error:
        raise ArtifactError(str(error)) from error
    except DocumentError as error:  # such as 5.0 for an integer, which JSON Schema takes
        raise ArtifactError(f"{path} is not a valid manifest at {error}") from error


def _check_schema(content: Any, path: Path) -> None:
    import fastjsonschema

    try:
        schema_check(SCHEMA_FILE)(content)
    except fastjsonschema.JsonSchemaValueException as error:
        _, *parts = error.path
        where = "/".join(parts) or "top level"
        what = error.message.removeprefix(error.name or "").strip()
        raise ArtifactError(
            f"{path} is not a valid manifest at {where[:200]}: it {what[:300]}"
        ) from error
