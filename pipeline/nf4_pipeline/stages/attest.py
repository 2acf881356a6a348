"""export/ -> the model card, provenance.json and bom.cdx.json in it: what it is, made from what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nf4_pipeline.build_folder import Build, Record
from nf4_pipeline.provenance.summary import Rebuild
from nf4_pipeline.records import ATTEST, AttestFacts
from nf4_pipeline.stages.publication import Publication


@dataclass(frozen=True)
class Attest:
    """Writes the card, the statement and the bill of materials.

    Attributes:
        build: the build folder.
        repo_id: the repo that the card names; see `Publication`.
        rebuilt: the summary that the card links to; see `Publication`.
    """

    build: Build
    repo_id: str | None = None
    rebuilt: Rebuild | None = None

    kind: ClassVar = ATTEST

    def key(self) -> str:
        """Depends on every file that serialize and verify left in the export, and on the repo.

        Raises:
            BuildError: serialize or verify is not done.
        """
        return Publication(self.build, self.repo_id, self.rebuilt).key()

    def run(self) -> Record[AttestFacts]:
        """Does the work.

        Raises:
            BuildError: serialize or verify is not done, or a file changed since.
        """
        return Publication(self.build, self.repo_id, self.rebuilt).write()
