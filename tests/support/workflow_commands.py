"""What GitHub's runner makes of the lines of a log: which it obeys as workflow commands.

Both forms are read as its `ActionCommand` reads them: `::name key=value::text` at the beginning of
a line, and `##[name key=value;]text` anywhere in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

_KNOWN: Final = {
    *("error", "warning", "notice", "debug", "group", "endgroup", "echo", "add-mask"),
    *("add-matcher", "remove-matcher", "set-output", "save-state", "set-env", "add-path"),
    "stop-commands",
}


@dataclass(frozen=True)
class WorkflowCommand:
    """A line that was obeyed."""

    name: str
    properties: dict[str, str] = field(default_factory=dict)
    text: str = ""


def obeyed(lines: Iterable[str]) -> list[WorkflowCommand]:
    """The commands in a log that would be obeyed, without those that stop and resume commands."""
    found, resume = [], ""
    for line in lines:
        command = _second_form(line, resume) or _first_form(line, resume)
        if command is None:
            continue
        if resume:
            resume = "" if command.name.casefold() == resume.casefold() else resume
        elif command.name == "stop-commands":
            resume = command.text
        else:
            found.append(command)
    return found


def _second_form(line: str, resume: str) -> WorkflowCommand | None:
    text = line.lstrip()
    end = text.find("::", 2)
    if not text.startswith("::") or end < 0:
        return None
    name, _, rest = text[2:end].partition(" ")
    if not _is_known(name, resume):
        return None
    pairs = (pair.split("=", 1) for pair in rest.strip().split(",") if "=" in pair)
    properties = {key: _unescaped(value, ":,") for key, value in pairs}
    return WorkflowCommand(name, properties, _unescaped(text[end + 2 :], ""))


def _first_form(line: str, resume: str) -> WorkflowCommand | None:
    start = line.find("##[")
    end = line.find("]", start)
    if start < 0 or end < 0:
        return None
    name = line[start + 3 : end].partition(" ")[0]
    if not _is_known(name, resume):
        return None
    return WorkflowCommand(name, {}, _unescaped(line[end + 1 :], ";]"))


def _is_known(name: str, resume: str) -> bool:
    return name.casefold() in _KNOWN or (bool(resume) and name.casefold() == resume.casefold())


def _unescaped(text: str, more: str) -> str:
    for char in ("\r", "\n", *more, "%"):
        text = text.replace(f"%{ord(char):02X}", char)
    return text
