"""What tells of a verified export: its model card, provenance.json and bom.cdx.json.

The card names the repo that people load from, which may be known only when the artifact is pushed.
So card and provenance are written together, by `attest` and again by `push` if the repo is another:
what provenance and a signature say of the card is true of the one that the Hub shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from nf4_pipeline.build_folder import Build, Record
from nf4_pipeline.checkpoint.atomic import json_bytes, write_bytes
from nf4_pipeline.checkpoint.digest import FileDigest, json_sha256
from nf4_pipeline.checkpoint.files import CARD_FILE
from nf4_pipeline.manifest.read import MANIFEST_FILE, read_manifest
from nf4_pipeline.provenance.bom import bill_of_materials
from nf4_pipeline.provenance.identifiers import tool_versions
from nf4_pipeline.provenance.statement import statement
from nf4_pipeline.provenance.summary import Rebuild
from nf4_pipeline.records import (
    ATTEST,
    DOWNLOAD,
    QUANTIZE,
    SERIALIZE,
    VERIFY,
    AttestFacts,
    source_card,
)
from nf4_pipeline.report.model_card import model_card
from nf4_pipeline.stages.run_recorded import Outcome, run_recorded

CODE_VERSION: Final = 2
PROVENANCE_FILE: Final = "provenance.json"
BOM_FILE: Final = "bom.cdx.json"
WRITTEN: Final = frozenset({CARD_FILE, PROVENANCE_FILE, BOM_FILE})


@dataclass(frozen=True)
class Publication:
    """The card, the statement and the bill of materials of a build.

    Attributes:
        build: the build folder.
        repo_id: the repo that the card names; None for the one that it was last written for, or
            for none: its snippets then load from the folder where it lies.
        rebuilt: the summary that the card links to; None for the one that it linked to last, or
            for none.
    """

    build: Build
    repo_id: str | None = None
    rebuilt: Rebuild | None = None

    def key(self) -> str:
        """Depends on every file that serialize and verify left in the export, and on what is named.

        Raises:
            BuildError: serialize or verify is not done.
        """
        parts = {
            "code": CODE_VERSION,
            "export": {name: digest.sha256 for name, digest in self._subjects().items()},
            "repo": self._repo(),
        }
        if (rebuilt := self._rebuilt()) is not None:
            parts["rebuilt"] = rebuilt.to_json()
        return json_sha256(parts)

    def documents(self) -> dict[str, bytes]:
        """All of it, by name in the export; the same each time.

        Raises:
            BuildError: an earlier stage is not done.
        """
        manifest = read_manifest(self.build.export)
        source, verified = source_card(self.build), self.build.need(VERIFY)
        tokenizer = self.build.need(DOWNLOAD).facts.tokenizer
        subjects = self._subjects()
        card = model_card(
            manifest,
            verified.facts,
            source,
            repo_id=self._repo(),
            chat=tokenizer is not None and tokenizer.template == "works",
            rebuilt=self._rebuilt(),
        )
        bom = bill_of_materials(manifest, subjects[MANIFEST_FILE].sha256, source)
        written = {CARD_FILE: card.encode(), BOM_FILE: json_bytes(bom)}
        subjects |= {name: FileDigest.of(content) for name, content in written.items()}
        quantized = self.build.need(QUANTIZE)
        began = datetime.fromisoformat(quantized.finished) - timedelta(seconds=quantized.seconds)
        provenance = statement(
            manifest,
            subjects,
            tool_versions(),
            started=began.isoformat(timespec="seconds").replace("+00:00", "Z"),
            finished=verified.finished.replace("+00:00", "Z"),
            run=quantized.facts.run,
        )
        return {**written, PROVENANCE_FILE: json_bytes(provenance)}

    def write(self) -> Record[AttestFacts]:
        """Writes it into the export, and the record of `attest`.

        Raises:
            BuildError: serialize or verify is not done, or a file changed since.
        """
        key, repo_id, rebuilt = self.key(), self._repo(), self._rebuilt()
        self.build.check_inputs(SERIALIZE)
        self.build.check_inputs(VERIFY)

        def work() -> Outcome[AttestFacts]:
            written = Publication(self.build, repo_id, rebuilt).documents()
            for name, content in written.items():
                write_bytes(self.build.export / name, content)
            outputs = {
                f"export/{name}": FileDigest.of(content) for name, content in written.items()
            }
            return outputs, AttestFacts(repo_id=repo_id, rebuilt=rebuilt)

        return run_recorded(self.build, ATTEST, key, work)

    def _repo(self) -> str | None:
        if self.repo_id is not None:
            return self.repo_id
        record = self.build.record(ATTEST)
        return record.facts.repo_id if record else None

    def _rebuilt(self) -> Rebuild | None:
        if self.rebuilt is not None:
            return self.rebuilt
        record = self.build.record(ATTEST)
        return record.facts.rebuilt if record else None

    def _subjects(self) -> dict[str, FileDigest]:
        """What serialize and verify left in the export, by name."""
        serialized, verified = self.build.need(SERIALIZE), self.build.need(VERIFY)
        return serialized.outputs_in("export") | verified.outputs_in("export")
