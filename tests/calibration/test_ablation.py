"""The scripts that compare variants of calibration on texts of several domains."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any, Final

import click
import pytest
from click.testing import CliRunner
from nf4_pipeline.verification.eval_text import TEXTS

from tests.support.calibrated import downloaded
from tests.support.checkpoints import make_checkpoint

pytestmark = pytest.mark.usefixtures("workers_here")

CAMPAIGNS: Final = Path(__file__).parents[2] / "scripts" / "campaigns"


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"campaign_{name}", CAMPAIGNS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ablation() -> Any:
    return script("ablate_calibration")


def test_each_text_is_a_domain(ablation: Any, tmp_path: Path) -> None:
    for name in ("code.txt", "old verse.md"):
        (tmp_path / name).write_text(f"words of {name}")
    found = ablation.domains([tmp_path / "code.txt", tmp_path / "old verse.md"]).domains
    assert found == {"code": "words of code.txt", "old verse": "words of old verse.md"}
    assert set(ablation.domains([]).domains) == {path.stem for path in TEXTS.glob("*.txt")}
    (tmp_path / "code.md").write_text("other words")
    with pytest.raises(click.UsageError, match="named code"):
        ablation.domains([tmp_path / "code.txt", tmp_path / "code.md"])


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        (["--only", "the recipe"], ["the recipe"]),
        (["--starts", "--only", "chats,any token"], ["any token alone"]),  # it has no template
    ],
)
def test_a_table_with_a_column_for_each_domain(
    ablation: Any, tmp_path: Path, options: list[str], rows: list[str]
) -> None:
    build = downloaded(make_checkpoint(tmp_path / "llama", "llama"), tmp_path)
    words = {"a": "many words " * 40, "b": "1, 2, 3\n" * 40}
    for name, text in words.items():
        (tmp_path / f"{name}.txt").write_text(text)
    texts = [part for name in words for part in ("--eval-text", str(tmp_path / f"{name}.txt"))]
    few = ["--tokens", "256", "--eval-tokens", "200"]
    ran = CliRunner().invoke(ablation.main, [str(build.root), *texts, *few, *options])
    assert ran.exception is None, ran.output
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in ran.stdout.splitlines()
        if line.startswith("|")
    ]
    assert table[0] == ["variant", "KL", "all", "a", "b", "seconds"]
    assert [row[0] for row in table[2:]] == ["round to nearest", *rows]
    assert set(table[2][2:5]) == {"1.000 [1.000, 1.000]"}
    shares = [float(cell.split()[0]) for row in table[3:] for cell in row[2:5]]
    assert all(0 < share < 3 and share != 1 for share in shares)  # of 256 tokens, not less


CATALOG: Final = """msgid ""
msgstr "Language: de\\n"

msgid "word"
msgstr "ein Wort, und noch viele andere Wörter"

msgid "more"
msgstr ""
"mehrere Zeilen, die zusammen "
"einen Satz ergeben"
"""
PROSE: Final = (
    "This is a paragraph of the documentation, which goes on for long enough to be one of those\n"
    "that are taken, since it ends with a full stop and has no markup in it.\n"
)
TABLE: Final = "| a | b |\n| - | - |\n| 1 | 2 |\n| 3 | 4 |\n"


def test_texts_of_four_domains(tmp_path: Path) -> None:
    made = script("domain_texts")
    files = {
        "pkg/module.py": "def f(x):\n    return x\n" * 20,
        "pkg/tests/test_module.py": "assert f(1) == 1  # no code to read\n" * 20,
        "pkg/locale/de/LC_MESSAGES/p.po": CATALOG + CATALOG.partition("\n\n")[2] * 4,
        "pkg/locale/en/LC_MESSAGES/p.po": CATALOG + CATALOG.partition("\n\n")[2] * 4,
        "pkg/docs/guide.rst": f"Title\n=====\n\n{PROSE}\n.. note::\n\n    Not this.\n\n{PROSE}",
        "pkg/docs/latin.txt": "caf\xe9 " * 100,
        "pkg/README.md": f"# Title\n\n{TABLE * 6}\nSome words.\n",
        "pkg/rows.csv": "x,y,z\n" + "1,2,3\n" * 60,
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("latin-1" if "latin" in name else "utf-8"))
    found = made.domain_texts((tmp_path,), 10_000)
    assert found["code"].strip() == files["pkg/module.py"].strip()
    assert found["prose"].split() == (PROSE * 2).split()
    assert "einen Satz ergeben" in found["languages"]
    assert found["languages"].count("ein Wort") == 5
    assert "Language" not in found["languages"]
    assert "| 3 | 4 |" in found["tables"]
    assert "1,2,3" in found["tables"]
    assert "Some words" not in found["tables"]
    few = made.domain_texts((tmp_path,), 100)
    assert {name: len(text) > 0 for name, text in few.items()} == dict.fromkeys(found, True)
