"""What stands where a model is wanted and is no folder: a Hub id, or what people take for one.

Addresses copied from a browser, single files, archives, names with a letter too many: each gets the
command that was meant.
"""

from __future__ import annotations

import re
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from nf4_pipeline.checkpoint.named_path import named_path
from nf4_pipeline.errors import UsageError
from nf4_pipeline.near_names import did_you_mean

SAMPLE: Final = "sample"
WANTED: Final = 'a Hub id of the form ORG/NAME, a local folder, or "sample"'

_HUB_ADDRESS: Final = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)(?P<path>[^?#]*)([?#].*)?",
    re.I | re.S,
)
_ADDRESS: Final = re.compile(r"[a-z][a-z0-9+.-]*://|git@|www\.", re.I)
_NOT_MODELS: Final = {"datasets": "a data set", "spaces": "a Space", "collections": "a collection"}
_AT_REVISION: Final = re.compile(r"(?P<model>[^@/]+(/[^@/]+)?)@(?P<revision>[^@]+)")
_BUILD: Final = re.compile(r"[^@/]+@[0-9a-f]{12}(-[a-z0-9-]+)?")
"""The name of a build folder."""

_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_ARCHIVES: Final = (".zip", ".tar", ".gz", ".tgz", ".zst", ".xz", ".7z", ".bz2")
_OWNERS: Final = {
    "falcon": "tiiuae",
    "falcon3": "tiiuae",
    "gemma": "google",
    "llama": "meta-llama",
    "mistral": "mistralai",
    "phi": "microsoft",
    "qwen2.5": "Qwen",
    "qwen3": "Qwen",
    "smollm2": "HuggingFaceTB",
}
"""Who owns the models of a family, by how their names begin, for those who leave it out."""

_MOST: Final = 1000  # names of a folder that are compared


def is_hub_id(name: str) -> bool:
    """True for text of the form ORG/NAME that is no path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def at_revision(name: str) -> tuple[str, str] | None:
    """The parts of `ORG/NAME@REVISION`, as some programs write it; None of any other name."""
    found = _AT_REVISION.fullmatch(name)
    if found is None or ("/" in found["model"] and not is_hub_id(found["model"])):
        return None
    return found["model"], found["revision"]


def model_path(name: str | Path) -> Path:
    """The path that is meant by the name of a model.

    Raises:
        UsageError: the name is empty, or no path can be called so.
    """
    if not str(name).strip():
        raise UsageError(
            f"The name of the model is empty, as of a variable that is not set: expected {WANTED}."
        )
    return named_path(name)


def check_hub_id(name: str) -> None:
    """Refuses what is no folder and no Hub id either.

    Raises:
        UsageError: the name is an address, a file, or has not the form ORG/NAME; the message says
            what to name instead.
    """
    if (address := _HUB_ADDRESS.fullmatch(name)) is not None:
        raise UsageError(f"{name} is an address on the Hub. {_of_address(address['path'])}")
    if _ADDRESS.match(name):
        raise UsageError(
            f"{name} is an address, and models are fetched from the Hub alone. Name {WANTED}; "
            "another Hub than huggingface.co is named by HF_ENDPOINT."
        )
    if (path := named_path(name)).is_file():
        raise UsageError(_of_file(path))
    if _BUILD.fullmatch(name):
        owner, is_whole, model = name.partition("@")[0].rpartition("--")
        of = f"{owner}/{model}" if is_whole else f"ORG/{model}, with its owner for ORG"
        raise UsageError(
            f"{name} looks like the name of a build, and there is no folder of that name (`nf4 "
            f"status` lists the builds here). To build, name the model: {of}"
        )
    is_beside = len(path.parts) > 1 and path.parent.is_dir()
    if (at := at_revision(name)) is not None and not is_beside:
        model, revision = at
        owner = "" if is_hub_id(model) else f"{_owner(model) or 'ORG'}/"
        needed = " (a Hub id begins with its owner)" if owner else ""
        raise UsageError(
            f"{name}: no such folder. A revision is an option{needed}: {owner}{model} --revision "
            f"{revision}"
        )
    if is_hub_id(name) and "@" not in name:
        return
    near = did_you_mean(path.name, beside(path), "" if len(path.parts) < 2 else f"{path.parent}/")
    if is_hub_id(name.strip("/")) and name.endswith("/") and not name.startswith("/"):
        near = f" Did you mean {name.strip('/')!r}?"
    if not near and "/" not in name and (of := _owner(name)):
        near = f" Did you mean '{of}/{name}'?"
    if not near and (is_beside or name.startswith(("~", "/", "./", "../"))):
        raise UsageError(
            f"{name}: no such folder; looked for {path.absolute()}. Correct the path, or name a "
            'Hub id of the form ORG/NAME, or "sample".'
        )
    near = near or " Write the whole id, such as tiiuae/falcon-7b-instruct, or the folder's path."
    raise UsageError(f"{name}: no such folder, and not a Hub id of the form ORG/NAME.{near}")


def _owner(model: str) -> str:
    """Who owns the models of a family on the Hub; empty if that is not known."""
    return _OWNERS.get(model.partition("-")[0].casefold(), "")


def _of_address(path: str) -> str:
    """What to name instead of an address.

    Args:
        path: what stands behind the host.
    """
    parts = [unquote(part) for part in path.split("/") if part]
    if parts and parts[0] in _NOT_MODELS:
        return f"It is that of {_NOT_MODELS[parts[0]]}, and a model is wanted: {WANTED}."
    if parts[:1] == ["models"]:
        del parts[0]
    if len(parts) < 2:
        return f"It names no model: expected {WANTED}."
    said = "/".join(parts[:2])
    if len(parts) > 3 and parts[2] in ("tree", "blob", "resolve", "commit"):
        rest = parts[3:] if parts[2] == "tree" else parts[3:4]
        revision = "/".join(rest[:3] if rest[:2] == ["refs", "pr"] else rest[:1])
        if revision != "main":
            said += f" --revision {revision}"
    return f"Name the model by its id: {said}"


def _of_file(path: Path) -> str:
    """Why a file is no model, and what to name instead."""
    name = path.name.lower()
    if name.endswith(".gguf"):
        return (
            f"{path} is a GGUF file, which llama.cpp reads and which is mostly quantized already. "
            "Take the 16-bit checkpoint in safetensors that it was made from; the card of the "
            "repository it came from names it."
        )
    if name.endswith(_ARCHIVES):
        return f"{path} is an archive. Unpack it, and name the folder with config.json in it."
    folder = path.parent
    if (folder / "config.json").is_file():
        return f"{path} is one file of a model. Name the folder that holds all of them: {folder}"
    if name.endswith(_WEIGHTS):
        return (
            f"{path} is a file of weights, and a model is a folder: beside its weights it needs "
            "config.json and a tokenizer. Bring those, too, and name the folder."
        )
    return f"{path} is a file, and a model is a folder with config.json in it. Name {WANTED}."


def beside(path: Path) -> list[str]:
    """The names of the folders beside which a path was to lie, and "sample"."""
    found = [SAMPLE] if len(path.parts) < 2 else []
    with suppress(OSError):
        found += [other.name for other in islice(path.parent.iterdir(), _MOST) if other.is_dir()]
    return found
