"""manifest.json as a document: the same keys and types as the published schema, the same bytes."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from nf4_pipeline.checkpoint.atomic import json_bytes
from nf4_pipeline.errors import ArtifactError
from nf4_pipeline.manifest.manifest import CalibrationSummary, Manifest
from nf4_pipeline.manifest.read import MANIFEST_FILE, SCHEMA_FILE, read_manifest

from tests.support import made
from tests.support.schemas import differences

SCHEMA: dict[str, Any] = json.loads(SCHEMA_FILE.read_text("utf-8"))


@pytest.fixture
def export(exported_falcon: Path) -> Path:
    return exported_falcon / "export"


def test_class_and_schema_say_the_same() -> None:
    assert differences(Manifest, SCHEMA) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("properties", "source", "properties", "commit", "type"), "string"),
        (("properties", "totals", "properties", "weights", "type"), "number"),
        (("properties", "calibration", "properties", "device", "enum"), ["cpu"]),
        (("properties", "dropped", "items", "required"), ["name"]),
        (("properties", "tensors", "items", "properties", "more"), {"type": "string"}),
    ],
)
def test_a_schema_that_says_something_else_is_seen(path: tuple[str, ...], value: Any) -> None:
    changed = deepcopy(SCHEMA)
    place = changed
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    assert differences(Manifest, changed)


def test_reading_and_writing_give_the_same_bytes(export: Path) -> None:
    content = (export / MANIFEST_FILE).read_bytes()
    assert json_bytes(read_manifest(export).to_json()) == content


def test_calibration_keeps_its_bytes_and_says_nothing_of_the_machine() -> None:
    value = made.calibration()
    order = [
        "source",
        "sequences",
        "tokens",
        "tokens_sha256",
        "device",
        "fallbacks",
        "kept",
        "extra_bytes",
    ]
    summary = CalibrationSummary.from_json(value | {"seconds": {"pass": 1.0}})
    assert json.dumps(summary.to_json()) == json.dumps({name: value[name] for name in order})


def test_what_is_asked_of_a_manifest(export: Path) -> None:
    manifest = read_manifest(export)
    quantized = [tensor for tensor in manifest.tensors if tensor.quantized]
    assert manifest.rounding == "nearest"
    assert manifest.relative_rmse == {tensor.name: tensor.relative_rmse for tensor in quantized}
    assert manifest.quantized_modules == {tensor.module for tensor in quantized}
    assert manifest.source.version == manifest.source.content_sha256


def changed(export: Path, folder: Path, change: Any) -> Path:
    value = json.loads((export / MANIFEST_FILE).read_text("utf-8"))
    change(value)
    (folder / MANIFEST_FILE).write_text(json.dumps(value), "utf-8")
    return folder


def test_what_is_no_manifest_is_named_by_its_place(export: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        read_manifest(tmp_path)
    changed(export, tmp_path, lambda value: value["tensors"][1].update(shape="wide"))
    with pytest.raises(
        ArtifactError, match=r"not a valid manifest at tensors/1/shape: it must be "
    ):
        read_manifest(tmp_path)
    # JSON Schema takes 4.0 for an integer.
    changed(export, tmp_path, lambda value: value["tensors"][1].update(bytes=4.0))
    with pytest.raises(ArtifactError, match=r"not a valid manifest at tensors\[1\].bytes: expect"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST_FILE).write_text("{", "utf-8")
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        read_manifest(tmp_path)
