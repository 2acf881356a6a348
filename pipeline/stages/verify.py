"""export/ against source/: gates, both models in fresh processes, the verdict, the card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from pipeline import card
from pipeline.build import Build, Record, stage_key
from pipeline.checkpoint.digest import digest_file
from pipeline.checkpoint.durable import write_bytes, write_json
from pipeline.checkpoint.files import is_tokenizer
from pipeline.errors import RecipeError, ResourceError
from pipeline.fidelity.metrics import Fidelity, is_right
from pipeline.fidelity.verdict import Check, accuracy_check, fidelity_checks, verdict
from pipeline.manifest.read import read_manifest
from pipeline.progress import Reporter
from pipeline.proof.gates import file_gates, reload_gate
from pipeline.proof.prompts import REFERENCE, Prompt, read_prompts
from pipeline.proof.run import examine
from pipeline.recipe import VerifyRecipe
from pipeline.runtime.loader import pick_device
from pipeline.stages import Settings, recorded
from pipeline.stages.download import recorded_files

CODE_VERSION: Final = 1
VERIFICATION_FILE: Final = "verification.json"
CARD_FILE: Final = "README.md"


def key(build: Build, settings: Settings) -> str:
    """Depends on the export, the source, [verify], the prompts and the kind of device."""
    download, serialized = build.need("download"), build.need("serialize")
    recipe = {**settings.recipe.as_json()["verify"]}
    del recipe["prompts"]  # what the file holds matters, not where it is
    return stage_key(
        {
            "code": CODE_VERSION,
            "source": download.facts["content_sha256"],
            "export": {name: digest.sha256 for name, digest in serialized.outputs.items()},
            "recipe": recipe,
            "prompts": digest_file(prompts_path(build, settings)).sha256,
            "device": pick_device(settings.device).partition(":")[0],
        }
    )


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
        from pipeline.sample import QUESTIONS

        return QUESTIONS
    return REFERENCE


def run(build: Build, settings: Settings, reporter: Reporter) -> Record:
    """Verifies an export and writes what was found beside it.

    The verdict "fail" is recorded like any other; the caller decides what follows from it.

    Raises:
        ArtifactError: the export is no artifact, or one of the models does not load.
        ResourceError: a GPU was required and there is none.
        VerificationError: a process that loads a model died.
    """
    stage = key(build, settings)
    build.check_inputs("download")
    device = pick_device(settings.device)
    prompts = read_prompts(prompts_path(build, settings))
    if not _has_tokenizer(build):
        prompts = ()
        reporter.note(
            "This checkpoint has no tokenizer: no prompt can be answered, and the models are "
            "compared on random token ids."
        )

    def work() -> tuple[dict[str, Any], dict[str, Any]]:
        manifest = read_manifest(build.export)
        gates = file_gates(build.export, manifest, reporter)
        found = _behaviour(
            build, manifest, prompts, settings.recipe.verify, device, gates, reporter
        )
        write_json(build.export / VERIFICATION_FILE, found)
        text = card.model_card(manifest, found, _source_metadata(build))
        write_bytes(build.export / CARD_FILE, text.encode())
        outputs = {
            f"export/{name}": digest_file(build.export / name)
            for name in (VERIFICATION_FILE, CARD_FILE)
        }
        return outputs, found

    def peak(facts: dict[str, Any]) -> int:
        return max((m["peak_memory_bytes"] for m in facts.get("models", {}).values()), default=0)

    return recorded(build, "verify", stage, work, child_peak=peak)


def _has_tokenizer(build: Build) -> bool:
    return any(is_tokenizer(name) for name in recorded_files(build.need("download")))


def _behaviour(
    build: Build,
    manifest: dict[str, Any],
    prompts: Sequence[Prompt],
    recipe: VerifyRecipe,
    device: str,
    gates: list[Check],
    reporter: Reporter,
) -> dict[str, Any]:
    """What both models do; skipped if the files already fail, since nothing would be learned."""
    found: dict[str, Any] = {"schema_version": 1, "thresholds": _thresholds(recipe)}
    checks = list(gates)
    if all(check.passed for check in gates):
        with reporter.task("run both models", 2, unit="models") as task:
            reference, model = examine(
                build.source, build.export, prompts, recipe, device, lambda: task.advance(1)
            )
        fidelity = Fidelity(**model["fidelity"])
        answers = _side_by_side(prompts, reference, model)
        asked = [answer for answer in answers if answer["expect"] is not None]
        checks.append(reload_gate(manifest, model["linear4bit"]))
        checks += fidelity_checks(fidelity, recipe)
        accuracy = accuracy_check(
            [answer["right_16bit"] for answer in asked],
            [answer["right_4bit"] for answer in asked],
            recipe,
        )
        checks += [accuracy] if accuracy else []
        found |= {
            "device": model["device"],
            "fidelity": fidelity.as_json(),
            "accuracy": _accuracy(asked),
            "models": {"16bit": _costs(reference), "4bit": _costs(model)},
            "answers": answers,
        }
    found["checks"] = [check.as_json() for check in checks]
    found["verdict"] = verdict(checks)
    return found


def _thresholds(recipe: VerifyRecipe) -> dict[str, float]:
    return {
        "max_mean_kl": recipe.max_mean_kl,
        "min_sure_agreement": recipe.min_sure_agreement,
        "max_accuracy_drop": recipe.max_accuracy_drop,
    }


def _side_by_side(
    prompts: Sequence[Prompt], reference: dict[str, Any], model: dict[str, Any]
) -> list[dict[str, Any]]:
    answers = []
    for prompt, before, after in zip(prompts, reference["answers"], model["answers"], strict=True):
        entry: dict[str, Any] = {
            "prompt": prompt.prompt,
            "expect": prompt.expect,
            "answer_16bit": before["text"],
            "answer_4bit": after["text"],
            "same": before["text"] == after["text"],
        }
        if prompt.expect is not None:
            entry["right_16bit"] = is_right(before["text"], prompt.expect)
            entry["right_4bit"] = is_right(after["text"], prompt.expect)
        answers.append(entry)
    return answers


def _accuracy(asked: Sequence[dict[str, Any]]) -> dict[str, int] | None:
    if not asked:
        return None
    return {
        "asked": len(asked),
        "right_16bit": sum(answer["right_16bit"] for answer in asked),
        "right_4bit": sum(answer["right_4bit"] for answer in asked),
    }


def _costs(found: dict[str, Any]) -> dict[str, Any]:
    tokens = sum(answer["tokens"] for answer in found["answers"])
    seconds = sum(answer["seconds"] for answer in found["answers"])
    return {
        "load_seconds": found["load_seconds"],
        "tokens_per_second": round(tokens / seconds, 2) if seconds else None,
        "footprint_bytes": found["footprint_bytes"],
        "peak_memory_bytes": found["peak_memory_bytes"],
        "peak_device_memory_bytes": found["peak_device_memory_bytes"],
    }


def _source_metadata(build: Build) -> dict[str, Any]:
    """The front matter of the source's own card: its license is inherited, never invented."""
    path = build.source / CARD_FILE
    return card.front_matter(path.read_text("utf-8", "replace")) if path.is_file() else {}
