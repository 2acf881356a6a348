"""Which weight files of a folder are the model: those that transformers would load, and no others.

transformers 5 (`modeling_utils._get_resolved_checkpoint_files`) takes the first that is there:

1. what config.json names under "transformers_weights": a file, or an index
2. model.safetensors, also where shards and an index lie beside it
3. model.safetensors.index.json: the files that its weight_map names, each whole

Of an index only the names of the files count. A tensor that two of them hold is that of the last,
and what its weight_map says of single tensors means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.checkpoint.named_path import problem_of
from nf4_pipeline.errors import CheckpointError

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
NAMED_IN_CONFIG: Final = "transformers_weights"

ReadJson = Callable[[str], Mapping[str, Any]]


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a model.

    Attributes:
        files: their names, in the order in which they are read.
        index: the file that names them, if one does.
        promised: the tensors that the index names, and the file that it gives for each.
    """

    files: tuple[str, ...]
    index: str | None = None
    promised: Mapping[str, str] = field(default_factory=dict)


def choose_weight_files(
    names: Collection[str], config: Mapping[str, Any], read_json: ReadJson, where: str
) -> WeightFiles | None:
    """The weight files that transformers would load, or None if there are none in safetensors.

    Args:
        names: of the files in the folder.
        config: its config.json; empty if there is none.
        read_json: reads a JSON object of the folder, by its name.
        where: the folder, for messages.

    Raises:
        CheckpointError: config.json or the index names something that is no file of the folder, or
            the index has no weight_map.
    """
    named = config.get(NAMED_IN_CONFIG)
    if named is not None:
        name = _plain_name(named, f'{where}/config.json names {{}} as "{NAMED_IN_CONFIG}"')
        if name not in names:
            raise CheckpointError(
                f'{where}/config.json names {name!r} as "{NAMED_IN_CONFIG}", and there is no such '
                "file beside it. Bring that file, or take the key out to load "
                f"{SINGLE_FILE} or what {INDEX_FILE} names."
            )
        if name.endswith(".index.json"):
            return _from_index(name, read_json(name), where)
        return WeightFiles((name,))
    if SINGLE_FILE in names:
        return WeightFiles((SINGLE_FILE,))
    if INDEX_FILE in names:
        return _from_index(INDEX_FILE, read_json(INDEX_FILE), where)
    return None


def passed_over(names: Collection[str], chosen: WeightFiles) -> tuple[str, ...]:
    """Weight files and indexes in the folder that are no part of the model, sorted.

    Args:
        names: of the files in the folder.
        chosen: the files of the model.
    """
    return tuple(
        sorted(
            name
            for name in names
            if name.startswith("model")
            and name.endswith((".safetensors", ".safetensors.index.json"))
            and name not in (*chosen.files, chosen.index)
        )
    )


def _from_index(index: str, value: Mapping[str, Any], where: str) -> WeightFiles:
    weight_map = value.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{Path(where) / index} has no weight_map. Download it again.")
    said = f"{Path(where) / index} names {{}} as a shard"
    files = {_plain_name(file, said, index=False) for file in weight_map.values()}
    return WeightFiles(tuple(sorted(files)), index, weight_map)


def _plain_name(name: object, said: str, *, index: bool = True) -> str:
    """A file of the folder itself: neither an index nor a config is to be trusted with paths."""
    endings = (".safetensors", ".safetensors.index.json") if index else (".safetensors",)
    if (
        not isinstance(name, str)
        or Path(name).name != name
        or not name.endswith(endings)
        or not name.isprintable()
        or problem_of(name) is not None
    ):
        raise CheckpointError(
            f"{said.format(repr(str(name)[:80]))}; "
            "expected the plain name of a .safetensors file beside it."
        )
    return name
