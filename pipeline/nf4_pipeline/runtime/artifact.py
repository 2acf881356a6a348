"""What a name means where a model is wanted: an artifact, a build, a plain checkpoint, a Hub id."""

from __future__ import annotations

import shlex
from pathlib import Path

from nf4_pipeline.checkpoint.folder_advice import adapter_advice, without_config
from nf4_pipeline.checkpoint.model_name import check_hub_id, model_path
from nf4_pipeline.checkpoint.named_path import ARTIFACTS as ARTIFACTS
from nf4_pipeline.checkpoint.source import read_json
from nf4_pipeline.checkpoint.weight_files import choose_weight_files
from nf4_pipeline.errors import ArtifactError, SourceError, UsageError
from nf4_pipeline.model.check_folder import check_headers, check_small_files
from nf4_pipeline.model.config import read_config
from nf4_pipeline.progress import SILENT, Reporter


def find_model(name: str | Path | None) -> str:
    """The folder (or Hub id) that transformers can load for a name.

    Args:
        name: an artifact folder, a build folder (its export is meant), a plain checkpoint folder,
            "sample", a Hub id, or None for the export of the newest build under ./artifacts.

    Raises:
        UsageError: the name is a path that does not exist or cannot be one, or None although there
            is no build.
        ArtifactError: the name is a build folder that has no export yet.
    """
    if name is None:
        exports = [root / "export" for root in build_roots(ARTIFACTS) if is_model(root / "export")]
        if not exports:
            raise UsageError(
                f"No artifact was named, and {ARTIFACTS}/ holds no finished build. "
                "Name one, or make one: nf4 build sample."
            )
        return str(exports[0])
    path = model_path(name)
    if is_model(path):
        return str(path)
    if (path / "records").is_dir():
        export = path / "export"
        if is_model(export):
            return str(export)
        raise ArtifactError(
            f"{path} is a build without an export. Finish it: nf4 build MODEL --build-dir "
            f"{shlex.quote(str(path))}."
        )
    if str(name) == "sample":
        from nf4_pipeline.sample import MODEL_DIR

        return str(MODEL_DIR)
    if path.is_dir():
        advice = without_config(path) or f"{path} holds no model: there is no config.json in it."
        raise ArtifactError(advice)
    check_hub_id(str(name))
    return str(name)


def open_folder(
    name: str | Path | None,
    reporter: Reporter = SILENT,
    *,
    weights: bool = True,
    revision: str | None = None,
    offline: bool = False,
) -> Path:
    """The folder that a name means, fetched if it is on the Hub, and looked at.

    Args:
        name: as `find_model` takes it.
        reporter: told how far a download is.
        weights: look at the weights, too; without, a model on the Hub is fetched without them.
        revision: branch, tag or commit of a model on the Hub; None for its main branch.
        offline: take a model on the Hub as it is cached; HF_HUB_OFFLINE says so, too.

    Raises:
        UsageError: the name means nothing, or a revision was given for a local folder.
        ArtifactError: the name is a build folder that has no export yet.
        SourceError: the folder holds no weights that may be read, a file leads out of it, or is not
            what its name says, or the config is not that of the weights.
        HubError: the Hub does not give the model.
    """
    found = find_model(name)
    folder = Path(found)
    if not is_model(folder):
        folder = _fetch(found, reporter, weights=weights, revision=revision, offline=offline)
    elif revision is not None:
        raise UsageError(
            f"The revision {revision!r} means nothing for {folder}, a local folder. Leave it out."
        )
    check_small_files(folder)
    if weights:
        if (folder / "adapter_config.json").exists():  # transformers would load what it names
            raise SourceError(
                f"{adapter_advice(folder) or f'{folder} holds an adapter_config.json.'} If a whole "
                "model lies beside it, take adapter_config.json out of the folder."
            )
        check_headers(folder)
    return folder


def _fetch(
    repo: str, reporter: Reporter, *, weights: bool, revision: str | None, offline: bool
) -> Path:
    """A model of the Hub in the Hub's cache, pinned to a commit, every file's hash checked."""
    from nf4_pipeline import hub

    model = hub.resolve(repo, revision, offline=offline or None)
    folder = hub.fetch(model, hub.small_files(model), reporter, last=not weights).folder
    if not weights:
        return folder
    check_small_files(folder)
    hub.wanted_files(model)  # refuses what has no weights in safetensors
    chosen = choose_weight_files(
        {file.path for file in model.files if "/" not in file.path},
        read_config(folder),
        lambda name: read_json(folder / name),
        f"{repo}@{model.commit[:12]}",
    )
    if chosen is None:
        raise SourceError(
            f"{repo}@{model.commit[:12]} has no model.safetensors and no index of several files."
        )
    hub.fetch(model, hub.named(model, chosen.files), reporter)
    return folder


def build_roots(artifacts: Path) -> list[Path]:
    """All build folders under a folder, the one worked on last first."""
    if not artifacts.is_dir():
        return []
    roots = [path.parent for path in artifacts.glob("*/records") if path.is_dir()]
    return sorted(roots, key=lambda root: (root / "records").stat().st_mtime, reverse=True)


def is_model(path: Path) -> bool:
    """True for a folder with a config.json."""
    return (path / "config.json").is_file()


def is_quantized(folder: str) -> bool:
    """True if the config.json of a folder says that its weights are quantized."""
    path = Path(folder) / "config.json"
    return path.is_file() and bool(read_json(path).get("quantization_config"))
