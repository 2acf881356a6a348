"""The model card: every number in it comes from verification.json, and nothing in it can harm."""

from __future__ import annotations

import copy
import math
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import pytest
import yaml
from huggingface_hub import ModelCard
from nf4_pipeline.checkpoint.source_card import SourceCard, parse_card
from nf4_pipeline.report.formatting import one_in
from nf4_pipeline.report.model_card import model_card
from nf4_pipeline.verification.document import parse_verification
from nf4_pipeline.verification.prompts import REFERENCE, read_prompts

from tests.support.made import (
    SHOCKWAVE,
    calibration,
    failed_gate,
    made,
    manifest,
    nulls,
    without_tokenizer,
)

NUMBER: Final = re.compile(r"\d+(?:[.,]\d+)*(?:e-?\d+)?")
SOURCE: Final = SourceCard(license=("apache-2.0",))
LEFT_OUT: Final = "falcon-7b-instruct"  # the name of the source, which says how large it is


def card(verification: dict[str, Any]) -> str:
    return model_card(manifest(), parse_verification(verification), SOURCE)


def measured(verification: dict[str, Any]) -> str:
    """The part of a card that speaks of this artifact's measurements."""
    text = card(verification)
    start = text.find("## What 4 bits cost")
    part = text[start if start >= 0 else text.index("## Verification") :]
    return part[: part.index("## How it was made")].replace(LEFT_OUT, "")


def full() -> dict[str, Any]:
    return made(expected=True, against=True, nearest=True)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all numbers."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from leaves(item, (*path, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    at(value, path[:-1])[path[-1]] = new


def larger(number: float) -> float:
    """Larger by far more than rounding; whole if it was."""
    return number * 2 + 1_000_003 if isinstance(number, int) else number * 1.37


INTERVALS: Final = (
    "mean_kl",
    "median_kl",
    "p99_kl",
    "max_kl",
    "top1_agreement",
    "sure_agreement",
    "perplexity_16bit",
    "perplexity_4bit",
    "perplexity_ratio",
)
ENDS: Final = ("value", "low", "high")
SHOWN: Final = [
    *(("sizes", name) for name in ("original_bytes", "artifact_bytes", "disk_bytes", "layers")),
    ("sizes", "footprint_bytes"),
    *(("sizes", name) for name in ("ratio", "bits_per_weight", "bits_per_quantized_weight")),
    *(("sizes", "kept_bytes_by_reason", reason) for reason in ("embedding", "norm or bias")),
    ("text", "tokens"),
    ("fidelity", "confidence"),
    *(("fidelity", name, end) for name in INTERVALS for end in ENDS),
    *(("domains", place, "tokens") for place in range(5)),
    *(
        ("domains", place, name, end)
        for place in range(5)
        for name in ("mean_kl", "top1_agreement")
        for end in ENDS
    ),
    *(
        (part, "fidelity", name, end)
        for part in ("against", "nearest")
        for name in ("mean_kl", "top1_agreement", "sure_agreement", "perplexity_4bit")
        for end in ENDS
    ),
    *(
        (part, "difference", "mean_kl_ratio", end)
        for part in ("against", "nearest")
        for end in ENDS
    ),
    *(("nearest", "domains", place, "mean_kl", end) for place in range(5) for end in ENDS),
    *(
        ("nearest", "difference", "domains", place, "mean_kl_ratio", end)
        for place in range(5)
        for end in ENDS
    ),
]


def test_each_number_that_the_card_shows_moves_it() -> None:
    before = card(full())
    assert set(SHOWN) <= set(leaves(full()))
    for path in SHOWN:
        changed = full()
        new = 0.5 if path == ("fidelity", "confidence") else larger(at(changed, path))
        put(changed, path, new)
        after = card(changed)
        lines = [a for a, b in zip(after.split("\n"), before.split("\n"), strict=True) if a != b]
        assert lines, path
        # It moves as it is written, beside what is made of it elsewhere.
        shown = f"{new:.0%}" if path[-1] == "confidence" else _as_shown(path, new)
        assert any(shown in line for line in lines), (path, shown, lines)


