"""An artifact's manifest, checked against the schema."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

from nf4_pipeline.checkpoint.source import read_json
from nf4_pipeline.documents import DocumentError
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
    import jsonschema

    path = artifact / MANIFEST_FILE
    if not os.path.lexists(path):
        raise ArtifactError(
            f"{artifact} has no {MANIFEST_FILE}, so it is not an artifact of this pipeline. "
            "Name the export/ folder of a build."
        )
    try:
        content = read_json(path, finite=True)
        jsonschema.validate(content, json.loads(SCHEMA_FILE.read_text("utf-8")))
        return Manifest.from_json(content)
    except CheckpointError as error:
        raise ArtifactError(str(error)) from error
    except jsonschema.ValidationError as error:
        where = "/".join(str(part) for part in error.absolute_path) or "top level"
        raise ArtifactError(
            f"{path} is not a valid manifest at {where[:200]}: {error.message[:300]}"
        ) from error
    except DocumentError as error:  # such as 5.0 for an integer, which JSON Schema takes
        raise ArtifactError(f"{path} is not a valid manifest at {error}") from error
