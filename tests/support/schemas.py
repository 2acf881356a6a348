"""Holds document classes and published JSON Schemas together."""

from __future__ import annotations

import types
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nf4_pipeline.documents import Document

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def differences(document: type[Document], schema: dict[str, Any]) -> list[str]:
    """Where a document class and a schema disagree on keys, on what is required, or on types."""
    return list(_differences(document, schema, schema, ""))


def _differences(hint: Any, schema: dict[str, Any], root: dict[str, Any], at: str) -> list[str]:
    while "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    if hint is Any or schema == {}:
        return []
    if isinstance(hint, type) and issubclass(hint, Document):
        return _of_document(hint, schema, root, at)
    choices = _choices(schema)
    if get_origin(hint) is Literal and choices is not None:
        same = set(get_args(hint)) == choices
        return [] if same else [f"{at}: {sorted(map(str, choices))} but {hint}"]
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = {_TYPES[type(value)] for value in choices} if choices else _kinds(schema["type"])
    wrong = [f"{at}: {sorted(kinds)} but {hint}"] if kinds != set(map(_kind, parts)) else []
    for part in parts:
        inner = get_args(part)
        if isinstance(part, type) and issubclass(part, Document):
            wrong += _of_document(part, schema, root, at)
        elif get_origin(part) is tuple:
            wrong += _differences(inner[0], schema.get("items", {}), root, f"{at}[]")
        elif get_origin(part) is dict and "additionalProperties" in schema:
            wrong += _differences(inner[1], schema["additionalProperties"], root, f"{at}.*")
    return wrong


def _of_document(
    document: type[Document], schema: dict[str, Any], root: dict[str, Any], at: str
) -> list[str]:
    assert is_dataclass(document)
    hints = get_type_hints(document)
    required = set(schema.get("required", ()))
    # A schema may name the keys of an object and give them all one type.
    properties = schema.get("properties") or dict.fromkeys(
        required, schema.get("additionalProperties", {})
    )
    keys = {item.metadata.get("nf4_pipeline.key", item.name): item for item in fields(document)}
    wrong = [f"{at}.{name}: only in one of the two" for name in keys.keys() ^ properties.keys()]
    for name in keys.keys() & properties.keys():
        item = keys[name]
        optional = item.metadata.get("nf4_pipeline.optional", False)
        if optional == (name in required):
            wrong.append(f"{at}.{name}: required in one and optional in the other")
        hint = hints[item.name]
        if optional:
            left = [part for part in get_args(hint) if part is not type(None)]
            hint = Union[tuple(left)] if left else hint  # noqa: UP007  # made at run time
        wrong += _differences(hint, properties[name], root, f"{at}.{name}")
    return wrong


def _choices(schema: dict[str, Any]) -> set[Any] | None:
    if "const" in schema:
        return {schema["const"]}
    return set(schema["enum"]) if "enum" in schema else None


def _kinds(kind: str | list[str]) -> set[str]:
    return {kind} if isinstance(kind, str) else set(kind)


def _kind(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return "array"
    if get_origin(hint) is Literal:
        return _TYPES[type(get_args(hint)[0])]
    return _TYPES.get(hint, "object")
