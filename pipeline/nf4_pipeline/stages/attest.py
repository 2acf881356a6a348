"""export/ -> provenance.json and bom.cdx.json in it: who made it from what, for other programs."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Final

from nf4_pipeline.build_folder import Build, Record
from nf4_pipeline.checkpoint.atomic import json_bytes, write_bytes
from nf4_pipeline.checkpoint.digest import FileDigest, json_sha256
from nf4_pipeline.manifest.read import MANIFEST_FILE, read_manifest
from nf4_pipeline.progress import Reporter
from nf4_pipeline.provenance.bom import bill_of_materials
from nf4_pipeline.provenance.identifiers import tool_versions
from nf4_pipeline.provenance.statement import statement
from nf4_pipeline.report import model_card as card
from nf4_pipeline.stages import Settings, recorded

CODE_VERSION: Final = 1
PROVENANCE_FILE: Final = "provenance.json"
BOM_FILE: Final = "bom.cdx.json"
CARD_FILE: Final = "README.md"


def key(build: Build, settings: Settings) -> str:
    """Depends on every file that serialize and verify left in the export."""
    return json_sha256(
        {
            "code": CODE_VERSION,
            "export": {name: digest.sha256 for name, digest in _files(build).items()},
        }
    )


def run(build: Build, settings: Settings, reporter: Reporter) -> Record:
    """Writes the statement and the bill of materials.

    Raises:
        BuildError: serialize or verify is not done, or a file changed since.
    """
    stage = key(build, settings)
    build.check_inputs("serialize")
    build.check_inputs("verify")

    def work() -> tuple[dict[str, Any], dict[str, Any]]:
        manifest = read_manifest(build.export)
        subjects = _files(build)
        source_card = build.source / CARD_FILE
        text = source_card.read_text("utf-8", "replace") if source_card.is_file() else ""
        bom = json_bytes(
            bill_of_materials(manifest, subjects[MANIFEST_FILE].sha256, card.front_matter(text))
        )
        subjects[BOM_FILE] = FileDigest.of(bom)
        quantized, verified = build.need("quantize"), build.need("verify")
        began = datetime.fromisoformat(quantized.finished) - timedelta(seconds=quantized.seconds)
        provenance = json_bytes(
            statement(
                manifest,
                subjects,
                tool_versions(),
                started=began.isoformat(timespec="seconds").replace("+00:00", "Z"),
                finished=verified.finished.replace("+00:00", "Z"),
            )
        )
        written = {BOM_FILE: bom, PROVENANCE_FILE: provenance}
        for name, content in written.items():
            write_bytes(build.export / name, content)
        return {f"export/{name}": FileDigest.of(content) for name, content in written.items()}, {}

    return recorded(build, "attest", stage, work)


def _files(build: Build) -> dict[str, FileDigest]:
    """What serialize and verify left in the export, by name."""
    return {
        path.removeprefix("export/"): digest
        for stage in ("serialize", "verify")
        for path, digest in build.need(stage).outputs.items()
        if path.startswith("export/")
    }
