"""Text of four domains on which two models can be compared, from sources that lie on this machine.

    pip download --no-deps --no-binary :all: django tabulate mpmath prettytable  # and unpack them
    python scripts/campaigns/domain_texts.py django-*/ tabulate-*/ mpmath-*/ --out domains
    python scripts/campaigns/ablate_calibration.py BUILD --eval-text domains/code.txt ...

Takes sources of packages that the models were not trained on. Source files of Python are code;
paragraphs of documentation are prose; translations of gettext catalogs are languages; tables, CSV
files, lines of numbers and sums at a prompt are tables.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import click

_FILE_CHARACTERS: Final = 3_000
"""Of a file at most, so that many files have their say."""
_DOCUMENTS: Final = {".txt", ".rst", ".md"}
_FEWEST: Final = 200
_GAP: Final = re.compile(r"\S(?: {2,}|\t)\S")


def is_row(line: str) -> bool:
    """True for a row of a table, a line of numbers, and a sum at a prompt."""
    line = line.strip()
    if not line or line.startswith(("#", "assert", "..")):
        return False
    digits = sum(character.isdigit() for character in line)
    return (
        (line[0] in "|+" and line[-1] in "|+")
        or set(line) <= set("=- ")
        or line.endswith("\\\\")
        or len(_GAP.findall(line)) >= 2
        or digits > 0.3 * len(line)
        or (line.startswith(">>>") and digits > 1)
    )


def code(path: Path, text: str) -> str:
    """The beginning of a source file that is no test."""
    return text if path.suffix == ".py" and "test" not in str(path) else ""


def prose(path: Path, text: str) -> str:
    """Paragraphs of documentation: sentences, no markup."""
    if path.suffix not in _DOCUMENTS or "docs" not in path.parts:
        return ""
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(
        part
        for part in paragraphs
        if len(part) > 120 and part[0].isalpha() and part.rstrip().endswith(".")
        and not re.search(r"::|^ |\d\.\d", part, re.MULTILINE)
    )  # fmt: skip


def languages(path: Path, text: str) -> str:
    """Translations in a gettext catalog."""
    if path.suffix != ".po" or {"en", "en_GB", "en_AU", "en_CA", "en_US"} & set(path.parts):
        return ""
    found = re.findall(r'^msgstr(?:\[0\])? ((?:".*"\n)+)', text, re.MULTILINE)[1:]
    lines = ("".join(ast.literal_eval(part) for part in own.splitlines()) for own in found)
    return "\n".join(line for line in lines if len(line) > 20)


def tables(path: Path, text: str) -> str:
    """Rows that stand together."""
    if path.suffix == ".csv":
        return text[:800]
    if path.suffix not in {*_DOCUMENTS, ".py"}:
        return ""
    groups: list[list[str]] = [[]]
    for line in text.splitlines():
        shown = path.suffix != ".py" or line.lstrip()[:1] in tuple("|+>-0123456789")
        if shown and is_row(line):
            groups[-1].append(line.strip())
        elif groups[-1]:
            groups.append([])
    return "\n\n".join("\n".join(rows) for rows in groups if len(rows) >= 4)


DOMAINS: Final[dict[str, Callable[[Path, str], str]]] = {
    "code": code,
    "prose": prose,
    "languages": languages,
    "tables": tables,
}


def files(folders: tuple[Path, ...]) -> Iterator[tuple[Path, str]]:
    """Text files by their paths in folders, in an order that has nothing to do with their texts."""
    paths = [(p, p.relative_to(folder)) for folder in folders for p in folder.rglob("*")]
    paths.sort(key=lambda pair: hashlib.sha256(pair[1].as_posix().encode()).digest())
    for path, name in paths:
        if path.suffix in {*_DOCUMENTS, ".py", ".po", ".csv"} and path.is_file():
            try:
                yield name, path.read_text("utf-8")
            except UnicodeDecodeError:
                continue


def domain_texts(folders: tuple[Path, ...], size: int) -> dict[str, str]:
    """A text for each domain.

    Args:
        folders: with sources of packages.
        size: bytes of each text, about.
    """
    found = dict.fromkeys(DOMAINS, "")
    for path, text in files(folders):
        for name, take in DOMAINS.items():
            if len(found[name].encode()) < size:
                part = take(path, text)[:_FILE_CHARACTERS]
                found[name] += f"{part}\n\n" if len(part) >= _FEWEST else ""
    return found


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--size", default=60_000, show_default=True, help="Bytes of a text.")
def main(folders: tuple[Path, ...], out: Path, size: int) -> None:
    """Write a text for each domain."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in domain_texts(folders, size).items():
        (out / f"{name}.txt").write_text(text, "utf-8")
        click.echo(f"{name}.txt: {len(text.encode()):,} bytes")


if __name__ == "__main__":
    main()
