"""A directive that shows a JSON Schema of the package as tables: every key, its type, what it is.

```{json-schema} manifest/manifest.schema.json
```
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any, Final

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

_BOUNDS: Final = {
    "minimum": "≥ ",
    "exclusiveMinimum": "> ",
    "maximum": "≤ ",
    "exclusiveMaximum": "< ",
    "minItems": "items ≥ ",
    "maxItems": "items ≤ ",
}


class _JsonSchema(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        path = files("nf4_pipeline").joinpath(self.arguments[0])
        schema = json.loads(path.read_text("utf-8"))
        self.env.note_dependency(str(path))
        lines = [str(schema.get("description", "")), ""]
        parts = [("The document", schema), *_definitions(schema)]
        for name, part in parts:
            lines += [f"**{name}**", ""]
            if part is not schema and part.get("description"):
                lines += [str(part["description"]), ""]
            lines += list(_table(part))
        content = nodes.container()
        self.state.nested_parse(StringList(lines, source=str(path)), 0, content)
        return content.children


def _definitions(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, part in {**schema.get("$defs", {}), **schema.get("definitions", {})}.items():
        yield f"`{name}`", part


def _table(part: dict[str, Any]) -> Iterator[str]:
    rows = list(_rows(part, ""))
    if not rows:
        yield from (_kind(part), "")
        return
    yield "| key | type | |"
    yield "| --- | --- | --- |"
    for key, value, optional in rows:
        said = str(value.get("description", "")).replace("|", "\\|").replace("\n", " ")
        yield f"| `{key}` | {_kind(value)} | {'may be absent. ' * optional}{said} |"
    yield ""


def _rows(part: dict[str, Any], before: str) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """The keys of an object and of what is in it: a.b, items[].b, by_name.*.b."""
    required = set(part.get("required", ()))
    for key, value in part.get("properties", {}).items():
        name = f"{before}{key}"
        yield name, value, key not in required
        yield from _rows(value, f"{name}.")
        for inner, sign in (("items", "[]"), ("additionalProperties", ".*")):
            if isinstance(value.get(inner), dict):
                yield from _rows(value[inner], f"{name}{sign}.")


def _kind(value: dict[str, Any]) -> str:
    """What a value may be, in one cell of a table."""
    if "$ref" in value:
        return f"`{value['$ref'].rpartition('/')[2]}`"
    if "const" in value:
        return f"`{json.dumps(value['const'])}`"
    if "enum" in value:
        return ", ".join(f"`{json.dumps(item)}`" for item in value["enum"])
    for several in ("anyOf", "oneOf", "allOf"):
        if several in value:
            return " or ".join(dict.fromkeys(_kind(item) for item in value[several]))
    kinds = value.get("type", "any")
    text = " or ".join(kinds) if isinstance(kinds, list) else str(kinds)
    if isinstance(value.get("items"), dict):
        text += f" of {_kind(value['items'])}"
    elif isinstance(value.get("additionalProperties"), dict):
        text += f" of {_kind(value['additionalProperties'])} by name"
    bounds = [sign + str(value[key]) for key, sign in _BOUNDS.items() if key in value]
    if "pattern" in value:
        bounds.append("`" + value["pattern"].replace("|", "\\|") + "`")
    return ", ".join([text, *bounds])


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers it."""
    app.add_directive("json-schema", _JsonSchema)
    return {"parallel_read_safe": True}
