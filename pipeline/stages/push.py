"""export/ -> the Hub. So far this stage says exactly what would be uploaded; it uploads nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.build import Build
from pipeline.checkpoint.digest import FileDigest, digest_file
from pipeline.errors import ArtifactError, VerificationError
from pipeline.manifest.read import MANIFEST_FILE, read_manifest
from pipeline.provenance.signing import SIGNATURE_FILE
from pipeline.stages.verify import CARD_FILE, VERIFICATION_FILE


@dataclass(frozen=True)
class Upload:
    """What a push would put on the Hub.

    Attributes:
        repo_id: ORG/NAME.
        private: visibility of the repo if it has to be made.
        files: name -> digest, as they are on disk now.
    """

    repo_id: str
    private: bool
    files: dict[str, FileDigest]

    def as_json(self) -> dict[str, Any]:
        return {
            "repo_id": self.repo_id,
            "private": self.private,
            "total_bytes": sum(digest.size for digest in self.files.values()),
            "files": {name: digest.as_json() for name, digest in self.files.items()},
        }


def plan_upload(build: Build, repo_id: str, *, private: bool) -> Upload:
    """Lists what would be uploaded, after checking that it is what was verified.

    Raises:
        BuildError: verify is not done.
        VerificationError: the verdict is not "pass".
        ArtifactError: a file changed, or came, since it was verified.
    """
    record = build.need("verify")
    if record.facts["verdict"] != "pass":
        raise VerificationError(
            f'{build.export} has the verdict "{record.facts["verdict"]}"; only an artifact that '
            "passed is published. See verification.json in it for the checks that failed."
        )
    expected: dict[str, Any] = dict(read_manifest(build.export)["files"])
    expected[MANIFEST_FILE] = build.need("serialize").outputs[f"export/{MANIFEST_FILE}"].as_json()
    for name in (VERIFICATION_FILE, CARD_FILE):
        expected[name] = record.outputs[f"export/{name}"].as_json()
    attested = build.record("attest")
    for path, digest in attested.outputs.items() if attested else ():
        expected[path.removeprefix("export/")] = digest.as_json()
    found = {
        path.relative_to(build.export).as_posix(): digest_file(path)
        for path in sorted(build.export.rglob("*"))
        if path.is_file()
    }
    if SIGNATURE_FILE in found:
        expected[SIGNATURE_FILE] = found[SIGNATURE_FILE].as_json()
    for name in sorted(set(expected) | set(found)):
        if name not in found or name not in expected or found[name].as_json() != expected[name]:
            what = "is missing" if name not in found else "is not what was verified"
            raise ArtifactError(f"{build.export / name} {what}. Run `nf4 verify` again.")
    return Upload(repo_id, private, found)
