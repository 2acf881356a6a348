"""Every file and every stored tensor of an artifact against its manifest. Nothing is loaded."""

from __future__ import annotations

from pathlib import Path

from nf4_pipeline.checkpoint.digest import FileDigest, digest_file, digest_tensors
from nf4_pipeline.checkpoint.header import read_header
from nf4_pipeline.errors import CheckpointError
from nf4_pipeline.fidelity.verdict import Check
from nf4_pipeline.manifest.manifest import Manifest, StoredTensorEntry
from nf4_pipeline.progress import SILENT, Reporter


def check_manifest(digest: FileDigest, recorded: FileDigest) -> Check:
    """The manifest itself, against what serialize recorded of it."""
    return Check(
        "manifest as serialize wrote it",
        digest == recorded,
        f"sha256 {digest.sha256[:12]}…",
        f"sha256 {recorded.sha256[:12]}…",
    )


def check_files(artifact: Path, manifest: Manifest, reporter: Reporter = SILENT) -> list[Check]:
    """Hashes all files and tensors of an artifact.

    Args:
        artifact: the export folder.
        manifest: read from it.
        reporter: told how far the hashing is.
    """
    problems: list[str] = []
    tensors: dict[str, StoredTensorEntry] = {}
    total = sum(digest.size for digest in manifest.files.values())
    with reporter.task("check files", total) as task:
        for name, expected in manifest.files.items():
            path = artifact / name
            if not path.is_file():
                problems.append(f"{name} is missing")
                continue
            if name.endswith(".safetensors"):
                try:
                    headers = read_header(path)
                except CheckpointError as error:
                    problems.append(str(error))
                    continue
                digest, by_name = digest_tensors(path, headers)
                task.advance(digest.size)
                for tensor in headers:
                    tensors[tensor.name] = StoredTensorEntry(
                        name=tensor.name,
                        file=name,
                        dtype=tensor.dtype,
                        shape=tensor.shape,
                        bytes=tensor.nbytes,
                        sha256=by_name[tensor.name],
                    )
            else:
                digest = digest_file(path, task)
            if digest != expected:
                problems.append(f"{name} has other bytes ({digest.size:,}, {digest.sha256[:12]}…)")
    problems += [
        f"{path.name} is not in the manifest"
        for path in artifact.glob("*.safetensors")
        if path.name not in manifest.files
    ]
    return [
        Check(
            "files as in the manifest",
            not problems,
            "; ".join(problems[:3]) if problems else f"{len(manifest.files)} files hash right",
            f"{len(manifest.files)} files, each with its sha256",
        ),
        _check_tensors(manifest, tensors),
    ]


def _check_tensors(manifest: Manifest, stored: dict[str, StoredTensorEntry]) -> Check:
    expected = {part.name: part for tensor in manifest.tensors for part in tensor.stored}
    missing = sorted(expected.keys() - stored.keys())
    extra = sorted(stored.keys() - expected.keys())
    differ = sorted(n for n in stored.keys() & expected.keys() if stored[n] != expected[n])
    problems = [
        f"{what}: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for what, names in (("missing", missing), ("extra", extra), ("different", differ))
        if names
    ]
    return Check(
        "tensors as in the manifest",
        not problems,
        "; ".join(problems) if problems else f"{len(stored)} tensors as listed",
        f"{len(expected)} tensors with their dtype, shape and sha256",
    )
