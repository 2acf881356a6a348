"""What a folder without a usable checkpoint looks like, and the way out. Looks, and reads little.

Folders that people give by mistake: one of the Hub cache, an adapter, a GGUF download, a training
with its checkpoints, a pipeline of several models, a repository cloned without its weights.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Final

from nf4_pipeline.checkpoint.plain_file import read_beginning, read_plain
from nf4_pipeline.checkpoint.strict_json import parse_json

_CACHE_FOLDER: Final = re.compile(r"models--(?P<org>.+?)--(?P<name>.+)")
_COMMIT: Final = re.compile("[0-9a-f]{40}")
_LARGEST_CONFIG: Final = 2**20  # bytes of adapter_config.json


def without_config(folder: Path) -> str | None:
    """What a folder without config.json is, and the way out; None if that is not known."""
    if (cache := _cache_advice(folder)) is not None:
        return cache
    if (link := dead_link(folder / "config.json")) is not None:
        return link
    if (folder / "records").is_dir():
        return (
            f"{folder} is a build folder of nf4, and a model is wanted. What is done in it says: "
            f"nf4 status --build-dir {shlex.quote(str(folder))}. To build again, name the model "
            "that it was built from."
        )
    if (adapter := adapter_advice(folder)) is not None:
        return adapter
    if gguf := sorted(path.name for path in folder.glob("*.gguf")):
        return _gguf(folder, gguf)
    if (folder / "model_index.json").is_file():
        return (
            f"{folder} is a diffusers pipeline (model_index.json), made of several models and not "
            "a causal LM. If one of its folders holds a causal LM, name that folder."
        )
    if inside := _checkpoints_in(folder):
        return (
            f"{folder} has no config.json, and folders in it do: {', '.join(inside[:5])}"
            f"{', …' if inside[5:] else ''}. Name the one to quantize, such as "
            f"{folder / inside[-1]}."
        )
    if (folder / "params.json").is_file():
        return (
            f"{folder} holds a checkpoint as its makers train it (params.json), not one of Hugging "
            "Face. Convert it with the script that transformers has for this model, or take the "
            "repository whose name ends in -hf."
        )
    return None


def without_weights(folder: Path) -> str:
    """Why a folder with a config has no weights to read, and the way out."""
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if (link := dead_link(folder / name)) is not None:
            return link
    links = [path for path in sorted(folder.glob("*.safetensors")) if dead_link(path)]
    if links:
        return str(dead_link(links[0]))
    if (adapter := adapter_advice(folder)) is not None:
        return adapter
    if gguf := sorted(path.name for path in folder.glob("*.gguf")):
        return _gguf(folder, gguf)
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    variants = [name for name in others if re.fullmatch(r"model\..+\.safetensors", name)]
    if variants:
        return (
            f"{folder} holds its weights as a variant ({variants[0]}), which transformers loads "
            "only where it is asked for by name. Rename it to model.safetensors, or name it in "
            'config.json under "transformers_weights".'
        )
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt")
    )
    if pickles:
        return (
            f"{folder} holds its weights only as Python pickles ({pickles[0]}"
            f"{', …' if pickles[1:] else ''}), which can run code when they are read. Take a "
            "checkpoint in safetensors. If you trust its maker, let them be scanned and converted: "
            f"nf4 build {shlex.quote(str(folder))} --allow-pickle"
        )
    expected = "expected model.safetensors.index.json or model.safetensors in it."
    if others:
        return (
            f"{folder} holds no weights under a name that transformers loads: {expected} There "
            f"{'is' if len(others) == 1 else 'are'} {', '.join(others[:3])}: if that is the model, "
            'rename it, or name it in config.json under "transformers_weights".'
        )
    if (commit := cache_commit(folder)) is not None:
        return f"{folder} holds no weights: {expected} {_download_again(*commit)}"
    return f"{folder} holds no weights: {expected} {_build_again(folder) or ''}".rstrip()


def how_to_complete(folder: Path, missing: str) -> str:
    """The way to a shard that an index names and the folder lacks.

    Args:
        folder: of the checkpoint.
        missing: the shard's name.
    """
    if (link := dead_link(folder / missing)) is not None:
        return link
    if (commit := cache_commit(folder)) is not None:
        return _download_again(*commit)
    if (again := _build_again(folder)) is not None:
        return again
    others = sorted(
        path.name for path in folder.glob("*.safetensors") if path.name.startswith("model")
    )
    if others and not missing.startswith(_shards_of(others[0])):
        return (
            f"The index belongs to another set of files than {others[0]}: bring the index that was "
            "saved with them, or the files that were saved with it."
        )
    return "Download the checkpoint again."


def _build_again(folder: Path) -> str | None:
    """The way to the files of a build; None for a folder that is in none."""
    root = folder.absolute().parent
    if folder.absolute().name != "export" or not (root / "records").is_dir():
        return None
    place = shlex.quote(str(root))
    if (url := _sent_to(root)) is not None:
        return (
            f"It is the export of a build whose weights are in {url} alone: name that repo, or run "
            f"`nf4 build` again with --build-dir {place} and without --stream-output, which makes "
            "them here."
        )
    return (
        "It is the export of a build: run `nf4 build` again with the model that `nf4 status "
        f"--build-dir {place}` names, and --build-dir {place}."
    )


def _sent_to(build: Path) -> str | None:
    """The repo that received the weights of a build; None if none did."""
    try:
        sent = parse_json(read_plain(build / "sent.json", _LARGEST_CONFIG))
        return str(sent["url"]) if sent["files"] else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _shards_of(name: str) -> str:
    """`model-00001-of-00003.safetensors` -> `model-`."""
    return name.partition("-")[0]


def dead_link(path: Path) -> str | None:
    """What to say of a link that leads nowhere; None if `path` is something else."""
    if not path.is_symlink() or path.exists():
        return None
    target = path.readlink()
    commit = cache_commit(path.parent)
    if commit is not None:
        return (
            f"{path} is a dead link: {target.name} is no longer among the blobs of the Hub cache. "
            f"{_download_again(*commit)}"
        )
    return (
        f"{path} is a dead link: there is no {target}. Bring the file back there; if it was moved, "
        "run `nf4 build` with the folder in which it lies now."
    )


def cache_commit(folder: Path) -> tuple[str, str] | None:
    """Repo and commit of a snapshot in a Hub cache, by the names of its folders.

    Args:
        folder: .../models--ORG--NAME/snapshots/COMMIT, or any other.
    """
    where = folder.absolute()
    if where.parent.name != "snapshots" or not _COMMIT.fullmatch(where.name):
        return None
    repo = _CACHE_FOLDER.fullmatch(where.parent.parent.name)
    return (f"{repo['org']}/{repo['name']}", where.name) if repo else None


def _download_again(repo: str, commit: str) -> str:
    return (
        "The download is not finished, or its cache was cleaned: "
        f"`nf4 download {repo} --revision {commit}` fetches what is missing."
    )


def _cache_advice(folder: Path) -> str | None:
    """For a folder of the Hub cache above a snapshot: which snapshot to give."""
    where = folder.absolute()
    root = next((p for p in (where, where.parent) if _CACHE_FOLDER.fullmatch(p.name)), None)
    if root is None:
        return None
    repo = _CACHE_FOLDER.fullmatch(root.name)
    assert repo is not None
    name = f"{repo['org']}/{repo['name']}"
    snapshots = sorted((root / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime)
    if not snapshots:
        return (
            f"{folder} is the Hub cache's folder for {name}, and holds no snapshot of it. "
            f"`nf4 build {name}` downloads it."
        )
    ref = root / "refs" / "main"
    main = root / "snapshots" / _commit_in(ref)
    best = main if main in snapshots else snapshots[-1]
    others = f" (there are {len(snapshots)}; this is that of main)" if snapshots[1:] else ""
    return (
        f"{folder} is the Hub cache's folder for {name}; its checkpoint is a snapshot in it. "
        f"Give {best}{others}, or the id: `nf4 build {name}`."
    )


def _commit_in(ref: Path) -> str:
    """What a ref of the Hub cache says; some other text if it says nothing."""
    try:
        return read_beginning(ref, 64).decode("ascii", "replace").strip()
    except OSError:
        return "none"


def adapter_advice(folder: Path) -> str | None:
    """For the folder of a PEFT adapter: of which base, and that it is to be merged."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    try:
        value = parse_json(read_plain(path, _LARGEST_CONFIG))
        base, kind = value.get("base_model_name_or_path"), value.get("peft_type")
    except (OSError, ValueError, AttributeError):
        base, kind = None, None
    base = base if isinstance(base, str) and base else None
    of = f"{folder} holds an adapter ({str(kind or 'PEFT')[:80]}) of {base or 'a base model'}"
    if base is not None and _says_quantized(Path(base) / "config.json"):
        return (
            f"{of}, which is quantized itself: what is merged into it is rounded twice. Load the "
            "16-bit model that it was made of, merge the adapter into that (PeftModel."
            "from_pretrained(model, adapter).merge_and_unload().save_pretrained(FOLDER)), save the "
            "tokenizer beside it, then: nf4 build FOLDER"
        )
    return f"{of}, not a whole model. {how_to_merge(str(folder), base, f'{folder.name}-merged')}"


