"""What to build: everything that shapes the bytes or the verdict, frozen, validated, hashed.

A recipe is a TOML file with up to three tables, named for the stage that reads them:

    [quantize]
    skip_modules = ["h.31.mlp"]      # left in 16 bit, besides the output head

    [serialize]
    max_shard_size = "1GB"

    [verify]
    max_mean_kl = 0.5

Each stage's key hashes only its own table, so a new threshold does not quantize again.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from nf4_pipeline.checkpoint.named_path import problem_of
from nf4_pipeline.checkpoint.plain_file import read_text
from nf4_pipeline.errors import RecipeError
from nf4_pipeline.near_names import did_you_mean

RecipeValue = str | int | float | list[str]
"""What a key of a recipe may hold, as TOML and JSON have it."""
RecipeTable = dict[str, RecipeValue]
"""One table of a recipe as plain values."""

_LARGEST: Final = 2**20  # bytes of a recipe file
_PATHS: Final = {"calibrate", "prompts", "eval_text"}  # of files, unless empty or "self"
_MOST: Final = 10**9
"""Of tokens, which no machine reads."""

_MOST_DOTS: Final = 100

_SHOWN: Final = 120
"""Characters of a value in a message."""

_LEAST_BARE: Final = 10**6
"""Below it, a size without a unit is taken for one whose unit was forgotten."""

_UNITS: Final = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


@dataclass(frozen=True)
class QuantizeRecipe:
    """How weights become codes.

    Attributes:
        skip_modules: modules that stay in 16 bit, besides the output head (see `selection.skips`).
        calibrate: what calibration reads: "self" for tokens that the model writes, or a file of
            text or JSONL; empty to round to nearest.
        calibration_tokens: how many, at most. KL still falls from 2,000 to 16,000.
        extra_bytes: how much larger the linear layers may become by leaving those that lose most
            in 16 bit, such as "5%", or "5" for the same; needs calibration.
        effort: "high" lets calibrated codes learn, end to end, from the 16-bit model; empty for
            calibration alone.
        rounding: how codes and scales are chosen; "nearest" is what bitsandbytes does, and
            "calibrated" follows from `calibrate`.
        allow_unused: tensors of the checkpoint that may be left out though nobody knows what they
            are (see `model.unused_tensors.matches`).
        strip_prefix: what stands before the names of all tensors and is no part of them.
    """

    skip_modules: tuple[str, ...] = ()
    calibrate: str = ""
    calibration_tokens: int = 16_384
    extra_bytes: str = ""
    effort: str = ""
    rounding: str = ""
    allow_unused: tuple[str, ...] = ()
    strip_prefix: str = ""

    def __post_init__(self) -> None:
        rounding = "calibrated" if self.calibrate else "nearest"
        _require(
            self.rounding in ("", rounding),
            "quantize.rounding",
            self.rounding,
            f'"{rounding}", since quantize.calibrate is {self.calibrate!r}',
        )
        object.__setattr__(self, "rounding", rounding)
        _require(
            256 <= self.calibration_tokens <= _MOST,
            "quantize.calibration_tokens",
            self.calibration_tokens,
            f"at least 256, at most {_MOST:,}",
        )
        _require_path("quantize.calibrate", self.calibrate)
        share = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(%?)\s*", self.extra_bytes)
        _require(
            not self.extra_bytes or (share is not None and float(share[1]) <= 100),
            "quantize.extra_bytes",
            self.extra_bytes,
            'a percentage of the 4-bit layers, such as "5%", at most 100%',
        )
        if share is not None and not share[2]:
            _require(
                float(share[1]) >= 1 or not float(share[1]),
                "quantize.extra_bytes",
                self.extra_bytes,
                f'a percentage such as "5%"; if you mean it, write "{share[1]}%"',
            )
            object.__setattr__(self, "extra_bytes", f"{share[1]}%")
        if self.extra_bytes and not self.calibrate:
            raise RecipeError(
                "quantize.extra_bytes needs quantize.calibrate, which measures what each layer "
                'loses. Add calibrate = "self", or leave it out.'
            )
        _require(
            self.effort in ("", "high"),
            "quantize.effort",
            self.effort,
            '"high", or nothing for calibration alone',
        )
        if self.effort and not self.calibrate:
            raise RecipeError(
                "quantize.effort needs quantize.calibrate, which chooses the codes that learning "
                'begins with. Add calibrate = "self", or leave it out.'
            )
        _require(
            all(part and part.isprintable() for part in self.skip_modules),
            "quantize.skip_modules",
            list(self.skip_modules),
            "names of modules, none of them empty or with control characters",
        )
        _require(
            all(pattern.strip("*.") and pattern.isprintable() for pattern in self.allow_unused),
            "quantize.allow_unused",
            list(self.allow_unused),
            "names of tensors, each with more in it than *, and no control characters",
        )
        _require(
            self.strip_prefix.isprintable() and self.strip_prefix[-1:] in ("", "."),
            "quantize.strip_prefix",
            self.strip_prefix,
            'a prefix with its dot, such as "_orig_mod."',
        )

    @property
    def extra_share(self) -> float:
        """Of the bytes of the 4-bit layers."""
        return float(self.extra_bytes.rstrip(" %") or 0) / 100

    def shaping(self) -> RecipeTable:
        """Plain JSON of what shapes the bytes; where a text lies is not part of it."""
        plain = _table(self)
        if not self.calibrate:
            for name in ("calibrate", "calibration_tokens", "extra_bytes"):
                del plain[name]
        elif self.calibrate != "self":
            plain["calibrate"] = "text"
        for name in ("effort", "allow_unused", "strip_prefix"):  # most recipes have none of them
            if not plain[name]:
                del plain[name]
        return plain


@dataclass(frozen=True)
class SerializeRecipe:
    """How the artifact is cut into files.

    Attributes:
        max_shard_size: of one weight file, such as "500MB"; without it they have 1 GB at most.
    """

    max_shard_size: str = "1GB"

    def __post_init__(self) -> None:
        _require(self.max_shard_bytes > 0, "serialize.max_shard_size", self.max_shard_size, "> 0")

    @property
    def max_shard_bytes(self) -> int:
        return parse_size(self.max_shard_size, "serialize.max_shard_size")


@dataclass(frozen=True)
class VerifyRecipe:
    """What the artifact is asked, and when the verdict is "fail".

    Attributes:
        prompts: a JSONL file of prompts; empty for those that come with the package.
        max_new_tokens: of each answer.
        eval_text: a text file on which both models are compared; empty for the text that comes with
            the package.
        eval_tokens: how many tokens of it, at most. 8,192 bring the interval of the mean KL to some
            10 % of it.
        max_mean_kl: nats per token. NF4 costs 0.02 to 0.1 on models of some billion weights and
            0.28 on one of 135 million; above 0.5 something is broken rather than coarse.
        min_sure_agreement: share of the tokens on which the 16-bit model's first choice is at least
            twice as likely as its second, for which 4 bits must make the same choice. A model of
            135 million weights keeps 0.73 of all tokens; of the sure ones a model that is still the
            same keeps nearly all.
        max_perplexity_ratio: perplexity in 4 bit over that in 16 bit. A model of 135 million
            weights loses 30 %, one of some billions 1 to 5 %.
        max_accuracy_drop: share of the prompts with an expected answer that the 16-bit model gets
            right and that 4 bits may lose. NF4 loses 1 to 3 %; 10 % of 50 prompts is beyond chance.
    """

    prompts: str = ""
    max_new_tokens: int = 48
    eval_text: str = ""
    eval_tokens: int = 8192
    max_mean_kl: float = 0.5
    min_sure_agreement: float = 0.8
    max_perplexity_ratio: float = 1.5
    max_accuracy_drop: float = 0.1

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 0), ("eval_tokens", 1)):
            count = getattr(self, name)
            most = f"> {least}" if count <= least else f"at most {_MOST:,}"
            _require(least < count <= _MOST, f"verify.{name}", count, most)
        for name in ("prompts", "eval_text"):
            _require_path(f"verify.{name}", getattr(self, name))
        _require(self.max_mean_kl > 0, "verify.max_mean_kl", self.max_mean_kl, "> 0")
        _require(
            self.max_perplexity_ratio >= 1,
            "verify.max_perplexity_ratio",
            self.max_perplexity_ratio,
            "at least 1",
        )
        for name in ("min_sure_agreement", "max_accuracy_drop"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"verify.{name}", value, "from 0 to 1")


@dataclass(frozen=True)
class Recipe:
    """The whole recipe, one part per stage."""

    quantize: QuantizeRecipe = field(default_factory=QuantizeRecipe)
    serialize: SerializeRecipe = field(default_factory=SerializeRecipe)
    verify: VerifyRecipe = field(default_factory=VerifyRecipe)

    def as_json(self) -> dict[str, RecipeTable]:
        """Plain JSON values, in the order of the fields."""
        return {
            "quantize": self.quantize.shaping(),
            "serialize": _table(self.serialize),
            "verify": _table(self.verify),
        }

    def table(self, name: str) -> RecipeTable:
        """One table as plain values, all of it, as `parse_recipe` reads it from anywhere."""
        table = _table(getattr(self, name))
        for key in _PATHS & set(table):
            if table[key] not in ("", "self"):
                table[key] = str(Path(str(table[key])).absolute())
        return table


TABLES: Final = tuple(part.name for part in fields(Recipe))
"""Of a recipe, in the order of the stages that they are named for."""


T = TypeVar("T", QuantizeRecipe, SerializeRecipe, VerifyRecipe)


@dataclass(frozen=True)
class PartialRecipe:
    """A recipe of which only some tables were said; for an existing build, the others are known.

    So that `nf4 serialize` and `nf4 status` need not be told again what `nf4 build` was told.

    Attributes:
        recipe: with defaults for what was not said.
        given: the tables that were said.
    """

    recipe: Recipe
    given: frozenset[str]

    def completed(self, recorded: Mapping[str, RecipeTable], before: str | None = None) -> Recipe:
        """The recipe with those tables that a build was made with, where no other was given.

        Args:
            recorded: tables as plain values, by the name of their stage; without those of stages
                that are not done.
            before: the stage that comes next. For `verify`, its own table stays as it is: what it
                does not say was not wanted this time. The others shape the build's bytes, and stay
                what they are there.
        """
        recipe = self.recipe
        for name in TABLES:
            if name == before == "verify":
                break
            if name in self.given or not recorded.get(name):
                continue
            try:
                table = parse_recipe({name: recorded[name]}, f"the record of {name}")
            except RecipeError:  # of another version; the key will say that the stage is stale
                continue
            recipe = replace(recipe, **{name: getattr(table, name)})
        return recipe


def _table(part: QuantizeRecipe | SerializeRecipe | VerifyRecipe) -> RecipeTable:
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(part).items()
    }


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe file.

    Raises:
        RecipeError: there is no such file, it is no plain file or too large, it is not TOML, or it
            holds an unknown key, a wrong type or a value out of range.
    """
    return parse_recipe(read_tables(path), str(path))


