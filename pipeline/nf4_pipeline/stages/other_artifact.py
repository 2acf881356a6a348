"""Another artifact of the same source, with which the one that is verified is compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nf4_pipeline.checkpoint.digest import FileDigest, content_sha256, digest_file
from nf4_pipeline.errors import ArtifactError
from nf4_pipeline.manifest.manifest import Source
from nf4_pipeline.manifest.read import MANIFEST_FILE, read_manifest
from nf4_pipeline.model.check_folder import check_small_files
from nf4_pipeline.progress import Reporter
from nf4_pipeline.runtime.artifact import find_model
from nf4_pipeline.verification.check_files import check_files
from nf4_pipeline.verification.check_model import check_kept, check_weights
from nf4_pipeline.verification.document import Against
from nf4_pipeline.verification.launch import Examination, compare_scores


@dataclass(frozen=True)
class OtherArtifact:
    """An artifact of anybody's.

    Attributes:
        folder: its export.
    """

    folder: Path

    @classmethod
    def named(cls, name: str) -> OtherArtifact:
        """The one that a user means.

        Raises:
            UsageError: there is no such folder.
            ArtifactError: the folder holds no artifact.
        """
        folder = Path(find_model(name))
        check_small_files(folder)
        read_manifest(folder)
        return cls(folder)

    @property
    def manifest_sha256(self) -> str:
        """Of its manifest as it lies there."""
        return digest_file(self.folder / MANIFEST_FILE).sha256

    def check_source(self, files: Mapping[str, FileDigest], reporter: Reporter) -> None:
        """Refuses what cannot be compared, before any work is done.

        What its manifest says is believed nowhere: its files are hashed, and its source must be the
        one that this build has hashed.

        Args:
            files: of the source, as this build has downloaded and hashed it.
            reporter: told how far it is.

        Raises:
            ArtifactError: its manifest contradicts itself or its files, or it is of another source.
        """
        theirs = read_manifest(self.folder)
        claimed, listed = theirs.source.content_sha256, content_sha256(theirs.source.files)
        if claimed != listed:
            raise ArtifactError(
                f"{self.folder / MANIFEST_FILE} contradicts itself: it says that the source has "
                f"the content {claimed[:12]}…, and the files that it lists make {listed[:12]}…. "
                "Take the manifest from where the artifact was published."
            )
        own = content_sha256(files)
        if listed != own:
            raise ArtifactError(
                f"{self.folder} was made from another source ({theirs.source.repo}, content "
                f"{listed[:12]}…) than this artifact ({own[:12]}…). Only artifacts of one source "
                "can be compared."
            )
        failed = [c for c in check_files(self.folder, theirs, reporter).checks if not c.passed]
        if failed:
            raise ArtifactError(f"{self.folder} is not what its manifest says: {failed[0].found}.")

    def compare(
        self,
        asked: Examination,
        own_scores: Path,
        scores: Path,
        source: Source,
        reporter: Reporter,
    ) -> Against:
        """What it scores on the same text.

        Args:
            asked: of the artifact that is verified.
            own_scores: that this one left.
            scores: where those of the other are left.
            source: of both, as this build has downloaded and hashed it.
            reporter: told how far it is.

        Raises:
            ArtifactError: the other one does not hold the weights of the source.
        """
        theirs = read_manifest(self.folder)
        reply = asked.without_prompts().ask_artifact(self.folder, scores, reporter)
        for check in (
            check_weights(theirs, reply.blocks, reply.outside, reply.malformed),
            check_kept(reply.kept, reply.changed),
        ):
            if not check.passed:
                raise ArtifactError(
                    f"{self.folder} was not made from this source, whatever its manifest says: "
                    f"{check.name}: expected {check.expected}, found {check.found}."
                )
        said = theirs.source
        not_checked = None
        if (said.repo, said.commit) != (source.repo, source.commit):
            not_checked = (
                f"that its source is {said.repo} at {said.commit or 'no commit'}; its content is "
                f"that of {source.repo} at {source.version[:12]}, which this build has downloaded"
            )
            reporter.note(f"{self.folder}: not checked: {not_checked}.")
        is_export = self.folder.name == "export"
        return Against(
            name=self.folder.parent.name if is_export else self.folder.name,
            manifest_sha256=self.manifest_sha256,
            rounding=theirs.rounding,
            fidelity=reply.fidelity,
            domains=reply.domains,
            difference=compare_scores(own_scores, scores),
            not_checked=not_checked,
        )
