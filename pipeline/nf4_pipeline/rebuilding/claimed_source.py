"""The source that a manifest names, as the Hub lists it: what contradicts it needs no download."""

from __future__ import annotations

from nf4_pipeline import hub
from nf4_pipeline.checkpoint.files import PICKLE_FILE
from nf4_pipeline.checkpoint.model_name import is_hub_id
from nf4_pipeline.errors import ArtifactError, HubError, NotFoundError, UsageError
from nf4_pipeline.manifest.manifest import Manifest, Source
from nf4_pipeline.manifest.read import MANIFEST_FILE
from nf4_pipeline.progress import Reporter
from nf4_pipeline.sample import SAMPLE_REPO


class NotCheckable(Exception):
    """Nobody can tell here; the text says why."""


def check_source(manifest: Manifest, reporter: Reporter) -> int:
    """Holds what a manifest says of its source against what the Hub lists.

    Args:
        manifest: of the artifact.
        reporter: told what is waited for.

    Returns:
        How many bytes fetching the source takes, at most.

    Raises:
        NotCheckable: the source is a folder of somebody's, gone or hidden, or cannot be derived
            from without its maker's help; or the Hub does not answer.
        ArtifactError: the Hub contradicts the manifest.
    """
    source = manifest.source
    if source.commit is None:
        if source.repo == SAMPLE_REPO:
            return 0
        if "/" in source.repo:
            raise ArtifactError(
                f"{MANIFEST_FILE} names the repo {source.repo!r} and no commit of it, as no "
                "artifact does that was made from the Hub."
            )
        raise NotCheckable(
            f"it was made from a folder named {source.repo!r}, which no Hub holds; who has the "
            "folder can run nf4 reproduce --source"
        )
    if not is_hub_id(source.repo):
        raise ArtifactError(
            f"{MANIFEST_FILE} names a commit of {source.repo!r}, which can be no repo of a Hub."
        )
    with reporter.task("ask the Hub", None):
        model = _resolve(source)
    if model.commit != source.commit:
        raise ArtifactError(
            f"{MANIFEST_FILE} names the commit {source.commit} of {source.repo}; asked for that, "
            f"the Hub gave {model.commit}."
        )
    is_converted = _is_converted(model)
    if is_converted:
        raise NotCheckable(
            f"{source.repo} holds pickles, which were converted for this artifact; nf4 reproduce "
            "--source with a converted copy can tell"
        )
    is_renamed = bool(manifest.recipe["quantize"].get("strip_prefix"))
    _compare(source, model, weights=not is_renamed)
    try:
        return sum(file.size for file in hub.wanted_files(model)) * (2 if is_renamed else 1)
    except HubError as error:
        raise ArtifactError(
            f"The source that {MANIFEST_FILE} names is no model: {error}"
        ) from error


def _resolve(source: Source) -> hub.RemoteModel:
    try:
        return hub.resolve(source.repo, source.commit)
    except UsageError as error:
        raise ArtifactError(f"{MANIFEST_FILE} names no source of a Hub: {error}") from error
    except NotFoundError as error:
        _refuse_unknown_commit(source)
        if source.repo == SAMPLE_REPO:
            raise ArtifactError(
                f"{MANIFEST_FILE} names the commit {source.commit} of the sample that comes with "
                "nf4-pipeline, which has none."
            ) from error
        raise NotCheckable(f"its source is gone, or hidden from who asks: {error}") from error
    except HubError as error:
        raise NotCheckable(f"the Hub does not say what its source holds: {error}") from error


def _refuse_unknown_commit(source: Source) -> None:
    """A repo that is there and does not have the commit contradicts the manifest."""
    try:
        hub.resolve(source.repo)
    except HubError:
        return
    raise ArtifactError(
        f"{MANIFEST_FILE} names the commit {source.commit} of {source.repo}, and that repo has no "
        "such commit."
    )


def _is_converted(model: hub.RemoteModel) -> bool:
    names = [file.path for file in model.files]
    is_pickled = any(PICKLE_FILE.fullmatch(name) for name in names)
    return is_pickled and not any(name.endswith(".safetensors") for name in names)


def _compare(source: Source, model: hub.RemoteModel, *, weights: bool) -> None:
    listed = {file.path: file for file in model.files}
    hashed = [n for n in source.unchecked or () if n in listed and listed[n].is_hashed]
    if hashed:
        raise ArtifactError(
            f"{MANIFEST_FILE} says that the Hub lists no hash of {hashed[0]}, and it does."
        )
    for name, digest in source.files.items():
        if not weights and name.endswith((".safetensors", ".safetensors.index.json")):
            continue
        file = listed.get(name)
        if file is None:
            raise ArtifactError(
                f"{MANIFEST_FILE} says that {name} was taken from {source.repo} at "
                f"{source.commit}, and there is no such file."
            )
        if file.size != digest.size or file.sha256 not in (None, digest.sha256):
            raise ArtifactError(
                f"{MANIFEST_FILE} lists another {name} than {source.repo} has at "
                f"{source.commit}: expected {file.size:,} bytes"
                + (f" with sha256 {file.sha256}" if file.sha256 else "")
                + f", found {digest.size:,} with {digest.sha256}."
            )
