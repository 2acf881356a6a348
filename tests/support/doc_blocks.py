"""The blocks of code in the documents, and what a comment before a block says of it.

    <!-- not run: REASON -->    its commands are parsed, its code is compiled, and that is all
    <!-- slow: REASON -->       the same in the tests; `scripts/campaigns/docs.py` runs it
    <!-- file: NAME -->         the content of a file that later blocks of the page use

Of all others, those in sh, console, python and toml are run (`doc_runner.py`). A comment with
"page" before the word ("page not run: …") holds for every block of its page that has none of its
own.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import click
from markdown_it import MarkdownIt
from nf4_pipeline.cli import COMMANDS, cli

ROOT: Final = Path(__file__).parents[2]
DOCS: Final = ROOT / "docs"
RUN: Final = ("sh", "console", "python", "toml")
"""Languages whose blocks are run unless they say why not."""
KNOWN: Final = (*RUN, "", "json", "yaml")

_MARK: Final = re.compile(r"<!--\s*(page )?(not run|slow|file): (.+?)\s*-->", re.DOTALL)
_PRINTS: Final = ("python", "slow")
_PARSER: Final = MarkdownIt("commonmark").enable("table")
_ASSIGNMENT: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: the document, from `docs/` on.
        line: its first line there.
        language: what stands behind the fence.
        text: what stands in it.
        mark: "not run", "slow", "file", or nothing.
        why: what the mark says: a reason, or the name of the file.
        output: of a slow Python block, what the page says that it prints.
    """

    page: str
    line: int
    language: str
    text: str
    mark: str = ""
    why: str = ""
    output: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The logical lines of a shell block, without comments; what is typed in a console."""
        text = re.sub(r"\\\n\s*", " ", self.text)
        lines = [line.strip() for line in text.splitlines()]
        if self.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [line for line in lines if line and not line.startswith("#")]


def pages() -> list[Path]:
    """All documents."""
    return sorted(DOCS.rglob("*.md"))


def blocks_of(path: Path) -> list[Block]:
    """The blocks of a document, in their order; what is a directive of the site is none."""
    page = path.relative_to(DOCS).as_posix() if path.is_relative_to(DOCS) else path.name
    text = path.read_text("utf-8")
    whole = next((found for found in _MARK.finditer(text) if found[1]), None)
    found: list[Block] = []
    mark: re.Match[str] | None = None
    for token in _PARSER.parse(text):
        if token.type == "html_block":
            mark = _MARK.search(token.content)
            if mark is not None and mark[1]:
                mark = None
            continue
        if token.type == "fence" and not token.info.startswith("{"):
            assert token.map is not None
            said = mark or whole
            kind, why = (said[2], " ".join(said[3].split())) if said else ("", "")
            block = Block(page, token.map[0] + 1, token.info, token.content, kind, why)
            if not block.language and found and (found[-1].language, found[-1].mark) == _PRINTS:
                found[-1] = replace(found[-1], output=block.text)
            found.append(block)
        mark = None
    return found


def inline_commands(path: Path) -> Iterator[str]:
    """What stands in the text as `nf4 …`."""
    for token in _PARSER.parse(path.read_text("utf-8")):
        for child in token.children or ():
            if child.type == "code_inline" and child.content.startswith("nf4 "):
                yield child.content


def fault_of(line: str, *, whole: bool = True) -> str:
    """What `nf4` would find wrong with a line before it begins; nothing if all is well.

    Args:
        line: a simple command, with variables before it and `&&` between several.
        whole: what is required must be there; not so where a text only names a command.
    """
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        return f"{line}: {error}"
    simple: list[list[str]] = [[]]
    for word in words:
        if word in ("&&", "|", ";", "&", "||"):
            simple.append([])
        else:
            simple[-1].append(word)
    return "; ".join(filter(None, (_fault_of_words(part, whole) for part in simple)))


def _fault_of_words(words: list[str], whole: bool) -> str:
    while words and _ASSIGNMENT.match(words[0]):
        words = words[1:]
    if len(words) < 2 or words[0] not in ("nf4", ".venv/bin/nf4"):
        return ""
    name, *args = words[1:]
    if name in ("--help", "-h", "--version", "-V"):
        return ""
    if name not in COMMANDS:
        return "" if not whole and not name.isalpha() else f"nf4 has no command {name!r}"
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    context = click.Context(command, info_name=name)
    if not whole:  # a text may break off: `nf4 push … --repo-id`
        known = {
            option for param in command.params for option in (*param.opts, *param.secondary_opts)
        }
        known |= set(context.help_option_names) | {"-h", "--help"}
        asked = [word.partition("=")[0] for word in args if re.match("--?[a-z]", word)]
        return ", ".join(f"nf4 {name} has no {word}" for word in asked if word not in known)
    try:
        values, _, _ = command.make_parser(context).parse_args(args)
    except click.UsageError as error:
        return f"nf4 {name}: {error.message}"
    missing = [
        param.human_readable_name
        for param in command.params
        if param.required
        and (param.name not in values or param.value_is_missing(values[param.name]))
    ]
    return f"nf4 {name}: {missing} missing" if missing else ""


def faults(block: Block) -> list[str]:
    """What is wrong with a block as far as can be told without running it."""
    if block.language not in KNOWN:
        return [f"unknown language {block.language!r}; expected one of {KNOWN}"]
    if block.mark and len(block.why) < 4:
        return ["the comment gives no reason"]
    if block.language == "python":
        try:
            ast.parse(block.text)
        except SyntaxError as error:
            return [str(error)]
    if block.language in ("sh", "console"):
        return [fault for line in block.commands if (fault := _fault_of_line(line))]
    return []


def _fault_of_line(line: str) -> str:
    script = re.search(r"(?:^|\s)(?:python|sh|bash) (scripts/\S+)", line)
    if script and not (ROOT / script[1]).is_file():
        return f"there is no {script[1]}"
    target = re.match(r"make ([a-z]+)", line)
    if target and not re.search(rf"^{target[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE):
        return f"make has no target {target[1]!r}"
    line = re.sub(r"\$\(\(.*?\)\)|\$\{.*?\}|\$\w+", "1", line)
    return fault_of(line) if re.match(r"([A-Z_]+=\S* )*nf4 ", line) else ""
