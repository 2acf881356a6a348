"""Every failure that a user can meet, as a tree.

    PipelineError                 one clear message, exit code 1, no traceback
    ├── UsageError                the command cannot mean anything: exit code 2
    │   └── RecipeError           a recipe file or option is not valid
    ├── SourceError               the checkpoint that goes in is not usable
    │   ├── CheckpointError       a file is missing, truncated or malformed
    │   ├── AlreadyQuantizedError the checkpoint is quantized already
    │   └── ArchitectureError     no causal LM, or nothing in it that could be quantized
    ├── HubError                  the Hub refused, is unreachable, or sent wrong bytes
    │   ├── NotFoundError         no such repo or revision, as far as the token can see
    │   └── ConflictError         somebody else changed the repo in the meantime
    ├── BuildError                a build folder lacks a stage, or another process holds it
    ├── StoreError                a store at a URL refuses, does not answer, or holds other bytes
    ├── ArtifactError             an exported artifact is not what its manifest says
    │   └── SignatureError        it is not signed, or not what was signed
    ├── PlanMismatchError         the bytes written differ from the bytes predicted
    ├── ResourceError             not enough disk, memory, or no such device
    │   └── AccessError           a file or a folder cannot be read or written
    │       └── UnfitFileError    a pipe, a device, or far too many bytes, where a file should be
    ├── VerificationError         the verdict is "fail"
    ├── TiedWeightsDiffer         tensors that config.json ties differ; caught, and both are kept
    └── StoppedError              the user stopped it: exit code 130

Exit code 3 is no error: `nf4 reproduce` derived every byte again, and could not check where its
source is said to be from; `nf4 rebuild` found nothing wrong, and could not check all of it
(`NOT_CHECKED`).

A message says what happened, where, what was expected and what was found, and what to do next.
Only the command line turns an error into text and an exit code (`cli/__init__.py`).
"""

from __future__ import annotations

import errno
import sys
from typing import Final

NOT_CHECKED: Final = 3
"""Exit code: all that could be checked is right, and something that is claimed could not be."""


class PipelineError(Exception):
    """An expected failure: its text is complete and is all that the user sees."""

    exit_code = 1


class UsageError(PipelineError):
    """The command, an option or a name cannot mean anything."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe has an unknown key or a value out of range."""


class SourceError(PipelineError):
    """The checkpoint that goes in cannot be used."""


class CheckpointError(SourceError):
    """A checkpoint file is missing, truncated or malformed."""


class AlreadyQuantizedError(SourceError):
    """The checkpoint carries a quantization config; quantizing it again would lose twice."""


class ArchitectureError(SourceError):
    """transformers has no causal LM for this config, or it has no layer to quantize."""


class HubError(PipelineError):
    """The Hub refused a request, could not be reached, or sent bytes that hash wrong."""


class NotFoundError(HubError):
    """The Hub knows no such repo or revision, or does not show it to this token."""


class ConflictError(HubError):
    """A push would go over what somebody else pushed."""


class BuildError(PipelineError):
    """A build folder lacks what the stage needs, or is in use by another process."""


class StoreError(PipelineError):
    """The store at a URL refused, did not answer, or holds something else than was put there."""


class ArtifactError(PipelineError):
    """An artifact does not hold what its manifest says."""


class SignatureError(ArtifactError):
    """An artifact is not signed, or holds other files than those that were signed."""


class PlanMismatchError(PipelineError):
    """The bytes that were written differ from the bytes that the plan predicted."""


class ResourceError(PipelineError):
    """The machine lacks the disk, the memory or the device that the job needs."""


class AccessError(ResourceError):
    """A file or a folder cannot be read or written: permissions, a read-only or a failing disk."""


class UnfitFileError(AccessError, OSError):
    """What should be a file is none, or is larger than any real one; an `OSError`, too.

    So whoever turns an unreadable file into an error of its own does so with this one.

    Args:
        text: all that the user sees, unless it is turned into another error.
        why: its reason alone, for `strerror`.
    """

    def __init__(self, text: str, why: str = "") -> None:
        super().__init__(errno.EINVAL, why or text)
        self._text = text

    def __str__(self) -> str:
        return self._text


class StoppedError(PipelineError):
    """The user stopped the work; the text says what is kept, and how to go on."""

    exit_code = 130


