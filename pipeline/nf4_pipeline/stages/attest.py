"""export/ -> provenance.json and bom.cdx.json in it: who made it from what, for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import ClassVar, Final

from nf4_pipeline.build_folder import Build, Record
from nf4_pipeline.checkpoint.atomic import json_bytes, write_bytes
from nf4_pipeline.checkpoint.digest import FileDigest, json_sha256
from nf4_pipeline.manifest.read import MANIFEST_FILE, read_manifest
from nf4_pipeline.provenance.bom import bill_of_materials
from nf4_pipeline.provenance.identifiers import tool_versions
from nf4_pipeline.provenance.statement import statement
from nf4_pipeline.records import (
    ATTEST,
    QUANTIZE,
    SERIALIZE,
    VERIFY,
    AttestFacts,
    source_card,
)
from nf4_pipeline.stages.run_recorded import Outcome, run_recorded

CODE_VERSION: Final = 1
PROVENANCE_FILE: Final = "provenance.json"
BOM_FILE: Final = "bom.cdx.json"


@dataclass(frozen=True)
class Attest:
    """Writes the statement and the bill of materials."""

    build: Build

    kind: ClassVar = ATTEST

    def key(self) -> str:
        """Depends on every file that serialize and verify left in the export.

        Raises:
            BuildError: serialize or verify is not done.
        """
        return json_sha256(
            {
                "code": CODE_VERSION,
                "export": {name: digest.sha256 for name, digest in self._subjects().items()},
            }
        )

    def run(self) -> Record[AttestFacts]:
        """Does the work.

        Raises:
            BuildError: serialize or verify is not done, or a file changed since.
        """
        key = self.key()
        self.build.check_inputs(SERIALIZE)
        self.build.check_inputs(VERIFY)

        def work() -> Outcome[AttestFacts]:
            manifest = read_manifest(self.build.export)
            subjects = self._subjects()
            card = source_card(self.build)
            bom = json_bytes(bill_of_materials(manifest, subjects[MANIFEST_FILE].sha256, card))
            subjects[BOM_FILE] = FileDigest.of(bom)
            quantized, verified = self.build.need(QUANTIZE), self.build.need(VERIFY)
            began = datetime.fromisoformat(quantized.finished) - timedelta(
                seconds=quantized.seconds
            )
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
                write_bytes(self.build.export / name, content)
            outputs = {
                f"export/{name}": FileDigest.of(content) for name, content in written.items()
            }
            return outputs, AttestFacts()

        return run_recorded(self.build, self.kind, key, work)

    def _subjects(self) -> dict[str, FileDigest]:
        """What serialize and verify left in the export, by name."""
        serialized, verified = self.build.need(SERIALIZE), self.build.need(VERIFY)
        return serialized.outputs_in("export") | verified.outputs_in("export")