def read_tables(path: Path) -> dict[str, object]:
    """The tables of a recipe file; what stands in them is not looked at.

    Raises:
        RecipeError: there is no such file, it is no plain file or too large, or it is not TOML.
    """
    try:
        text = read_text(path, _LARGEST)
        # What tomllib takes for a name grows with the square of its dots.
        if any(run.count(".") > _MOST_DOTS for run in re.findall(r"[^\n=,{}\[\]#]+", text)):
            raise RecipeError(f"The recipe {path} has a name of more than {_MOST_DOTS} parts.")
        return tomllib.loads(text)
    except OSError as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    except RecursionError:
        raise RecipeError(f"The recipe {path} is nested too deep.") from None
    except ValueError as error:  # no TOML, no UTF-8, or a number of more than 4,300 digits
        is_json = path.suffix.lower() == ".json"
        what = (
            "is JSON, and a recipe is TOML" if is_json else f"is not valid TOML: {str(error)[:300]}"
        )
        raise RecipeError(
            f"The recipe {path} {what}. Write {'another file with ' if is_json else ''}tables such "
            'as [quantize], and under it lines such as skip_modules = ["h.31.mlp"].'
        ) from error


def parse_recipe(tables: Mapping[str, object], where: str) -> Recipe:
    """Turns plain values (of TOML, or of a manifest) into a recipe.

    Raises:
        RecipeError: a key is unknown, or a value has a wrong type or is out of range.
    """
    _reject_unknown(tables, TABLES, where, "as a table")
    return Recipe(
        _parse_table(QuantizeRecipe, "quantize", tables, where),
        _parse_table(SerializeRecipe, "serialize", tables, where),
        _parse_table(VerifyRecipe, "verify", tables, where),
    )


