"""The commands from outside, on a tiny random Falcon.

One build, and what depends on the process, are processes of their own; the rest runs in this one.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nf4_pipeline
import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.cli import COMMANDS
from nf4_pipeline.printable import printable
from nf4_pipeline.processes.in_process import in_process

from tests.support.command_line import run_nf4, without_progress
from tests.support.tiny import (
    SHARDS,
    Done,
    content_of,
    copy_of,
    environment,
    flip_byte,
    nf4,
)
from tests.support.verified import skip_documents, skip_readers

pytestmark = pytest.mark.usefixtures("warm_workers")

REPOSITORY = Path(__file__).parents[2]
STAGE = re.compile(r"(?P<number>[1-5])/5 (?P<name>[a-z]+): (?P<what>.+)")

HELP_OF_ALL = """
import json, sys
from click.testing import CliRunner
from nf4_pipeline.cli import COMMANDS, cli
texts = {name: CliRunner().invoke(cli, [name, "--help"]).output for name in COMMANDS}
print(json.dumps({"texts": texts, "modules": sorted(sys.modules)}))
"""

HEAVY = {
    "torch",
    "transformers",
    "numpy",
    "numba",
    "rich",
    "huggingface_hub",
    "matplotlib",
    "jinja2",
    "bitsandbytes",
}


@dataclass(frozen=True)
class Built:
    """The first build: where, with what, and what it said."""

    root: Path
    model: Path
    recipe: Path
    done: Done

    @property
    def build(self) -> Build:
        return Build(self.root / self.done.value["build"])

    def again(self, folder: Path) -> Build:
        """A copy of the build folder that a test may damage."""
        return Build(copy_of(self.build.root, folder / "build"))


@pytest.fixture(scope="module")
def built(tiny_falcon: Path, quick_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    root = tmp_path_factory.mktemp("cwd")
    done = nf4("build", tiny_falcon, "--recipe", quick_recipe, "--json", cwd=root)
    assert done.status == 0, done.err
    return Built(root, tiny_falcon, quick_recipe, done)


def states_of(built: Built, build: Build) -> dict[str, str]:
    done = run_nf4("status", "--build-dir", build.root, "--recipe", built.recipe, "--json")
    assert done.status == 0, done.err
    (stages,) = done.value.values()
    return {name: stage["status"] for name, stage in stages.items()}


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "nf4_pipeline", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line]
    imported = {name.partition(".")[0] for name in lines}
    assert "click" in imported
    assert imported & HEAVY == set()
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", done.stdout, re.MULTILINE)


def test_every_command_has_help_that_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP_OF_ALL], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert {name.partition(".")[0] for name in found["modules"]} & HEAVY == set()
    for command, text in found["texts"].items():
        assert text.startswith(f"Usage: cli {command} [OPTIONS]"), text
        assert len(re.split(r"\n\n", text)[1].strip()) > 20  # it says what it does
        assert "--json" in text
        assert "--quiet" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_the_readme_mentions_every_command(command: str) -> None:
    assert f"nf4 {command}" in (REPOSITORY / "README.md").read_text("utf-8")


def test_a_build_prints_one_json_value_and_no_noise(built: Built) -> None:
    value = built.done.value
    assert isinstance(value, dict)
    assert built.done.out.endswith("}\n")
    assert value["verdict"] == "pass"
    assert value["totals"]["tensors"] == {"quantized": 8, "kept": 7, "dropped": 1}
    assert [name for name, stage in value["stages"].items() if stage["ran"]] == [
        "download",
        "quantize",
        "serialize",
        "verify",
        "attest",
    ]
    lines = built.done.err.splitlines()
    found = [match for line in lines if (match := STAGE.fullmatch(line))]
    assert len(found) == len(lines), "noise"
    begun = [(m["number"], m["name"]) for m in found if m["what"] == "begins"]
    assert begun == [(str(n), name) for n, name in enumerate(value["stages"], start=1)]
    # Beside those, one line at the end of each, and one for each ten seconds.
    ends = [m["what"] for m in found if re.search(r"\d\.\d s(, [0-9.]+ [kMG]B/s)?$", m["what"])]
    assert len(ends) == 5
    assert ends[3].startswith("pass, ")


def test_a_build_leaves_what_it_should(built: Built) -> None:
    assert {path.name for path in built.build.export.iterdir()} >= {
        *SHARDS,
        "model.safetensors.index.json",
        "config.json",
        "manifest.json",
        "verification.json",
        "README.md",
        "provenance.json",
        "bom.cdx.json",
        "tokenizer.json",
    }
    assert not list(built.build.root.rglob("*.partial"))
    assert {path.stem for path in (built.build.root / "records").iterdir()} == {
        "download",
        "quantize",
        "serialize",
        "verify",
        "attest",
    }


def test_a_second_build_runs_nothing(built: Built) -> None:
    before = {p: p.lstat().st_mtime_ns for p in built.build.root.rglob("*") if p.name != ".lock"}
    done = nf4("build", built.model, "--recipe", built.recipe, "--json", cwd=built.root)
    assert done.status == 0, done.err
    after = {p: p.lstat().st_mtime_ns for p in built.build.root.rglob("*") if p.name != ".lock"}
    assert after == before
    assert {n: stage["ran"] for n, stage in done.value["stages"].items()} == dict.fromkeys(
        ("download", "quantize", "serialize", "verify", "attest"), False
    )


def test_a_damaged_export_is_seen_and_healed(built: Built, tmp_path: Path) -> None:
    expected = content_of(built.build.export)
    build = built.again(tmp_path)
    flip_byte(build.export / SHARDS[0])
    assert states_of(built, build) == {
        "download": "done",
        "quantize": "done",  # the copy of the build has no hard links
        "serialize": "stale",
        "verify": "stale",
        "attest": "stale",
    }
    done = run_nf4(
        "build", built.model, "--build-dir", build.root, "--recipe", built.recipe, "--json"
    )
    assert done.status == 0, done.err
    stages = done.value["stages"]
    assert not stages["quantize"]["ran"]
    assert stages["serialize"]["ran"]
    assert stages["verify"]["ran"]
    healed = content_of(build.export)
    measured = {"verification.json", "report.html", "provenance.json"}  # they hold times
    assert set(healed) == set(expected)
    for name in set(expected) - measured:
        assert healed[name] == expected[name], name
    assert set(states_of(built, build).values()) == {"done"}


def test_status_for_people(built: Built) -> None:
    done = nf4("status", "--recipe", built.recipe, cwd=built.root)
    assert done.status == 0
    assert without_progress(done.err) == ""
    lines = done.out.splitlines()
    assert lines[0] == built.done.value["build"]
    assert [line.split()[:2] for line in lines[1:]] == [
        [stage, "done"] for stage in ("download", "quantize", "serialize", "verify", "attest")
    ]


def test_a_recipe_need_not_be_told_twice(built: Built, tmp_path: Path) -> None:
    """What `build` was told holds for the stages behind it, until something else is said."""
    build = built.again(tmp_path)
    folder = ("--build-dir", build.root, "--json")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[quantize]\nskip_modules = ["h.0.mlp"]\n')
    for stage in ("quantize", "serialize"):
        told = ("--recipe", recipe) if stage == "quantize" else ("--max-shard-size", "50KB")
        refused = run_nf4(stage, *told, *folder)
        assert refused.status == 1
        assert "is another build" in refused.err
        told = (*told, "--replace")
        done = run_nf4(stage, *told, *folder)
        assert (done.status, done.value["ran"]) == (0, True), done.err
    kept = json.loads((build.export / "manifest.json").read_text())["recipe"]
    assert kept["quantize"]["skip_modules"] == ["h.0.mlp"]
    assert kept["serialize"]["max_shard_size"] == "50KB"

    def states(*told: str | Path) -> list[str]:
        done = run_nf4("status", *told, *folder)
        return [stage["status"] for stage in done.value[str(build.root)].values()]

    assert states() == ["done", "done", "done", "missing", "missing"]
    recipe.write_text("[serialize]\n")
    assert states("--recipe", recipe)[:3] == ["done", "done", "stale"]
    recipe.write_text("[quantize]\n")
    assert states("--recipe", recipe)[:3] == ["done", "stale", "stale"]
    done = run_nf4("serialize", "--recipe", recipe, *folder)
    assert done.status == 1
    assert "what `quantize` wrote is stale" in done.err


def test_files_that_a_recipe_names_are_found_from_anywhere(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_documents(monkeypatch)
    skip_readers(monkeypatch)
    build = built.again(tmp_path)
    folder = ("--build-dir", build.root, "--json")
    here, there = tmp_path / "here", tmp_path / "there"
    for place, text in ((here, "2 + 2 ="), (there, "3 + 3 =")):
        place.mkdir()
        (place / "p.jsonl").write_text(json.dumps({"prompt": text}) + "\n")
    recipe = ("--recipe", built.recipe)
    monkeypatch.chdir(here)
    assert run_nf4("verify", *recipe, "--prompts", "p.jsonl", *folder).value["ran"]
    monkeypatch.chdir(there)

    def verify_now() -> dict[str, str]:
        done = run_nf4("status", *folder)
        assert done.status == 0, done.err
        found: dict[str, str] = done.value[str(build.root)]["verify"]
        return found

    assert verify_now()["status"] == "done"
    (here / "p.jsonl").rename(here / "q.jsonl")
    assert verify_now()["status"] == "stale"
    assert f"{here}/p.jsonl cannot be read" in verify_now()["why"]
    # Told where it is now, the build remembers it.
    again = ("verify", *recipe, "--prompts", here / "q.jsonl", *folder)
    assert run_nf4(*again).value["ran"]
    assert verify_now()["status"] == "done"


@pytest.mark.parametrize("table", [{"of_another_version": 1}, {"skip_modules": 3}, None, []])
def test_a_recorded_recipe_that_cannot_be_read(table: object, built: Built, tmp_path: Path) -> None:
    """It counts as none: no command fails for it."""
    build = built.again(tmp_path)
    path = build.root / "records" / "quantize.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"recipe": table}))
    assert set(states_of(built, build).values()) <= {"done", "missing", "stale"}
    done = run_nf4("attest", "--build-dir", build.root)
    assert done.status == 0, done.err


def test_status_where_there_is_nothing(tmp_path: Path) -> None:
    done = nf4("status", cwd=tmp_path)
    assert done.status == 0
    assert f"There is no build under {tmp_path}/artifacts. Start one" in done.out
    done = nf4("status", "--json", cwd=tmp_path)
    assert done.value == {}


def test_inspect(built: Built) -> None:
    done = nf4("inspect", built.build.root, "--tensors", cwd=built.root)
    assert (done.status, without_progress(done.err)) == (0, "")
    assert "FalconForCausalLM from tiny-falcon" in done.out
    assert "8 quantized, 7 kept, 1 dropped" in done.out
    assert "lm_head.weight: equals transformer.word_embeddings.weight" in done.out
    assert "transformer.h.1.mlp.dense_4h_to_h.weight" in done.out
    value = nf4("inspect", built.build.export, "--json", cwd=built.root).value
    assert value == json.loads((built.build.export / "manifest.json").read_text())


def test_inspect_of_something_else(built: Built, tmp_path: Path) -> None:
    done = nf4("inspect", built.model, cwd=tmp_path)
    assert done.status == 1
    assert "is a checkpoint, not an artifact: a 16-bit model. Build it: nf4 build /" in done.err
    assert "Traceback" not in done.err


def test_push_lists_what_it_would_upload(built: Built) -> None:
    done = nf4(
        "push", "--dry-run", "--repo-id", "some-org/tiny", "--build-dir", built.build.root,
        "--json", cwd=built.root,
    )  # fmt: skip
    assert done.status == 0, done.err
    assert done.value["repo_id"] == "some-org/tiny"
    assert done.value["private"] is True
    files = {name: len(content) for name, content in content_of(built.build.export).items()}
    files["README.md"] = len(done.value["card"].encode())  # which would name the repo
    assert '"some-org/tiny"' in done.value["card"]
    assert {name: entry["size"] for name, entry in done.value["files"].items()} == files
    assert done.value["total_bytes"] == sum(files.values())


def test_push_refuses_what_was_not_verified(built: Built, tmp_path: Path) -> None:
    build = built.again(tmp_path)
    (build.export / "extra.txt").write_text("stray")
    arguments = ("push", "--dry-run", "--repo-id", "a/b", "--build-dir", build.root)
    done = nf4(*arguments, cwd=tmp_path)
    assert done.status == 1
    assert "extra.txt is not what was verified" in done.err
    (build.root / "records" / "verify.json").unlink()
    done = nf4(*arguments, cwd=tmp_path)
    assert done.status == 1
    assert "only a verified build can be published. Finish it: nf4 build " in done.err


def test_push_wants_a_repo_name(tmp_path: Path) -> None:
    done = nf4("push", "--dry-run", "--repo-id", "no-slash", cwd=tmp_path)
    assert done.status == 2
    assert "the owner is missing" in done.err


def test_a_prompt_is_answered_greedily(built: Built) -> None:
    """Two processes, streaming or not, and the library write the same."""
    prompt = ("prompt", str(built.build.root), "Hello", "--max-new-tokens", "8")
    done = nf4(*prompt, "--json", cwd=built.root)
    assert (done.status, without_progress(done.err)) == (0, "")
    (answer,) = done.value["answers"]
    assert done.value["prompt"] == "Hello"
    assert done.value["device"] == "cpu"
    assert 1 <= done.value["tokens"] <= 8
    with in_process():
        assert [answer] == nf4_pipeline.prompt(
            "Hello", built.build.root, max_new_tokens=8, temperature=0, seed=99, device="cpu"
        )


def test_draws_with_a_seed_are_the_same_twice(built: Built) -> None:
    prompt = ("prompt", str(built.build.root), "Hello", "--max-new-tokens", "8")
    draws = ("--top-k", "50", "--num-return-sequences", "2", "--seed", "3")
    done = run_nf4(*prompt, *draws)
    assert (done.status, without_progress(done.err)) == (0, "")
    answers = []
    with in_process():
        for seed in (3, 3, 4):
            answers.append(
                nf4_pipeline.prompt(
                    "Hello",
                    built.build.root,
                    max_new_tokens=8,
                    top_k=50,
                    num_return_sequences=2,
                    seed=seed,
                    device="cpu",
                )
            )
    assert answers[0] == answers[1] != answers[2]
    assert answers[0][0] != answers[0][1]
    shown = [printable(text.strip(), lines=True) for text in answers[0]]
    assert done.out == f"[1] {shown[0]}\n[2] {shown[1]}\n"


def test_a_prompt_with_values_that_mean_nothing(built: Built) -> None:
    done = nf4("prompt", built.build.root, "Hello", "--top-p", "1.5", cwd=built.root)
    assert done.status == 2
    assert "--top-p is 1.5; expected a number above 0 and at most 1" in done.err
    assert "Traceback" not in done.err


def test_a_locked_build_says_so(built: Built, tmp_path: Path) -> None:
    build = built.again(tmp_path)
    program = (
        "import sys, pathlib; from nf4_pipeline.build_folder import Build\n"
        "with Build(pathlib.Path(sys.argv[1])).locked():\n"
        "    print('locked', flush=True); sys.stdin.read()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program, str(build.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(tmp_path),
    )
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "locked\n"
        done = nf4("quantize", "--build-dir", build.root, "--recipe", built.recipe, cwd=tmp_path)
        assert done.status == 1
        assert f"in use by another nf4 process (pid {owner.pid})" in done.err
        assert "Traceback" not in done.err
        assert set(states_of(built, build).values()) == {"done"}  # reading is allowed
    finally:
        owner.kill()
        owner.communicate()
    # The lock of a process that was killed does not count.
    done = nf4("quantize", "--build-dir", build.root, "--recipe", built.recipe, cwd=tmp_path)
    assert done.status == 0, done.err
