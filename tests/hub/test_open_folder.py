"""A model on the Hub, asked for by name: pinned, hashed, and looked at like any folder."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.hub_client import isolated
from tests.support.hub_server import HubServer
from tests.support.tiny import INDEX, copy_of, edit_json

REPO = "some-org/tiny"
PROGRAM = """
import sys
from nf4_pipeline.errors import PipelineError
from nf4_pipeline.runtime.artifact import open_folder
try:
    print(open_folder(sys.argv[1], weights=sys.argv[2] == "True"))
except PipelineError as error:
    print(type(error).__name__, error)
"""


def opened(hub: HubServer, home: Path, *, weights: bool = True) -> str:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, REPO, str(weights)],
        env=isolated(home, hub.url),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
    ).stdout.strip()


def test_it_is_pinned_and_whole(tiny_falcon: Path, tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.store.add(REPO, tiny_falcon)
        folder = Path(opened(hub, tmp_path, weights=False))
        assert folder.name == hub.store.repos[REPO].refs["main"]
        assert (folder / "tokenizer.json").is_file()
        assert not list(folder.glob("*.safetensors"))
        assert Path(opened(hub, tmp_path)) == folder
        for path in tiny_falcon.glob("*.safetensors"):
            assert (folder / path.name).read_bytes() == path.read_bytes()


def _pickle(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_pickle, "HubError.*has no model.*safetensors.*--allow-pickle"),
        (
            lambda folder: edit_json(folder / INDEX, weight_map={"a": "../x.safetensors"}),
            "CheckpointError .*plain name",
        ),
        (
            lambda folder: edit_json(folder / "config.json", num_hidden_layers=10**6),
            "CheckpointError .*do not belong together",
        ),
        (
            lambda folder: edit_json(
                folder / "tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.json"]
            ),
            "CheckpointError .*plain names",
        ),
    ],
)
def test_what_is_refused_in_a_folder_is_refused_here(
    damage: Callable[[Path], object], message: str, tiny_falcon: Path, tmp_path: Path
) -> None:
    model = copy_of(tiny_falcon, tmp_path / "model")
    damage(model)
    with HubServer() as hub:
        hub.store.add(REPO, model)
        assert re.match(message, opened(hub, tmp_path / "home"))
