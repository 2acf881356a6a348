"""Artifacts on a test Hub as people publish them, and as a forger changes them.

Nothing is measured: what verify would say of each is made up. Everything else is real.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.build_folder import Build, Record
from nf4_pipeline.checkpoint.atomic import json_bytes, write_json
from nf4_pipeline.checkpoint.digest import FileDigest, content_sha256, digest_file, digest_tensors
from nf4_pipeline.checkpoint.safetensors_header import read_header
from nf4_pipeline.job import run_stage
from nf4_pipeline.manifest.manifest import Manifest
from nf4_pipeline.progress import SILENT
from nf4_pipeline.provenance.bom import bill_of_materials
from nf4_pipeline.provenance.statement import statement
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.records import DOWNLOAD, VERIFY, source_card
from nf4_pipeline.report.model_card import model_card
from nf4_pipeline.stages.publication import Publication
from nf4_pipeline.stages.verify import Verify
from nf4_pipeline.verification.document import parse_verification

from tests.support import made
from tests.support.hub_store import Repo, Store
from tests.support.jobs import CPU, PASSED, download

GIT_FILE: Final = ".gitattributes"
ATTRIBUTES: Final = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
NOT_SUBJECTS: Final = ("provenance.json", "model.sig", GIT_FILE)

Files = dict[str, bytes]
Forgery = Callable[["Artifact"], None]


def snapshot_of(repo: Repo, cache: Path) -> Path:
    """The head of a repo as a Hub cache holds it, so that a build of it is one of that commit."""
    storage = cache / f"models--{repo.repo_id.replace('/', '--')}"
    snapshot = storage / "snapshots" / repo.head.sha
    (storage / "blobs").mkdir(parents=True, exist_ok=True)
    for path, blob in repo.head.files.items():
        (storage / "blobs" / blob.etag).write_bytes(blob.data)
        link = snapshot / path
        link.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (2 + path.count("/"))
        link.symlink_to(f"{up}blobs/{blob.etag}")
    return snapshot


def exported(model: str | Path, folder: Path, recipe: Recipe | None = None) -> Build:
    """A build as far as serialize."""
    build, *_ = download(model, folder)
    for stage in ("quantize", "serialize"):
        run_stage(build, stage, recipe or Recipe(), CPU, SILENT)
    return build


def attest(build: Build, repo_id: str, *, measured: bool = False) -> None:
    """What verify and attest would leave, with figures that nobody measured."""
    verification = PASSED
    if measured:
        value = made.sample()
        totals = json.loads((build.export / "manifest.json").read_text("utf-8"))["totals"]
        value["sizes"] |= {name: totals[name] for name in value["sizes"].keys() & totals.keys()}
        verification = parse_verification(value)
    write_json(build.export / "verification.json", verification.to_json())
    (build.export / "report.html").write_text("<p>Not the report.</p>\n", "utf-8")
    outputs = {
        f"export/{name}": digest_file(build.export / name)
        for name in ("verification.json", "report.html")
    }
    key = Verify(build, Recipe(), CPU).key()
    build.write_record(Record(VERIFY, key, outputs, verification, 1.0, 1))
    Publication(build, repo_id).write()


@dataclass
class Artifact:
    """An artifact's files, to be changed and published.

    Attributes:
        repo_id: where it is published.
        folder: a copy of its export.
        build: of which it is a copy; only read.
    """

    repo_id: str
    folder: Path
    build: Build
    extra: Files = field(default_factory=dict)

    @classmethod
    def of(cls, build: Build, repo_id: str, folder: Path) -> Artifact:
        """A copy of an export."""
        for path in build.export.rglob("*"):
            if path.is_file():
                target = folder / path.relative_to(build.export)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        return cls(repo_id, folder, build)

    def files(self) -> Files:
        """What is published."""
        paths = (path for path in self.folder.rglob("*") if path.is_file())
        here = {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in paths}
        return {GIT_FILE: ATTRIBUTES} | here | self.extra

    def publish(self, store: Store) -> Repo:
        """Puts it on a Hub."""
        return store.add(self.repo_id, self.files())

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text("utf-8"))

    def put_json(self, name: str, value: Any) -> None:
        """Writes JSON as this pipeline does."""
        (self.folder / name).write_bytes(json_bytes(value))

    def edit(self, name: str, change: Callable[[Any], object]) -> None:
        """Changes the JSON in a file."""
        value = self.json(name)
        change(value)
        self.put_json(name, value)

    def edit_manifest(self, change: Callable[[Any], object]) -> None:
        self.edit("manifest.json", change)

    def agree(self, *, documents: bool = True) -> None:
        """Makes manifest, provenance, bill and card say what the files hold, as a forger would."""
        manifest = self.json("manifest.json")
        names = [name for name in manifest["files"] if (self.folder / name).is_file()]
        manifest["files"] = {
            name: digest_file(self.folder / name).to_json() for name in sorted(names)
        }
        stored: dict[str, Any] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            headers = read_header(path)
            hashes = digest_tensors(path, headers)[1]
            stored |= {
                tensor.name: {
                    "name": tensor.name,
                    "file": path.name,
                    "dtype": tensor.dtype,
                    "shape": list(tensor.shape),
                    "bytes": tensor.nbytes,
                    "sha256": hashes[tensor.name],
                }
                for tensor in headers
            }
        for tensor in manifest["tensors"]:
            tensor["stored"] = [stored.get(part["name"], part) for part in tensor["stored"]]
        source = manifest["source"]
        source["content_sha256"] = content_sha256(
            {name: FileDigest(**digest) for name, digest in source["files"].items()}
        )
        self.put_json("manifest.json", manifest)
        if documents and (self.folder / "provenance.json").is_file():
            self.attest_again()

    def agree_files_only(self) -> None:
        """As `agree`, where a weight file is no longer one."""
        manifest = self.json("manifest.json")
        manifest["files"] = {
            name: digest_file(self.folder / name).to_json() for name in manifest["files"]
        }
        self.put_json("manifest.json", manifest)
        self.attest_again()

    def attest_again(self) -> None:
        """Card, bill and provenance of what the manifest says now."""
        manifest = Manifest.from_json(self.json("manifest.json"))
        card = source_card(self.build)
        tokenizer = self.build.need(DOWNLOAD).facts.tokenizer
        verification = parse_verification(self.json("verification.json"))
        text = model_card(
            manifest,
            verification,
            card,
            repo_id=self.repo_id,
            chat=tokenizer is not None and tokenizer.template == "works",
        )
        (self.folder / "README.md").write_text(text, "utf-8")
        digest = digest_file(self.folder / "manifest.json").sha256
        self.put_json("bom.cdx.json", bill_of_materials(manifest, digest, card))
        self.state_again()

    def state_again(self, change: Callable[[Any], object] = lambda value: None) -> None:
        """Provenance of the files as they are; `change` is made to it in the end."""
        manifest = Manifest.from_json(self.json("manifest.json"))
        details = self.json("provenance.json")["predicate"]["runDetails"]
        subjects = {
            name: FileDigest(len(content), hashlib.sha256(content).hexdigest())
            for name, content in self.files().items()
            if name not in NOT_SUBJECTS
        }
        value = statement(
            manifest,
            subjects,
            details["builder"]["version"],
            details["metadata"]["startedOn"],
            details["metadata"]["finishedOn"],
        )
        change(value)
        self.put_json("provenance.json", value)


def verdicts(value: Mapping[str, Any]) -> dict[str, str]:
    """Verdict of each artifact, from results.json."""
    return {result["artifact"]: result["verdict"] for result in value["results"]}
