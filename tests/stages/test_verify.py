"""Verify from outside: what it measures, against what, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import jsonschema
import numpy as np
import pytest
import torch
import transformers
from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.digest import FileDigest, content_sha256
from nf4_pipeline.cluster.ray_tasks import Claim
from nf4_pipeline.errors import ArtifactError, RecipeError, UsageError
from nf4_pipeline.fidelity.token_scores import TokenScores, score_tokens
from nf4_pipeline.job import run_stage, states
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer
from nf4_pipeline.progress import SILENT
from nf4_pipeline.quiet_libraries import quiet_loading
from nf4_pipeline.recipe import Recipe, load_recipe
from nf4_pipeline.records import VERIFY
from nf4_pipeline.report.formatting import number
from nf4_pipeline.runtime.loader import load
from nf4_pipeline.sample import MODEL_DIR, QUESTIONS, TEXT
from nf4_pipeline.verification.document import SCHEMA
from nf4_pipeline.verification.eval_text import Text, cut
from nf4_pipeline.verification.launch import Examination
from nf4_pipeline.verification.prompts import Prompt

from tests.support import made
from tests.support.checkpoints import make_checkpoint, read_tensors
from tests.support.command_line import run_nf4
from tests.support.jobs import CPU, download
from tests.support.stand_in_cluster import standing_in, without_ray
from tests.support.tamper import agree, change, swap
from tests.support.tiny import content_of, copy_of, edit_json, flip_byte, nf4
from tests.support.verified import ask_source, skip_documents, skip_readers

pytestmark = pytest.mark.usefixtures("workers_here")

DONE: Final = dict.fromkeys(("download", "quantize", "serialize", "verify"), "done")


@pytest.fixture
def recipe(quick_recipe: Path) -> Recipe:
    return load_recipe(quick_recipe)


@pytest.fixture
def build(exported_falcon: Path, tmp_path: Path) -> Build:
    return Build(copy_of(exported_falcon, tmp_path / "build"))


@pytest.fixture
def without_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_documents(monkeypatch)
    skip_readers(monkeypatch)


def with_verify(recipe: Recipe, **changes: Any) -> Recipe:
    return replace(recipe, verify=replace(recipe.verify, **changes))


def verified(build: Build, recipe: Recipe, against: Path | None = None) -> dict[str, Any]:
    """Runs the stage; gives what stands in verification.json, which fits its schema."""
    other = None if against is None else str(against)
    result = run_stage(build, "verify", recipe, CPU, SILENT, against=other)
    assert result.ran
    found: dict[str, Any] = json.loads((build.export / "verification.json").read_text("utf-8"))
    jsonschema.validate(found, json.loads(SCHEMA.read_text("utf-8")))
    assert found == json.loads(json.dumps(result.record.facts.to_json()))
    return found


def status_of(build: Build, recipe: Recipe) -> dict[str, str]:
    """Of every stage up to verify."""
    found: dict[str, str] = {
        stage: state.status for stage, state in states(build, recipe, CPU).items()
    }
    del found["attest"]
    return found


def failed(found: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["found"] for check in found["checks"] if not check["passed"]}


# --- against both models whole ---


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of the sample up to serialize."""
    build, *_ = download("sample", tmp_path_factory.mktemp("sample"))
    for stage in ("quantize", "serialize"):
        run_stage(build, stage, Recipe(), CPU, SILENT)
    return build.root


