"""provenance.json and bom.cdx.json: valid for other programs, true, silent about the machine."""

from __future__ import annotations

import getpass
import json
import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from nf4_pipeline.build_folder import Build, Record
from nf4_pipeline.checkpoint.atomic import write_json
from nf4_pipeline.checkpoint.digest import FileDigest, digest_file
from nf4_pipeline.checkpoint.source_card import parse_card
from nf4_pipeline.errors import BuildError
from nf4_pipeline.job import make_stages, run_stage, states
from nf4_pipeline.manifest.manifest import CalibrationSummary, Manifest
from nf4_pipeline.manifest.read import read_manifest
from nf4_pipeline.progress import SILENT
from nf4_pipeline.provenance.bom import bill_of_materials
from nf4_pipeline.provenance.ci_run import CiRun
from nf4_pipeline.provenance.identifiers import licenses, model_purl
from nf4_pipeline.provenance.statement import SCHEMA_FILE, statement
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.records import QUANTIZE, VERIFY
from nf4_pipeline.stages.verify import Verify

from tests.support import made
from tests.support.jobs import CPU, PASSED
from tests.support.tiny import content_of, copy_of

pytestmark = pytest.mark.usefixtures("workers_here")

RECIPE = Recipe()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def verified(exported_falcon: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build whose verification is made up: what it measures does not matter here."""
    build = Build(copy_of(exported_falcon, tmp_path_factory.mktemp("attest") / "build"))
    write_json(build.export / "verification.json", {"verdict": "pass"})
    outputs = {"export/verification.json": digest_file(build.export / "verification.json")}
    key = Verify(build, RECIPE, CPU).key()
    build.write_record(Record(VERIFY, key, outputs, PASSED, 1.0, 1))
    return build.root


@pytest.fixture
def build(verified: Path, tmp_path: Path) -> Build:
    return Build(copy_of(verified, tmp_path / "build"))


@pytest.fixture
def attested(build: Build) -> Build:
    assert run_stage(build, "attest", RECIPE, CPU, SILENT).ran
    return build


def provenance_of(build: Build) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((build.export / "provenance.json").read_text("utf-8"))
    return value


def bom_of(build: Build) -> str:
    return (build.export / "bom.cdx.json").read_text("utf-8")


def test_the_kind_of_device_that_calibrated_is_said(build: Build) -> None:
    manifest = hub_manifest(build)
    plain = statement(manifest, {}, {}, "", "")
    assert plain["predicate"]["buildDefinition"]["internalParameters"] == {}
    calibration = {**made.calibration(), "device": "cuda"}
    manifest = replace(manifest, calibration=CalibrationSummary.from_json(calibration))
    found = statement(manifest, {}, {}, "", "")["predicate"]["buildDefinition"]
    assert found["internalParameters"] == {"calibration_device": "cuda"}


def test_the_statement_is_valid_for_us_and_for_in_toto(attested: Build) -> None:
    from google.protobuf import json_format
    from in_toto_attestation.v1.statement import Statement

    value = provenance_of(attested)
    jsonschema.validate(value, json.loads(SCHEMA_FILE.read_text("utf-8")))
    jsonschema.Draft202012Validator.check_schema(json.loads(SCHEMA_FILE.read_text("utf-8")))
    theirs = Statement([], "", {})
    json_format.ParseDict(value, theirs.pb)
    theirs.validate()


def test_a_ci_run_is_named_as_the_quantizing_record_has_it(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever run attests or pushes: the one that quantized is the one that made the bytes."""
    made_by = CiRun(
        builder="https://github.com/me/code/.github/workflows/publish.yml@refs/heads/main",
        invocation="https://github.com/me/code/actions/runs/77",
    )
    record = build.need(QUANTIZE)
    build.write_record(replace(record, facts=replace(record.facts, run=made_by)))
    run_stage(build, "attest", RECIPE, CPU, SILENT)
    value = provenance_of(build)
    jsonschema.validate(value, json.loads(SCHEMA_FILE.read_text("utf-8")))
    details = value["predicate"]["runDetails"]
    assert details["builder"]["id"] == made_by.builder
    assert details["metadata"]["invocationId"] == made_by.invocation
    assert (
        "invocationId"
        not in statement(hub_manifest(build), {}, {}, "", "")["predicate"]["runDetails"]["metadata"]
    )


def test_the_predicate_is_valid_slsa(attested: Build) -> None:
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2

    parsed = json_format.ParseDict(
        provenance_of(attested)["predicate"], provenance_pb2.Provenance()
    )
    assert parsed.build_definition.build_type.startswith("pkg:pypi/nf4-pipeline?build_type=")
    assert parsed.run_details.metadata.finished_on.seconds > 1.7e9
    assert parsed.run_details.metadata.started_on.seconds > 1.7e9


def test_every_file_is_a_subject_and_every_source_file_a_dependency(attested: Build) -> None:
    value = provenance_of(attested)
    subjects = {entry["name"]: entry["digest"]["sha256"] for entry in value["subject"]}
    files = set(content_of(attested.export)) - {"provenance.json"}
    assert set(subjects) == files
    assert all(digest_file(attested.export / name).sha256 == subjects[name] for name in files)
    dependencies = value["predicate"]["buildDefinition"]["resolvedDependencies"]
    named = {entry["name"]: entry["digest"]["sha256"] for entry in dependencies}
    manifest = read_manifest(attested.export)
    source = {name: digest.sha256 for name, digest in manifest.source.files.items()}
    assert named == {**source, "recipe": named["recipe"]}


def test_nothing_says_where_it_was_made(attested: Build, tiny_falcon: Path) -> None:
    text = (attested.export / "provenance.json").read_text() + bom_of(attested)
    for private in (str(attested.root), str(tiny_falcon.parent), str(Path.home()), "/tmp"):
        assert private not in text
    for private in (socket.gethostname(), getpass.getuser()):
        assert not re.search(rf"\b{re.escape(private)}\b", text)


def test_the_stage_is_done_until_the_export_changes(attested: Build) -> None:
    assert states(attested, RECIPE, CPU)["attest"].status == "done"
    assert not run_stage(attested, "attest", RECIPE, CPU, SILENT).ran
    before = provenance_of(attested)
    assert run_stage(attested, "attest", RECIPE, CPU, SILENT).record.outputs
    assert provenance_of(attested) == before
    (attested.export / "bom.cdx.json").write_text("{}")
    assert states(attested, RECIPE, CPU)["attest"].status == "stale"
    assert run_stage(attested, "attest", RECIPE, CPU, SILENT).ran
    assert provenance_of(attested) == before
    assert list(make_stages(attested, RECIPE, CPU))[-1] == "attest"


def test_only_a_verified_export_that_is_what_it_was_is_attested(build: Build) -> None:
    write_json(build.export / "verification.json", {"verdict": "fail"})
    with pytest.raises(BuildError, match=r"verification\.json changed since `verify`"):
        run_stage(build, "attest", RECIPE, CPU, SILENT)
    build.forget(VERIFY)
    with pytest.raises(BuildError, match="not finished: its verify stage"):
        run_stage(build, "attest", RECIPE, CPU, SILENT)
    assert not (build.export / "provenance.json").exists()


def test_the_card_names_a_repo_until_another_is_named(attested: Build) -> None:
    def card() -> str:
        return (attested.export / "README.md").read_text("utf-8")

    assert 'from_pretrained(".", ' in card()
    assert run_stage(attested, "attest", RECIPE, CPU, SILENT, repo_id="me/one").ran
    assert 'from_pretrained("me/one", ' in card()
    subjects = {entry["name"]: entry["digest"] for entry in provenance_of(attested)["subject"]}
    assert subjects["README.md"]["sha256"] == digest_file(attested.export / "README.md").sha256
    assert states(attested, RECIPE, CPU)["attest"].status == "done"
    assert not run_stage(attested, "attest", RECIPE, CPU, SILENT).ran  # what `nf4 build` asks
    assert run_stage(attested, "attest", RECIPE, CPU, SILENT, repo_id="me/two").ran
    assert 'from_pretrained("me/two", ' in card()


def hub_manifest(build: Build) -> Manifest:
    manifest = read_manifest(build.export)
    source = replace(manifest.source, repo="Org/Name", commit=COMMIT)
    return replace(manifest, source=source)


def test_a_hub_model_is_named_by_its_package_url(build: Build) -> None:
    digest = FileDigest(1, "0" * 64)
    time = "2030-01-01T00:00:00Z"
    tools = {"nf4-pipeline": "1", "python": "3"}
    value = statement(hub_manifest(build), {"a": digest}, tools, time, time)
    jsonschema.validate(value, json.loads(SCHEMA_FILE.read_text("utf-8")))
    first, second = value["predicate"]["buildDefinition"]["resolvedDependencies"][:2]
    purl = f"pkg:huggingface/Org/Name@{COMMIT}"
    assert first == {"uri": purl, "digest": {"gitCommit": COMMIT}}
    assert second["uri"] == f"{purl}#{second['name']}"
    assert model_purl("local", None) is None


CARDS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "apache": ("license: apache-2.0", [{"license": {"id": "Apache-2.0"}}]),
    "two": ("license: [mit, gpl-3.0]", [{"license": {"id": n}} for n in ("MIT", "GPL-3.0")]),
    "of its own": (
        "license: other\nlicense_name: falcon\nlicense_link: https://x.org/ä",
        [{"license": {"name": "falcon", "url": "https://x.org/%C3%A4"}}],
    ),
    "unknown": ("license: llama3.1", [{"license": {"name": "llama3.1"}}]),
    "none": ("", []),
    "odd": ("license: 7\nlicense_link: javascript:1", []),
    "odd link": (
        "license: other\nlicense_link: javascript:1",
        [{"license": {"name": "other"}}],
    ),
}