def _as_shown(path: tuple[Any, ...], number: float) -> str:
    if path[-1] in ENDS:
        return f"{number:.4g}"
    if path[-1] in ("tokens", "layers"):
        return str(number)
    if isinstance(number, int):
        return f"{number / 1e6:.2f} MB" if number < 10**9 else f"{number / 1e9:.3f} GB"
    return f"{number:.3f}"


def test_each_number_in_the_card_comes_from_the_verification() -> None:
    """All numbers of the verification change, and with them every number of the card."""
    changed = full()
    for path in set(leaves(changed)) - {("schema_version",)}:
        put(changed, path, larger(at(changed, path)))
    for check in changed["checks"]:
        check |= {name: NUMBER.sub("0", check[name]) for name in ("found", "expected")}
    for answer in changed["answers"]:
        for name in ("prompt", "answer_16bit", "answer_4bit"):
            answer[name] = NUMBER.sub("0", answer[name])
    changed["device"]["name"] = "some CPU"
    changed["against"]["manifest_sha256"] = "f" * 64
    pairs = zip(measured(full()).split("\n"), measured(changed).split("\n"), strict=True)
    stay = set()
    for before, after in pairs:
        for line in re.findall(r"[^|]+", before):
            label = line.strip()
            stay |= set(NUMBER.findall(label)) if label in after else set()
    # What is left are the words "16-bit", "4 bit", "99th percentile", "sha256", "Linear4bit" and
    # "KL is 0 where both models predict the same", and how many checks there are.
    assert stay <= {"16", "4", "99", "256", "0", str(len(changed["checks"]))}


def test_the_verdict_and_each_check_are_shown() -> None:
    verification = full()
    verification["verdict"] = "fail"
    verification["checks"][3] |= {"passed": False, "found": "far away", "expected": "near"}
    text = card(verification)
    assert "## Verification: fail" in text
    (line,) = (line for line in text.split("\n") if "far away" in line)
    assert line.endswith("| far away | near | FAIL |")
    assert text.count("| pass |") == len(verification["checks"]) - 1


def test_a_failed_gate_shows_the_gates_and_claims_nothing_else() -> None:
    text = card(failed_gate())
    assert "## Verification: fail" in text
    assert text.count("| FAIL |") == 2
    assert "> [!WARNING]\n> **This artifact did not pass verification" in text.split("## Use")[0]
    for absent in ("## What 4", "perplexity", "Measured on", "pictures/", "| prompt |", "model-in"):
        assert absent not in text


def test_what_is_not_finite_is_said_in_words() -> None:
    text = card(nulls())
    assert "| KL from the 16-bit model, mean | not finite |" in text
    assert "None" not in text
    assert "nan" not in measured(nulls()).lower()


def test_without_a_tokenizer_there_are_no_answers() -> None:
    text = card(without_tokenizer())
    assert "random token ids" in text
    assert "| prompt |" not in text


def test_another_artifact_is_told_only_if_there_is_one() -> None:
    assert "Beside another artifact of the same source" in card(full())
    assert "another artifact" not in card(made())


def test_round_to_nearest_stands_beside_what_was_calibrated() -> None:
    text = card(full())
    assert "| calibrated (this artifact) | round to nearest |" in text
    assert (
        text.index("Measured on") < text.index("round to nearest") < text.index("another artifact")
    )
    assert "as bitsandbytes does: 0.3797 [0.3645, 0.3949], at the same bytes." in text
    assert "round to nearest |" not in card(made(against=True))


def making(**changes: Any) -> str:
    """How a calibrated artifact was made, as its card says it."""
    calibrated = manifest(calibrated=calibration() | changes)
    text = model_card(calibrated, parse_verification(made(nearest=True)), SOURCE)
    return text[text.index("## How it was made") : text.index("## Check it yourself")]


def test_how_the_codes_were_chosen() -> None:
    text = making()
    assert "16,384 tokens that the 16-bit model wrote itself (64 sequences, sha256 c0dec0" in text
    assert "computed on a GPU" in text
    assert " --calibrate self --extra-bytes 5%\n" in text
    calibrated = manifest(calibrated=calibration())
    verification = parse_verification(made(nearest=True))
    assert "0.3949], for " in model_card(calibrated, verification, SOURCE)
    assert "5 weights: transformer.h.0.mlp.dense_4h_to_h.weight (no token came through it)" in text
    assert "5 modules: transformer.h.0.self_attention.query_key_value (KL 0.003100, 31.52" in text
    assert text.count(" and 2 more.") == 2
    assert "without calibration" not in text
    assert "the same bytes on any machine" not in text
    assert "without calibration" in card(made())
    assert "on a CPU" in making(device="cpu")
    assert "16,384 tokens of a text (64" in making(source="text")


