"""The site of the documents: no warning, no dead link, nothing fetched from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urldefrag

import pytest
from nf4_pipeline import errors
from nf4_pipeline.cli import COMMANDS
from playwright.sync_api import Browser

from tests.support.browser import AXE, AXE_RUN, PATIENCE, open_browser, overflow, watch
from tests.support.doc_blocks import DOCS, ROOT
from tests.support.hub_client import PYTHONPATH

_LOADING: Final = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
_NO_RESOURCE: Final = {"search", "genindex", "index", "next", "prev", "canonical"}


class _Page(HTMLParser):
    """Links, anchors, and what a browser would load by itself."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if "id" in values:
            self.anchors.append(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if values.get(_LOADING.get(tag, ""), "") and values.get("rel") not in _NO_RESOURCE:
            self.loaded.append(values[_LOADING[tag]])


def make(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """What `make docs` runs."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going"),
            *("-d", str(site.parent / "doctrees"), str(source), str(site)),
        ],
        env={"PATH": "", "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = make(DOCS, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def read(site: Path) -> dict[Path, _Page]:
    return {path: _Page(path.read_text("utf-8")) for path in site.rglob("*.html")}


def test_make_docs_is_what_was_run() -> None:
    recipe = (ROOT / "Makefile").read_text()
    assert re.search(r"^docs: dev-venv.*\n.*sphinx --builder html.*--fail-on-warning", recipe, re.M)


def test_no_link_is_dead(site: Path, read: dict[Path, _Page]) -> None:
    dead = []
    inner = 0
    for path, page in read.items():
        for link in page.links:
            address, anchor = urldefrag(link)
            if re.match(r"[a-z]+:", address):
                continue
            target = (path.parent / unquote(address)).resolve() if address else path
            inner += 1
            if not target.is_file():
                dead.append(f"{path.relative_to(site)}: {link}")
            elif anchor and target in read and unquote(anchor) not in read[target].anchors:
                dead.append(f"{path.relative_to(site)}: {link} (no such anchor)")
    assert inner > 500
    assert dead == []


def test_links_to_elsewhere_are_whole(read: dict[Path, _Page]) -> None:
    """Whether anybody answers there cannot be tried here."""
    outer = {link for page in read.values() for link in page.links if re.match("[a-z]+:", link)}
    assert {link for link in outer if not re.match(r"https://[\w.-]+\.\w+(/|$)", link)} == set()


def test_nothing_is_fetched_from_elsewhere(site: Path, read: dict[Path, _Page]) -> None:
    loaded = {link for page in read.values() for link in page.loaded}
    assert len(loaded) > 10
    assert {link for link in loaded if re.match(r"([a-z]+:)?//", link)} == set()
    styles = [style.read_text("utf-8") for style in site.rglob("*.css")]
    assert [found for text in styles for found in re.findall(r"url\([\"']?https?:", text)] == []
    assert [text for text in styles if "@import" in text] == []


def test_a_dead_link_or_anchor_stops_it(tmp_path: Path) -> None:
    source = tmp_path / "docs"
    source.mkdir()
    for name in ("conf.py", "_ext", "_static"):
        (source / name).symlink_to(DOCS / name)
    page = (
        "# One\n\n[two](two.md), [no page](none.md), [no anchor](two.md#none), [not here](#none)\n"
    )
    (source / "index.md").write_text(f"{page}\n```{{toctree}}\ntwo\n```\n")
    (source / "two.md").write_text("# Two\n")
    (source / "lost.md").write_text("# In no table of contents\n")
    done = make(source, tmp_path / "site")
    assert done.returncode == 1
    for said in ("none.md", "'none'", "lost.md"):
        assert said in done.stderr
    assert done.stderr.count("WARNING") == 4


def test_the_reference_has_every_command_and_option(site: Path) -> None:
    page = (site / "reference" / "commands.html").read_text("utf-8")
    for name in COMMANDS:
        assert f'id="nf4-{name}"' in page
    assert page.count("--calibrate") >= 2


def classes() -> list[str]:
    return [
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.PipelineError)
    ]


@pytest.mark.parametrize("name", classes())
def test_every_error_has_an_entry(name: str) -> None:
    """With what to do about it, on the page of troubleshooting."""
    text = (DOCS / "troubleshooting.md").read_text("utf-8")
    entry = re.search(rf"^### {name}\n\n((?:(?!^#).*\n)+)", text, re.MULTILINE)
    assert entry, f"docs/troubleshooting.md has no entry {name}"
    assert len(entry[1].split()) >= 12


def test_no_entry_is_of_an_error_that_is_gone() -> None:
    text = (DOCS / "troubleshooting.md").read_text("utf-8")
    entries = re.findall(r"^### (\w+)$", text.split("## By kind of error")[1], re.MULTILINE)
    assert sorted(entries) == sorted(classes())


PICTURES: Final = os.environ.get("NF4_SCREENSHOTS")
"""A folder for pictures of all pages, to be looked at."""

LOOKED_AT: Final = ("index", "first-artifact", "recipes", "messages", "reference/commands")
"""One of each kind; all of them where axe or pictures are asked for."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_open(browser: Browser, site: Path, scheme: Any, width: int) -> None:
    """Nothing is wider than the window, nothing asked of a network, nothing said to the console."""
    everything = sorted(path.relative_to(site).with_suffix("") for path in site.rglob("*.html"))
    names = everything if AXE or PICTURES else LOOKED_AT
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True
    )
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    said, asked = watch(page)
    violations = {}
    try:
        for name in map(str, names):
            page.goto((site / f"{name}.html").as_uri())
            assert page.locator("h1").first.is_visible() or name in ("search", "genindex"), name
            assert overflow(page) <= 0, name
            if PICTURES:
                target = Path(PICTURES) / f"{name.replace('/', '-')}-{width}-{scheme}.png"
                page.screenshot(path=target, full_page=name != "messages")
            if AXE:
                page.evaluate(Path(AXE).read_text("utf-8"))
                if found := page.evaluate(AXE_RUN)["violations"]:
                    violations[name] = found
        assert violations == {}
        assert AXE or said == []  # axe reads the styles anew, and the browser says so
        assert [address for address in asked if not address.startswith(("file:", "data:"))] == []
    finally:
        context.close()


def test_the_search_finds_a_message(browser: Browser, site: Path) -> None:
    """Without a server, from the files alone."""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    try:
        page.goto((site / "search.html").as_uri() + "?q=pickles")
        page.locator("ul.search li a").first.wait_for()
        assert "troubleshooting.html" in page.content()
    finally:
        page.close()
