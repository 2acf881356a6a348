"""Files and tensors: a good artifact passes, and of every bad one it is named what is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
import torch
from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.fidelity.verdict import Check
from nf4_pipeline.manifest.manifest import Manifest
from nf4_pipeline.manifest.read import read_manifest
from nf4_pipeline.verification.check_files import check_files, check_manifest
from safetensors.torch import load_file, save_file

from tests.support.tamper import leave_in_16_bit, shuffle_codes, swap, zero_scale, zero_scale_byte
from tests.support.tiny import SHARDS, copy_of, edit_json, flip_byte

UP: Final = "transformer.h.0.mlp.dense_h_to_4h"
OTHER: Final = "transformer.h.1.mlp.dense_h_to_4h"
FILES, TENSORS = "files as in the manifest", "tensors as in the manifest"


@pytest.fixture
def build(exported_falcon: Path, tmp_path: Path) -> Build:
    return Build(copy_of(exported_falcon, tmp_path / "build"))


@pytest.fixture(scope="module")
def manifest(exported_falcon: Path) -> Manifest:
    return read_manifest(exported_falcon / "export")


def failed(checks: list[Check]) -> dict[str, str]:
    """What the checks that do not pass found, by name."""
    return {check.name: check.found for check in checks if not check.passed}


def test_a_good_artifact(build: Build, manifest: Manifest) -> None:
    files, tensors = check_files(build.export, manifest).checks
    assert (files.name, files.passed) == (FILES, True)
    assert files.found == f"{len(manifest.files)} files hash right"
    assert (tensors.name, tensors.passed) == (TENSORS, True)
    count = sum(len(tensor.stored) for tensor in manifest.tensors)
    assert tensors.found == f"{count} tensors as listed"


# What forges one tensor of a file, and how the check names it.
FORGED: Final[dict[str, tuple[Callable[[Build], None], str]]] = {
    "codes shuffled": (shuffle_codes(f"{UP}.weight"), f"different: {UP}.weight"),
    "a scale zeroed": (zero_scale(f"{UP}.weight", 5), f"different: {UP}.weight.absmax"),
    "a scale's byte zeroed": (zero_scale_byte(f"{UP}.weight", 5), f"different: {UP}.weight.absmax"),
    "another layer's": (swap(f"{UP}.weight", f"{OTHER}.weight"), f"different: {UP}.weight"),
    "left in 16 bit": (leave_in_16_bit(f"{UP}.weight"), f"missing: {UP}.weight.absmax"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_tensor_is_named(build: Build, manifest: Manifest, case: str) -> None:
    forge, words = FORGED[case]
    forge(build)
    found = failed(check_files(build.export, manifest).checks)
    assert set(found) == {FILES, TENSORS}
    assert f"{SHARDS[0]} has other bytes" in found[FILES]
    assert words in found[TENSORS]


def test_one_bit_of_any_tensor_is_seen(build: Build, manifest: Manifest) -> None:
    """The first and the last byte of the data, and one in the header."""
    for position in (-1, 12, None):
        shard = build.export / SHARDS[1]
        before = shard.read_bytes()
        length = int.from_bytes(before[:8], "little")
        flip_byte(shard, 8 + length if position is None else position)
        found = failed(check_files(build.export, manifest).checks)
        assert SHARDS[1] in found[FILES]
        assert TENSORS in found
        shard.unlink()
        shard.write_bytes(before)
    assert failed(check_files(build.export, manifest).checks) == {}


def test_a_small_file_that_changed(build: Build, manifest: Manifest) -> None:
    edit_json(build.export / "config.json", rope_theta=1.0)
    assert list(failed(check_files(build.export, manifest).checks)) == [FILES]
    assert (
        "config.json has other bytes" in failed(check_files(build.export, manifest).checks)[FILES]
    )


def test_a_file_that_is_gone(build: Build, manifest: Manifest) -> None:
    (build.export / SHARDS[1]).unlink()
    found = failed(check_files(build.export, manifest).checks)
    assert found[FILES] == f"{SHARDS[1]} is missing"
    assert found[TENSORS].startswith("missing: transformer.h.1.")
    assert " more" in found[TENSORS]


def test_a_file_that_is_cut_short(build: Build, manifest: Manifest) -> None:
    os.truncate(build.export / SHARDS[0], 3000)
    found = failed(check_files(build.export, manifest).checks)
    assert SHARDS[0] in found[FILES]
    assert "missing: " in found[TENSORS]


def test_a_weight_file_that_nobody_listed(build: Build, manifest: Manifest) -> None:
    save_file({"x": torch.zeros(2)}, build.export / "adapter_model.safetensors")
    assert failed(check_files(build.export, manifest).checks) == {
        FILES: "adapter_model.safetensors is not in the manifest"
    }


def test_a_tensor_that_nobody_listed(build: Build, manifest: Manifest) -> None:
    path = build.export / SHARDS[0]
    tensors = load_file(path)
    path.unlink()
    save_file({**tensors, "stray": torch.zeros(2)}, path, metadata={"format": "pt"})
    found = failed(check_files(build.export, manifest).checks)
    assert found[TENSORS] == "extra: stray"


def test_many_wrong_files_are_three_words_long(build: Build, manifest: Manifest) -> None:
    for name in manifest.files:
        (build.export / name).unlink()
    found = failed(check_files(build.export, manifest).checks)
    assert found[FILES].count(" is missing") == 3


def test_the_manifest_itself() -> None:
    recorded = FileDigest(10, "a" * 64)
    assert check_manifest(FileDigest(10, "a" * 64), recorded).passed
    forged = check_manifest(FileDigest(10, "b" * 64), recorded)
    assert not forged.passed
    assert ("bbbb" in forged.found, "aaaa" in forged.expected) == (True, True)
    assert not check_manifest(FileDigest(11, "a" * 64), recorded).passed