def test_how_codes_learned() -> None:
    learning = {
        "sequences": 8192,
        "tokens": 4_194_304,
        "held_back": 32,
        "tokens_sha256": "5eed" * 16,
        "steps": 512,
        "rate": 0.0008,
        "halvings": 0,
        "kl_before": 0.0123,
        "kl_after": 0.00456,
    }
    text = making(learning=learning)
    assert " --calibrate self --extra-bytes 5% --effort high\n" in text
    assert "512 steps on 4,194,304 tokens that the 16-bit model wrote itself (sha256 5eed" in text
    assert "On 32 sequences that were held back, the KL went from 0.01230 to 0.004560." in text
    assert "learned" not in making()


def test_each_number_of_calibration_moves_the_card() -> None:
    """But for those of modules that are not named any more."""
    paths = [path for path in leaves(calibration()) if path[0] != "kept" or path[1] < 3]
    assert len(paths) == 3 + 2 * 3
    for path in paths:
        changed = calibration()
        put(changed, path, larger(at(changed, path)))
        assert making(**changed) != making(), path


def test_what_has_no_exceptions_names_none() -> None:
    text = making(fallbacks={}, kept=[], extra_bytes=0)
    assert "Not calibrated" not in text
    assert "Left in 16 bit" not in text


def test_names_of_modules_stay_words() -> None:
    text = making(fallbacks={"<img src=x> `a`": "![c](d)\n# no"})
    assert "&lt;img src=x&gt; &#96;a&#96; (!&#91;c&#93;(d) # no)" in text
    assert "<img" not in text


def _device(found: dict[str, Any], text: str) -> None:
    found["device"]["name"] = text


def _text(found: dict[str, Any], text: str) -> None:
    found["text"]["name"] = text


def _domain(found: dict[str, Any], text: str) -> None:
    found["domains"][0]["name"] = text  # the name of a file of the user


def _check(found: dict[str, Any], text: str) -> None:
    found["checks"][0]["found"] = text


def _answer(found: dict[str, Any], text: str) -> None:
    found["answers"][0] |= {"prompt": text, "answer_16bit": text, "answer_4bit": text}


def _rounding(found: dict[str, Any], text: str) -> None:
    found["against"]["rounding"] = text


@pytest.mark.parametrize("place", [_device, _text, _domain, _check, _answer, _rounding])
def test_words_of_others_stay_words(place: Callable[[dict[str, Any], str], None]) -> None:
    verification = copy.deepcopy(full())
    place(verification, "a | b\n\n# no <img src=x> ![c](d) `e` *f*")
    text = card(verification)
    assert "a &#124; b # no &lt;img src=x&gt; !&#91;c&#93;(d) &#96;e&#96; &#42;f&#42;" in text
    for mark in ("<img", "![c]", "\n# no"):
        assert mark not in text
    assert len(text.split("\n")) == len(card(full()).split("\n"))


def head(text: str) -> dict[str, Any]:
    """The front matter as the Hub's client cuts it out of a card, read by another reader."""
    block = re.match(r"^(\s*---[\r\n]+)([\S\s]*?)([\r\n]+---(\r\n|\n|$))", text)
    assert block
    value: dict[str, Any] = yaml.safe_load(block[2])
    return value


def test_the_license_is_the_sources() -> None:
    assert head(card(made()))["license"] == "apache-2.0"
    unlicensed = model_card(manifest(), parse_verification(made()), SourceCard())
    assert "license" not in head(unlicensed)


@pytest.mark.parametrize(
    "said",
    [
        SourceCard(license=("other",), license_name="no", license_link="https://x.org/#a:b"),
        SourceCard(license=("mit", "gpl-3.0"), language=("no", "en")),
        SourceCard(license=("other",), license_name="--- a: b # c 'd' \"e\" {f} &g *h !i %j"),
        SourceCard(license=("other",), license_name="2001-12-14"),
    ],
)
def test_what_is_inherited_is_read_back_as_it_was(said: SourceCard) -> None:
    text = model_card(manifest(), parse_verification(made()), said)
    assert parse_card(text) == said
    assert head(text).items() >= said.metadata().items()


