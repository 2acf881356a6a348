"""A headless Chromium, and what to ask of a page in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES: Final = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS: Final = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

PATIENCE: Final = 300_000
"""Milliseconds for a page, and for whatever is asked of it: a machine may be busy."""

AXE: Final = os.environ.get("NF4_AXE")
"""An axe.min.js (`npm pack axe-core`), if the pages are to be held against WCAG."""

AXE_RUN: Final = """() => axe.run({runOnly: {type: "tag", values: [
    "wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}}).then(result => ({
  violations: result.violations.map(v => [v.id, v.nodes.map(n => n.html.slice(0, 120))]),
  passed: result.passes.length}))"""


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser with a fresh profile; where there is none, the test is skipped."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        if os.environ.get("NF4_REQUIRE_BROWSER"):
            pytest.fail(f"NF4_REQUIRE_BROWSER is set and none of {', '.join(NAMES)} was found.")
        pytest.skip(f"No browser: none of {', '.join(NAMES)} was found.")
    with sync_playwright() as playwright:
        # A fresh profile in a temporary folder is what launch() makes.
        opened = playwright.chromium.launch(executable_path=path, args=ARGUMENTS, timeout=PATIENCE)
        yield opened
        opened.close()


def watch(page: Page) -> tuple[list[str], list[str]]:
    """What the console says, and what is asked of files and network."""
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: asked.append(request.url))
    return said, asked


def overflow(page: Page) -> int:
    """By how many pixels a page is wider than its window."""
    found: int = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    return found
