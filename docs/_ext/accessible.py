"""What the theme's HTML lacks for readers without eyes or mouse (WCAG 2.2 AA, by axe-core).

Captions of the sidebar are headings without a level; boxes that scroll sideways cannot be reached
by keyboard.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

_LAST = 900  # after the theme has put its own into the context


def _mend(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: object) -> None:
    for name in ("body", "furo_navigation_tree"):
        if isinstance(context.get(name), str):
            text = context[name].replace('role="heading">', 'role="heading" aria-level="2">')
            text = re.sub(r"<pre>", '<pre tabindex="0">', text)
            text = re.sub(r'(<div class="table-wrapper[^"]*")>', r'\1 tabindex="0">', text)
            context[name] = text


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers it."""
    app.connect("html-page-context", _mend, priority=_LAST)
    return {"parallel_read_safe": True}
