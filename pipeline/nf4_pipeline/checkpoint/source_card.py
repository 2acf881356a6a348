"""What a model card's front matter says of license and language: the YAML between two `---` lines.

A card is a stranger's, and YAML is easily made to harm: aliases that multiply, tags that build
objects, depth, megabytes. So no YAML document is built here. In a block mapping, what begins in the
first column is the next entry; the few entries that are wanted are cut out by that, and of each one
the events are looked at, in order, until they are more than a text or a list of texts. What is odd
is left out with a word; nothing in a card stops a build.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from nf4_pipeline.checkpoint.plain_file import read_beginning
from nf4_pipeline.documents import Document

_HEAD_BYTES: Final = 2**20  # cards with a thousand benchmark results have 200 KB of front matter
_ENTRY_CHARS: Final = 16_384  # PyYAML is slow: 60,000 characters a second
_MAX_TEXTS: Final = 512
_MAX_EVENTS: Final = _MAX_TEXTS + 12  # those around the texts of a list

# An entry of the top level, with or without quotes around its key.
_WANTED: Final = re.compile(
    r"""(["']?)(license|license_name|license_link|language)\1[ \t]*:(?=\s)"""
)
_GOES_ON: Final = frozenset(" \t\n-#]}")  # first characters of lines that begin no entry

_IDENTIFIER: Final = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")
_LANGUAGE: Final = re.compile(r"[a-z]{2,3}|code|multilingual")
_NAME: Final = re.compile(r"[^\ufffd]{1,200}")
_LINK: Final = re.compile(r"https?://[^\s<>\"'`\\|^{}]{1,1000}|[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

# Plain scalars of the YAML that the Hub reads (1.2, core schema) which are no texts. Unlike in
# YAML 1.1, `no` is a text there: the language of Norway.
_NO_TEXT: Final = re.compile(
    r"|~|null|Null|NULL|true|True|TRUE|false|False|FALSE|0o[0-7]+|0x[0-9a-fA-F]+|"
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)


@dataclass(frozen=True, kw_only=True)
class SourceCard(Document):
    """What an artifact inherits from the card of its source: as it says it, never invented.

    Attributes:
        license: identifiers, as the Hub has them.
        license_name: of a license without an identifier.
        license_link: to its text: an address, or a file of the repository.
        language: codes of ISO 639.
        left_out: what the card says of these and cannot be taken over, in words.
    """

    license: tuple[str, ...] = ()
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def metadata(self) -> dict[str, str | list[str]]:
        """As front matter has it: what is not said is not there, and one of a kind is no list."""
        said = {
            "license": self.license,
            "license_name": self.license_name,
            "license_link": self.license_link,
            "language": self.language,
        }
        return {key: _plain(value) for key, value in said.items() if value}


def _plain(value: str | tuple[str, ...] | None) -> str | list[str]:
    if isinstance(value, tuple):
        return value[0] if len(value) == 1 else list(value)
    return value or ""


class _OddError(ValueError):
    """An entry is not what it should be; the text says what it is."""


def read_card(path: Path) -> SourceCard:
    """What the card in a file says; whatever is in it, there is an answer.

    Args:
        path: of README.md; it may be absent.
    """
    try:
        head = read_beginning(path, _HEAD_BYTES)
    except FileNotFoundError:
        return SourceCard()
    except OSError as error:
        return SourceCard(left_out=(f"all of it: it cannot be read: {error.strerror}",))
    return parse_card(head.decode("utf-8", "replace"))


def parse_card(text: str) -> SourceCard:
    """What a card says; whatever is in it, there is an answer.

    Args:
        text: of the card; what comes after the first MiB is not looked at.
    """
    found: dict[str, tuple[str, ...]] = {}
    odd: dict[str, str] = {}
    try:
        for key, entry in _entries(text):
            if key in found or key in odd:
                found.pop(key, None)
                odd[key] = "it stands there twice"
                continue
            try:
                found[key], wrong = _checked(key, _texts(entry))
                if wrong:
                    odd[key] = wrong
            except _OddError as error:
                odd[key] = str(error)
    except _OddError as error:
        return SourceCard(left_out=(str(error),))
    names, links = found.get("license_name", ()), found.get("license_link", ())
    return SourceCard(
        license=found.get("license", ()),
        license_name=names[0] if names else None,
        license_link=links[0] if links else None,
        language=found.get("language", ()),
        left_out=tuple(f"{key}: {why}" for key, why in sorted(odd.items())),
    )


def _entries(text: str) -> Iterator[tuple[str, str]]:
    """The wanted entries of the front matter, each as its key and its lines."""
    head = text[:_HEAD_BYTES].removeprefix("\ufeff").lstrip()
    lines = iter(head.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    if next(lines).rstrip() != "---":
        return
    entries: list[tuple[str, list[str]]] = []
    current: list[str] | None = None
    for line in lines:
        if line.rstrip() in ("---", "..."):
            break
        if line[:1] not in _GOES_ON and line:
            wanted = _WANTED.match(line + "\n")
            current = [line] if wanted else None
            if wanted and current:
                entries.append((wanted[2], current))
        elif current is not None:
            current.append(line)
    else:
        raise _OddError(
            f"all of it: no line `---` ends its head in the first {_HEAD_BYTES:,} bytes"
        )
    for key, parts in entries:
        yield key, "\n".join(parts) + "\n"


def _texts(entry: str) -> list[str]:
    """The text of an entry, or the texts of its list.

    Raises:
        _OddError: the entry is not valid YAML, has an anchor, an alias or a tag, is too large, or
            holds something else than texts.
    """
    if len(entry) > _ENTRY_CHARS:
        raise _OddError(f"it has {len(entry):,} characters; no real one has {_ENTRY_CHARS:,}")
    values: list[str] = []
    inside, outer, is_list = 0, 0, False
    try:
        events: Iterable[Any] = yaml.parse(entry, Loader=yaml.SafeLoader)
        for number, event in enumerate(events):
            if number > _MAX_EVENTS:
                raise _OddError(f"it lists more than {_MAX_TEXTS} texts")
            if getattr(event, "anchor", None) is not None:
                raise _OddError("it has an anchor or an alias, which multiply")
            if getattr(event, "tag", None) is not None:
                raise _OddError(f"it has a tag, {event.tag[:40]!r}")
            match event:
                case yaml.MappingStartEvent() | yaml.SequenceStartEvent():
                    inside += 1
                    is_list = isinstance(event, yaml.SequenceStartEvent)
                    if inside > 2 or is_list != (inside == 2):
                        raise _OddError("expected a text or a list of texts, got something deeper")
                case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                    inside -= 1
                case yaml.ScalarEvent():
                    is_plain = event.style is None
                    if is_plain and _NO_TEXT.fullmatch(event.value):
                        raise _OddError(f"expected a text, got {event.value[:40] or 'nothing'}")
                    values.append(event.value)
                    outer += inside == 1
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, _OddError):
            raise
        problem = getattr(error, "problem", None) or getattr(error, "reason", None)
        raise _OddError(f"it is not valid YAML ({problem or type(error).__name__})") from error
    if outer != (1 if is_list else 2):  # YAML knows more line breaks than are split at here
        raise _OddError("expected a text or a list of texts, got several entries")
    return values[1:]


def _checked(key: str, texts: list[str]) -> tuple[tuple[str, ...], str]:
    """Those of the texts that fit the key, and what is to be said of the others."""
    fits, expected, several = _FITTING[key]
    if not several and len(texts) != 1:
        raise _OddError(f"expected one text, got a list of {len(texts)}")
    good = tuple(dict.fromkeys(text for text in texts if text.isprintable() and fits(text)))
    bad = [text for text in texts if text not in good]
    if not bad:
        return good, "" if good else "it is an empty list"
    shown = ", ".join(ascii(text[:40]) for text in bad[:3]) + (", …" if bad[3:] else "")
    return good, f"expected {expected}, got {shown}"


_FITTING: Final[dict[str, tuple[Callable[[str], Any], str, bool]]] = {
    "license": (_IDENTIFIER.fullmatch, "an identifier such as apache-2.0", True),
    "license_name": (_NAME.fullmatch, "a name in one line", False),
    "license_link": (_LINK.fullmatch, "an https address or the name of a file", False),
    "language": (_LANGUAGE.fullmatch, "a code of ISO 639 such as en", True),
}
"""What fits a key, that in words, and whether there may be several."""
