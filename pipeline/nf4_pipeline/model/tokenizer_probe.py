"""Loads a tokenizer and tries its chat template: programs of strangers, so only in a child process.

Their code is never run; templates are, in the sandbox that transformers has for them, and within
limits (`limited_tokenizer.py`).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, Final, Literal

from nf4_pipeline.checkpoint.files import is_tokenizer
from nf4_pipeline.checkpoint.source import read_json
from nf4_pipeline.errors import CheckpointError, PipelineError, SourceError
from nf4_pipeline.model.config import brief_text
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer, no_tokenizer
from nf4_pipeline.model.tokenizer_facts import TokenizerFacts

_PLAIN_TEXT: Final = (
    "The quick brown fox jumps over 13 lazy dogs; isn't it strange?\n\tx = [1.5] # no"
)
_USER_TURN: Final = [{"role": "user", "content": "What is 3 plus 10?"}]
_TEMPLATE_SECONDS: Final = 5
_BRING: Final = (
    "Bring its files from where the model came from; without any tokenizer files the model is "
    "built without one."
)
EXTRA_NEEDED: Final = "pip install 'nf4-pipeline[tokenizers]'"


def probe_tokenizer(folder: Path, rows: int | None) -> TokenizerFacts:
    """Loads the tokenizer of a checkpoint as transformers does.

    Args:
        folder: the checkpoint.
        rows: of the model's embedding; None if that is not known.
    """
    names = {path.name for path in folder.iterdir()}
    if not any(is_tokenizer(name) or name == "tokenizer_config.json" for name in names):
        return TokenizerFacts("none")
    asked: set[str] = set()
    try:
        with _noting(folder, asked):
            limited = LimitedTokenizer.open(folder, error=SourceError)
        plain = limited.ids(_PLAIN_TEXT)
    except SourceError as error:
        return _failed(folder, names, asked, _cause(error), str(error))
    tokenizer = limited.tokenizer
    asked |= _class_files(tokenizer)
    if not plain:
        return _failed(folder, names, asked, "it makes no token of plain text")
    kind = type(tokenizer).__name__
    problem, beyond = _rows_missing(tokenizer, plain, rows, kind, folder)
    template, why = _template(limited, rows)
    return TokenizerFacts("loads", kind, *_listed(asked, names), problem, template, why, beyond)


def _listed(asked: set[str], names: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What was asked for, and what of it is there."""
    return tuple(sorted(asked)), tuple(sorted(asked & names - {"config.json"}))


def _cause(error: PipelineError) -> str:
    """What a library said; "" if it said nothing, and was too slow, or too much came of it."""
    cause = error.__cause__
    return brief_text(cause) if isinstance(cause, Exception) and str(cause) else ""


def _class_files(tokenizer: Any) -> set[str]:
    return {str(name) for name in (getattr(tokenizer, "vocab_files_names", None) or {}).values()}


@contextmanager
def _noting(folder: Path, asked: set[str]) -> Iterator[None]:
    """Notes which files of a folder transformers looks for while it loads a tokenizer."""
    from transformers import tokenization_utils_base as base

    real = base.cached_file

    def noted(path: Any, filename: str, *args: Any, **options: Any) -> Any:
        if str(path) == str(folder):
            asked.add(filename)
        return real(path, filename, *args, **options)

    base.cached_file = noted
    try:
        yield
    finally:
        base.cached_file = real


def _failed(
    folder: Path, names: set[str], asked: set[str], why: str, whole: str = ""
) -> TokenizerFacts:
    """What is known of a tokenizer that does not load.

    Args:
        folder: of the checkpoint.
        names: of all files in it.
        asked: names of the files that were looked for.
        why: in the words of the library; "" if it has none.
        whole: the message if nothing more is to be said.
    """
    config = _tokenizer_config(folder)
    kind = str(config.get("tokenizer_class") or "")
    files = _listed(asked, names)
    if config.get("auto_map") and not _is_known(kind):
        code = _code_of(config)
        return TokenizerFacts(
            "code",
            kind,
            *files,
            f"The tokenizer ({kind or 'of its own'}) needs code that comes with the checkpoint "
            f"({code}), which is never run.",
        )
    if packages := _packages_missing(folder, names):
        return TokenizerFacts(
            "fails",
            kind,
            *files,
            f"The tokenizer of {folder} ({', '.join(sorted(packages.values()))}) needs "
            f"{' and '.join(sorted(packages))}, which is not installed. {EXTRA_NEEDED} brings what "
            "tokenizers need.",
        )
    if not any(is_tokenizer(name) for name in names):
        whole = f"{no_tokenizer(folder, names)} {_BRING}"
        return TokenizerFacts("fails", kind, *files, whole)
    if not why:
        return TokenizerFacts("fails", kind, *files, whole)
    what = f" ({kind})" if kind else ""
    return TokenizerFacts(
        "fails",
        kind,
        *files,
        f"The tokenizer of {folder}{what} does not load: {why.rstrip('.')}. {_BRING}",
    )