def _parse_table(kind: type[T], name: str, tables: Mapping[str, object], where: str) -> T:
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise RecipeError(f"{where}: {name} is {_shown(table)}; expected a table [{name}].")
    defaults = {item.name: getattr(kind(), item.name) for item in fields(kind)}
    _reject_unknown(table, defaults, where, f"in [{name}]")
    values = {
        key: _typed(value, defaults[key], f"{where}: {name}.{key}") for key, value in table.items()
    }
    try:
        return kind(**values)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def _reject_unknown(keys: Iterable[str], known: Iterable[str], where: str, place: str) -> None:
    unknown = sorted(set(keys) - set(known))
    if unknown:
        near = did_you_mean(str(unknown[0]), known)
        expected = near or f" Expected {', '.join(known)}."
        raise RecipeError(f"{where}: {_shown(unknown[0])} {place} is unknown.{expected}")


def _typed(value: object, default: object, where: str) -> Any:
    if isinstance(default, tuple):
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise RecipeError(f"{where} is {_shown(value)}; expected a list of strings.")
    if isinstance(default, float) and isinstance(value, int | float) and type(value) is not bool:
        if not -sys.float_info.max <= value <= sys.float_info.max:  # nor a NaN
            raise RecipeError(f"{where} is {_shown(value)}; expected a finite number.")
        return float(value)
    if type(value) is not type(default):
        raise RecipeError(f"{where} is {_shown(value)}; expected a {type(default).__name__}.")
    return value


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise RecipeError(f"{name} is {_shown(value)}; expected {expected}.")


def _require_path(name: str, value: str) -> None:
    problem = problem_of(value)
    _require(problem is None, name, value, f"the path of a file, and {problem}")


def _shown(value: object) -> str:
    """A value for a message, cut if it is long."""
    try:
        text = repr(value)
    except ValueError:  # a number of more digits than Python writes
        return "a number beyond all"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def parse_size(text: str, name: str) -> int:
    """Bytes from a text such as "5GB", "256MiB" or "1000".

    Raises:
        RecipeError: the text is no size; the message names `name`.
    """
    match = re.fullmatch(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([kKmMgG]?[iI]?[bB]?)\s*", text)
    unit = match[2].upper() if match else ""
    if match is None or unit not in _UNITS:
        raise RecipeError(f'{name} is {_shown(text)}; expected a size such as "5GB" or "500MiB".')
    size = int(float(match[1]) * _UNITS[unit])
    if 0 < size < _LEAST_BARE and not match[2]:
        raise RecipeError(
            f"{name} is {_shown(text)}, and without a unit that is {size} bytes; expected a size "
            f'such as "{match[1]}GB" or "{match[1]}MB".'
        )
    if size >= 2**63:
        raise RecipeError(f"{name} is {_shown(text)}; no machine has so much.")
    return size
