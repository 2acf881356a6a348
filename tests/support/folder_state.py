"""What stands in a build folder: its files, what is half-written, and records that are not true."""

from __future__ import annotations

from pathlib import Path

from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.digest import FileDigest, digest_file
from nf4_pipeline.records import KINDS

Content = dict[str, FileDigest]


def content(build: Build) -> Content:
    """The digest of every file in quantized/ and export/, half-written ones included."""
    return {
        path.relative_to(build.root).as_posix(): digest_file(path)
        for folder in (build.quantized, build.export)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def leftovers(build: Build) -> list[Path]:
    """Whatever is half-written."""
    return sorted(build.root.rglob(".*.partial"))


def false_records(build: Build) -> list[str]:
    """Records that stand over a file that is not what they say."""
    return [
        f"{path.stem}: {name}"
        for path in sorted((build.root / "records").glob("*.json"))
        if (record := build.record(KINDS[path.stem])) is not None
        for name, digest in record.outputs.items()
        if not (build.root / name).is_file() or digest_file(build.root / name) != digest
    ]