def _is_known(class_name: str) -> bool:
    """True of a tokenizer that transformers itself has."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    try:
        return bool(class_name) and tokenizer_class_from_name(class_name) is not None
    except Exception:  # it may lack a package
        return True


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    try:
        value = read_json(folder / "tokenizer_config.json")
    except CheckpointError:
        return {}
    return value


def _code_of(config: dict[str, Any]) -> str:
    auto_map = config["auto_map"]
    named = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    first = next((n for n in named if n), "") if isinstance(named, list | tuple) else named
    return f"{str(first or auto_map).rpartition('.')[0] or first}.py"


def _packages_missing(folder: Path, names: set[str]) -> dict[str, str]:
    """Packages that reading the vocabulary needs and that are not installed, and the file."""
    if "tokenizer.json" in names:
        return {}
    needed: dict[str, str] = {}
    for name in sorted(names):
        if name.endswith((".model", ".spm")):
            with (folder / name).open("rb") as file:
                head = file.read(64)
            needed["sentencepiece" if not _is_ranks(head) else "tiktoken"] = name
        elif name.endswith(".tiktoken"):
            needed["tiktoken"] = name
        elif name == "tekken.json":
            needed["mistral-common"] = name
    modules = {"mistral-common": "mistral_common"}
    return {
        package: name
        for package, name in needed.items()
        if find_spec(modules.get(package, package)) is None
    }


def _is_ranks(head: bytes) -> bool:
    """True of a tiktoken file: lines of a token in base64 and its rank."""
    first = head.partition(b"\n")[0].split(b" ")
    return len(first) == 2 and first[1].strip().isdigit()


def _rows_missing(
    tokenizer: Any, text: Sequence[int], rows: int | None, kind: str, folder: Path
) -> tuple[str, tuple[str, ...]]:
    """Tokens that the embedding has no row for: why they matter, or their names if they do not."""
    if rows is None:
        return "", ()
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    beyond = sorted((i, token) for token, i in vocabulary.items() if i >= rows)
    if not beyond:
        return "", ()
    added = set(tokenizer.get_added_vocab())
    common = {*text, tokenizer.bos_token_id, tokenizer.eos_token_id}
    plain = [(i, token) for i, token in beyond if token not in added or i in common]
    if not plain:
        return "", tuple(f"{token!r} ({i})" for i, token in beyond)
    index, token = plain[0]
    problem = (
        f"The tokenizer of {folder} ({kind}) makes {len(beyond)} tokens that the model has no row "
        f"for: {token!r} has the id {index}, and the embedding has {rows:,} rows. The tokenizer is "
        "that of another model, or the embedding was not resized when tokens were added."
    )
    return problem, ()


class _TooSlowError(Exception):
    """A template ran longer than any real one."""


def _template(
    tokenizer: LimitedTokenizer, rows: int | None
) -> tuple[Literal["none", "works", "fails"], str]:
    """Renders a plain user turn."""
    if not tokenizer.has_template:
        return "none", ""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooSlowError(f"it ran longer than {_TEMPLATE_SECONDS} s")

    # Most that are endless can be stopped, and the model be used without them.
    earlier = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _TEMPLATE_SECONDS)
    try:
        text = tokenizer.in_template(_USER_TURN, answer_follows=True)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        ids = tokenizer.ids(text)
    except SourceError as error:
        return "fails", (_cause(error) or str(error)).rstrip(".")
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, earlier)
    if not ids:
        return "fails", "it makes an empty text"
    if rows is not None and max(ids) >= rows:
        token = tokenizer.tokenizer.convert_ids_to_tokens(max(ids))
        return "fails", f"it writes {token!r}, and the embedding has no row {max(ids)}"
    return "works", ""
