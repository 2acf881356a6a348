"""Every file and every stored tensor of an artifact against its manifest. Nothing is loaded."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nf4_pipeline.checkpoint.digest import (
    FileDigest,
    content_sha256,
    digest_file,
    digest_tensors,
)
from nf4_pipeline.checkpoint.files import entries
from nf4_pipeline.checkpoint.safetensors_header import read_header
from nf4_pipeline.errors import CheckpointError
from nf4_pipeline.fidelity.verdict import Check
from nf4_pipeline.manifest.manifest import Manifest, Source, StoredTensorEntry
from nf4_pipeline.progress import SILENT, Reporter, Task


def check_manifest(digest: FileDigest, recorded: FileDigest) -> Check:
    """The manifest itself, against what serialize recorded of it."""
    return Check(
        "manifest as serialize wrote it",
        digest == recorded,
        f"sha256 {digest.sha256[:12]}…",
        f"sha256 {recorded.sha256[:12]}…",
    )


def check_source(found: Source, expected: Source) -> Check:
    """What the manifest says of the source, against the source that this build has hashed.

    Args:
        found: in the manifest.
        expected: of the checkpoint that stands in the build.
    """
    pairs = (
        ("repo", found.repo, expected.repo),
        ("commit", found.commit, expected.commit),
        ("content_sha256", found.content_sha256, content_sha256(expected.files)),
    )
    problems = [f"{name} {said}, not {real}" for name, said, real in pairs if said != real]
    names = sorted(found.files.keys() | expected.files.keys())
    differ = [name for name in names if found.files.get(name) != expected.files.get(name)]
    problems += [f"other bytes of {name} than in source/" for name in differ[:3]]
    words = f"{expected.repo} at {expected.version[:12]}, {len(expected.files)} files"
    return Check("source as the manifest says", not problems, "; ".join(problems) or words, words)


def check_remade(made: int, differ: Sequence[str]) -> Check:
    """Files that only the Hub has, which were made again to be judged, against what it was sent.

    Args:
        made: how many there are.
        differ: paths of those that have other bytes.
    """
    return Check(
        "files that the Hub alone has, made again",
        not differ,
        f"other bytes of {', '.join(differ[:3])}" if differ else f"{made} files, the same sha256",
        f"{made} files with the sha256 that the Hub received",
    )


@dataclass(frozen=True)
class CheckedFiles:
    """What came of holding an artifact's files against its manifest.

    Attributes:
        checks: of files, and of tensors.
        digests: of everything that was found, by path; without a hash where it is no file.
    """

    checks: list[Check]
    digests: dict[str, FileDigest]


def _hash(artifact: Path, name: str, task: Task) -> tuple[FileDigest, list[StoredTensorEntry], str]:
    """A file's digest, its tensors, and why it has none though its name says so."""
    path = artifact / name
    if path.suffix != ".safetensors":
        return digest_file(path, task), [], ""
    try:
        headers = read_header(path)
    except CheckpointError as error:
        return digest_file(path, task), [], str(error)
    digest, by_name = digest_tensors(path, headers, task)
    return (
        digest,
        [
            StoredTensorEntry(
                name=tensor.name,
                file=name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                bytes=tensor.nbytes,
                sha256=by_name[tensor.name],
            )
            for tensor in headers
        ],
        "",
    )


def check_files(
    artifact: Path,
    manifest: Manifest,
    reporter: Reporter = SILENT,
    *,
    others: Collection[str] | None = None,
) -> CheckedFiles:
    """Hashes all files and tensors of an artifact.

    Args:
        artifact: the export folder.
        manifest: read from it.
        reporter: told how far the hashing is.
        others: the only files that may stand there besides those of the manifest, and then there
            may be no link; None to look for other weights alone, as beside a published artifact.
    """
    problems: list[str] = []
    tensors: dict[str, StoredTensorEntry] = {}
    digests: dict[str, FileDigest] = {}
    found = entries(artifact)
    total = sum(digest.size for digest in manifest.files.values())
    with reporter.task("check files", total) as task, ThreadPoolExecutor() as pool:
        linked = {n for n in manifest.files if others is not None and (artifact / n).is_symlink()}
        hashed = {
            name: pool.submit(_hash, artifact, name, task)
            for name in manifest.files
            if name not in linked and (artifact / name).is_file()
        }
        for name, expected in manifest.files.items():
            if name not in hashed:
                problems.append(f"{name} is {'a link' if name in linked else 'missing'}")
                continue
            digest, stored, problem = hashed[name].result()
            digests[name] = digest
            tensors |= {tensor.name: tensor for tensor in stored}
            if problem:
                problems.append(problem)
            elif digest != expected:
                problems.append(f"{name} has other bytes ({digest.size:,}, {digest.sha256[:12]}…)")
    for name in sorted(found.keys() - digests.keys()):
        path = found[name]
        plain = path.is_file() and not path.is_symlink()
        if others is not None:
            digests[name] = digest_file(path) if plain else FileDigest(0, "")
        if name in manifest.files:
            continue
        known = not name.endswith(".safetensors") if others is None else name in others and plain
        if not known:
            problems.append(f"{name} is not in the manifest" if plain else f"{name} is a link")
    return CheckedFiles(
        [
            Check(
                "files as in the manifest",
                not problems,
                "; ".join(problems[:3]) if problems else f"{len(manifest.files)} files hash right",
                f"{len(manifest.files)} files, each with its sha256",
            ),
            _check_tensors(manifest, tensors),
        ],
        digests,
    )


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
