"""A batch: checked before it begins, done one by one, in one table at the end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

import pytest
from click.testing import CliRunner
from nf4_pipeline.batch.queue import KEYS, read_queue
from nf4_pipeline.batch.results import BatchResults, Result, as_markdown
from nf4_pipeline.cli import COMMANDS
from nf4_pipeline.cli.batch import command
from nf4_pipeline.cli.build import command as build_command
from nf4_pipeline.errors import UsageError

from tests.support.tiny import copy_of, edit_json, write_recipe

pytestmark = pytest.mark.usefixtures("workers_here", "warm_workers")


def written(folder: Path, text: str) -> Path:
    path = folder / "models.toml"
    path.write_text(text)
    return path


WRONG: Final = {
    "": r"expected 1 to 10,000 tables \[\[model\]\]",
    "model = 5": r"expected 1 to 10,000 tables \[\[model\]\]",
    '[model]\nmodel = "a/b"': r"expected 1 to 10,000 tables \[\[model\]\]",
    "model = [1]": r"\[\[model\]\] 1 is no table",
    "[[model]]": r"\[\[model\]\] 1 has no line such as model =",
    "[[model]]\nmodel = 5": "has no line such as model =",
    'defaults = 5\n[[model]]\nmodel = "a/b"': r"\[defaults\] is no table",
    '[[models]]\nmodel = "a/b"': r"'models' is neither \[defaults\] nor \[\[model\]\]",
    '[[model]]\nmodel = "a/b"\ncalibarte = "self"': "there is no 'calibarte'. Did you mean c",
    '[[model]]\nmodel = "a/b"\nx = 1': "there is no 'x'. Known are allow_pickle",
    '[defaults]\nworker = 4\n[[model]]\nmodel = "a/b"': "Did you mean workers",
    '[[model]]\nmodel = "a/b"\ndevice = "gpu"': r"\(a/b\): --device 'gpu': expected",
    '[[model]]\nmodel = "a/b"\ndevice = 5': "a value is of the wrong type",
    '[[model]]\nmodel = "a/b"\nworkers = "many"': "a value is of the wrong type",
    '[[model]]\nmodel = "a/b"\nextra_bytes = "5%"': "extra_bytes needs",
    '[[model]]\nmodel = "a/b"\nmax_shard_size = "5"': "max_shard_size",
    '[[model]]\nmodel = "a/b"\nrecipe = "gone.toml"': r"gone\.toml cannot be read",
    '[[model]]\nmodel = "a/b"\nallow_unused = "x"': "expected a list of patterns",
    "[[model": "is not valid TOML",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_said_before_anything_begins(text: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError, match=WRONG[text]) as caught:
        read_queue(path)
    assert str(path) in str(caught.value)


def test_paths_are_relative_to_the_file_and_defaults_give_way(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x")
    write_recipe(tmp_path).rename(tmp_path / "mine.toml")
    path = written(
        tmp_path,
        """
        [defaults]
        device = "cpu"
        recipe = "mine.toml"
        eval_text = "text.txt"
        [[model]]
        model = "a/b"
        build_dir = "here"
        [[model]]
        model = "a/c"
        device = "cuda:3"
        calibrate = "text.txt"
        replace = true
        """,
    )
    one, other = read_queue(path)
    assert (one.name, one.options) == ("a/b", "build_dir = 'here'")
    assert one.request.build_dir == tmp_path / "here"
    assert one.recipe.verify.eval_text == str(tmp_path / "text.txt")
    assert (one.machine.device, other.machine.device) == ("cpu", "cuda:3")
    assert other.recipe.quantize.calibrate == str(tmp_path / "text.txt")
    assert other.request.replaces
    assert not one.request.replaces


def test_every_key_is_an_option_of_build() -> None:
    page = CliRunner().invoke(build_command, ["--help"]).output
    options = set(re.findall(r"--([a-z-]+)", page))
    assert {key.replace("_", "-") for key in KEYS - {"model"}} <= options


def test_a_failure_ends_one_of_them(
    tiny_falcon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    broken = copy_of(tiny_falcon, tmp_path / "broken")
    edit_json(broken / "config.json", hidden_size=128)
    recipe = write_recipe(tmp_path)
    path = written(
        tmp_path,
        f"""
        [defaults]
        device = "cpu"
        recipe = "{recipe.name}"
        [[model]]
        model = "broken"
        [[model]]
        model = "{tiny_falcon}"
        [[model]]
        model = "no/such-model"
        offline = true
        """,
    )
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    runner = CliRunner()
    ran = runner.invoke(command, [str(path), "--json", "--markdown", str(summary)])
    assert ran.exit_code == 1, ran.output
    found = BatchResults.from_json(json.loads(ran.stdout))
    assert [result.outcome for result in found.results] == ["error", "pass", "error"]
    assert "config.json has" in (found.results[0].error or "")
    assert Path(found.results[1].build or "", "export").is_dir()
    lines = summary.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[1:3] == as_markdown(found.results).splitlines()[:2]
    assert len(lines) == 3 + 3


def test_the_table_holds_the_words_of_strangers() -> None:
    evil = "a|b](http://x) <script>\n::error::x `c`"
    rows = as_markdown(
        [Result(model=evil, options=evil, outcome="error", error=evil, build=None)]
    ).splitlines()
    assert len(rows) == 3
    assert len(re.findall(r"(?<!\\)\|", rows[2])) == 10
    assert "<script>" not in rows[2]


def test_it_is_a_command() -> None:
    assert "batch" in COMMANDS
