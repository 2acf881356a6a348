"""`nf4 rebuild` on a Hub: which of many published artifacts are what they say they are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import fastjsonschema
import jsonschema
import pytest
from nf4_pipeline.errors import NOT_CHECKED
from nf4_pipeline.processes.in_process import in_process
from nf4_pipeline.provenance import summary
from nf4_pipeline.rebuilding import results
from nf4_pipeline.rebuilding.results import RebuildDocument
from nf4_pipeline.recipe import QuantizeRecipe, Recipe, SerializeRecipe

from tests.campaigns.rebuild_forgeries import (
    GATED_SOURCE,
    OTHER_SOURCE,
    PRIVATE_SOURCE,
    SOURCE,
    Case,
    Cases,
    manifest,
    recipe,
    run_cases,
    source,
)
from tests.campaigns.rebuild_forgeries import added as add
from tests.campaigns.rebuild_forgeries import flip as flip_in
from tests.support.checkpoints import make_checkpoint
from tests.support.hub_server import HubServer
from tests.support.hub_worker import Worker
from tests.support.published import Artifact, attest, exported, snapshot_of
from tests.support.schemas import differences
from tests.support.tiny import Done, content_of, write_falcon

UP: Final = "transformer.h.0.mlp.dense_h_to_4h.weight"
ENDING: Final = ".vsa.json"
KEPT: Final = "transformer.h.0.mlp.dense_h_to_4h"
HONEST: Final = ("sample", "shards", "kept", "calibrated", "fp16", "extras")
FORGED: Final = ("codes", "scales", "commit", "recipe", "added", "manifest")
WHOLE: Final = {
    f"pinned/{name}": verdict
    for names, verdict in ((HONEST, "PASSED"), (FORGED, "FAILED"))
    for name in names
}
OTHER_CASES: Final = (
    "config: no quantization",
    "config: auto_map",
    "tokenizer_config: a template",
    "tokenizer: two tokens exchanged",
    "file added: generation_config.json, in the manifest",
    "file added: sub/config.json",
    "file added: pytorch_model.bin",
    "file removed: tokenizer.json, out of the manifest",
    "file removed: provenance.json",
    "card: 'pip install nf4-pipeline' is 'pip install nf4-pipelime'",
    "provenance: another builder",
    "provenance: a workflow that signed nothing",
    "provenance: a subject's hash",
    "bill of materials: a license",
    "pointer: config.json",
    "name by case: Config.json",
    "manifest: lists ../../x.json",
    "manifest: no JSON",
    "source: no commit of it",
    "source: a repo that is gone",
    "source: a gated repo",
    "source: a folder of somebody's",
    "weight file: bytes behind it",
)
"""One of each kind; `scripts/campaigns/rebuild_forgeries.py` tries all."""


@dataclass(frozen=True)
class Shelf:
    """What was published, and what `nf4 rebuild` said of it."""

    folder: Path
    output: Path
    done: Done
    cases: Mapping[str, Case]
    worker: Worker
    hub: HubServer

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        return {result["artifact"]: result for result in self.done.value["results"]}


def twelve(hub: HubServer, folder: Path) -> None:
    """Six honest artifacts, and six that were changed and made whole again."""
    repo = hub.store.repos[SOURCE]
    later = repo.refs["main"]
    model = snapshot_of(repo, folder / "cache")
    half = hub.store.add("source/half", make_checkpoint(folder / "half", "llama", dtype="float16"))
    honest = {
        "sample": exported("sample", folder / "sample"),
        "shards": exported(model, folder / "shards", Recipe(serialize=SerializeRecipe("20KB"))),
        "kept": exported(
            model,
            folder / "kept",
            Recipe(QuantizeRecipe(skip_modules=(KEPT,))),
        ),
        "calibrated": exported(
            model,
            folder / "calibrated",
            Recipe(QuantizeRecipe(calibrate="self", calibration_tokens=256)),
        ),
        "fp16": exported(snapshot_of(half, folder / "cache"), folder / "fp16"),
        "extras": exported(model, folder / "extras"),
    }
    for name, build in honest.items():
        attest(build, f"pinned/{name}", measured=name in ("extras", "calibrated"))
        artifact = Artifact.of(build, f"pinned/{name}", folder / "copies" / name)
        if name == "extras":
            artifact.extra |= {"LICENSE": b"All rights reserved.\n", "model.sig": b"{}"}
        artifact.publish(hub.store)
    earlier = next(sha for sha in repo.commits if sha != later)
    forgeries = {
        "codes": flip_in(UP, 0.5),
        "scales": flip_in(f"{UP}.absmax", 0.5),
        "commit": source(commit=earlier),
        "recipe": recipe("quantize", skip_modules=["transformer.h.1.mlp.dense_4h_to_h"]),
        "added": add("modeling_falcon.py", b"print('code')\n", listed=True),
        "manifest": manifest(lambda value: value["totals"].update(ratio=0.2)),
    }
    for name, forge in forgeries.items():
        artifact = Artifact.of(honest["extras"], f"pinned/{name}", folder / "copies" / name)
        artifact.attest_again()
        forge(artifact)
        artifact.publish(hub.store)
    cases = Cases(honest["extras"], hub.store)()
    wanted = [case for case in cases if case.name in OTHER_CASES]
    assert {case.name for case in wanted} == set(OTHER_CASES)
    _cases.update(run_cases(wanted, honest["extras"], hub.store, folder / "forged"))


_cases: dict[str, Case] = {}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, tiny_falcon: Path) -> Iterator[Shelf]:
    folder = tmp_path_factory.mktemp("shelf")
    with HubServer() as hub:
        repo = hub.store.add(SOURCE, write_falcon(folder / "earlier", seed=1))
        repo.commit({path.name: path.read_bytes() for path in tiny_falcon.iterdir()})
        hub.store.add(OTHER_SOURCE, folder / "earlier")
        hub.store.add(PRIVATE_SOURCE, tiny_falcon, private=True)
        hub.store.add(GATED_SOURCE, tiny_falcon, gated=True)
        with in_process():
            twelve(hub, folder)
        home = folder / "hf"
        (folder / SOURCE).mkdir(parents=True)  # what lies here is not what a manifest means
        with Worker(home, hub.url, TMPDIR=str(folder), CUDA_VISIBLE_DEVICES="") as worker:
            options = ("--json", "-q", "--work-dir", folder / "work", "--output", folder / "out")
            done = worker.nf4(folder, "rebuild", *options, *WHOLE, *_cases)
            yield Shelf(folder, folder / "out", done, _cases, worker, hub)


def test_exactly_the_changed_ones_are_found(shelf: Shelf) -> None:
    assert shelf.done.status == 1, shelf.done.err
    found = {name: shelf.results[name]["verdict"] for name in WHOLE}
    assert found == WHOLE, {name: shelf.results[name]["why"] for name in WHOLE}


@pytest.mark.parametrize(
    ("name", "file", "tensor"),
    [
        ("codes", "model-00001-of-00002.safetensors", UP),
        ("scales", "model-00001-of-00002.safetensors", f"{UP}.absmax"),
        ("recipe", "config.json", None),
        ("added", "modeling_falcon.py", None),
        ("manifest", "manifest.json", None),
    ],
)
def test_what_was_changed_is_named(shelf: Shelf, name: str, file: str, tensor: str | None) -> None:
    found = {d["file"]: d for d in shelf.results[f"pinned/{name}"]["differences"]}
    assert file in found
    if tensor is not None:
        assert set(found) == {file, "manifest.json", "bom.cdx.json"}
        assert found[file]["tensor"] == tensor


def test_a_commit_of_other_bytes_is_refused_without_a_download(shelf: Shelf) -> None:
    result = shelf.results["pinned/commit"]
    assert "lists another model-0000" in result["why"]
    earlier = result["source"]["commit"]
    assert not shelf.hub.count("GET", f"/{SOURCE}/resolve/{earlier}/*")


@pytest.mark.parametrize("name", OTHER_CASES)
def test_other_changes(shelf: Shelf, name: str) -> None:
    repo_id, case = next((r, c) for r, c in shelf.cases.items() if c.name == name)
    result = shelf.results[repo_id]
    assert result["verdict"] == case.expected, result["why"]
    assert "bug in nf4-pipeline" not in result["why"]
    said = " ".join([result["why"], *(d["file"] for d in result["differences"])])
    assert case.names in said


def test_what_is_not_shown_is_said(shelf: Shelf) -> None:
    extras = shelf.results["pinned/extras"]
    assert {"LICENSE", "model.sig", ".gitattributes", "README.md"} <= set(extras["not_derived"])
    assert any("model.sig was not looked at" in note for note in extras["notes"])
    assert any("was not measured again" in note for note in extras["notes"])
    assert shelf.results["pinned/calibrated"]["calibrated_on"] == "cpu"


def test_nothing_is_left_behind_and_no_cache_is_touched(shelf: Shelf) -> None:
    assert list((shelf.folder / "work").iterdir()) == []
    assert not [path for path in (shelf.folder / "hf").rglob("*") if path.is_file()]
    assert not list(shelf.folder.glob("nf4-re*"))


def test_results_and_summaries_have_their_published_form(shelf: Shelf) -> None:
    from google.protobuf import json_format
    from in_toto_attestation.predicates.vsa.v1 import vsa_pb2
    from in_toto_attestation.v1.statement import Statement

    document = json.loads((shelf.output / "results.json").read_text("utf-8"))
    assert document == shelf.done.value
    schema = json.loads(results.SCHEMA_FILE.read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(document, schema)
    assert differences(RebuildDocument, schema) == []
    its_schema = json.loads(summary.SCHEMA_FILE.read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(its_schema)
    check = fastjsonschema.compile(its_schema)
    written = {
        path.name.removesuffix(".vsa.json"): path for path in shelf.output.glob("*.vsa.json")
    }
    told = {
        name.replace("/", "--"): result
        for name, result in shelf.results.items()
        if result["verdict"] != "NOT_CHECKED"
    }
    assert set(written) == set(told)
    for name, path in written.items():
        value = json.loads(path.read_text("utf-8"))
        check(value)
        theirs = Statement([], "", {})
        json_format.ParseDict(value, theirs.pb)
        theirs.validate()
        # The package has version 1.0 of the predicate, to which 1.1 added this field; and where
        # both have a list of levels, its protobuf has one text.
        assert value["predicate"]["verifier"].pop("version")["nf4-pipeline"]
        levels = value["predicate"].pop("verifiedLevels")
        value["predicate"]["verifiedLevels"] = levels[0]
        predicate = json_format.ParseDict(value["predicate"], vsa_pb2.VerificationSummary())
        assert predicate.verification_result == told[name]["verdict"]
        assert predicate.time_verified.seconds > 1.7e9
        assert told[name]["commit"] in predicate.resource_uri
        passed = told[name]["verdict"] == "PASSED"
        reproduced = ["SLSA_BUILD_LEVEL_UNEVALUATED", "NF4_PIPELINE_REPRODUCED"]
        assert levels == (reproduced if passed else ["FAILED"])


def test_a_summary_names_every_file_of_the_commit(shelf: Shelf) -> None:
    value = json.loads((shelf.output / "pinned--extras.vsa.json").read_text("utf-8"))
    head = shelf.hub.store.repos["pinned/extras"].head
    subjects = {entry["name"]: entry["digest"] for entry in value["subject"]}
    assert subjects.pop("pinned/extras") == {"gitCommit": head.sha}
    assert subjects == {name: {"sha256": blob.sha256} for name, blob in head.files.items()}
    (attestation,) = value["predicate"]["inputAttestations"]
    assert attestation["digest"] == {"sha256": head.files["provenance.json"].sha256}


def test_badges_and_table(shelf: Shelf) -> None:
    import xml.etree.ElementTree as ElementTree

    for name, said in (
        ("pinned--sample", "reproduced"),
        ("pinned--codes", "differs"),
        (
            next(r for r, c in shelf.cases.items() if c.expected == NOT).replace("/", "--"),
            "not checkable",
        ),
    ):
        badge = ElementTree.parse(shelf.output / f"{name}.svg").getroot()
        assert badge.get("aria-label") == f"nf4 rebuild: {said}"
        endpoint = json.loads((shelf.output / f"{name}.badge.json").read_text("utf-8"))
        assert set(endpoint) == {"schemaVersion", "label", "message", "color"}
        assert endpoint["message"] == said
    table = (shelf.output / "README.md").read_text("utf-8")
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(WHOLE) + len(shelf.cases)
    assert "6 PASSED" in table


NOT: Final = "NOT_CHECKED"


def test_a_summary_makes_a_line_in_the_card(shelf: Shelf) -> None:
    """Only one that passed, and speaks of this very artifact; `nf4 rebuild` then knows the card."""
    build = next((shelf.folder / "extras").iterdir())
    summary_file = shelf.output / "pinned--extras.vsa.json"
    url = "https://huggingface.co/datasets/somebody/rebuilt/blob/main/pinned--extras.vsa.json"

    def run(path: Path, address: str = url) -> Done:
        options = ("--build-dir", build, "--repo-id", "pinned/extras")
        return shelf.worker.nf4(shelf.folder, "attest", *options, "--rebuilt", path, address)

    before = content_of(build / "export")
    for path, said in (
        (shelf.output / "pinned--codes.vsa.json", "says FAILED"),
        (shelf.output / "pinned--shards.vsa.json", "speaks of another artifact"),
        (shelf.output / "results.json", "no verification summary"),
        (shelf.folder / "nothing", "cannot be read"),
    ):
        done = run(path)
        assert done.status == 1
        assert said in done.err
    assert run(summary_file, "javascript:x").status == 2
    assert content_of(build / "export") == before
    assert b"Verified reproducible" not in before["README.md"]
    assert run(summary_file).status == 0
    card = (build / "export" / "README.md").read_text("utf-8")
    assert "**Verified reproducible** by `pkg:pypi/nf4-pipeline?verifier=local" in card
    assert f"[summary](<{url}>)" in card
    assert "nf4 rebuild pinned/extras" in card
    done = shelf.worker.nf4(shelf.folder, "rebuild", "--json", build)
    assert done.value["results"][0]["verdict"] == "PASSED", done.out
    assert any(url in note for note in done.value["results"][0]["notes"])


def test_exit_codes_and_names(shelf: Shelf) -> None:
    def run(*args: str | Path) -> Done:
        return shelf.worker.nf4(shelf.folder, "rebuild", "-q", *args)

    gone = run("nobody/nothing")
    assert gone.status == NOT_CHECKED
    assert "NOT_CHECKED  nobody/nothing" in gone.out
    names = shelf.folder / "names.txt"
    names.write_text("# ours\n\npinned/shards@main # the newest\n", "utf-8")
    assert run("--list", names).status == 0
    names.write_text("no-such-thing\nx\0y\npinned/commit\n", "utf-8")
    output = shelf.folder / "listed"
    listed = run("--list", names, "--output", output)
    assert listed.status == 1
    assert [line.split()[0] for line in listed.out.splitlines()[:3]] == [NOT, NOT, "FAILED"]
    assert len(list(output.glob("*.vsa.json"))) == 1
    names.write_text("# none yet\n", "utf-8")
    assert run("--list", names, "--output", output).status == 0
    too_small = run("pinned/shards", "--max-download", "1KB")
    assert too_small.status == NOT_CHECKED
    assert "--max-download allows 1,000" in too_small.out
    for wrong in ((), ("no-such-thing",), ("pinned/shards", "--keep"), ("a/b", "--verifier", "me")):
        assert run(*wrong).status == 2
    device = run("pinned/calibrated", "--device", "cuda")
    assert device.status == NOT_CHECKED
    assert "same kind" in device.out


def test_a_folder_and_its_links(shelf: Shelf, tmp_path: Path) -> None:
    """A link would show a file of this machine as one of the artifact's."""
    artifact = shelf.folder / "copies" / "shards"
    before = content_of(artifact)
    done = shelf.worker.nf4(shelf.folder, "rebuild", "-q", "--json", artifact)
    result = done.value["results"][0]
    assert (result["verdict"], result["commit"]) == ("PASSED", None), result
    assert result["resource_uri"].startswith("pkg:generic/shards?checksum=sha256%3A")
    secret = tmp_path / "secret"
    secret.write_bytes(before["config.json"])
    (artifact / "config.json").unlink()
    (artifact / "config.json").symlink_to(secret)
    (artifact / "x.fifo").touch()
    done = shelf.worker.nf4(shelf.folder, "rebuild", "-q", "--json", artifact)
    (result,) = done.value["results"]
    found = {d["file"]: d["what"] for d in result["differences"]}
    assert found["config.json"] == "is a link, and not a file"
    assert set(found) == {"config.json", "x.fifo"}
