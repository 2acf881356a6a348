"""verification.json: the exact bytes for fixed inputs, and one shape in class and schema."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest
from nf4_pipeline.checkpoint.atomic import json_bytes
from nf4_pipeline.documents import DocumentError
from nf4_pipeline.fidelity.verdict import Check
from nf4_pipeline.manifest.manifest import Manifest
from nf4_pipeline.recipe import VerifyRecipe
from nf4_pipeline.verification.assemble_document import assemble_measured, assemble_stopped
from nf4_pipeline.verification.document import (
    SCHEMA,
    SCHEMA_VERSION,
    Against,
    MeasuredVerification,
    Verification,
    parse_verification,
)
from nf4_pipeline.verification.messages import ArtifactReply, SourceReply
from nf4_pipeline.verification.prompts import Prompt

from tests.support.schemas import differences

GOLDEN: Final = Path(__file__).with_name("golden")
PROMPTS: Final = (
    Prompt("Tell me."),
    Prompt("1 + 1 =", expect="2"),
    Prompt("2 + 2 =", expect="4", chat=True),
)
VERSIONS: Final = {"nf4-pipeline": "0.1.0", "python": "3.11.7", "torch": "2.13.0"}
FILES: Final = "2 files, each with its sha256"
DOCUMENTS: Final = ("measured", "not_finite", "stopped")


def read(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text("utf-8"))


def schema() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(SCHEMA.read_text("utf-8"))
    return content


@pytest.mark.parametrize(
    ("reply", "expected"),
    [("artifact_reply", "measured"), ("artifact_reply_not_finite", "not_finite")],
)
def test_fixed_replies_give_fixed_bytes(reply: str, expected: str) -> None:
    verification = assemble_measured(
        Manifest.from_json(read("manifest")),
        [Check("files as in the manifest", True, "2 files hash right", FILES)],
        PROMPTS,
        SourceReply.from_json(read("source_reply")),
        ArtifactReply.from_json(read(reply)),
        VerifyRecipe(),
        VERSIONS,
    )
    if "against" in read(expected):
        other = Against.from_json(read(expected)["against"])
        verification = replace(verification, against=other)
    assert json_bytes(verification.to_json()) == (GOLDEN / f"{expected}.json").read_bytes()


def test_a_failed_check_of_files_gives_fixed_bytes() -> None:
    check = Check("files as in the manifest", False, "config.json is missing", FILES)
    verification = assemble_stopped([check], VerifyRecipe(), VERSIONS)
    assert json_bytes(verification.to_json()) == (GOLDEN / "stopped.json").read_bytes()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_was_written_is_read_and_written_alike(name: str) -> None:
    content = (GOLDEN / f"{name}.json").read_bytes()
    jsonschema.validate(json.loads(content), schema())
    verification = parse_verification(json.loads(content))
    assert isinstance(verification, MeasuredVerification) is (name != "stopped")
    assert json_bytes(verification.to_json()) == content


@pytest.mark.parametrize("name", ["source_reply", "artifact_reply", "artifact_reply_not_finite"])
def test_replies_come_through_json_unchanged(name: str) -> None:
    kind = SourceReply if name == "source_reply" else ArtifactReply
    assert kind.from_json(read(name)).to_json() == read(name)


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    assert schema()["properties"]["schema_version"]["const"] == SCHEMA_VERSION


# Always written, and optional in the schema for the sake of files written before they were.
YOUNGER: Final = {
    ".outside",
    *(
        f"{place}.{name}"
        for place in (".outside[]", ".blocks[].modules[]")
        for name in ("scale", "scale_at", "reach", "reach_at")
    ),
}


def test_class_and_schema_say_the_same() -> None:
    measured = schema()
    measured["required"] += ["fidelity", *measured["dependentRequired"]["fidelity"]]
    for end in measured["$defs"]["interval"]["properties"].values():
        end["$ref"] = "#/$defs/finite"  # what is null in JSON is NaN in the class: `Interval`
    measured["$defs"]["finite"] = {"type": "number"}
    said = "required in one and optional in the other"
    assert set(differences(MeasuredVerification, measured)) == {f"{at}: {said}" for at in YOUNGER}


def test_class_and_schema_say_the_same_of_what_was_not_measured() -> None:
    stopped = schema()
    told = (*stopped["required"], "date")
    stopped["properties"] = {name: stopped["properties"][name] for name in told}
    assert differences(Verification, stopped) == []


def test_what_came_later_may_be_absent() -> None:
    """Files that were written before a layer's scales were measured can be read."""
    value = read("measured")
    del value["outside"]
    layer = value["blocks"][0]["modules"][0]
    for name in ("scale", "scale_at", "reach", "reach_at"):
        del layer[name]
    jsonschema.validate(value, schema())
    verification = parse_verification(value)
    assert isinstance(verification, MeasuredVerification)
    assert verification.outside == ()
    assert verification.blocks[0].modules[0].scale == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "maybe"}, "verdict: expected one of"),
        ({"schema_version": 1}, "schema_version: expected one of 3"),
        ({"checks": None}, "checks: expected a list, got null"),
        ({"fidelity": {"tokens": 1}}, "fidelity.sure_tokens: expected an integer, got nothing"),
        ({"accuracy": {"asked": 3}}, "accuracy.right_16bit: expected an integer, got nothing"),
    ],
)
def test_another_shape_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        parse_verification(read("measured") | change)


@pytest.mark.parametrize("part", ["device", "sizes", "blocks", "models", "answers", "accuracy"])
def test_nothing_is_left_out_beside_a_fidelity(part: str) -> None:
    value = read("measured")
    del value[part]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(value, schema())
    with pytest.raises(DocumentError, match=f"^{part}: "):
        parse_verification(value)


@pytest.mark.parametrize("change", [{"checks": []}, {"surprise": 1}])
def test_the_schema_refuses(change: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(read("measured") | change, schema())
