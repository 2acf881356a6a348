"""The checkpoint that a manifest pins: found again, with every file's hash checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nf4_pipeline.build_folder import Build
from nf4_pipeline.errors import SourceError, UsageError
from nf4_pipeline.progress import Reporter
from nf4_pipeline.stages import download

_SAMPLE_REPO = "nf4-pipeline/sample"


def open_source(
    manifest: dict[str, Any], folder: Path | None, scratch: Path, reporter: Reporter
) -> Build:
    """Finds the source of an artifact and makes a build folder of links to it.

    Args:
        manifest: of the artifact.
        folder: where the user has the source; None to ask the Hub for the pinned commit.
        scratch: an empty folder for the build folder; it will hold links and a record.
        reporter: told how far it is.

    Raises:
        UsageError: the artifact was made from a local folder, and none was named.
        SourceError: it is not the source that the manifest pins.
        HubError: the Hub does not give it.
    """
    source = manifest["source"]
    model, revision = _where(source, folder)
    recipe = manifest["recipe"]["quantize"]
    build, record, _ = download.run(
        model,
        scratch,
        reporter,
        revision=revision,
        build_dir=scratch / "build",
        allow_unused=recipe.get("allow_unused", ()),
        strip_prefix=recipe.get("strip_prefix", ""),
    )
    found = download.recorded_files(record)
    for name, expected in source["files"].items():
        if name not in found:
            raise SourceError(
                f"{model} lacks {name}, which the artifact was made from. Name the folder, or the "
                f"commit, that the manifest pins: content {source['content_sha256'][:12]}…"
            )
        if found[name].as_json() != expected:
            raise SourceError(
                f"{name} of {model} is not what the artifact was made from: expected "
                f"{expected['size']:,} bytes with sha256 {expected['sha256']}, found "
                f"{found[name].size:,} bytes with sha256 {found[name].sha256}."
            )
    extra = [n for n in found if n.endswith(".safetensors") and n not in source["files"]]
    if extra:
        raise SourceError(
            f"{model} holds weights that the artifact was not made from: {extra[0]}. "
            "Name a folder that holds the pinned source alone."
        )
    return build


def _where(source: dict[str, Any], folder: Path | None) -> tuple[str, str | None]:
    """What `download` is asked for: a folder, the sample, or a Hub id with a commit."""
    if folder is not None:
        return str(folder), None
    if source["commit"] is not None:
        return source["repo"], source["commit"]
    if source["repo"] == _SAMPLE_REPO:
        return download.SAMPLE, None
    raise UsageError(
        f"The artifact was made from a local folder named {source['repo']!r} (content "
        f"{source['content_sha256'][:12]}…), which no Hub holds. Say where it is: --source DIR."
    )
