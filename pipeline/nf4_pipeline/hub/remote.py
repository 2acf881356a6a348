"""What a model repo lists, and which of its files the pipeline reads. Pure: no network, no disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from nf4_pipeline.checkpoint.files import PICKLE_FILE, WEIGHT_FILE, is_wanted
from nf4_pipeline.checkpoint.folder_advice import how_to_merge
from nf4_pipeline.errors import HubError

_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx")


@dataclass(frozen=True)
class RemoteFile:
    """One file of a model repo: `size` in bytes, and the hash that the Hub lists for it.

    LFS files list a sha256, the others the sha1 of their git blob. A file may have neither: where a
    Hub lists none, and in a cache without links. Then nothing says whether its bytes are right.
    """

    path: str
    size: int
    sha256: str | None
    git_sha1: str | None

    @property
    def is_hashed(self) -> bool:
        """Whether its bytes can be checked."""
        return self.sha256 is not None or self.git_sha1 is not None


@dataclass(frozen=True)
class RemoteModel:
    """A model repo at one commit.

    `revision` is the branch, tag or commit that was asked for. `offline` says that commit and files
    are those of the local cache, and that the Hub was not asked. `private` is as the Hub says.
    """

    repo_id: str
    commit: str
    files: tuple[RemoteFile, ...]
    revision: str | None = None
    offline: bool = False
    private: bool = False


def wanted_files(model: RemoteModel, *, allow_pickle: bool = False) -> tuple[RemoteFile, ...]:
    """Picks what the pipeline reads: safetensors weights, configs, tokenizer, licence, model card.

    Never code; a pickle only with `allow_pickle`, and only where there are no safetensors.

    Raises:
        HubError: the repo has no safetensors, nor, with `allow_pickle`, pickled weights.
    """
    if not any(WEIGHT_FILE.fullmatch(file.path) for file in model.files):
        pickles = {file.path for file in model.files if PICKLE_FILE.fullmatch(file.path)}
        if pickles and allow_pickle:
            return tuple(f for f in model.files if f.path in pickles or is_wanted(f.path))
        raise HubError(_without_weights(model, has_pickles=bool(pickles)))
    return tuple(file for file in model.files if is_wanted(file.path))


def _without_weights(model: RemoteModel, *, has_pickles: bool) -> str:
    """Why a repo without safetensors that are a model will not do, and what to take instead."""
    names = {file.path for file in model.files}
    others = [f.path for f in model.files if _matches(f.path, _OTHER_WEIGHTS)]
    named = ", ".join(others[:3]) + (", …" if others[3:] else "") if others else "none at all"
    what = f"{model.repo_id}@{model.commit[:12]} has no model*.safetensors"
    if "adapter_config.json" in names:
        merged = f"{model.repo_id.partition('/')[2]}-merged"
        return (
            f"{model.repo_id} holds an adapter (PEFT, LoRA), not a whole model; the base model is "
            "named in its adapter_config.json. " + how_to_merge(model.repo_id, None, merged)
        )
    if any(name.endswith(".gguf") for name in names) and not has_pickles:
        return (
            f"{what}; its weights: {named}. GGUF is for llama.cpp, and mostly quantized already: "
            "take the 16-bit checkpoint that it was made from, which its card names."
        )
    of_pickles = (
        ". If you trust its maker, let them be scanned and converted: nf4 build "
        f"{model.repo_id} --revision {model.commit} --allow-pickle"
    )
    return (
        f"{what}; its weights: {named}. Only safetensors are read, because opening a pickle can "
        "run code: choose a repo or a revision that has them"
        f"{of_pickles if has_pickles else ''}."
    )


def small_files(model: RemoteModel) -> tuple[RemoteFile, ...]:
    """Those of the wanted files that are no weights, and every index of weights."""
    return tuple(
        file
        for file in model.files
        if ("/" not in file.path and file.path.endswith(".safetensors.index.json"))
        or (is_wanted(file.path) and not file.path.endswith(".safetensors"))
    )


def named(model: RemoteModel, names: Iterable[str]) -> tuple[RemoteFile, ...]:
    """The files of a model with these names; a name that it does not have is passed over."""
    wanted = set(names)
    return tuple(file for file in model.files if file.path in wanted)


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)
