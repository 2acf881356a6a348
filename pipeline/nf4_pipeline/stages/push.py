"""export/ -> the Hub, after checking that it is what was verified; the record holds the proof."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from nf4_pipeline import __version__
from nf4_pipeline.build_folder import Build, Record
from nf4_pipeline.checkpoint.digest import FileDigest, FileStamp, digest_file, json_sha256
from nf4_pipeline.checkpoint.files import CARD_FILE, entries
from nf4_pipeline.documents import Document
from nf4_pipeline.errors import ArtifactError, BuildError, HubError, VerificationError
from nf4_pipeline.manifest.manifest import Manifest
from nf4_pipeline.manifest.read import read_manifest
from nf4_pipeline.progress import SILENT, Reporter
from nf4_pipeline.provenance.signing import SIGNATURE_FILE
from nf4_pipeline.records import (
    ATTEST,
    PUSH,
    SERIALIZE,
    VERIFY,
    AttestFacts,
    PushFacts,
    recorded_files,
)
from nf4_pipeline.resource_usage import measured
from nf4_pipeline.stages.publication import WRITTEN, Publication

if TYPE_CHECKING:
    from nf4_pipeline.hub import Earlier, LocalFile, Published, Target

CODE_VERSION: Final = 1


@dataclass(frozen=True, kw_only=True)
class UploadDocument(Document):
    """An `Upload` as `nf4 push --dry-run --json` says it."""

    repo_id: str
    private: bool
    pull_request: bool
    verdict: str
    total_bytes: int
    files: dict[str, FileDigest]
    card: str


@dataclass(frozen=True)
class Upload:
    """What a push puts on the Hub.

    Attributes:
        target: where.
        source: the repo that the artifact was made from.
        verdict: of verify.
        card: the model card as it will be there.
        folder: where the files are.
        files: name -> digest of what will be there.
        is_written: the folder holds all of them so; else card and provenance are to be written.
        stamps: name -> what the file looked like when it was hashed.
        sent: names of files that the Hub received ahead, and that are not in the folder.
    """

    target: Target
    source: str
    verdict: str
    card: str
    folder: Path
    files: dict[str, FileDigest]
    is_written: bool
    stamps: dict[str, FileStamp]
    sent: frozenset[str] = frozenset()

    @property
    def total_bytes(self) -> int:
        return sum(digest.size for digest in self.files.values())

    @property
    def document(self) -> UploadDocument:
        """What `nf4 push --dry-run --json` says."""
        return UploadDocument(
            repo_id=self.target.repo_id,
            private=self.target.private is not False,
            pull_request=self.target.pull_request,
            verdict=self.verdict,
            total_bytes=self.total_bytes,
            files=self.files,
            card=self.card,
        )

    def after_writing(self, record: Record[AttestFacts]) -> Upload:
        """The same, once card and provenance are written: the record says what they look like."""
        stamps = {name.removeprefix("export/"): stamp for name, stamp in record.stamps.items()}
        return replace(self, stamps=self.stamps | stamps, is_written=True)

    def local_files(self) -> dict[str, LocalFile]:
        """The files as the Hub room takes them."""
        from nf4_pipeline.hub import LocalFile

        return {
            name: LocalFile(
                None if name in self.sent else self.folder / name,
                digest.size,
                digest.sha256,
                self.stamps.get(name),
            )
            for name, digest in self.files.items()
        }


@dataclass(frozen=True)
class Push:
    """Publishes an export, proves what the Hub holds, and records both.

    Attributes:
        build: the build folder.
        target: where it goes.
        reporter: told how far it is.
        allow_unverified: also an export whose verdict is "fail"; its card says so.
    """

    build: Build
    target: Target
    reporter: Reporter = SILENT
    allow_unverified: bool = False

    kind: ClassVar = PUSH

    def plan(self) -> Upload:
        """Lists what would be uploaded, after checking that it is what was verified.

        Raises:
            BuildError: verify is not done, or a signature signs a card that does not name the repo.
            VerificationError: the verdict is not "pass", and that is not allowed.
            ArtifactError: a file changed, came or went since it was verified.
        """
        export = self.build.export
        self.build.fetch(SERIALIZE, VERIFY, ATTEST)
        verdict = self.build.need(VERIFY).facts.verdict
        if verdict != "pass" and not self.allow_unverified:
            raise VerificationError(
                f'{export} has the verdict "{verdict}"; only an artifact that passed is '
                "published. See verification.json in it for the checks that failed. "
                "--allow-unverified publishes it all the same, with a warning at the head of its "
                "card."
            )
        manifest = read_manifest(export)
        stamps = {
            name: FileStamp.of(path) for name, path in entries(export).items() if path.is_file()
        }
        # What a killed `attest` left half done is written anew.
        ignored = set() if self.build.record(ATTEST) else WRITTEN
        found = _checked_files(self.build, manifest, self.reporter, ignored, self._sent())
        documents = self._publication.documents()
        written = {name: FileDigest.of(content) for name, content in documents.items()}
        files = dict(sorted((found | written).items()))
        if SIGNATURE_FILE in found and files != found:
            raise BuildError(
                f"{export / SIGNATURE_FILE} signs a card that does not name "
                f"{self.target.repo_id}, and a push would change it. Write the card for that repo, "
                f"then sign again: nf4 attest --repo-id {self.target.repo_id} --build-dir "
                f"{shlex.quote(self.build.shown)}, then nf4 sign. Or delete the signature."
            )
        return Upload(
            self.target,
            manifest.source.repo,
            verdict,
            documents[CARD_FILE].decode(),
            export,
            files,
            files == found,
            stamps,
            frozenset(self._sent()),
        )

    def _sent(self) -> dict[str, FileDigest]:
        """Files of the export that the Hub alone has, by name.

        Raises:
            HubError: another repo has them.
        """
        sent = self.build.only_sent(SERIALIZE)
        if sent:
            from nf4_pipeline import hub

            url = self.build.sent.url
            if url != hub.repo_url(self.target.repo_id):
                raise HubError(
                    f"{len(sent)} files of weights of {self.build.shown} are in {url} alone, where "
                    "--stream-output sent them. Push to that repo; or run `nf4 build` without "
                    "--stream-output first, which makes them here."
                )
        return {name.removeprefix("export/"): digest for name, digest in sent.items()}

    @property
    def _publication(self) -> Publication:
        return Publication(self.build, self.target.repo_id)

    def run(self) -> Record[PushFacts]:
        """Does the work.

        Raises:
            BuildError: verify is not done, or another process works here.
            VerificationError: the verdict is not "pass", and that is not allowed.
            ArtifactError: the export is not what was verified.
            ConflictError: somebody else pushed to the repo; the target does not say `force`.
            HubError: the Hub refuses, does not answer, or does not hold what was sent.
        """
        from nf4_pipeline import hub

        with self.build.locked():
            with measured() as usage:
                upload = self.plan()
                if not upload.is_written:
                    self._publication.write()
                    upload = upload.after_writing(self.build.need(ATTEST))
                message = hub.CommitMessage(
                    f"NF4 artifact of {upload.source}",
                    f"Made and verified by nf4-pipeline {__version__}.",
                )
                published = hub.publish(
                    upload.local_files(),
                    self.target,
                    message,
                    self.reporter,
                    earlier=_earlier(self.build, self.target.repo_id),
                )
                facts = _facts(upload, published)
            # An earlier record stands until this one replaces it: it says what the Hub held last.
            files = {name: digest.to_json() for name, digest in upload.files.items()}
            key = json_sha256({"code": CODE_VERSION, "repo": self.target.repo_id, "files": files})
            record = Record(PUSH, key, {}, facts, usage.seconds, usage.peak_memory)
            self.build.write_record(record)
        return record


def _facts(upload: Upload, published: Published) -> PushFacts:
    from nf4_pipeline import hub

    repo_id, number = upload.target.repo_id, published.pull_request
    return PushFacts(
        repo_id=repo_id,
        commit=published.commit,
        url=hub.commit_url(repo_id, published.commit),
        branch=published.branch,
        parent=published.parent,
        committed=published.parent is not None,
        created=published.created,
        private=published.private,
        pull_request=number,
        pull_request_url=hub.pull_request_url(repo_id, number) if number else None,
        verdict=upload.verdict,
        allow_unverified=upload.verdict != "pass",
        files=upload.files,
        total_bytes=upload.total_bytes,
        proof=published.proof,
    )


def _checked_files(
    build: Build,
    manifest: Manifest,
    reporter: Reporter,
    ignored: Set[str],
    sent: Mapping[str, FileDigest],
) -> dict[str, FileDigest]:
    """Every file of the export, each as it was verified, and as manifest and records have it.

    A file that the Hub alone has is what it was sent as, by its sha256.
    """
    verified = build.need(VERIFY).inputs_in("export")
    if not verified:
        raise ArtifactError(
            f"{build.root / 'records' / 'verify.json'} does not say which bytes were verified: an "
            "earlier version left it. Run `nf4 verify` again."
        )
    claims = [verified, manifest.files, recorded_files(build)]
    paths = entries(build.export)
    signature = paths.pop(SIGNATURE_FILE, None)
    names = sorted({*paths, *(name for claim in claims for name in claim)} - ignored)
    actual = {}
    with reporter.task("check export", sum(path.stat().st_size for path in paths.values())) as task:
        for name in [*names, *([SIGNATURE_FILE] if signature else [])]:
            path = build.export / name
            if path.is_symlink():
                raise _refused(path, "is a link, which holds no bytes of its own")
            if not path.is_file() and name not in sent:
                raise _refused(path, "is missing")
            actual[name] = sent[name] if name in sent else digest_file(path, task)
            said = [claim[name] for claim in claims if name in claim]
            # A signature signs what is checked here, and nothing signs it.
            if name != SIGNATURE_FILE and (not said or any(one != actual[name] for one in said)):
                raise _refused(path, "is not what was verified")
    return actual


def _refused(path: Path, what: str) -> ArtifactError:
    return ArtifactError(
        f"{path} {what}. Run `nf4 build` (or `nf4 serialize` and `nf4 verify`) again."
    )


def _earlier(build: Build, repo_id: str) -> Earlier | None:
    """What an earlier push from this build left in that repo."""
    from nf4_pipeline.hub import Earlier, commit_url

    record = build.record(PUSH)
    # The address tells apart repos of one name on two Hubs, too.
    if record is None or record.facts.url != commit_url(repo_id, record.facts.commit):
        return None
    files = {name: entry.found for name, entry in record.facts.proof.files.items() if entry.found}
    return Earlier(record.facts.branch, record.facts.commit, files)
