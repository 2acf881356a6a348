"""Every file and every stored tensor of an artifact against its manifest, without loading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.checkpoint.digest import digest_file, digest_tensors
from pipeline.checkpoint.header import read_header
from pipeline.errors import CheckpointError
from pipeline.fidelity.verdict import Check
from pipeline.progress import SILENT, Reporter


def file_gates(
    artifact: Path, manifest: dict[str, Any], reporter: Reporter = SILENT
) -> list[Check]:
    """Hashes all files and tensors of an artifact.

    Args:
        artifact: the export folder.
        manifest: read from it.
        reporter: told how far the hashing is.
    """
    wrong: list[str] = []
    tensors_found: dict[str, dict[str, Any]] = {}
    total = sum(entry["size"] for entry in manifest["files"].values())
    with reporter.task("check files", total) as task:
        for name, expected in manifest["files"].items():
            path = artifact / name
            if not path.is_file():
                wrong.append(f"{name} is missing")
                continue
            if name.endswith(".safetensors"):
                try:
                    headers = read_header(path)
                except CheckpointError as error:
                    wrong.append(str(error))
                    continue
                digest, by_name = digest_tensors(path, headers)
                task.advance(digest.size)
                for tensor in headers:
                    tensors_found[tensor.name] = {
                        "file": name,
                        "dtype": tensor.dtype,
                        "shape": list(tensor.shape),
                        "bytes": tensor.nbytes,
                        "sha256": by_name[tensor.name],
                    }
            else:
                digest = digest_file(path, task)
            if digest.as_json() != expected:
                wrong.append(f"{name} has other bytes ({digest.size:,}, {digest.sha256[:12]}…)")
    stray = [
        path.name for path in artifact.glob("*.safetensors") if path.name not in manifest["files"]
    ]
    wrong += [f"{name} is not in the manifest" for name in stray]
    return [
        Check(
            "files as in the manifest",
            not wrong,
            "; ".join(wrong[:3]) if wrong else f"{len(manifest['files'])} files hash right",
            f"{len(manifest['files'])} files, each with its sha256",
        ),
        _tensor_gate(manifest, tensors_found),
    ]


def _tensor_gate(manifest: dict[str, Any], found: dict[str, dict[str, Any]]) -> Check:
    expected = {
        part["name"]: {key: value for key, value in part.items() if key != "name"}
        for tensor in manifest["tensors"]
        for part in tensor["stored"]
    }
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    differ = sorted(n for n in set(found) & set(expected) if found[n] != expected[n])
    problems = [
        f"{what}: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for what, names in (("missing", missing), ("extra", extra), ("different", differ))
        if names
    ]
    return Check(
        "tensors as in the manifest",
        not problems,
        "; ".join(problems) if problems else f"{len(found)} tensors as listed",
        f"{len(expected)} tensors with their dtype, shape and sha256",
    )


def reload_gate(manifest: dict[str, Any], linear4bit: list[str]) -> Check:
    """The modules that came back as `Linear4bit`, against the manifest.

    Args:
        manifest: of the artifact.
        linear4bit: names of the modules that a fresh process counted.
    """
    expected = {tensor["module"] for tensor in manifest["tensors"] if tensor["quantized"]}
    missing = sorted(expected - set(linear4bit))
    extra = sorted(set(linear4bit) - expected)
    problems = [f"{name} is not Linear4bit" for name in missing[:3]]
    problems += [f"{name} is Linear4bit and should not be" for name in extra[:3]]
    return Check(
        "Linear4bit modules after reloading",
        not missing and not extra,
        "; ".join(problems) if problems else f"{len(linear4bit)} modules",
        f"{len(expected)} modules",
    )
