"""What a manifest claims of its source: confirmed by somebody else, refused, or not checked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, Final

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.digest import FileDigest, content_sha256
from nf4_pipeline.errors import NOT_CHECKED, ArtifactError, SourceError
from nf4_pipeline.job import run_stage
from nf4_pipeline.manifest.read import read_manifest
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import Recipe, load_recipe
from nf4_pipeline.reproduce.reproduce import reproduce
from nf4_pipeline.sample import MODEL_DIR

from tests.support.command_line import run_nf4
from tests.support.hub_server import HubServer
from tests.support.hub_worker import Worker
from tests.support.jobs import CPU, download
from tests.support.tamper import agree
from tests.support.tiny import SHARDS, Done, copy_of, edit_json, write_falcon
from tests.support.verified import skip_documents, skip_readers

pytestmark = pytest.mark.usefixtures("workers_here")

REPO: Final = "some-org/tiny"
COMMIT: Final = "c0ffee" * 6 + "c0ff"
FORGED: Final[dict[str, Any]] = {
    "repo": "other-org/other",
    "commit": "0" * 40,
    "content_sha256": "f" * 64,
}
COMBINATIONS: Final = [
    {key: FORGED[key] for key, forged in zip(FORGED, which, strict=True) if forged}
    for which in product((False, True), repeat=3)
]


def claim(artifact: Path, **claims: Any) -> None:
    """Lets a manifest say something else of its source."""
    source = json.loads((artifact / "manifest.json").read_text())["source"]
    edit_json(artifact / "manifest.json", source={**source, **claims})
    value = json.loads((artifact / "manifest.json").read_text())
    (artifact / "manifest.json").write_text(
        json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8"
    )


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No Hub, and an empty cache; gives the cache."""
    cache = tmp_path / "hub-cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def artifact(exported_falcon: Path, tmp_path: Path) -> Path:
    """As it was made of a local folder."""
    return copy_of(exported_falcon / "export", tmp_path / "artifact")


@pytest.fixture
def pinned(artifact: Path) -> Path:
    """As it would have been made from a Hub."""
    claim(artifact, repo=REPO, commit=COMMIT)
    return artifact


def snapshot_of(model: Path, cache: Path, repo: str = REPO, commit: str = COMMIT) -> Path:
    """A Hub cache that holds a model: weights by sha256, small files by the sha1 that git has."""
    storage = cache / f"models--{repo.replace('/', '--')}"
    snapshot = storage / "snapshots" / commit
    (storage / "blobs").mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True)
    for path in model.iterdir():
        content = path.read_bytes()
        name = hashlib.sha256(content).hexdigest()
        if not path.name.endswith(".safetensors"):
            name = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        (storage / "blobs" / name).write_bytes(content)
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    return snapshot


# --- reproduce ---


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("forged", COMBINATIONS, ids=lambda forged: "+".join(forged) or "none")
def test_forged_claims_of_a_local_source(
    artifact: Path, tiny_falcon: Path, forged: dict[str, Any]
) -> None:
    claim(artifact, **forged)
    if "content_sha256" in forged:
        with pytest.raises(ArtifactError, match=r"contradicts itself.*f{64}.*have [0-9a-f]{64}"):
            reproduce(artifact, tiny_falcon, SILENT)
        return
    found = reproduce(artifact, tiny_falcon, SILENT)
    assert found.differences == []
    assert found.origin.confirmed_by is None
    assert found.origin.is_open == bool(forged)
    assert found.source.content_sha256 == content_sha256(found.source.files)


@pytest.mark.parametrize("forged", COMBINATIONS, ids=lambda forged: "+".join(forged) or "none")
def test_forged_claims_of_a_snapshot(
    pinned: Path, tiny_falcon: Path, offline: Path, tmp_path: Path, forged: dict[str, Any]
) -> None:
    snapshot = snapshot_of(tiny_falcon, tmp_path / "elsewhere")
    claim(pinned, **forged)
    if "content_sha256" in forged:
        with pytest.raises(ArtifactError, match="contradicts itself"):
            reproduce(pinned, snapshot, SILENT)
        return
    found = reproduce(pinned, snapshot, SILENT)
    assert found.differences == []
    if forged:
        assert found.origin.is_open
        assert f"is a snapshot of some-org/tiny at {COMMIT}" in str(found.origin.not_checked)
    else:
        assert found.origin.confirmed_by == f"the Hub cache, {snapshot}"


