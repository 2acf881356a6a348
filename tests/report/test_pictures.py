"""The pictures: what is drawn, that it is the same every time, and that it follows the numbers."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from nf4_pipeline.report.pictures import pictures, svg_elements
from nf4_pipeline.verification.document import BlockError, LayerError, parse_verification
from PIL import Image

from tests.support import made

REPOSITORY = Path(__file__).parents[2]


def png(verification: dict[str, Any]) -> dict[str, bytes]:
    return pictures(made.manifest(), parse_verification(verification))


def svg(verification: dict[str, Any]) -> dict[str, str]:
    return svg_elements(parse_verification(verification))


NAMES = ["pictures/bytes.png", "pictures/kl.png", "pictures/layers.png"]


def test_png_files_are_sane_and_the_same_every_time() -> None:
    first = png(made.made())
    assert sorted(first) == NAMES
    assert first == png(made.made())
    for content in first.values():
        image = Image.open(io.BytesIO(content))
        assert image.width == 1600
        assert 400 < image.height < 1400
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
        assert set(image.info) <= {"dpi"}  # no date, no software
        assert len(content) < 250_000


def test_a_users_matplotlib_settings_change_nothing() -> None:
    import matplotlib

    before = png(made.sample())
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "savefig.dpi": 7}):
        assert png(made.sample()) == before
        assert matplotlib.rcParams["font.size"] == 30


@pytest.mark.parametrize(
    ("verification", "names"),
    [
        (made.large(), NAMES),
        (made.sample(), NAMES),
        (made.hostile(), NAMES),
        (made.failed_gate(), []),
        (made.nulls(), ["pictures/bytes.png", "pictures/layers.png"]),
        (made.without_tokenizer(), ["pictures/bytes.png", "pictures/kl.png"]),
    ],
    ids=["large", "sample", "hostile", "failed gate", "nulls", "no blocks"],
)
def test_what_cannot_be_drawn_is_left_out(verification: dict[str, Any], names: list[str]) -> None:
    assert sorted(png(verification)) == names


def test_identical_models() -> None:
    """Every KL is 0, which a logarithmic axis does not have."""
    verification = made.made()
    zero = {"value": 0.0, "low": 0.0, "high": 0.0}
    for key in ("mean_kl", "median_kl", "p99_kl", "max_kl"):
        verification["fidelity"][key] = zero
    for domain in verification["domains"]:
        domain["mean_kl"] = zero
    for block in verification["blocks"]:
        block["relative_error"] = 0.0
        for module in block["modules"]:
            module["relative_error"] = 0.0
    counts = verification["kl_histogram"]["counts"]
    verification["kl_histogram"]["counts"] = [8176] + [0] * (len(counts) - 1)
    assert sorted(svg(verification)) == ["domains", "kl", "layers", "sizes"]


def texts_of(pairs: Mapping[str, str]) -> list[str]:
    """Each <svg> element, wide and narrow."""
    return [f"<svg{text}" for pair in pairs.values() for text in pair.split("<svg")[1:]]


def test_svg_elements_stand_in_a_page_without_touching_it() -> None:
    ids: list[str] = []
    for pair in svg(made.hostile()).values():
        wide, narrow = ElementTree.fromstring(f"<pair>{pair}</pair>")
        assert (wide.get("class"), narrow.get("class")) == ("wide", "narrow")
    for text in texts_of(svg(made.hostile())):
        root = ElementTree.fromstring(text)
        tags = {element.tag for element in root.iter()}
        assert tags <= {"svg", "g", "path", "defs", "use", "text", "tspan", "clipPath", "rect"}
        assert root.get("role") == "img"
        assert root.get("aria-label")
        own = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        used = re.findall(r'(?:url\(|href=")#([^)"]+)', text)
        assert set(used) == set(own)
        ids += own
        assert "DejaVu" not in text
        assert "://" not in text
    assert len(ids) == len(set(ids))


def test_colours_follow_the_theme() -> None:
    """Only the heat map, whose colours mean numbers, has colours of its own."""
    for name, text in svg(made.made()).items():
        assert "var(--ink)" in text
        assert (re.search("#[0-9a-f]{6}", text) is not None) is (name == "layers")


def _group(v: dict[str, Any]) -> None:
    v["sizes"]["groups"][0]["after"] //= 2


def _layer(v: dict[str, Any]) -> None:
    v["blocks"][3]["modules"][1]["relative_error"] *= 1.5


def _block(v: dict[str, Any]) -> None:
    v["blocks"][3]["relative_error"] *= 1.5


def _bin(v: dict[str, Any]) -> None:
    v["kl_histogram"]["counts"][20] += 300


def _position(v: dict[str, Any]) -> None:
    v["kl_by_position"][4]["mean_kl"] *= 2


def _mean(v: dict[str, Any]) -> None:
    v["fidelity"]["mean_kl"]["value"] *= 2


def _domain(v: dict[str, Any]) -> None:
    v["domains"][2]["mean_kl"]["high"] *= 2


def _nearest(v: dict[str, Any]) -> None:
    v["nearest"]["domains"][2]["mean_kl"]["low"] *= 0.5


@cache
def _unchanged() -> dict[str, str]:
    return svg(made.made(nearest=True))


@pytest.mark.parametrize(
    ("change", "moved"),
    [
        (_nearest, {"domains"}),
        (_group, {"sizes"}),
        (_layer, {"layers"}),
        (_block, {"layers"}),
        (_bin, {"kl"}),
        (_position, {"kl"}),
        (_mean, {"kl", "domains"}),
        (_domain, {"domains"}),
    ],
)
def test_a_number_moves_its_picture(
    change: Callable[[dict[str, Any]], None], moved: set[str]
) -> None:
    before = _unchanged()
    verification = made.made(nearest=True)
    change(verification)
    after = svg(verification)
    assert {name for name in before if before[name] != after[name]} == moved


def test_each_thing_compared_has_its_dots_and_its_name() -> None:
    plain = svg(made.made())["domains"]
    assert "this artifact" not in plain
    for nearest, against in ((True, False), (False, True), (True, True)):
        text = svg(made.made(nearest=nearest, against=against))["domains"]
        assert ">this artifact<" in text
        assert (">round to nearest<" in text) is nearest
        assert (">falcon-7b-instruct-calibrated<" in text) is against


def _block_of(errors: dict[str, float | None]) -> BlockError:
    layers = [
        LayerError(name=name, relative_error=error, weight_error=0.1, worst=0.1, worst_at=0)
        for name, error in errors.items()
    ]
    return BlockError(name="h.0", relative_error=0.1, modules=tuple(layers))


def test_experts_share_a_row_and_the_worst_counts() -> None:
    from nf4_pipeline.report.draw.layers import _grid

    names = [f"mlp.experts.{i}.down_proj" for i in range(64)]
    blocks = [
        _block_of({name: i / 64 for i, name in enumerate(names)}),
        _block_of({names[5]: None}),
        _block_of({"attn.q2_proj": 0.1}),
    ]
    kinds, errors = _grid(blocks)
    assert kinds == ["mlp.experts.*.down_proj", "attn.q2_proj"]
    assert errors[0, 0] == 63 / 64
    assert errors[0, 1] == float("inf")
    assert errors[0, 2] != errors[0, 2]


def test_matplotlib_is_imported_to_draw_and_says_nothing(tmp_path: Path) -> None:
    """On a machine where it has never run, and where it cannot keep what it finds out."""
    (tmp_path / "file").touch()
    code = (
        "import sys, nf4_pipeline.report.page, nf4_pipeline.report.pictures as p\n"
        "assert not {'matplotlib', 'jinja2'} & set(sys.modules)\n"
        "from nf4_pipeline.verification.document import parse_verification\n"
        "from tests.support import made\n"
        "assert p.pictures(made.manifest(), parse_verification(made.sample()))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    environment = {**os.environ, "MPLCONFIGDIR": str(tmp_path / "file")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=REPOSITORY,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