NAMES: Final = [
    "a`b<img src=x>",
    "# a | b",
    "x\n---\nlicense: mit\n---",
    "a\r\n```\n<script>alert(1)</script>",
    "_a_ **b** [c](javascript:d)",
    "\x1b[31mred\x07",
    "\u202egpj.exe",
    "$(reboot); 'a' \"b\"",
    "$$x$$",
    "\ud800",
    "~~a~~",
    "   ",
]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_a_folder_acts_in_the_card(name: str) -> None:
    """A local checkpoint is called what its folder is called."""
    plain = manifest()
    theirs = replace(plain, source=replace(plain.source, repo=name, commit=None))
    text = model_card(theirs, parse_verification(made()), SOURCE)
    text.encode()
    assert not [char for char in text if not (char.isprintable() or char == "\n")]
    lines, usual = text.split("\n"), card(made()).split("\n")
    assert len(lines) in (len(usual), len(usual) - 2)  # base_model goes with the commit
    words = re.sub(r"```.*?\n```|`[^`\n]*`", "", text, flags=re.DOTALL)  # in code nothing acts
    for mark in ("<img", "<script", "[c](", "**b**", "~~a~~", "$$x$$"):
        assert mark not in words
    (command,) = [line for line in lines if line.startswith("nf4 build ")]
    assert len(shlex.split(command)) == 3
    assert head(text)["license"] == "apache-2.0"


# How to use it.

FALCON: Final = "modeling_falcon.FalconLinear = torch.nn.Linear"


def used(repo_id: str | None = None, *, chat: bool = True, **identity: Any) -> str:
    """The card of an artifact with a tokenizer, of an architecture that may need a line."""
    own = {"files": {"tokenizer.json": None}, **identity}
    theirs = replace(manifest(), **own)
    return model_card(theirs, parse_verification(made()), SOURCE, repo_id=repo_id, chat=chat)


def snippets(text: str) -> list[str]:
    found = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    for code in found:
        compile(code, "README.md", "exec")
        assert max(map(len, re.sub(r'"[^"]*/[^"]*"', "", code).split("\n"))) <= 90
    return found


HIDDEN: Final = {"hidden_modules": ("transformer.h.0.mlp.dense_h_to_4h",)}
OTHER: Final = HIDDEN | {"model_class": "OtherForCausalLM"}


@pytest.mark.parametrize("repo_id", [None, "me/x", "an-org/A.very_long-name.of.a.model-7B-nf4"])
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("identity", [{}, HIDDEN, OTHER], ids=["plain", "falcon", "other"])
def test_how_to_use_it_comes_first_and_has_no_placeholder(
    repo_id: str | None, chat: bool, identity: dict[str, Any]
) -> None:
    text = used(repo_id, chat=chat, **identity)
    order = [text.index(f"## {title}") for title in ("Use", "What 4 bits cost", "Verification: ")]
    order += [text.index("## How it was made"), text.index("## Check it yourself")]
    assert order == sorted(order)
    assert len(text[: order[0]].split("---\n")[-1].splitlines()) <= 6
    assert not re.search(r"PATH|ORG/NAME|_REPO|TODO|\bNAME\b", text)
    codes = snippets(text)
    assert len(codes) == 3
    for code in codes:
        assert f'"{repo_id or "."}"' in code
    own = next(code for code in codes if "nf4_pipeline" in code)
    stock = next(code for code in codes if "AutoModelForCausalLM" in code)
    generate = next(code for code in codes if "AutoTokenizer" in code)
    assert codes == ([own, stock, generate] if identity is OTHER else [stock, generate, own])
    assert (FALCON in stock) is (identity is HIDDEN)
    assert ("4.57 and no newer" in text) is (identity is OTHER)
    assert ("apply_chat_template" in generate) is chat
    assert ("nf4 push" in text) is (repo_id is None)


def test_without_a_tokenizer_nothing_is_asked() -> None:
    codes = snippets(used("me/x", files={}))
    assert len(codes) == 2
    assert not [code for code in codes if "okenizer" in code or "prompt" in code]