def test_the_users_own_cache_confirms_or_refuses(
    pinned: Path, tiny_falcon: Path, offline: Path
) -> None:
    snapshot = snapshot_of(tiny_falcon, offline)
    found = reproduce(pinned, tiny_falcon, SILENT)
    assert found.origin.confirmed_by == f"the Hub cache, {snapshot}"
    assert not found.origin.is_open
    other = snapshot / SHARDS[0]
    other.unlink()
    other.symlink_to(f"../../blobs/{'a' * 64}")
    (snapshot / f"../../blobs/{'a' * 64}").write_bytes(b"x")
    with pytest.raises(SourceError, match=rf"has another {SHARDS[0]} than the source .*found 1 by"):
        reproduce(pinned, tiny_falcon, SILENT)


def test_a_snapshot_whose_files_are_no_links_says_nothing(
    pinned: Path, tiny_falcon: Path, offline: Path, tmp_path: Path
) -> None:
    snapshot = snapshot_of(tiny_falcon, tmp_path / "elsewhere")
    path = snapshot / "config.json"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    found = reproduce(pinned, snapshot, SILENT)
    assert found.origin.is_open
    assert "does not say what the Hub listed for config.json" in str(found.origin.not_checked)


@pytest.mark.usefixtures("offline")
def test_what_is_no_name_of_a_repo_is_not_looked_for(artifact: Path, tiny_falcon: Path) -> None:
    for repo in ("tiny-falcon", "a--b/c", "a/b/c", "../x"):
        claim(artifact, repo=repo, commit=COMMIT)
        found = reproduce(artifact, tiny_falcon, SILENT)
        assert found.origin.is_open
        assert "is not the name of a Hub repo" in str(found.origin.not_checked)