class TiedWeightsDiffer(PipelineError):
    """A tensor that was to be dropped differs from the one to which config.json ties it.

    Whoever made the plan catches this and makes another, with both kept.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"{name!r} does not equal the tensor to which it is tied.")
        self.name = name


class VerificationError(PipelineError):
    """The artifact was measured and its verdict is "fail"."""


_OF_THE_MACHINE: Final = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.EAGAIN,
    }
)
_NO_THREAD: Final = "can't start new thread"  # a RuntimeError of Python's


def is_of_machine(error: BaseException) -> bool:
    """Whether the machine failed, or a limit of the session, and not what was worked on."""
    if isinstance(error, RuntimeError):
        return str(error) == _NO_THREAD
    return isinstance(error, OSError) and error.errno in _OF_THE_MACHINE


_NEEDED: Final = frozenset(
    {
        "accelerate",
        "bitsandbytes",
        "fastjsonschema",
        "huggingface_hub",
        "jinja2",
        "matplotlib",
        "numba",
        "numpy",
        "rich",
        "safetensors",
        "tokenizers",
        "torch",
        "transformers",
        "yaml",
    }
)
"""Packages without which nothing works, by the names that are imported."""


def of_installation(error: BaseException, doing: str) -> PipelineError | None:
    """A package that is missing or broken, as an error of ours; None of any other error.

    Args:
        error: what was raised.
        doing: what was going on, such as "quantize".
    """
    if not isinstance(error, ImportError) or (error.name or "").split(".")[0] not in _NEEDED:
        return None
    return ResourceError(
        f"{doing}: {error}. What this package needs is not installed whole in {sys.prefix}: "
        "install it again (pip install --force-reinstall nf4-pipeline)."
    )


def of_system(error: OSError | MemoryError | RuntimeError, doing: str) -> PipelineError:
    """What the system refused, as an error of ours.

    Args:
        error: what it said.
        doing: what was going on, such as "quantize".
    """
    if isinstance(error, UnfitFileError):
        return error
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return ResourceError(
            f"{doing}: memory ran out. Give it a smaller --memory-budget, or end other programs, "
            "then run the same command again."
        )
    again = "then run the same command again; nothing is half-written, and what is finished is kept"
    if isinstance(error, RuntimeError) or error.errno == errno.EAGAIN:
        return ResourceError(
            f"{doing}: the system starts no further process or thread ({error}). End other "
            f"programs, or raise the limits of this session (ulimit -u, ulimit -v), {again}."
        )
    where = f"{error.filename}: " if error.filename else ""
    what = error.strerror or str(error) or type(error).__name__
    if what.startswith("No usable temporary directory"):
        return AccessError(f"{doing}: {what}. Let TMPDIR name a folder with free space, {again}.")
    match error.errno:
        case errno.EMFILE | errno.ENFILE:
            return ResourceError(
                f"{doing}: {where}{what}. Raise the limit of this session (ulimit -n 1024), "
                f"{again}."
            )
        case errno.ENOSPC | errno.EDQUOT:
            return ResourceError(f"{doing}: {where}the disk is full ({what}). Make space, {again}.")
        case errno.EFBIG:
            return ResourceError(
                f"{doing}: {where}{what}. This disk, or a limit of this session (ulimit -f), takes "
                "no file of that size; name a --build-dir elsewhere."
            )
        case errno.EROFS | errno.EACCES | errno.EPERM:
            return AccessError(
                f"{doing}: {where}{what}. Give this user the right to it, or name another "
                f"--build-dir, {again}."
            )
        case errno.ENAMETOOLONG | errno.ELOOP:
            return AccessError(f"{doing}: {where}{what}. Name another path.")
        case errno.EISDIR | errno.ENOTEMPTY | errno.EEXIST:
            return AccessError(f"{doing}: {where}{what}. Move it away, {again}.")
        case errno.ENOSYS | errno.EOPNOTSUPP | errno.ENOLCK if error.filename:
            return AccessError(
                f"{doing}: {where}{what}. The file system there cannot do that; name a --build-dir "
                "on another one."
            )
        case errno.ENOENT | errno.ENOTDIR | errno.ESTALE:
            return AccessError(
                f"{doing}: {where}{what}. It was moved or deleted: bring it back, {again}."
            )
    return AccessError(f"{doing}: {where}{what}. Look at the disk, {again}.")