@pytest.mark.parametrize("case", CARDS)
def test_the_license_is_inherited_and_the_bom_is_valid(build: Build, case: str) -> None:
    text, expected = CARDS[case]
    card = parse_card(f"---\n{text}\n---\n")
    assert licenses(card) == expected
    for manifest in (read_manifest(build.export), hub_manifest(build)):
        bom = bill_of_materials(manifest, "0" * 64, card)
        assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bom)) is None
        model = bom["metadata"]["component"]
        assert model.get("licenses", []) == expected
        (ancestor,) = model["pedigree"]["ancestors"]
        assert ancestor["name"] == manifest.source.repo
        assert ancestor.get("licenses", []) == expected


def test_the_bom_of_a_build_is_valid_and_deterministic(attested: Build) -> None:
    text = bom_of(attested)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    value = json.loads(text)
    files = {entry["name"]: entry["hashes"][0]["content"] for entry in value["components"]}
    manifest = read_manifest(attested.export)
    assert files == {name: digest.sha256 for name, digest in manifest.files.items()}
    properties = {p["name"]: p["value"] for p in value["metadata"]["component"]["properties"]}
    assert properties["nf4-pipeline:quantization:type"] == "nf4"
    (attested.export / "bom.cdx.json").unlink()
    run_stage(attested, "attest", RECIPE, CPU, SILENT)
    assert bom_of(attested) == text