def _says_quantized(config: Path) -> bool:
    """Whether a config.json on this machine says that its model is quantized."""
    try:
        return bool(parse_json(read_plain(config, _LARGEST_CONFIG)).get("quantization_config"))
    except (OSError, ValueError, AttributeError):
        return False


def how_to_merge(adapter: str, base: str | None, merged: str) -> str:
    """The line that makes a whole model of an adapter.

    Args:
        adapter: its folder or Hub id.
        base: the model that it adapts; None if that is not known, and the adapter says it.
        merged: the folder to make.
    """
    code = (
        "from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as "
        f"T; M.from_pretrained({adapter!r}, dtype='auto').merge_and_unload()"
        f".save_pretrained({merged!r}); T.from_pretrained({base or adapter!r})"
        f".save_pretrained({merged!r})"
    )
    word = shlex.quote(code) if {*code} & {*'"$`\\!'} else f'"{code}"'
    return (
        f"Merge it into that model first: pip install peft && python -c {word} && nf4 build "
        f"{shlex.quote(merged)}"
    )


def _gguf(folder: Path, files: list[str]) -> str:
    return (
        f"{folder} holds GGUF files ({', '.join(files[:3])}{', …' if files[3:] else ''}), which "
        "llama.cpp reads and which are mostly quantized already. Take the 16-bit checkpoint in "
        "safetensors that they were made from; the repository's card names it."
    )


def _checkpoints_in(folder: Path) -> list[str]:
    """Folders inside that have a config.json, those of a training in the order of its steps."""
    found = [path.parent.name for path in folder.glob("*/config.json")]
    return sorted(found, key=lambda name: [int(n) for n in re.findall(r"\d+", name)] + [0])
