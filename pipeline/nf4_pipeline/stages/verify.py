"""export/ against source/: gates, both models in fresh processes, the verdict, report and card."""

from __future__ import annotations

import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from nf4_pipeline import __version__
from nf4_pipeline.build_folder import Build, Record, stage_key
from nf4_pipeline.checkpoint.atomic import json_bytes, write_bytes
from nf4_pipeline.checkpoint.digest import digest_file
from nf4_pipeline.checkpoint.files import is_tokenizer
from nf4_pipeline.errors import ArtifactError, RecipeError, ResourceError
from nf4_pipeline.manifest.read import MANIFEST_FILE, read_manifest
from nf4_pipeline.progress import Reporter
from nf4_pipeline.report import model_card as card
from nf4_pipeline.report.page import report_page
from nf4_pipeline.report.pictures import PICTURES, pictures
from nf4_pipeline.runtime.artifact import find_model
from nf4_pipeline.runtime.loader import pick_device
from nf4_pipeline.stages import Settings, recorded
from nf4_pipeline.stages.download import recorded_files, recorded_tokenizer
from nf4_pipeline.verification.checks import file_gates, load_gate, manifest_gate
from nf4_pipeline.verification.document import examined, refused
from nf4_pipeline.verification.eval_text import RANDOM, Text, read_text
from nf4_pipeline.verification.launch import Examination, scores_differ
from nf4_pipeline.verification.prompts import REFERENCE, Prompt, asked_with, read_prompts

CODE_VERSION: Final = 3
VERIFICATION_FILE: Final = "verification.json"
CARD_FILE: Final = "README.md"
REPORT_FILE: Final = "report.html"
_WRITTEN: Final = {VERIFICATION_FILE, CARD_FILE, REPORT_FILE} | {
    picture.file for picture in PICTURES.values() if picture.file
}
_USED: Final = ("torch", "transformers", "bitsandbytes")


def key(build: Build, settings: Settings) -> str:
    """Depends on the export, the source, [verify], what is asked, and the kind of device.

    A comparison with another artifact that was made once stays valid until another one is wanted.
    """
    against = _manifest_of(settings)
    if against is None and (record := build.record("verify")) is not None:
        against = record.facts.get("against", {}).get("manifest_sha256")
    return _key(build, settings, against)


def _key(build: Build, settings: Settings, against: str | None) -> str:
    download, serialized = build.need("download"), build.need("serialize")
    recipe = {**settings.recipe.as_json()["verify"]}
    del recipe["prompts"], recipe["eval_text"]  # what the files hold matters, not where they are
    return stage_key(
        {
            "code": CODE_VERSION,
            "source": download.facts["content_sha256"],
            "export": {name: digest.sha256 for name, digest in serialized.outputs.items()},
            "recipe": recipe,
            "prompts": digest_file(prompts_path(build, settings)).sha256,
            "text": _text(build, settings).sha256,
            "device": pick_device(settings.device).partition(":")[0],
            "against": against,
        }
    )


def _manifest_of(settings: Settings) -> str | None:
    """The hash of the manifest of the artifact to compare with, if there is one."""
    if settings.against is None:
        return None
    return digest_file(_other(settings.against) / MANIFEST_FILE).sha256


def check_gpu(settings: Settings) -> None:
    """Refuses to begin if a GPU is required and there is none.

    Raises:
        ResourceError: so it is.
    """
    if settings.require_gpu and pick_device(settings.device) == "cpu":
        raise ResourceError(
            "A GPU is required to verify (--require-gpu) and this machine has none that torch can "
            "use. Leave the option out to verify on the CPU."
        )


def prompts_path(build: Build, settings: Settings) -> Path:
    """The user's prompts, or those of the sample, or those for any model."""
    if settings.recipe.verify.prompts:
        path = Path(settings.recipe.verify.prompts)
        if not path.is_file():
            raise RecipeError(f"The prompts {path} cannot be read: there is no such file.")
        return path
    if build.need("download").facts["is_sample"]:
        from nf4_pipeline.sample import QUESTIONS

        return QUESTIONS
    return REFERENCE


def run(build: Build, settings: Settings, reporter: Reporter) -> Record:
    """Verifies an export and writes what was found beside it.

    The verdict "fail" is recorded like any other; the caller decides what follows from it.

    Raises:
        ArtifactError: the export is no artifact, or the one to compare with is not of its source.
        SourceError: the source does not load.
        ResourceError: a GPU was required and there is none.
        VerificationError: a process that loads a model died.
    """
    stage = _key(build, settings, _manifest_of(settings))
    build.check_inputs("download")
    manifest = read_manifest(build.export)
    if settings.against is not None:
        _check_other(manifest, _other(settings.against), reporter)

    def work() -> tuple[dict[str, Any], dict[str, Any]]:
        found = _examine(build, manifest, settings, reporter)
        files = _documents(build, manifest, found)
        for name in _WRITTEN - set(files):
            (build.export / name).unlink(missing_ok=True)  # of an earlier run that found more
        for name, content in files.items():
            write_bytes(build.export / name, content)
        return {f"export/{name}": digest_file(build.export / name) for name in files}, found

    def peak(facts: dict[str, Any]) -> int:
        parts = [*facts.get("models", {}).values(), facts.get("comparison", {})]
        return max((part.get("peak_memory_bytes", 0) for part in parts), default=0)

    table = settings.recipe.table("verify")
    return recorded(build, "verify", stage, work, recipe=table, child_peak=peak)


