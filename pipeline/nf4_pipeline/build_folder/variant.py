"""What of a recipe shapes the bytes of an artifact, and the tag that says so in a folder's name.

    artifacts/<org>--<name>@<sha12>                      the default recipe
    artifacts/<org>--<name>@<sha12>-calibrated-3fa2      any other: what differs, and a short hash

What is read to verify an artifact (prompts, texts, thresholds) and the machine that makes it
(device, workers, memory) shape none of its weights, and are no part of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from nf4_pipeline.calibration.calibrator import text_path
from nf4_pipeline.checkpoint.digest import digest_file, json_sha256
from nf4_pipeline.recipe import Recipe, RecipeTable, RecipeValue

SHAPING_TABLES: Final = ("quantize", "serialize")
"""Of a recipe, those that shape the bytes."""

DEFAULT_TAG: Final = "default"
"""What stands for the tag of the default recipe, whose folder has none."""

_WORDS: Final = {
    "calibrate": "calibrated",
    "effort": "high",
    "rounding": "",  # follows from `calibrate`
    "calibration_tokens": "tokens",
    "extra_bytes": "extra",
    "skip_modules": "skip",
    "allow_unused": "unused",
    "strip_prefix": "strip",
    "max_shard_size": "shards",
}
"""What a tag says of a key of the recipe, in its order; of any other, the key itself."""

_DIGITS: Final = 4
_LONGEST_NAME: Final = 255  # bytes that a file system takes
_ROOM: Final = 24  # of them for what is made beside the folder
_NAME: Final = re.compile(r"(?P<base>.+@[0-9a-f]{12})(?:-(?P<tag>[a-z0-9-]+))?", re.DOTALL)


@dataclass(frozen=True)
class Variant:
    """One way to make an artifact of a source: the tables of its recipe that shape the bytes.

    Two builds of one source and one variant hold the same bytes (calibrated ones on the same kind
    of device).

    Attributes:
        tables: by name; a text to calibrate on stands there by its hash, and not by its place.
    """

    tables: Mapping[str, RecipeTable]

    @classmethod
    def of(cls, recipe: Recipe, text_sha256: str | None = None) -> Variant:
        """That of a recipe.

        Args:
            recipe: all of it.
            text_sha256: of the text to calibrate on, if it names one.
        """
        plain = recipe.as_json()
        tables = {name: dict(plain[name]) for name in SHAPING_TABLES}
        if recipe.quantize.calibrate not in ("", "self"):
            tables["quantize"]["calibrate"] = f"text {text_sha256 or 'unknown'}"
        return cls(tables)

    def differences(self, other: Variant) -> dict[str, tuple[RecipeValue, RecipeValue]]:
        """The keys in which two differ, as `table.key` -> the values here and there.

        A key that a table leaves out has its default.
        """
        default = Recipe()
        found = {}
        for name in SHAPING_TABLES:
            mine, theirs = self.tables.get(name, {}), other.tables.get(name, {})
            usual = default.table(name)
            for key in [*_WORDS, *sorted({*mine, *theirs} - {*_WORDS})]:
                one, two = (table.get(key, usual.get(key, "")) for table in (mine, theirs))
                if one != two:
                    found[f"{name}.{key}"] = one, two
        return found

    @property
    def tag(self) -> str:
        """What differs from the default recipe, and a short hash of it; empty for the default."""
        return self.long_tag(_DIGITS)

    def long_tag(self, digits: int) -> str:
        """The same with more digits of the hash, for one whose place is taken.

        Args:
            digits: of the hash.
        """
        own = {key: values[0] for key, values in self.differences(Variant.of(Recipe())).items()}
        if not own and digits == _DIGITS:
            return ""
        words = [_word(key.partition(".")[2], value) for key, value in own.items()]
        return "-".join([*filter(None, words or [DEFAULT_TAG]), json_sha256(own)[:digits]])


def _word(key: str, value: RecipeValue) -> str:
    word = _WORDS.get(key, re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-"))
    return f"{word}-text" if key == "calibrate" and value != "self" else word


def text_sha256(recipe: Recipe) -> str | None:
    """The hash of the text that a recipe calibrates on; None if it names none.

    Raises:
        RecipeError: the recipe names a file that does not exist, is no plain file, or is too large.
    """
    path = text_path(recipe.quantize)
    return None if path is None else digest_file(path).sha256


def folder_name(base: str, tag: str) -> str:
    """The name of a build folder.

    Args:
        base: `<org>--<name>@<sha12>`.
        tag: of its variant; of one that would make the name too long, the hash alone is taken.
    """
    if not tag:
        return base
    name = f"{base}-{tag}"
    if len(name.encode()) > _LONGEST_NAME - _ROOM:
        return f"{base}-{tag.rpartition('-')[2]}"
    return name


def choose_folder(base: str, variant: Variant, there: Mapping[str, Variant | None]) -> str:
    """The name of the folder in which a variant of a source is, or shall be.

    Args:
        base: `<org>--<name>@<sha12>`.
        variant: that is wanted.
        there: the build folders of that base, by name; None for one that has no recipe yet.
    """
    names = [folder_name(base, variant.long_tag(digits)) for digits in (_DIGITS, 8, 16, 64)]
    for name in [*names, *sorted(there)]:
        if there.get(name) == variant:
            return name
    # One of an earlier version may hold another recipe than its name says.
    return next(name for name in names if there.get(name) is None)


def split_name(name: str) -> tuple[str, str | None]:
    """The base and the tag of a folder's name.

    Args:
        name: of any folder.

    Returns:
        The base, and the tag: empty for the default, None if no build was given such a name.
    """
    match = _NAME.fullmatch(name)
    return (match["base"], match["tag"] or "") if match else (name, None)


def without_hash(tag: str) -> str:
    """The part of a tag that people read."""
    return re.sub(r"-?[0-9a-f]{4,64}$", "", tag)
