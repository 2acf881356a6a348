"""The command that goes on with a build, or makes one like it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Final

from nf4_pipeline.build_folder.remote import shown_place
from nf4_pipeline.build_folder.variant import Variant
from nf4_pipeline.builds.listing import Listed, look_at, recipe_shown
from nf4_pipeline.checkpoint.source import read_json
from nf4_pipeline.checkpoint.weight_files import INDEX_FILE
from nf4_pipeline.errors import CheckpointError
from nf4_pipeline.recipe import Recipe

_OPTIONS: Final = {
    "quantize.calibrate": "--calibrate",
    "quantize.extra_bytes": "--extra-bytes",
    "quantize.effort": "--effort",
    "serialize.max_shard_size": "--max-shard-size",
}
"""What of a recipe is also an option of `nf4 build`."""

_WHAT_FOR: Final = {
    "verify": "there is nothing to verify yet",
    "attest": "there is nothing to attest yet",
    "push": "only a verified build can be published",
}


def how_to_build(build: Listed) -> str:
    """The command that makes another build of the model of a build, as far as that is known."""
    return shlex.join(["nf4", "build", *_model(build)])


def how_to_finish(build: Listed) -> str:
    """The command that finishes a build, as far as is known of which model it is."""
    words = ["nf4", "build", *_model(build), "--build-dir", shown_place(build.root)]
    own = build.variant.differences(Variant.of(Recipe())) if build.variant and build.spec else {}
    others = set(own) - {*_OPTIONS, "quantize.rounding"}
    if others and build.variant is not None:
        return (
            f"{shlex.join(words)}, with the recipe that it was begun with "
            f"({recipe_shown(build.variant)})"
        )
    for key, option in _OPTIONS.items():
        if key in own and build.spec is not None:
            table, _, name = key.partition(".")
            words += [option, str(build.spec.recipe[table][name])]
    return shlex.join(words)


def not_finished(root: Path, stage: str, command: str) -> str:
    """The message for a build that lacks a stage which a command needs.

    Args:
        root: the build folder.
        stage: that it lacks.
        command: of `nf4`.
    """
    why = _WHAT_FOR.get(command, f"its {stage} stage is not done")
    return f"{shown_place(root)} is not finished: {why}. Finish it: {how_to_finish(look_at(root))}"


def _model(build: Listed) -> list[str]:
    if build.is_sample:
        return ["sample"]
    if build.spec is not None and build.spec.source.commit is not None:
        how = ["--stream-source"] if build.is_streamed else []
        return [build.spec.source.repo, "--revision", build.spec.source.commit, *how]
    if build.source is not None and build.source.is_dir():
        return [str(build.source)]
    return ["MODEL"]


def missing_weights(export: Path) -> list[str]:
    """Weight files that the index of an export names and that are not there."""
    try:
        named = read_json(export / INDEX_FILE)["weight_map"].values()
        return sorted({str(name) for name in named if not (export / str(name)).exists()})
    except (OSError, CheckpointError, LookupError, AttributeError, ValueError):
        return []  # there is none, or whoever reads the weights says what is wrong with it
