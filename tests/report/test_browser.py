"""The page in a real browser: headless Chromium opens the file as a person would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nf4_pipeline.report.page import render, report_page
from nf4_pipeline.verification.document import parse_verification
from playwright.sync_api import Browser, Page

from tests.support import made
from tests.support.browser import AXE, AXE_RUN, PATIENCE, open_browser, overflow, watch

PICTURES = ["sizes", "layers", "kl", "domains"]
CASES: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "falcon": (made.made(against=True), "Pass", PICTURES),
    "calibrated": (made.made(nearest=True), "Pass", PICTURES),
    "learned": (made.made(nearest=True, learned=True), "Pass", PICTURES),
    "sample": (made.sample(), "Pass", PICTURES),
    "large": (made.large(), "Pass", PICTURES),
    "failed gate": (made.failed_gate(), "Fail", []),
    "nulls": (made.nulls(), "Fail", ["sizes", "layers"]),
    "hostile": (made.hostile(), "Pass", PICTURES),
}
# The smallest contrast (WCAG 2) of any text with what is behind it, and which text that is. Cells
# of the heat map are left out: their letters stand on the colour of a number.
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const known = new Map();
  const rgba = colour => {
    if (!known.has(colour)) {
      canvas.clearRect(0, 0, 1, 1);
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
      known.set(colour, canvas.getImageData(0, 0, 1, 1).data);
    }
    return known.get(colour);
  };
  const luminance = ([red, green, blue]) => [red, green, blue]
    .map(value => value / 255)
    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    throw new Error("nothing opaque behind " + element.outerHTML.slice(0, 80));
  };
  let worst = [21, ""];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let texts = 0;
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    const text = walk.currentNode.data.trim();
    if (!text || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    if (element.tagName === "text" && !element.style.fill.startsWith("var(")) continue;
    const front = luminance(rgba(element.tagName === "text" ? style.fill : style.color));
    const back = luminance(behind(element));
    const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    if (ratio < worst[0]) worst = [ratio, text.slice(0, 40)];
    texts += 1;
  }
  return [...worst, texts];
}"""


