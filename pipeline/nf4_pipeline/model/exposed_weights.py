"""Linear layers whose weight the model uses itself, passing over the layer: found by watching it.

A 4-bit weight is a column of bytes. It does for the layer that holds it, and for nobody else: code
that slices it, multiplies by it or asks for its dtype gets something else than it expects. Such
layers (dt_proj of Mamba, the router of LongCat Flash, BLOOM with pretraining_tp) stay in 16 bit.

The model runs on the meta device with layers that note who takes their weight. What cannot run
there (a choice of experts depends on values) hands on its input instead, and is read: its source
says which layers' weights it takes.
"""

from __future__ import annotations

import ast
import inspect
import os
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from types import CodeType
from typing import Any, Final

_TOKENS: Final = 8
_HARMLESS: Final = ("device", "requires_grad", "is_cuda", "is_meta", "grad")
"""What may be asked of a weight without meaning its values, its shape or its dtype."""


def exposed_modules(model: Any, linears: frozenset[str]) -> frozenset[str]:
    """The linear layers whose weight is used outside of their forward.

    Args:
        model: a causal LM on the meta device; it is of no use for anything else afterwards.
        linears: names of the modules to watch.

    Returns:
        Names of modules. Functions that ask a weight for its `quant_state` or `SCB` know of
        quantized weights, and do not count.
    """
    import torch

    watch = _Watch()
    modules = dict(model.named_modules())
    for name in linears:
        watch.linear(modules[name], name)
    for name, module in modules.items():
        if name and name not in linears:
            watch.guard(module, name)
    model.eval()
    ids = torch.zeros((1, _TOKENS), dtype=torch.int64, device="meta")
    made: Any = None
    with torch.no_grad():
        try:
            made = model(input_ids=ids, use_cache=True)
        except Exception:  # models may reject values in any way they like, and meta values more so
            watch.failed.add("")
        if (past := getattr(made, "past_key_values", None)) is not None:
            with suppress(Exception):  # the step from one token to the next may go another way
                model(input_ids=ids[:, :1], past_key_values=past, use_cache=True)
    found = {owner for owner, code in watch.used if code not in watch.aware}
    for name in watch.failed:
        found |= {f"{name}.{child}".lstrip(".") for child in _taken_in_source(modules[name])}
    return frozenset(found & linears)


class _Watch:
    """What was seen.

    Attributes:
        used: layers whose weight was used, each with the code that did.
        aware: code that asked a weight whether it is quantized.
        failed: modules that could not run.
    """

    def __init__(self) -> None:
        self.used: set[tuple[str, CodeType]] = set()
        self.aware: set[CodeType] = set()
        self.failed: set[str] = set()

    def linear(self, module: Any, name: str) -> None:
        """Has a layer hand out a weight that tells what it is used for, but not to itself."""
        inside = [0]
        kind = type(module)
        tensor = _watched_tensor()

        def get(own: Any, attribute: str) -> Any:
            value = kind.__getattr__(own, attribute)
            if attribute != "weight" or inside[0]:
                return value
            watched = value.data.as_subclass(tensor)
            watched.watch, watched.owner = self, name
            return watched

        forward = module.forward

        def run(*args: Any, **options: Any) -> Any:
            inside[0] += 1
            try:
                return forward(*args, **options)
            finally:
                inside[0] -= 1

        module.__class__ = type(kind.__name__, (kind,), {"__getattr__": get})
        module.forward = run

    def guard(self, module: Any, name: str) -> None:
        """Has a module that cannot run without values hand on its input."""
        forward = module.forward

        def run(*args: Any, **options: Any) -> Any:
            try:
                return forward(*args, **options)
            except Exception:
                given = next(_floats([*args, *options.values()]), None)
                if given is None:
                    raise
                self.failed.add(name)
                return given

        module.forward = run


@cache
def _watched_tensor() -> Any:
    """The class of weights that tell what they are used for; made late, since torch is slow."""
    import torch

    class Watched(torch.Tensor):
        watch: _Watch
        owner: str

        def __getattr__(self, name: str) -> Any:
            if name in ("quant_state", "SCB"):
                self.watch.aware.add(_calling_code())
            raise AttributeError(name)

        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            harmless = attribute in _HARMLESS

            def plain(value: Any) -> Any:
                if isinstance(value, Watched):
                    if not harmless:
                        value.watch.used.add((value.owner, _calling_code()))
                    return value.as_subclass(torch.Tensor)
                if isinstance(value, list | tuple):
                    return type(value)([plain(item) for item in value])
                return value

            with torch._C.DisableTorchFunctionSubclass():
                return func(
                    *[plain(arg) for arg in args],
                    **{key: plain(value) for key, value in (kwargs or {}).items()},
                )

    return Watched


def _calling_code() -> CodeType:
    """The code of the model that is running, below that of torch and of this module."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename == __file__ or f"{os.sep}torch{os.sep}" in frame.f_code.co_filename
    ):
        frame = frame.f_back
    return frame.f_code


def _floats(values: list[Any]) -> Iterator[Any]:
    import torch

    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            yield value


def _taken_in_source(module: Any) -> set[str]:
    """Children whose weight a module's class takes, as its source says: `self.child.weight`."""
    names = {name for name, _ in module.named_modules() if name}
    found: set[str] = set()
    for kind in type(module).__mro__:
        if kind is not object and not kind.__module__.startswith("torch."):
            found |= _weights_in(kind) & names
    return found


@cache
def _weights_in(kind: type) -> frozenset[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):  # no source: nothing can be read in it
        return frozenset()
    harmless = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in _HARMLESS
    }
    paths = (
        _path(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "weight" and node not in harmless
    )
    return frozenset(path for path in paths if path)


def _path(node: ast.expr) -> str | None:
    """`self.a.b` -> "a.b"."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if isinstance(node, ast.Name) and node.id == "self" else None
