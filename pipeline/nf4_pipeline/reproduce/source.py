"""The checkpoint that a manifest pins: found again, with every file's hash checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from nf4_pipeline.build_folder import Inputs
from nf4_pipeline.checkpoint.digest import content_sha256, digest_file
from nf4_pipeline.checkpoint.weight_files import INDEX_FILE
from nf4_pipeline.errors import ArtifactError, SourceError, UsageError
from nf4_pipeline.hub import cache
from nf4_pipeline.hub.local import LocalFile
from nf4_pipeline.manifest.manifest import Manifest, Source
from nf4_pipeline.manifest.read import MANIFEST_FILE
from nf4_pipeline.progress import Reporter
from nf4_pipeline.records import DOWNLOAD, DownloadFacts, Reading
from nf4_pipeline.reproduce.origin import Origin, check_origin
from nf4_pipeline.sample import MODEL_DIR, SAMPLE_REPO
from nf4_pipeline.stages.download import Download
from nf4_pipeline.stages.download_request import DownloadRequest


@dataclass(frozen=True)
class PinnedSource:
    """The checkpoint that a manifest pins.

    Attributes:
        folder: that holds links to it.
        facts: of its download.
        source: as it was found: every file hashed, and one hash over all of them. Repo and commit
            are the manifest's, as far as `origin` says.
        origin: who confirms repo and commit.
        inputs: the files as they were when they were hashed.
    """

    folder: Path
    facts: DownloadFacts
    source: Source
    origin: Origin
    inputs: Inputs


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
        ArtifactError: the manifest contradicts itself.
        SourceError: what was found is not the source that the manifest pins.
        HubError: the Hub does not give the source.
    """
    source = manifest.source
    content = content_sha256(source.files)  # of what is found, too, or it is refused below
    if content != source.content_sha256:
        raise ArtifactError(
            f"{MANIFEST_FILE} contradicts itself: it says that the source has the content hash "
            f"{source.content_sha256}, and the source's files that it lists have {content}. Take "
            "it from where the artifact was published."
        )
    model, revision = _where(source, folder)
    if folder is not None:  # said before anything is made of the folder
        for name in source.files:
            if not name.endswith((".safetensors", INDEX_FILE)) and not (folder / name).exists():
                raise _lacks(model, name, source)
    said = manifest.recipe["quantize"]
    reading = Reading(tuple(said.get("allow_unused", ())), said.get("strip_prefix", ""))
    request = DownloadRequest(
        model,
        scratch,
        revision,
        scratch / "build",
        allow_unhashed=bool(source.unchecked),  # the manifest has their hashes
        reading=reading,
        from_hub=folder is None and source.commit is not None,
    )
    build, record, _ = Download(request, reporter).run()
    if folder is None and record.facts.commit != source.commit:
        raise SourceError(
            f"{MANIFEST_FILE} says that the source is {source.repo} at {source.commit}; asked for "
            f"that, the Hub gave the commit {record.facts.commit}. Take the manifest from where "
            "the artifact was published."
        )
    files = record.outputs_in("source")
    for name, expected in source.files.items():
        if name not in files:
            raise _lacks(model, name, source)
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
    inputs = build.check_inputs(DOWNLOAD)
    hashed = {name: files[name] for name in source.files}
    listed = {name: (build.source / name).resolve() for name in hashed}
    if made_from := dict(record.facts.converted_from):  # a Hub knows what these were made from
        original = folder or cache.snapshot(source.repo, source.commit or "")
        listed = {name: original / name for name in made_from}
    found = replace(source, content_sha256=content_sha256(hashed), files=hashed)
    origin = check_origin(
        found,
        {
            name: LocalFile(listed[name], d.size, d.sha256)
            for name, d in (made_from or hashed).items()
        },
        folder,
        is_sample=record.facts.is_sample or (source.repo == SAMPLE_REPO and _is_sample(found)),
    )
    return PinnedSource(build.source, record.facts, found, origin, inputs)


def _is_sample(source: Source) -> bool:
    """Whether a source holds what the sample that comes with this package holds."""
    paths = {name: MODEL_DIR / name for name in source.files}
    if not all(path.is_file() for path in paths.values()):
        return False
    return {name: digest_file(path) for name, path in paths.items()} == source.files


def _lacks(model: str, name: str, source: Source) -> SourceError:
    if source.commit is not None:
        way = f"Leave --source out to fetch it: {source.repo} at commit {source.commit[:12]}"
    else:
        way = (
            f"Give --source with the folder of {source.repo} (content "
            f"{source.content_sha256[:12]}…)"
        )
    return SourceError(
        f"{model} lacks {name}, which the artifact was made from: it is another model, or not all "
        f"of it. {way}."
    )


def _where(source: Source, folder: Path | None) -> tuple[str, str | None]:
    """What `download` is asked for: a folder, that of the sample, or a Hub id with a commit."""
    if folder is not None:
        return str(folder), None
    if source.commit is not None:
        return source.repo, source.commit
    if source.repo == SAMPLE_REPO:
        return str(MODEL_DIR), None
    raise UsageError(
        f"The artifact was made from a local folder named {source.repo!r} (content "
        f"{source.content_sha256[:12]}…), which no Hub holds. Say where it is: --source DIR."
    )