# What scrolls sideways: on a phone nobody sees that there is more.
CUT = """() => [...document.querySelectorAll("*")]
  .filter(e => e.checkVisibility() && e.clientWidth > 1 && e.scrollWidth > e.clientWidth + 1)
  .filter(e => getComputedStyle(e).overflowX !== "visible")
  .map(e => e.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    paths = {name: folder / f"{name}.html" for name in CASES}
    for name, path in paths.items():
        path.write_text(report_page(made.manifest(), parse_verification(CASES[name][0])), "utf-8")
    return paths


@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", CASES)
def test_the_page_opens(
    browser: Browser, files: dict[str, Path], name: str, scheme: Any, width: int
) -> None:
    _, verdict, drawn = CASES[name]
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.set_default_timeout(PATIENCE)
    said, asked = watch(page)
    page.goto(files[name].as_uri())
    try:
        badge = page.locator("#verdict")
        assert badge.is_visible()
        assert verdict in badge.inner_text()
        assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == (
            "rgb(246, 247, 248)" if scheme == "light" else "rgb(18, 21, 25)"
        )

        shown = page.locator("svg[role=img]:visible")
        assert shown.count() == len(drawn)
        for place in range(shown.count()):
            box = shown.nth(place).bounding_box()
            assert box is not None
            assert box["width"] >= min(600, width - 70)
            assert box["height"] >= 80
        assert [s.get_attribute("aria-labelledby") for s in _sections(page)] == drawn

        assert overflow(page) <= 0
        assert width > 400 or page.evaluate(CUT) == []
        ratio, text, texts = page.evaluate(CONTRAST)
        assert texts > 20
        assert ratio >= 4.5, text

        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
        assert overflow(page) <= 0
        assert width > 400 or page.evaluate(CUT) == []
        assert page.evaluate(CONTRAST)[0] >= 4.5
        assert said == []
        assert asked == [files[name].as_uri()]
    finally:
        page.close()


@pytest.mark.skipif(not AXE, reason="NF4_AXE names no axe.min.js (npm pack axe-core)")
@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", CASES)
def test_axe_finds_no_violation(
    browser: Browser, files: dict[str, Path], name: str, scheme: Any, width: int
) -> None:
    """Of WCAG 2.2 A and AA, with all that folds folded and opened."""
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True
    )
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(files[name].as_uri())
    page.evaluate(Path(str(AXE)).read_text("utf-8"))
    try:
        for opened in (False, True):
            page.evaluate(f"document.querySelectorAll('details').forEach(d => d.open = {opened:d})")
            found = page.evaluate(AXE_RUN)
            assert found["violations"] == []
            assert found["passed"] > 20
    finally:
        context.close()


def test_the_page_prints_light_and_within_the_paper(
    browser: Browser, files: dict[str, Path]
) -> None:
    page = browser.new_page(viewport={"width": 718, "height": 1000}, color_scheme="dark")
    page.set_default_timeout(PATIENCE)
    page.goto(files["falcon"].as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    try:
        assert overflow(page) <= 0
        assert page.evaluate(CONTRAST)[0] >= 4.5
        background = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert background == "rgb(255, 255, 255)"
    finally:
        page.close()


def _sections(page: Page) -> list[Any]:
    return page.locator("section:has(> figure svg)").all()


ACTIVE = (
    '"><img src=x onerror="window.ran=1">',
    "'><svg onload=window.ran=2>",
    "</script><script>window.ran=3</script>",
    "</style><style>*{background:url(https://evil.example/s)}</style>",
    "</title><script>window.ran=4</script>",
    "</svg></section></main><iframe src=https://evil.example/f></iframe>",
    "javascript:window.ran=5",
    "<a href=javascript:window.ran=6 autofocus onfocus=window.ran=7>x</a>",
    "<base href=https://evil.example/><link rel=stylesheet href=//evil.example/l>",
    "<meta http-equiv=refresh content=0;url=https://evil.example/m>",
    "<details open ontoggle=window.ran=8>",
    "<object data=https://evil.example/o></object><embed src=//evil.example/e>",
    "url(https://evil.example/u) expression(window.ran=9) {{ 7*7 }} {% raw %}",
    "$\\href{https://evil.example/h}{x}$ <![CDATA[ ]]> &#60;script&#62;",
    "%3Cscript%3E \\u003cscript\\u003ewindow.ran=10\\u003c/script\\u003e",
    "+ADw-script+AD4-window.ran=11+ADw-/script+AD4-",
    "<form action=https://evil.example/a><input autofocus onfocus=window.ran=12>",
    "\u202e<b>\u2066</b>\x00\x1b]8;;https://evil.example/t\x07",
)


def poison(verification: dict[str, Any], payload: str) -> int:
    """Puts a payload into every text that a verification can have; returns how many those are."""
    places = 0

    def visit(value: Any) -> None:
        nonlocal places
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            inner = value[key]
            if isinstance(inner, dict | list):
                visit(inner)
            elif isinstance(inner, str):
                value[key] = f"{payload} {inner}"
                try:
                    parse_verification(verification)
                    places += 1
                except ValueError:  # one of few words that this package itself writes
                    value[key] = inner

    visit(verification)
    for name in ("versions", "kept_bytes_by_reason"):
        for holder in (verification, verification["sizes"]):
            if name in holder:
                holder[name] = {f"{payload}{key}": item for key, item in holder[name].items()}
    return places


DRAWN = (ACTIVE[0], ACTIVE[5], "".join(ACTIVE))
"""With the pictures, which take their time."""


@pytest.mark.parametrize("payload", [*ACTIVE, "".join(ACTIVE)], ids=lambda text: text[:24])
def test_nothing_that_a_stranger_names_acts(browser: Browser, tmp_path: Path, payload: str) -> None:
    """Without the page's own policy, too: that nothing acts hangs on the escaping alone."""
    verification = made.made(blocks=2, prompts=2, expected=True, against=True, nearest=True)
    assert poison(verification, payload) > 40
    calibration = made.calibration() | {"fallbacks": {f"{payload}name": f"{payload}reason"}}
    calibration["kept"][0]["module"] = payload
    manifest = made.manifest(payload, commit=False, calibrated=calibration)
    manifest = replace(manifest, model_class=payload)
    document = parse_verification(verification)
    path = tmp_path / "report.html"
    drawn = payload in DRAWN
    page_text = report_page(manifest, document) if drawn else render(manifest, document, {})
    path.write_text(page_text, "utf-8")
    context = browser.new_context(bypass_csp=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    said, asked = watch(page)
    try:
        page.goto(path.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
        page.keyboard.press("Tab")
        page.wait_for_timeout(50)
        assert page.evaluate("window.ran") is None
        assert said == []
        assert asked == [path.as_uri()]
        assert page.url == path.as_uri()
        assert len(context.pages) == 1
        assert page.evaluate(FOREIGN) == []
        shown = page.evaluate("document.body.innerText")
        begins = payload.partition("<")[0][:20].strip()
        if not begins.isprintable():  # marks of direction are shown as another character
            begins = ""
        assert shown.count(begins or "<") > 20
    finally:
        context.close()


FOREIGN = """() => [...document.querySelectorAll("*")].filter(element =>
  ["script", "iframe", "object", "embed", "img", "base", "form", "input", "image",
   "foreignobject", "animate", "set"].includes(element.localName)
  || (element.localName === "a"
      && !/^(#[a-z]+|https:..github.com.ggml-org.llama.cpp.*)$/.test(element.getAttribute("href")))
  || [...element.attributes].some(a => a.name.startsWith("on") || /javascript:|evil/.test(
       ["aria-label", "title", "data-label"].includes(a.name) ? "" : a.value))
).map(element => element.outerHTML.slice(0, 100))"""