MADE_BY: Final = {
    ("tiiuae/falcon-7b-instruct", "8" * 40): (
        "tiiuae/falcon-7b-instruct --revision " + "8" * 40,
        "",
    ),
    ("nf4-pipeline/sample", None): ("sample", ""),
    ("my-model", None): ("./my-model", " --source ./my-model"),
    ("my model", None): ("'./my model'", " --source './my model'"),
    ("-f", None): ("./-f", " --source ./-f"),
}


@pytest.mark.parametrize("source", MADE_BY)
@pytest.mark.parametrize("repo_id", [None, "me/x"])
def test_the_commands_name_what_they_take(
    source: tuple[str, str | None], repo_id: str | None
) -> None:
    repo, commit = source
    expected, origin = MADE_BY[source]
    text = used(repo_id, source=replace(manifest().source, repo=repo, commit=commit))
    build, check = re.findall(r"```sh\n(.*?)\n```", text, re.DOTALL)
    assert build == f"nf4 build {expected}"
    lines = [line for line in check.split("\n") if not line.startswith("#")]
    folder = "x" if repo_id else "."
    downloads = ["hf download me/x --local-dir x", "hf cache verify me/x --local-dir x"]
    local = bool(origin)  # no rebuilder has the folder
    assert lines == [
        *(["nf4 rebuild me/x"] if repo_id and not local else []),
        *(downloads if repo_id else []),
        f"nf4 reproduce {folder}{origin}",
        f"nf4 check {folder} --key key.pub",
    ]


@pytest.mark.parametrize("verification", [full(), nulls(), without_tokenizer(), failed_gate()])
@pytest.mark.parametrize("repo_id", [None, "me/x"])
def test_the_metadata_are_what_the_hub_reads(
    verification: dict[str, Any], repo_id: str | None
) -> None:
    document = parse_verification(verification)
    text = model_card(manifest(), document, SOURCE, repo_id=repo_id)
    parsed: Any = ModelCard(text, ignore_metadata_errors=False).data
    data, results = parsed.to_dict(), parsed.eval_results or []
    assert data["base_model"] == "tiiuae/falcon-7b-instruct"
    assert data["base_model_relation"] == "quantized"
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert data.get("quantized_by") == ("me" if repo_id else None)
    for result in results:
        assert isinstance(result.metric_value, float)
        assert math.isfinite(result.metric_value)
        assert (result.source_url is not None) is (repo_id is not None)
    measured = [result.metric_type for result in results]
    if verification == full():
        assert measured == ["kl_divergence", "accuracy", "perplexity"]
    elif verification in (nulls(), failed_gate()):
        assert measured == []


def test_figures_are_said_in_plain_words() -> None:
    text = card(full())
    assert "**14.434 GB become 4.010 GB**, 72% less, at 4.635 bits per weight." in text
    assert "**KL 0.021: one token in 13 changes.** Of 8,176 tokens" in text
    assert "of those where that model is sure, one token in 62." in text
    assert "Its predictions are not finite." in card(nulls())


@pytest.mark.parametrize(
    ("agreement", "said"),
    [
        (1.0, "no token"),
        (0.999_9, "one token in 10,000"),
        (0.952_7, "one token in 21"),
        (0.51, "one token in 2"),
        (0.4, "60% of all tokens"),
        (0.0, "100% of all tokens"),
    ],
)
def test_how_many_tokens_change(agreement: float, said: str) -> None:
    assert one_in(agreement) == said


def test_the_opening_prompt_of_a_card_is_for_everybody() -> None:
    """The reference set keeps the prompt of the first write-up, where no card or summary begins."""
    prompts = [prompt.prompt for prompt in read_prompts(REFERENCE)]
    assert SHOCKWAVE in prompts
    assert SHOCKWAVE not in prompts[:-1]
    verification = full() | {"answers": []}
    for prompt in prompts:
        for seed in (None, 0):
            answer = {"prompt": prompt, "expect": None, "seed": seed, "same": True}
            answer |= {"answer_16bit": "a", "answer_4bit": "a", "first_difference": None}
            verification["answers"].append(answer)
    text = card(verification)
    assert text.count(" | a | a |") == 4  # of four prompts, not of one in several ways
    assert "bomb" not in text.lower()
