"""What a model repo lists, and which of its files the pipeline reads. Pure: no network, no disk."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pipeline.errors import HubError

# No dot between "model" and the suffix: model.fp16.safetensors is a second copy of the weights.
_WEIGHTS = re.compile(r"model[^./]*\.safetensors")
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx")
_WANTED = (
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE*",
    "README.md",  # its metadata holds the licence, which the new model card repeats
)
_TEMPLATES = re.compile(r"additional_chat_templates/[^/]+\.jinja")


@dataclass(frozen=True)
class RemoteFile:
    """One file of a model repo: `size` in bytes, and the hash that the Hub lists for it.

    LFS files list a sha256, the others the sha1 of their git blob. A cached file may have neither.
    """

    path: str
    size: int
    sha256: str | None
    git_sha1: str | None


@dataclass(frozen=True)
class RemoteModel:
    """A model repo at one commit.

    `revision` is the branch, tag or commit that was asked for. `offline` says that commit and files
    are those of the local cache, and that the Hub was not asked.
    """

    repo_id: str
    commit: str
    files: tuple[RemoteFile, ...]
    revision: str | None = None
    offline: bool = False


def wanted_files(model: RemoteModel) -> tuple[RemoteFile, ...]:
    """Picks what the pipeline reads: safetensors weights, configs, tokenizer, licence, model card.

    Never code, never a pickle.

    Raises:
        HubError: the repo has no safetensors weights.
    """
    if not any(_WEIGHTS.fullmatch(file.path) for file in model.files):
        others = [f.path for f in model.files if _matches(f.path, _OTHER_WEIGHTS)]
        found = ", ".join(others[:3]) + (", …" if others[3:] else "") if others else "none at all"
        raise HubError(
            f"{model.repo_id}@{model.commit[:12]} has no model*.safetensors; its weights: {found}. "
            "Only safetensors are read, because opening a pickle can run code: choose a repo or a "
            "revision that has them."
        )
    return tuple(file for file in model.files if _is_wanted(file.path))


def _is_wanted(path: str) -> bool:
    if _WEIGHTS.fullmatch(path) or _TEMPLATES.fullmatch(path):
        return True
    return "/" not in path and _matches(path, _WANTED)


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)
