"""build.json: the source and the recipe that a build folder is for, written before any work.

The records say what is done; this says what it is to become, so that a build that was killed on the
way is not taken for one of another recipe.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.build_folder.variant import SHAPING_TABLES, Variant
from nf4_pipeline.checkpoint.atomic import write_json
from nf4_pipeline.checkpoint.plain_file import read_plain
from nf4_pipeline.documents import Document, optional
from nf4_pipeline.errors import RecipeError
from nf4_pipeline.recipe import parse_recipe

SPEC_FILE: Final = "build.json"
_VERSION: Final = 1
_LARGEST: Final = 2**22  # bytes


@dataclass(frozen=True, kw_only=True)
class SourcePin(Document):
    """Which checkpoint a build is of.

    Attributes:
        repo: Hub id, or the name of the local folder.
        commit: 40 hex digits for a Hub model, else None.
        sha256: one hash over its files, as they were found; None if it is not known yet.
        folder: where a local one was found.
    """

    repo: str
    commit: str | None
    sha256: str | None
    folder: str | None = optional()

    def is_same(self, other: SourcePin) -> bool:
        """Whether both are one checkpoint, wherever it lies, as far as is known."""
        hashes = {self.sha256, other.sha256} - {None}
        return (self.repo, self.commit) == (other.repo, other.commit) and len(hashes) < 2

    @property
    def slug(self) -> str:
        """The name of a folder of it, but for the tag of a recipe: `<org>--<name>@<12 digits>`."""
        return f"{self.repo.replace('/', '--')}@{(self.commit or self.sha256 or '')[:12]}"

    @property
    def shown(self) -> str:
        """For people."""
        pinned = self.commit or (self.sha256 and f"content {self.sha256[:12]}")
        return f"{self.repo} at {pinned}" if pinned else self.repo


@dataclass(frozen=True, kw_only=True)
class BuildSpec(Document):
    """What a build folder is for.

    Attributes:
        version: of this document.
        source: the checkpoint.
        recipe: the tables that shape the bytes, in full, by name; without those that nobody has
            decided yet.
        text_sha256: of the text to calibrate on, if there is one.
    """

    version: int = _VERSION
    source: SourcePin
    recipe: Mapping[str, dict[str, Any]]
    text_sha256: str | None = optional()

    @property
    def decided(self) -> tuple[str, ...]:
        """The tables that are decided, by name."""
        return tuple(name for name in SHAPING_TABLES if name in self.recipe)

    def variant(self) -> Variant:
        """What it makes of the source, with defaults for what is not decided."""
        try:
            recipe = parse_recipe(self.recipe, SPEC_FILE)
        except RecipeError:  # of another version, with keys that nobody knows here
            return Variant({name: dict(table) for name, table in self.recipe.items()})
        return Variant.of(recipe, self.text_sha256)


def read_spec(root: Path) -> BuildSpec | None:
    """That of a build folder, or None if there is none that can be read."""
    try:
        spec = BuildSpec.from_json(json.loads(read_plain(root / SPEC_FILE, _LARGEST)))
    except (OSError, ValueError, RecursionError):
        return None
    return spec if spec.version == _VERSION else None


def write_spec(root: Path, spec: BuildSpec) -> None:
    """Writes that of a build folder, complete or not at all."""
    write_json(root / SPEC_FILE, spec.to_json())