def _documents(build: Build, manifest: dict[str, Any], found: dict[str, Any]) -> dict[str, bytes]:
    """What was found, for machines and for people, by file name."""
    return {
        VERIFICATION_FILE: json_bytes(found),
        **pictures(manifest, found),
        REPORT_FILE: report_page(manifest, found).encode(),
        CARD_FILE: card.model_card(manifest, found, _source_metadata(build)).encode(),
    }


def _examine(
    build: Build, manifest: dict[str, Any], settings: Settings, reporter: Reporter
) -> dict[str, Any]:
    """Gates, then both models; left out if a gate fails, since nothing would be learned."""
    recipe = settings.recipe.verify
    versions = _versions()
    recorded_manifest = build.need("serialize").outputs[f"export/{MANIFEST_FILE}"]
    gates = [manifest_gate(digest_file(build.export / MANIFEST_FILE), recorded_manifest)]
    gates += file_gates(build.export, manifest, reporter)
    if not all(gate.passed for gate in gates):
        return refused(gates, recipe, versions)
    prompts = _prompts(build, settings, reporter)
    asked = Examination(
        source=build.source,
        device=pick_device(settings.device),
        device_memory=settings.device_memory,
        prompts=prompts,
        max_new_tokens=recipe.max_new_tokens,
        text=_text(build, settings),
        tokens=recipe.eval_tokens,
    )
    with tempfile.TemporaryDirectory(prefix="nf4-scores-") as folder:
        own, others = Path(folder) / "own.npz", Path(folder) / "others.npz"
        source = asked.ask_source(build.export, reporter)
        try:
            nearest = _beside(manifest)
            artifact = asked.ask_artifact(build.export, own, reporter, nearest=nearest)
        except ArtifactError as error:
            return refused([*gates, load_gate(str(error))], recipe, versions)
        found = examined(manifest, gates, prompts, source, artifact, recipe, versions)
        if settings.against is not None:
            other = _other(settings.against)
            compared = _compare(asked, other, others, reporter)
            found["against"] = {**compared, "difference": scores_differ(own, others)}
    return found


def _beside(manifest: dict[str, Any]) -> list[str] | None:
    """The modules that round to nearest would have in 4 bit and this artifact has not.

    None if round to nearest is what this artifact is.
    """
    if manifest["recipe"]["quantize"]["rounding"] == "nearest":
        return None
    kept = {module["module"] for module in manifest.get("calibration", {}).get("kept", ())}
    plain = [t.get("module") for t in manifest["tensors"] if not t["quantized"]]
    return [module for module in plain if module in kept]


def _versions() -> dict[str, str]:
    """Of everything that a figure may depend on."""
    used = {name: version(name) for name in _USED}
    return {"nf4-pipeline": __version__, "python": platform.python_version(), **used}


def _check_other(manifest: dict[str, Any], other: Path, reporter: Reporter) -> None:
    """Refuses an artifact that cannot be compared with, before any work is done."""
    theirs = read_manifest(other)
    if theirs["source"]["content_sha256"] != manifest["source"]["content_sha256"]:
        raise ArtifactError(
            f"{other} was made from another source ({theirs['source']['repo']}, content "
            f"{theirs['source']['content_sha256'][:12]}…) than this artifact "
            f"({manifest['source']['content_sha256'][:12]}…). Only artifacts of one source can be "
            "compared."
        )
    failed = [gate for gate in file_gates(other, theirs, reporter) if not gate.passed]
    if failed:
        raise ArtifactError(f"{other} is not what its manifest says: {failed[0].found}.")


def _compare(asked: Examination, other: Path, scores: Path, reporter: Reporter) -> dict[str, Any]:
    """Another artifact of the same source on the same text."""
    theirs = read_manifest(other)
    found = asked.without_prompts().ask_artifact(other, scores, reporter)
    return {
        "name": other.parent.name if other.name == "export" else other.name,
        "manifest_sha256": digest_file(other / MANIFEST_FILE).sha256,
        "rounding": theirs["recipe"]["quantize"]["rounding"],
        "fidelity": found["fidelity"],
        "domains": found["domains"],
    }


def _other(name: str) -> Path:
    """The artifact that this one is compared with.

    Raises:
        UsageError: no such folder.
        ArtifactError: it is none.
    """
    folder = Path(find_model(name))
    read_manifest(folder)
    return folder


def _prompts(build: Build, settings: Settings, reporter: Reporter) -> tuple[Prompt, ...]:
    if _has_tokenizer(build):
        found = recorded_tokenizer(build.need("download"))
        return asked_with(found, read_prompts(prompts_path(build, settings)))
    reporter.note(
        "This checkpoint has no tokenizer: no prompt can be answered, and the models are "
        "compared on random token ids."
    )
    return ()


def _text(build: Build, settings: Settings) -> Text:
    """The user's text, or that of the sample, or the one for any model."""
    if not _has_tokenizer(build):
        return Text(RANDOM, {})
    if settings.recipe.verify.eval_text:
        return read_text(Path(settings.recipe.verify.eval_text))
    if build.need("download").facts["is_sample"]:
        from nf4_pipeline.sample import TEXT

        return Text("the sample's own", {"stories and questions": TEXT.read_text("utf-8")})
    return read_text(None)


def _has_tokenizer(build: Build) -> bool:
    record = build.need("download")
    found = recorded_tokenizer(record)
    return found.status == "loads" if found else any(map(is_tokenizer, recorded_files(record)))


def _source_metadata(build: Build) -> dict[str, Any]:
    """The front matter of the source's own card: its license is inherited, never invented."""
    path = build.source / CARD_FILE
    return card.front_matter(path.read_text("utf-8", "replace")) if path.is_file() else {}
