"""The modules of an artifact as a tree, with bits and error; alike layers are one branch."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import prod
from typing import Final

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from nf4_pipeline.manifest.manifest import Tensor
from nf4_pipeline.printable import printable

_INDENT: Final = 4  # columns that a level takes
_VALUES: Final = 22  # columns of bits and error
_LEAST_NAME: Final = 12


@dataclass
class Branch:
    """A module, or several that are alike.

    Attributes:
        name: its part of the whole name, such as "mlp" or "0–31".
        branches: what is in it.
        tensors: of its own, one of each module that it stands for.
    """

    name: str
    branches: list[Branch] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)

    def likeness(self) -> tuple[object, ...]:
        """Equal for modules that differ in nothing but their numbers, errors and hashes."""
        own = [(t.name.rpartition(".")[2], t.shape, t.quantized, t.dtype) for t in self.tensors]
        return (*own, *((branch.name, *branch.likeness()) for branch in self.branches))


def tree_of(tensors: Iterable[Tensor]) -> Branch:
    """The tree, with numbered modules that are alike and follow each other in one branch."""
    root = Branch("")
    for tensor in tensors:
        *modules, _ = tensor.name.split(".")
        at = root
        for name in modules:
            found = next((branch for branch in at.branches if branch.name == name), None)
            if found is None:
                found = Branch(name)
                at.branches.append(found)
            at = found
        at.tensors.append(tensor)
    return _folded(root)


def _folded(branch: Branch) -> Branch:
    inside: list[Branch] = []
    children = [_folded(child) for child in branch.branches]
    for _, group in groupby(enumerate(children), key=lambda pair: _series(*pair)):
        alike = [child for _, child in group]
        first, last = alike[0], alike[-1]
        inside.append(first if first is last else _merged(f"{first.name}–{last.name}", alike))
    return Branch(branch.name, inside, branch.tensors)


def _series(place: int, branch: Branch) -> tuple[object, ...]:
    """Equal for neighbours that can be one branch: numbered in their order, and alike."""
    if not re.fullmatch(r"[0-9]{1,9}", branch.name):
        return ("name", place)
    return (int(branch.name) - place, branch.likeness())


def _merged(name: str, alike: Sequence[Branch]) -> Branch:
    inside = zip(*(branch.branches for branch in alike), strict=True)
    return Branch(
        name,
        [_merged(same[0].name, same) for same in inside],
        [tensor for branch in alike for tensor in branch.tensors],
    )


def lines_of(tensors: Iterable[Tensor], width: int, encoding: str = "utf-8") -> list[str]:
    """The tree, drawn.

    Args:
        tensors: of the artifact.
        width: columns that it may take.
        encoding: of where it is shown; without UTF-8 the lines are drawn in ASCII.
    """
    root = _joined(tree_of(tensors))
    wanted = max((_room(branch) for branch in root.branches), default=0)
    room = max(_LEAST_NAME, min(wanted, width - _VALUES))
    title = printable(root.name.lstrip("."))
    drawn = Tree(Text(f"{title[:room]:{room}}   bits  error"), guide_style="none")
    for branch in root.branches:
        _draw(branch, drawn, room - _INDENT)
    if root.tensors:  # of a model that is one module
        drawn.add(_label("(model)", root.tensors, room - _INDENT))
    # As wide as it likes: a terminal that is too narrow breaks lines, and no figure is cut.
    console = Console(file=io.StringIO(), width=10_000, no_color=True)
    options = replace(console.options, encoding=encoding)
    drawn_lines = console.render_lines(drawn, options, pad=False)
    return ["".join(segment.text for segment in line).rstrip() for line in drawn_lines]


def _joined(branch: Branch) -> Branch:
    """A branch together with what is alone in it, where that is a number or this is the root."""
    while not branch.tensors and len(branch.branches) == 1:
        (inner,) = branch.branches
        if branch.name and not inner.name[:1].isdigit():
            break
        branch = Branch(f"{branch.name}.{inner.name}", inner.branches, inner.tensors)
    return branch


def _room(branch: Branch, depth: int = 1) -> int:
    branch = _joined(branch)
    own = depth * _INDENT + len(printable(branch.name))
    return max([own, *(_room(inner, depth + 1) for inner in branch.branches)])


def _draw(branch: Branch, tree: Tree, room: int) -> None:
    branch = _joined(branch)
    node = tree.add(_label(printable(branch.name), branch.tensors, room))
    for inner in branch.branches:
        _draw(inner, node, max(room - _INDENT, _LEAST_NAME))


def _label(name: str, tensors: Sequence[Tensor], room: int) -> Text:
    name = name if len(name) <= room else f"{name[: room - 1]}…"
    return Text(f"{name:{room}} {_values(tensors)}", no_wrap=True)


def _values(tensors: Sequence[Tensor]) -> str:
    weights = sum(prod(tensor.shape) for tensor in tensors)
    if not weights:
        return ""
    bits = 8 * sum(tensor.bytes for tensor in tensors) / weights
    errors = sorted(_errors(tensors))
    said = f"{bits:6.2f}"
    if not errors:
        return said
    low, high = f"{errors[0]:.4f}", f"{errors[-1]:.4f}"
    return f"{said}  {low}" + (f"–{high}" if low != high else "")


def _errors(tensors: Sequence[Tensor]) -> Iterator[float]:
    return (t.relative_rmse for t in tensors if t.relative_rmse is not None)
