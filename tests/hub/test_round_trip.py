"""What is pushed, a stranger downloads: the same bytes, an answering model, a true card."""

from __future__ import annotations

import json
import re
import secrets
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import nf4_pipeline
import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.job import run_build, run_stage
from nf4_pipeline.progress import SILENT
from nf4_pipeline.provenance.signing import sign
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.stages.download_request import DownloadRequest

from tests.support import warm
from tests.support.hub_client import isolated
from tests.support.hub_server import HubServer
from tests.support.hub_worker import Worker
from tests.support.jobs import CPU
from tests.support.signed import make_keys
from tests.support.tiny import content_of, copy_of

pytestmark = pytest.mark.usefixtures("warm_workers")

PART = 300_000

SNIPPETS = r"""
import io, json, re, sys
from contextlib import redirect_stdout
from huggingface_hub import ModelCard

card = ModelCard.load(sys.argv[1])
scope, said = {}, io.StringIO()
blocks = re.findall("```python\n(.*?)```", card.text, re.DOTALL)
with redirect_stdout(said):
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
model = scope["model"]
layers = sum(type(m).__name__ == "Linear4bit" for m in model.modules())
results = [[r.metric_type, r.metric_value, r.source_url] for r in card.data.eval_results]
print(json.dumps({"blocks": len(blocks), "said": said.getvalue(), "layers": layers,
                  "class": type(model).__name__, "by": card.data.quantized_by,
                  "results": results}))
"""
"""What a stranger pastes from the card, in its order, in one session."""

FETCH = """
import sys
from huggingface_hub import snapshot_download
snapshot_download(sys.argv[1], revision=sys.argv[2], local_dir=sys.argv[3])
"""


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of the sample that comes with the package."""
    request = DownloadRequest("sample", tmp_path_factory.mktemp("sample"))
    build, _ = run_build(request, Recipe(), CPU, SILENT)
    weights = list(build.export.glob("*.safetensors"))
    assert all(path.stat().st_size > 3 * PART for path in weights)
    return build.root


@pytest.mark.parametrize("part_size", [None, PART], ids=["basic", "multipart"])
def test_round_trip(
    hub: HubServer, worker: Worker, tmp_path: Path, sample: Path, part_size: int | None
) -> None:
    build = Build(copy_of(sample, tmp_path / "build"))
    hub.part_size = part_size
    outcome = worker.push(build.root, "me/model", private=False)
    assert outcome.error == "", outcome.message
    assert (hub.count("POST", "*/complete") > 0) == (part_size is not None)
    assert (hub.count("PUT", "/upload/*") > 2) == (part_size is not None)

    fetched = tmp_path / "fetched"
    done = subprocess.run(
        [sys.executable, "-c", FETCH, "me/model", outcome.value["commit"], str(fetched)],
        env=isolated(tmp_path / "stranger", hub.url),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    there = {
        path: content
        for path, content in content_of(fetched).items()
        if path != ".gitattributes" and not path.startswith(".cache/")
    }
    assert there == content_of(build.export)
    if part_size is not None:
        return  # what answers was seen: the bytes are the same
    (answer,) = nf4_pipeline.prompt("Tell me a story.", fetched, max_new_tokens=5, device="cpu")
    assert isinstance(answer, str)
    expected = nf4_pipeline.prompt("Tell me a story.", build.export, max_new_tokens=5, device="cpu")
    assert [answer] == expected


def test_what_the_card_says_to_run_runs(
    hub: HubServer, worker: Worker, tmp_path: Path, sample: Path
) -> None:
    """Every snippet and command of the card, as the Hub shows it, of a repo of any name."""
    name = f"nf4-{secrets.token_hex(4)}"
    repo = f"me/{name}"
    build = Build(copy_of(sample, tmp_path / "build"))
    run_stage(build, "attest", Recipe(), CPU, SILENT, repo_id=repo)
    private, _ = make_keys(tmp_path, "key")
    sign(build.export, private)
    pushed = worker.push(build.root, repo, private=False)
    assert pushed.error == "", pushed.message
    found = verification_of(build)

    stranger = isolated(tmp_path / "stranger", hub.url)
    done = run_as([sys.executable, "-c", SNIPPETS, repo], stranger, tmp_path)
    told = json.loads(done.splitlines()[-1])
    assert told["blocks"] == 3
    assert (told["class"], told["layers"]) == ("FalconForCausalLM", found["sizes"]["layers"])
    answers = told["said"].splitlines()
    assert len(answers) >= 2
    assert answers[0].strip() == answers[len(answers) // 2].strip() != ""  # of both readers
    assert told["by"] == "me"
    assert [kind for kind, _, _ in told["results"]] == ["kl_divergence", "accuracy", "perplexity"]
    assert told["results"][0][1] == pytest.approx(found["fidelity"]["mean_kl"]["value"], rel=1e-5)
    assert all(f"/{repo}/blob/main/verification.json" in url for _, _, url in told["results"])

    card = (build.export / "README.md").read_text("utf-8")
    build_it, check_it = re.findall(r"```sh\n(.*?)```", card, re.DOTALL)
    assert build_it == "nf4 build sample\n"  # as the fixture was built
    lines = [shlex.split(line) for line in check_it.splitlines() if not line.startswith("#")]
    assert [line[:2] for line in lines] == [
        ["nf4", "rebuild"],
        ["hf", "download"],
        ["hf", "cache"],
        ["nf4", "reproduce"],
        ["nf4", "check"],
    ]
    programs = {
        "hf": [str(Path(sys.executable).with_name("hf"))],
        "nf4": [sys.executable, "-m", "nf4_pipeline"],
    }
    for line in lines:
        run_as([*programs[line[0]], *line[1:]], warm.variables(stranger), tmp_path)


def run_as(command: list[str], env: dict[str, str], folder: Path) -> str:
    """What a command prints that must succeed."""
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def verification_of(build: Build) -> dict[str, Any]:
    """What stands in verification.json."""
    found: dict[str, Any] = json.loads((build.export / "verification.json").read_text("utf-8"))
    return found
