"""Pickles become safetensors with the same tensors, in little memory, and only if asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nf4_pipeline.checkpoint.digest import digest_file
from nf4_pipeline.errors import SourceError, UsageError
from nf4_pipeline.pickles.convert import WORKER, ConvertRequest, convert
from nf4_pipeline.processes.parent_side import run
from nf4_pipeline.progress import SILENT
from safetensors.torch import load_file

from tests.support import warm
from tests.support.hub_client import isolated
from tests.support.hub_server import HubServer
from tests.support.jobs import download
from tests.support.tiny import INDEX, SHARDS, copy_of

pytestmark = pytest.mark.usefixtures("warm_workers")

BINS = tuple(f"pytorch_{name.removesuffix('.safetensors')}.bin" for name in SHARDS)


@pytest.fixture
def pickled(tiny_falcon: Path, tmp_path: Path) -> Path:
    """The tiny Falcon as torch.save writes it."""
    folder = copy_of(tiny_falcon, tmp_path / "pickled")
    for shard, pickle in zip(SHARDS, BINS, strict=True):
        torch.save(load_file(folder / shard), folder / pickle)
        (folder / shard).unlink()
    (folder / INDEX).unlink()
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_tensors(folder: Path, original: Path) -> None:
    found, expected = tensors_of(folder), tensors_of(original)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_a_folder_of_pickles_is_refused_unless_asked_for(pickled: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"can run code when they are read.*--allow-pickle"):
        download(pickled, tmp_path / "artifacts")
    assert not (tmp_path / "artifacts").exists()


def test_a_folder_of_pickles_becomes_a_build(
    pickled: Path, tiny_falcon: Path, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in pickled.iterdir()}
    build, record, ran = download(pickled, tmp_path / "artifacts", allow_pickle=True)
    assert ran
    assert_same_tensors(build.source, tiny_falcon)
    index = json.loads((build.source / INDEX).read_text())
    assert set(index["weight_map"]) == set(tensors_of(tiny_falcon))
    files = record.outputs_in("source")
    assert set(SHARDS) < set(files)
    assert {name: digest_file(build.source / name) for name in files} == files
    assert set(record.facts.converted_from) >= set(BINS)
    assert {path.name: path.read_bytes() for path in pickled.iterdir()} == before

    times = {path: path.stat().st_mtime_ns for path in build.root.glob("converted/*.safetensors")}
    _, again, ran = download(pickled, tmp_path / "artifacts", allow_pickle=True)
    assert (ran, again.key, again.outputs) == (False, record.key, record.outputs)
    assert {path: path.stat().st_mtime_ns for path in times} == times  # nothing was converted anew


def test_a_hub_model_of_pickles(pickled: Path, tiny_falcon: Path, tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.store.add("org/pickled", pickled)
        command = [sys.executable, "-m", "nf4_pipeline", "download", "org/pickled", "--json"]
        runs = [
            subprocess.run(
                [*command, *options],
                cwd=tmp_path,
                env=warm.variables(isolated(tmp_path / "hf", hub.url)),
                capture_output=True,
                text=True,
                check=False,
            )
            for options in ([], ["--allow-pickle"])
        ]
    refused, done = runs
    assert refused.returncode == 1
    assert "opening a pickle can run code" in refused.stderr
    assert "--allow-pickle" in refused.stderr
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["commit"][:12] in value["build"]
    assert_same_tensors(tmp_path / value["build"] / "source", tiny_falcon)


def test_safetensors_win_over_pickles(tiny_falcon: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_falcon, tmp_path / "both")
    (folder / "pytorch_model.bin").write_bytes(b"not even looked at")
    _, record, _ = download(folder, tmp_path / "artifacts", allow_pickle=True)
    assert "source/pytorch_model.bin" not in record.outputs
    assert record.facts.converted_from == {}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([torch.zeros(2)], "expected tensors by name"),
        ({"a": torch.zeros(2), "step": 3}, "'step' is no plain tensor"),
        ({"a": torch.zeros(2).to_sparse()}, "it names torch.* at byte|no plain tensor"),
    ],
    ids=["list", "number", "sparse"],
)
def test_what_is_no_state_dict_is_refused(content: object, said: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    files = {"pytorch_model.bin": digest_file(tmp_path / "pytorch_model.bin")}
    with pytest.raises(SourceError, match=said):
        convert(tmp_path, files, tmp_path / "converted", SILENT)
    assert not list(tmp_path.glob("converted/*.safetensors"))


def test_views_and_shared_storages_come_out_whole(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {"base": base, "turned": base.t(), "row": base[1], "scalar": torch.tensor(7.0)}
    torch.save(state | {"none": torch.zeros(0, 4)}, tmp_path / "pytorch_model.bin")
    files = {"pytorch_model.bin": digest_file(tmp_path / "pytorch_model.bin")}
    convert(tmp_path, files, tmp_path / "converted", SILENT)
    found = load_file(tmp_path / "converted" / "model.safetensors")
    assert found["none"].shape == (0, 4)
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    files = {"pytorch_model.bin": digest_file(tmp_path / "pytorch_model.bin")}
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is there already"):
        convert(tmp_path, files, tmp_path / "converted", SILENT)
    assert (tmp_path / "converted" / "thesis.txt").read_text() == "mine"


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        path = tmp_path / f"{count}.bin"
        torch.save({f"w{i}": torch.full((4 * 2**20,), float(i)) for i in range(count)}, path)
        return run(WORKER, ConvertRequest(path, tmp_path / "out.safetensors")).peak_memory_bytes

    one, many = peak(1), peak(24)  # 16 MiB, 384 MiB
    assert many - one < 64 * 2**20