@pytest.mark.usefixtures("offline")
def test_the_name_of_the_sample_is_held_against_the_sample(
    artifact: Path, tiny_falcon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(artifact, repo="nf4-pipeline/sample")
    found = reproduce(artifact, tiny_falcon, SILENT)
    assert found.origin.is_open
    assert "has other content" in str(found.origin.not_checked)
    build, *_ = download("sample", tmp_path / "artifacts")
    for stage in ("quantize", "serialize"):
        run_stage(build, stage, Recipe(), CPU, SILENT)
    (tmp_path / "here" / "sample").mkdir(parents=True)  # is not what the manifest means
    monkeypatch.chdir(tmp_path / "here")
    for source in (None, copy_of(MODEL_DIR, tmp_path / "sample")):
        found = reproduce(build.export, source, SILENT)
        assert (found.differences, found.origin.is_open) == ([], False)
        assert "the sample that comes with" in str(found.origin.confirmed_by)


@pytest.mark.usefixtures("offline")
def test_a_content_hash_that_fits_forged_files_does_not_fit_the_source(
    artifact: Path, tiny_falcon: Path
) -> None:
    source = read_manifest(artifact).source
    files = {**source.files, "config.json": FileDigest(7, "7" * 64)}
    listed = {name: digest.to_json() for name, digest in files.items()}
    claim(artifact, files=listed, content_sha256=content_sha256(files))
    with pytest.raises(SourceError, match=r"config\.json of .* is not what the artifact was made"):
        reproduce(artifact, tiny_falcon, SILENT)


def test_the_command_says_what_was_not_checked(
    pinned: Path, tiny_falcon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_nf4("reproduce", "-q", pinned, "--source", tiny_falcon)
    assert (done.status, done.err) == (NOT_CHECKED, "")
    assert re.search(r"reproduced: (\d+) of \1 files\n$", done.out)
    assert f"not checked: that it is {REPO} at {COMMIT} (" in done.out
    assert f"{REPO} at" not in done.out.splitlines()[0]
    done = run_nf4("reproduce", "-q", "--json", pinned, "--source", tiny_falcon)
    assert done.status == NOT_CHECKED
    assert done.value["reproduced"] is True
    origin = done.value["source"]["origin"]
    assert (origin["claimed"], origin["confirmed_by"]) == (True, None)


def test_a_hub_is_asked_and_believed_of_what_it_lists(
    pinned: Path, tiny_falcon: Path, tmp_path: Path
) -> None:
    """Nothing is fetched: the source is at hand, and the Hub lists what it should be."""
    home = tmp_path / "hf"
    with HubServer() as hub, Worker(home, hub.url, CUDA_VISIBLE_DEVICES="") as worker:
        repo = hub.store.add(REPO, tiny_falcon)
        commit = repo.refs["main"]
        later = repo.commit({SHARDS[0]: b"another state of main"})

        def run(commit: str, name: str = REPO) -> Done:
            claim(pinned, commit=commit, repo=name)
            return worker.nf4(tmp_path, "reproduce", pinned, "--source", tiny_falcon)

        done = run(commit)
        assert done.status == 0, done.err + done.out
        assert f"confirmed by: the Hub at {hub.url}" in done.out
        assert not list(home.rglob("*.safetensors"))
        done = run(str(later))
        assert done.status == 1
        assert f"has another {SHARDS[0]} than the source" in done.err
        for unknown in (("0" * 40, REPO), (commit, "nobody/nothing")):
            done = run(*unknown)
            assert done.status == NOT_CHECKED, done.err + done.out
            assert "not checked: that it is" in done.out


# --- verify --against ---


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """No pictures, and no readers in processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        skip_documents(patch)
        skip_readers(patch)
        yield


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("forged", COMBINATIONS, ids=lambda forged: "+".join(forged) or "none")
def test_forged_claims_of_the_artifact_to_compare_with(
    exported_falcon: Path,
    quick_recipe: Path,
    artifact: Path,
    tmp_path: Path,
    forged: dict[str, Any],
) -> None:
    build = Build(copy_of(exported_falcon, tmp_path / "build"))
    recipe = load_recipe(quick_recipe)
    claim(artifact, **forged)
    if "content_sha256" in forged:
        with pytest.raises(ArtifactError, match="contradicts itself"):
            run_stage(build, "verify", recipe, CPU, SILENT, against=str(artifact))
        return
    facts = run_stage(build, "verify", recipe, CPU, SILENT, against=str(artifact)).record.facts
    if forged:
        assert f"that its source is {forged.get('repo', 'tiny-falcon')} at" in str(
            facts.against.not_checked
        )
    else:
        assert facts.against.not_checked is None


@pytest.mark.usefixtures("quick")
def test_the_artifact_of_another_source_that_claims_to_be_of_this_one(
    exported_falcon: Path, quick_recipe: Path, tmp_path: Path
) -> None:
    """Its manifest agrees with its files, and lists the files of our source."""
    model = write_falcon(tmp_path / "model", seed=1)
    other, *_ = download(model, tmp_path / "artifacts")
    recipe = load_recipe(quick_recipe)
    for stage in ("quantize", "serialize"):
        run_stage(other, stage, Recipe(), CPU, SILENT)
    build = Build(copy_of(exported_falcon, tmp_path / "build"))
    ours = json.loads((build.export / "manifest.json").read_text())["source"]
    with pytest.raises(ArtifactError, match="made from another source"):
        run_stage(build, "verify", recipe, CPU, SILENT, against=str(other.export))
    edit_json(other.export / "manifest.json", source=ours)
    with pytest.raises(ArtifactError, match="was not made from this source, whatever"):
        run_stage(build, "verify", recipe, CPU, SILENT, against=str(other.export))


@pytest.mark.usefixtures("quick")
def test_a_manifest_of_our_own_that_claims_another_source(
    exported_falcon: Path, quick_recipe: Path, tmp_path: Path
) -> None:
    build = Build(copy_of(exported_falcon, tmp_path / "build"))
    claim(build.export, **FORGED)
    agree(build)
    recipe = load_recipe(quick_recipe)
    facts = run_stage(build, "verify", recipe, CPU, SILENT).record.facts
    (check,) = facts.failed_checks
    assert check.name == "source as the manifest says"
    for name in FORGED:
        assert f"{name} {FORGED[name]}, not " in check.found