@pytest.mark.usefixtures("without_documents")
def test_tasks_of_a_cluster_find_the_same(build: Build, quick_recipe: Path, tmp_path: Path) -> None:
    """Whatever the order in which they end; one task alone would find no more than a process."""
    recipe = with_verify(load_recipe(quick_recipe), eval_tokens=400)
    alone = Build(copy_of(build.root, tmp_path / "alone"))
    expected = without_costs(verified(alone, recipe))
    assert expected["text"]["sequences"] > 3
    typed = ["verify", "--build-dir", build.root, "--recipe", quick_recipe, "--device", "cpu"]
    typed += ["--eval-tokens", 400, "--engine", "ray", "--ray-address", "auto", "-v"]
    with standing_in() as cluster:
        cluster.cpus, cluster.largest = 3, Claim(1)
        done = run_nf4(*typed)
        assert "compared by one process" not in done.err
        assert cluster.claims == [Claim(1)]
        found = json.loads((build.export / "verification.json").read_text("utf-8"))
        assert without_costs(found) == expected
        assert done.status == (0 if found["verdict"] == "pass" else 1)

        cluster.cpus = 1
        done = run_nf4(*typed)
        assert "compared by one process of this host: the cluster has room for one" in done.err
        assert cluster.claims == [Claim(1)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_cluster_that_cannot_be_had(
    device: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before the verdict that is there is taken away."""
    without_ray(monkeypatch)
    monkeypatch.setattr("nf4_pipeline.machine._most_devices", lambda: 0)
    (build.export / "verification.json").write_text("{}")
    done = run_nf4("verify", "--build-dir", build.root, "--engine", "ray", "--device", device)
    if device == "cpu":
        assert done.status == 2
        assert "pip install 'nf4-pipeline[ray]'" in done.err
    else:  # the rest of verify runs on this host
        assert done.status == 1
        assert "Device cuda was asked for" in done.err
    assert (build.export / "verification.json").read_text() == "{}"


def without_costs(found: dict[str, Any]) -> dict[str, Any]:
    kept = {n: v for n, v in found.items() if n not in ("comparison", "models", "answers")}
    assert {"fidelity", "blocks", "worst_tokens", "kl_by_position"} <= kept.keys()
    return kept


@pytest.mark.usefixtures("without_documents")
def test_the_sample_passes_and_its_figures_are_those_of_both_models_whole(
    sample: Path, tmp_path: Path
) -> None:
    build = Build(copy_of(sample, tmp_path / "build"))
    asked = [json.loads(line) for line in QUESTIONS.read_text("utf-8").splitlines()[:50:6]]
    found = verified(
        build,
        with_verify(Recipe(), eval_tokens=1500, prompts=prompts_file(tmp_path, asked)),
    )
    assert (found["verdict"], failed(found)) == ("pass", {})
    assert found["accuracy"] == {"asked": 9, "right_16bit": 9, "right_4bit": 9}
    with quiet_loading():
        reference = transformers.AutoModelForCausalLM.from_pretrained(
            MODEL_DIR, dtype="auto"
        ).eval()
    model = load(build.export, device="cpu")
    text = Text("any", {"stories and questions": TEXT.read_text("utf-8")})
    sequences = cut(text, LimitedTokenizer.open(MODEL_DIR), 1500, None)
    parts = []
    for sequence in sequences:
        ids = torch.from_numpy(sequence.ids)[None]
        with torch.inference_mode():
            before, after = (m(ids, use_cache=False).logits[0, :-1] for m in (reference, model))
        parts.append(score_tokens(before, after, ids[0, 1:]))
    scores = TokenScores.joined(parts)
    fidelity = found["fidelity"]
    assert fidelity["tokens"] == found["text"]["tokens"] == len(scores) == 1500 - len(sequences)
    assert fidelity["mean_kl"]["value"] == pytest.approx(scores.kl.mean(), abs=1e-6)
    assert fidelity["max_kl"]["value"] == pytest.approx(scores.kl.max(), abs=1e-6)
    ordered = np.sort(scores.kl)
    for name, level in (("median_kl", 0.5), ("p99_kl", 0.99)):
        place = int(np.ceil(level * len(ordered))) - 1
        assert fidelity[name]["value"] == pytest.approx(ordered[place], abs=1e-6), name
    assert fidelity["top1_agreement"]["value"] == pytest.approx(scores.agrees.mean())
    assert fidelity["perplexity_16bit"]["value"] == pytest.approx(
        np.exp(scores.reference_nll.mean()), rel=1e-6
    )
    assert fidelity["perplexity_4bit"]["value"] == pytest.approx(
        np.exp(scores.nll.mean()), rel=1e-6
    )
    assert 1e-3 < fidelity["mean_kl"]["value"] < 0.1
    for block in found["blocks"]:
        assert 0.01 < block["relative_error"] < 0.2
        assert len(block["modules"]) == 4


@pytest.mark.usefixtures("without_documents")
def test_without_a_tokenizer_the_models_are_compared_on_token_ids(
    tiny_falcon: Path, tmp_path: Path, recipe: Recipe
) -> None:
    model = copy_of(tiny_falcon, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    build, *_ = download(model, tmp_path / "artifacts")
    for stage in ("quantize", "serialize"):
        run_stage(build, stage, recipe, CPU, SILENT)
    found = verified(build, recipe)
    assert found["verdict"] == "pass"
    assert (found["answers"], found["accuracy"]) == ([], None)
    assert found["text"] == {
        "name": "random token ids",
        "sha256": None,
        "sequences": 1,
        "tokens": 63,
        "length": 64,
    }
    assert found["fidelity"]["mean_kl"]["value"] > 0
    assert found["models"]["4bit"]["tokens_per_second"] is None
    assert status_of(build, recipe) == DONE


# --- what is asked ---


def prompts_file(folder: Path, prompts: list[dict[str, Any]]) -> str:
    path = folder / "asked.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts), "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def distant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build up to serialize of a random model that 4 bits move far enough to be seen."""
    folder = tmp_path_factory.mktemp("distant")
    model = make_checkpoint(folder / "model", "falcon-whole")
    build, *_ = download(model, folder / "artifacts")
    for stage in ("quantize", "serialize"):
        run_stage(build, stage, Recipe(), CPU, SILENT)
    return build.root


@pytest.mark.usefixtures("without_documents")
def test_expected_answers_count(distant: Path, tmp_path: Path, recipe: Recipe) -> None:
    build = Build(copy_of(distant, tmp_path / "build"))
    asked = [{"prompt": f"{word} and", "expect": "?"} for word in ("one", "two", "three", "four")]
    lenient = with_verify(recipe, max_new_tokens=16)
    first = verified(build, with_verify(lenient, prompts=prompts_file(tmp_path, asked)))
    assert first["accuracy"] == {"asked": 4, "right_16bit": 0, "right_4bit": 0}
    parted = [
        answer
        for answer in first["answers"]
        if _line(answer["answer_16bit"]) != _line(answer["answer_4bit"])
    ]
    assert len(parted) >= 2
    for answer in parted:
        at = answer["first_difference"]["character"]
        assert answer["answer_16bit"][:at] == answer["answer_4bit"][:at]
        assert answer["answer_16bit"][at : at + 1] != answer["answer_4bit"][at : at + 1]
    expected = [
        {"prompt": answer["prompt"], "expect": _line(answer[side])}
        for answer, side in zip(parted[:2], ("answer_16bit", "answer_4bit"), strict=True)
    ]
    even = verified(build, with_verify(lenient, prompts=prompts_file(tmp_path, expected)))
    # One is lost and one is won.
    assert even["accuracy"] == {"asked": 2, "right_16bit": 1, "right_4bit": 1}
    assert [(a["right_16bit"], a["right_4bit"]) for a in even["answers"]] == [
        (True, False),
        (False, True),
    ]
    assert even["verdict"] == "pass"
    lost = verified(build, with_verify(lenient, prompts=prompts_file(tmp_path, expected[:1])))
    assert lost["accuracy"] == {"asked": 1, "right_16bit": 1, "right_4bit": 0}
    assert failed(lost) == {"right answers": "0 of 1 in 4 bit, 1 of 1 in 16 bit"}
    assert lost["verdict"] == "fail"


def _line(text: str) -> str:
    """What counts of an answer."""
    lines = text.strip().splitlines()
    return lines[0].strip().rstrip(".").strip() if lines else ""


@pytest.mark.usefixtures("without_documents")
def test_the_limits_are_those_of_the_recipe(build: Build, recipe: Recipe) -> None:
    found = verified(build, with_verify(recipe, max_mean_kl=1e-9))
    assert list(failed(found)) == ["mean KL from the 16-bit model"]
    assert found["verdict"] == "fail"
    assert found["thresholds"]["max_mean_kl"] == 1e-9


def asked_of(folder: Path) -> Examination:
    """Greedy and drawn, with and without a right answer."""
    return Examination(
        source=folder,
        device="cpu",
        device_memory=0,
        prompts=[Prompt("one"), Prompt("two and three"), Prompt("four", expect="x")],
        max_new_tokens=7,
        text=Text("none", {}),
        tokens=2,
    )


@pytest.mark.parametrize("kind", ["falcon-7b", "llama"])
def test_streamed_answers_are_those_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / kind, kind)
    whole = ask_source(asked_of(folder), folder)
    streamed = ask_source(replace(asked_of(folder), device_memory=1), folder)
    assert not whole.costs.streamed
    assert whole.costs.tokens_per_second is not None
    assert whole.costs.tokens_per_second > 0
    assert streamed.costs.streamed
    assert len(whole.answers) == len(streamed.answers) == 5
    for one, other in zip(whole.answers, streamed.answers, strict=True):
        assert (other.ids, other.text) == (one.ids, one.text)
    # All prompts were answered together, so no time belongs to one of them.
    assert streamed.costs.tokens_per_second is None
    assert streamed.costs.first_token_seconds is None
    assert streamed.costs.footprint_bytes == whole.costs.footprint_bytes


# --- against another artifact ---


@pytest.fixture(scope="module")
def skipped(downloaded_falcon: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another artifact of the same source: one layer stays in 16 bit."""
    folder = tmp_path_factory.mktemp("skipped")
    build = Build(copy_of(downloaded_falcon, folder / "tiny"))
    recipe = _skipping(Recipe())
    for stage in ("quantize", "serialize"):
        run_stage(build, stage, recipe, CPU, SILENT)
    return build.root


@pytest.mark.usefixtures("without_documents")
def test_against_another_artifact(build: Build, recipe: Recipe, skipped: Path) -> None:
    found = verified(build, recipe, skipped)
    assert found["verdict"] == "pass"
    other = found["against"]
    assert other["name"] == "tiny"
    assert other["rounding"] == "nearest"
    assert other["fidelity"]["tokens"] == found["fidelity"]["tokens"]
    assert [d["name"] for d in other["domains"]] == [d["name"] for d in found["domains"]]
    one, two = found["fidelity"]["mean_kl"]["value"], other["fidelity"]["mean_kl"]["value"]
    assert one != two
    assert other["difference"]["mean_kl"]["value"] == pytest.approx(one - two)
    assert other["difference"]["mean_kl_ratio"]["value"] == pytest.approx(one / two)
    # It says the same of the other as that one's own verification does.
    alone = verified(Build(copy_of(skipped, build.root.parent / "other")), _skipping(recipe))
    assert alone["fidelity"] == other["fidelity"]
    assert alone["sizes"]["layers"] == found["sizes"]["layers"] - 1
    # What was compared once stays done for `build`; whoever asks for it again, gets it anew.
    assert status_of(build, recipe) == DONE
    assert verified(build, recipe, skipped)["against"]["fidelity"] == other["fidelity"]
    run_stage(build, "attest", recipe, CPU, SILENT)
    card = (build.export / "README.md").read_text("utf-8")
    assert "Beside another artifact of the same source" in card
    # Another one is compared anew, and takes the place of the first.
    own = verified(build, recipe, build.root)
    one_to_one = {"value": 1.0, "low": 1.0, "high": 1.0}
    assert own["against"]["difference"] == {
        "mean_kl": {"value": 0.0, "low": 0.0, "high": 0.0},
        "mean_kl_ratio": one_to_one,
        "domains": [
            {"name": domain["name"], "mean_kl_ratio": one_to_one} for domain in own["domains"]
        ],
    }
    assert own["against"]["fidelity"] == own["fidelity"]
    assert "nearest" not in own


# --- beside round to nearest ---


@pytest.fixture
def calibrated(build: Build) -> Build:
    """A build whose manifest says that its codes were chosen in another way."""
    path = build.export / "manifest.json"
    recipe = json.loads(path.read_text("utf-8"))["recipe"]
    recipe["quantize"]["rounding"] = "calibrated"
    edit_json(path, recipe=recipe, calibration={**made.calibration(), "kept": [], "extra_bytes": 0})
    agree(build)
    return build


@pytest.mark.usefixtures("without_documents")
def test_beside_round_to_nearest(
    calibrated: Build, recipe: Recipe, exported_falcon: Path, tmp_path: Path
) -> None:
    """Its codes are those of round to nearest, in truth, but for the scales of one layer."""
    layer = "transformer.h.0.mlp.dense_h_to_4h.weight"
    scales = read_tensors(calibrated.export)[f"{layer}.absmax"]
    change(calibrated.export, {f"{layer}.absmax": scales.clamp(max=250) + 5})
    agree(calibrated)
    found = verified(calibrated, recipe)
    plain = verified(Build(copy_of(exported_falcon, tmp_path / "plain")), recipe)
    beside = found["nearest"]
    assert (beside["fidelity"], beside["domains"]) == (plain["fidelity"], plain["domains"])
    one, two = found["fidelity"]["mean_kl"]["value"], plain["fidelity"]["mean_kl"]["value"]
    assert one != two
    ratio = beside["difference"]["mean_kl_ratio"]
    assert ratio["value"] == pytest.approx(one / two)
    assert [part["name"] for part in beside["difference"]["domains"]] == [
        domain["name"] for domain in found["domains"]
    ]
    assert "nearest" not in plain
    # Both comparisons at once; each speaks of its own.
    both = verified(calibrated, recipe, tmp_path / "plain")
    assert both["nearest"] == beside
    assert both["against"]["difference"] == beside["difference"]


@pytest.mark.usefixtures("without_documents")
def test_calibrated_weights_that_belong_elsewhere_are_named(
    calibrated: Build, recipe: Recipe
) -> None:
    layers = [f"transformer.h.{number}.mlp.dense_h_to_4h" for number in range(2)]
    swap(f"{layers[0]}.weight", f"{layers[1]}.weight")(calibrated)
    agree(calibrated)
    found = failed(verified(calibrated, recipe))
    assert layers[0] in found["weights near those of the source"]
    assert layers[1] not in found["weights near those of the source"]


def _skipping(recipe: Recipe) -> Recipe:
    skip = replace(recipe.quantize, skip_modules=("h.0.mlp.dense_h_to_4h",))
    return replace(recipe, quantize=skip)


def other_source(other: Build) -> None:
    manifest = json.loads((other.export / "manifest.json").read_text("utf-8"))
    files = {**manifest["source"]["files"], "config.json": {"size": 1, "sha256": "1" * 64}}
    content = content_sha256({n: FileDigest(f["size"], f["sha256"]) for n, f in files.items()})
    source = {"repo": "some/other", "commit": None, "content_sha256": content, "files": files}
    edit_json(other.export / "manifest.json", source=source)


def other_bytes(other: Build) -> None:
    flip_byte(sorted(other.export.glob("*.safetensors"))[0])


def no_manifest(other: Build) -> None:
    (other.export / "manifest.json").unlink()


@pytest.mark.usefixtures("without_documents")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_source, r"made from another source \(some/other, content [0-9a-f]{12}…\)"),
        (other_bytes, r"is not what its manifest says: model-00001.* has other bytes"),
        (no_manifest, r"has no manifest\.json"),
    ],
)
def test_an_artifact_that_cannot_be_compared_with_is_refused_before_any_work(
    build: Build,
    recipe: Recipe,
    skipped: Path,
    tmp_path: Path,
    spoil: Callable[[Build], None],
    message: str,
) -> None:
    verified(build, recipe)
    before = content_of(build.root)
    other = Build(copy_of(skipped, tmp_path / "other"))
    spoil(other)
    with pytest.raises(ArtifactError, match=message):
        run_stage(build, "verify", recipe, CPU, SILENT, against=str(other.root))
    with pytest.raises(UsageError, match="no such folder"):
        run_stage(build, "verify", recipe, CPU, SILENT, against="./nowhere")
    assert content_of(build.root) == before
    assert status_of(build, recipe) == DONE


# --- the command ---


WRONG: Final[dict[str, tuple[tuple[str, ...], str]]] = {
    "no such text": (("--eval-text", "none.txt"), "none.txt cannot be read"),
    "an empty text": (("--eval-text", "empty.txt"), "empty.txt is empty"),
    "not UTF-8": (("--eval-text", "latin.txt"), "latin.txt cannot be read"),
    "a folder": (("--eval-text", "."), "is a directory"),
    "a text of one token": (("--eval-text", "short.txt"), "make no sequence of two tokens"),
    "one token": (("--eval-tokens", "1"), "--eval-tokens is 1; expected a whole number from 2"),
    "fewer tokens than domains": (("--eval-tokens", "4"), "4 tokens of the text built in make no"),
    "no size": (("--device-memory", "nonsense"), "--device-memory is 'nonsense'; expected a size"),
    "no such prompts": (("--prompts", "none.jsonl"), "none.jsonl cannot be read"),
    "prompts that are none": (("--prompts", "empty.txt"), "empty.txt are empty"),
    "nothing to compare with": (("--against", "./none"), "--against './none': no such build"),
    "no such device": (("--device", "tpu"), "--device 'tpu': expected auto, cpu, cuda, or cuda:0"),
}


@pytest.mark.usefixtures("without_documents")
@pytest.mark.parametrize("case", WRONG)
def test_options_that_cannot_mean_anything(
    build: Build,
    quick_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "short.txt").write_text("a")
    before = content_of(build.root)
    options, message = WRONG[case]
    done = run_nf4(
        "verify", "--build-dir", build.root, "--recipe", quick_recipe, "--quiet", *options
    )
    assert done.status == (1 if case == "nothing to compare with" else 2), done.err
    errors = [line for line in done.err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, done.err
    assert message in errors[0]
    assert "Traceback" not in done.err
    assert content_of(build.root) == before


def test_a_gpu_that_is_required_and_not_there(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = content_of(build.root)
    done = run_nf4("verify", "--build-dir", build.root, "--require-gpu")
    assert done.status == 1
    assert done.err.startswith("Error: A GPU is required to verify (--require-gpu)")
    assert content_of(build.root) == before


def test_the_command_in_processes_of_its_own(
    build: Build, quick_recipe: Path, skipped: Path, tmp_path: Path
) -> None:
    """Streamed for want of memory, on a text of the user, against another artifact."""
    (tmp_path / "mine.txt").write_text("The fox went on. " * 40, "utf-8")
    done = nf4(
        "verify", "--build-dir", build.root, "--recipe", quick_recipe, "--eval-text", "mine.txt",
        "--eval-tokens", "90", "--device-memory", "1MB", "--against", skipped,
        cwd=tmp_path, cold=True,
    )  # fmt: skip
    assert done.status == 0, done.err
    found = json.loads((build.export / "verification.json").read_text("utf-8"))
    assert found["verdict"] == "pass"
    assert found["models"]["16bit"]["streamed"] is True
    assert found["models"]["4bit"]["streamed"] is False
    assert found["text"]["name"] == "mine.txt"
    assert (found["text"]["tokens"], found["text"]["length"]) == (89, 90)
    assert [domain["name"] for domain in found["domains"]] == ["mine"]
    for name in ("16bit", "4bit"):
        assert found["models"][name]["peak_memory_bytes"] > 100e6
        assert found["models"][name]["load_seconds"] > 0
    assert "verdict     pass" in done.out
    assert "mean KL of this one over the other: " in done.out
    kinds = {path.name for path in build.export.rglob("*") if path.is_file()}
    assert kinds >= {"verification.json", "report.html", "bytes.png", "kl.png"}
    text = (build.export / "report.html").read_text("utf-8")
    assert number(found["fidelity"]["mean_kl"]["value"]) in text


def test_a_forged_file_ends_the_command_with_1(build: Build, quick_recipe: Path) -> None:
    shard = sorted(build.export.glob("*.safetensors"))[0]
    flip_byte(shard)
    done = run_nf4("verify", "--build-dir", build.root, "--recipe", quick_recipe)
    assert done.status == 1
    assert "Traceback" not in done.err
    assert f"FAIL  files as in the manifest: {shard.name} has other bytes" in done.out
    assert "verdict     fail" in done.out
    assert f"{shard.name} has other bytes" in (build.export / "report.html").read_text("utf-8")


@pytest.mark.usefixtures("without_documents")
def test_too_little_text_is_no_fault_of_the_artifact(build: Build, recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="Ask for more"):
        run_stage(build, "verify", with_verify(recipe, eval_tokens=3), CPU, SILENT)
    assert build.record(VERIFY) is None
