"""The checkpoint that a manifest pins: found again, with every file's hash checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nf4_pipeline.build_folder import Record
from nf4_pipeline.errors import SourceError, UsageError
from nf4_pipeline.manifest.manifest import Manifest, Source
from nf4_pipeline.progress import Reporter
from nf4_pipeline.records import DownloadFacts, Reading
from nf4_pipeline.stages.download import SAMPLE, SAMPLE_REPO, Download, DownloadRequest


@dataclass(frozen=True)
class PinnedSource:
    """The checkpoint that a manifest pins.

    Attributes:
        folder: that holds links to it.
        record: of its download.
    """

    folder: Path
    record: Record[DownloadFacts]


def open_source(
    manifest: Manifest, folder: Path | None, scratch: Path, reporter: Reporter
) -> PinnedSource:
    """Finds the source of an artifact and makes a build folder of links to it.

    Args:
        manifest: of the artifact.
        folder: where the user has the source; None to ask the Hub for the pinned commit.
        scratch: an empty folder for the build folder; it will hold links and a record.
        reporter: told how far it is.

    Raises:
        UsageError: the artifact was made from a local folder, and none was named.
        SourceError: what was found is not the source that the manifest pins.
        HubError: the Hub does not give the source.
    """
    source = manifest.source
    model, revision = _where(source, folder)
    said = manifest.recipe["quantize"]
    reading = Reading(tuple(said.get("allow_unused", ())), said.get("strip_prefix", ""))
    request = DownloadRequest(model, scratch, revision, scratch / "build", reading=reading)
    build, record, _ = Download(request, reporter).run()
    files = record.outputs_in("source")
    for name, expected in source.files.items():
        if name not in files:
            raise SourceError(
                f"{model} lacks {name}, which the artifact was made from. Name the folder, or the "
                f"commit, that the manifest pins: content {source.content_sha256[:12]}…"
            )
        if files[name] != expected:
            raise SourceError(
                f"{name} of {model} is not what the artifact was made from: expected "
                f"{expected.size:,} bytes with sha256 {expected.sha256}, found "
                f"{files[name].size:,} bytes with sha256 {files[name].sha256}."
            )
    extra = [n for n in files if n.endswith(".safetensors") and n not in source.files]
    if extra:
        raise SourceError(
            f"{model} holds weights that the artifact was not made from: {extra[0]}. "
            "Name a folder that holds the pinned source alone."
        )
    return PinnedSource(build.source, record)


def _where(source: Source, folder: Path | None) -> tuple[str, str | None]:
    """What `download` is asked for: a folder, the sample, or a Hub id with a commit."""
    if folder is not None:
        return str(folder), None
    if source.commit is not None:
        return source.repo, source.commit
    if source.repo == SAMPLE_REPO:
        return SAMPLE, None
    raise UsageError(
        f"The artifact was made from a local folder named {source.repo!r} (content "
        f"{source.content_sha256[:12]}…), which no Hub holds. Say where it is: --source DIR."
    )
