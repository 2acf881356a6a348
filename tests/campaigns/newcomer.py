"""Mistakes of a newcomer, as they are typed, and what the message must say of each.

A message says what is wrong, why, and what to do next. `scripts/campaigns/newcomer_mistakes.py`
runs all of them as processes and writes `docs/messages.md`; the tests run the same list, most of it
in one process.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from nf4_pipeline.provenance.signing import sign

from tests.support import hub_uploads  # noqa: F401  # its routes
from tests.support.hub_client import isolated
from tests.support.hub_server import HubServer
from tests.support.signed import make_keys
from tests.support.tiny import Done, copy_of, edit_json, flip_byte

ROOT: Final = Path(__file__).parents[2]
NOBODY: Final = "http://127.0.0.1:9"
"""An address at which no Hub answers."""

GATED: Final = "meta-llama/Llama-9-8B"
BUILD: Final = "artifacts/model@000000000000"
MOVED: Final = "artifacts/moved@000000000000"
SIGNED: Final = "signed"
BARE: Final = "artifacts/bare@000000000000"
BROKEN: Final = "artifacts/broken@000000000000"
FETCHED: Final = "artifacts/fetched@000000000000"
"""A build of which only the source was fetched."""

READER: Final = "hf_reader"
"""The token of somebody who owns nothing on the Hub."""

ON_HUB: Final = "me/sample-nf4"
"""An artifact that somebody published."""


@dataclass(frozen=True)
class Mistake:
    """One thing typed in the folder that `make_place` makes.

    Attributes:
        item: what kind of mistake.
        line: what is typed.
        said: patterns that the message must hold: what, why, what next.
        status: the exit code.
        variables: of the environment, beside those of every case.
        hub: a Hub answers; without, the cache is asked alone.
        remedy: a pattern; what it finds in the message (its group, if it has one) helps.
        typed: a line with what was found in it, which does go well.
    """

    item: str
    line: str
    said: tuple[str, ...]
    status: int = 2
    variables: Mapping[str, str] = field(default_factory=dict)
    hub: bool = False
    remedy: str = ""
    typed: str = "{}"

    @property
    def args(self) -> list[str]:
        """What `nf4` gets."""
        return shlex.split(self.line)[1:]

    @property
    def shown(self) -> str:
        """The line with the variables before it, as it is shown."""
        set_here = [f"{name}={value}" for name, value in self.variables.items() if value != UNSET]
        return " ".join([*set_here, self.line])

    @property
    def is_alone(self) -> bool:
        """Whether it needs a process of its own."""
        return self.hub or bool(self.variables) or not self.line.startswith("nf4 ")


def make_place(folder: Path, model: Path, whole: Path) -> Path:
    """A folder as a newcomer has it.

    Args:
        folder: where; made here.
        model: a tiny checkpoint.
        whole: a verified build of it.
    """
    copy_of(model, folder / "model")
    weights = folder / "model" / "model-00001-of-00002.safetensors"
    copy_of(whole, folder / BUILD)
    for name in (MOVED, BARE, BROKEN, FETCHED):
        copy_of(whole, folder / name)
    min((folder / BROKEN / "export").glob("*.safetensors")).unlink()
    for path in (folder / MOVED / "source").iterdir():
        path.unlink()
        path.symlink_to(f"/mnt/usb-stick/{path.name}")
    for build in (BARE, MOVED):
        for name in ("serialize", "verify", "attest"):
            (folder / build / "records" / f"{name}.json").unlink(missing_ok=True)
        shutil.rmtree(folder / build / "export")
    for name in ("quantized", "export"):
        shutil.rmtree(folder / FETCHED / name)
    for record in (folder / FETCHED / "records").glob("*.json"):
        if record.name != "download.json":
            record.unlink()
    for name in ("lora", "gguf", "awq", "pickled", "empty", "t5", "no-tokenizer", "half-tokenizer"):
        (folder / name).mkdir()
    (folder / "lora" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "tiiuae/falcon-7b", "peft_type": "LORA"})
    )
    shutil.copyfile(weights, folder / "lora" / "adapter_model.safetensors")
    (folder / "falcon-7b.Q4_K_M.gguf").write_bytes(b"GGUF" + bytes(64))
    (folder / "gguf" / "falcon-7b.Q4_K_M.gguf").write_bytes(b"GGUF" + bytes(64))
    for name in ("awq", "pickled"):
        shutil.copytree(folder / "model", folder / name, dirs_exist_ok=True)
    edit_json(
        folder / "awq" / "config.json", quantization_config={"quant_method": "awq", "bits": 4}
    )
    for path in (folder / "pickled").glob("*.safetensors*"):
        path.unlink()
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"PK\3\4" + bytes(64))
    shutil.copyfile(weights, folder / "t5" / "model.safetensors")
    (folder / "t5" / "config.json").write_text(
        json.dumps({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]})
    )
    for path in (folder / "model").iterdir():
        if not path.name.startswith("tokenizer"):
            shutil.copyfile(path, folder / "no-tokenizer" / path.name)
        if path.name != "tokenizer.json":
            shutil.copyfile(path, folder / "half-tokenizer" / path.name)
    cache = folder / "models--tiiuae--falcon-7b"
    copy_of(folder / "model", cache / "snapshots" / ("ab" * 20))
    (folder / "typo.toml").write_text("[quantize]\nskip_module = ['h.31']\n")
    (folder / "recipe.json").write_text('{"quantize": {}}')
    (folder / "prompts.txt").write_text("What is a fox?\n")
    (folder / "short.txt").write_text("Too short.\n")
    (folder / "notes.txt").write_text("Notes.\n")
    (folder / "key.pem").write_text("not a key\n")
    _sign_and_change(folder, whole / "export")
    return folder


def _sign_and_change(folder: Path, export: Path) -> None:
    """A signed artifact in which a file was changed since, and the public key."""
    private, _ = make_keys(folder, "signer")
    copy_of(export, folder / SIGNED)
    sign(folder / SIGNED, private)
    flip_byte(folder / SIGNED / "config.json")


def serve(hub: HubServer, model: Path, export: Path) -> None:
    """What the Hub of these cases holds."""
    hub.store.users[READER] = "reader"
    hub.store.add("me/tiny", model)
    hub.store.add(ON_HUB, export)
    hub.store.add(GATED, model).gated = True
    hub.store.add("me/lora", {"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
    hub.store.add("me/model-GGUF", {"model.Q4_K_M.gguf": b"GGUF"})


def run_process(mistake: Mistake, place: Path, endpoint: str) -> Done:
    """Types it in a shell.

    Args:
        mistake: what is typed.
        place: where.
        endpoint: the Hub's address.
    """
    env = isolated(place / "hf-home", endpoint, **mistake.variables)
    if not mistake.hub and "HF_ENDPOINT" not in mistake.variables:
        env.setdefault("HF_HUB_OFFLINE", "1")
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    if "HF_TOKEN" not in mistake.variables:
        env.pop("HF_TOKEN", None)
    line = (
        f'nf4() {{ {sys.executable} -m nf4_pipeline "$@"; }}\n'
        f'make() {{ command make --no-print-directory -C {ROOT} "$@"; }}\n{mistake.line}'
    )
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=place,
        env={key: value for key, value in env.items() if value != UNSET},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


UNSET: Final = "<unset>"


def cure_of(mistake: Mistake, done: Done) -> str:
    """The line that a message names, as somebody would type it; empty if it names none.

    Args:
        mistake: one with a `remedy`.
        done: what came of it.
    """
    found = re.search(mistake.remedy, " ".join(message(done).split()))
    if found is None:
        return ""
    return mistake.typed.format(found[found.re.groups])


def message(done: Done) -> str:
    """The error and what stands below it."""
    lines = done.err.splitlines()
    at = next((n for n, line in enumerate(lines) if line.startswith("Error: ")), 0)
    return "\n".join(lines[at:]).strip()


def faults_of(mistake: Mistake, done: Done) -> list[str]:
    """What should not be; empty if all is well."""
    said = " ".join(message(done).split())
    faults = [f"does not say {part!r}" for part in mistake.said if not re.search(part, said)]
    if done.status != mistake.status:
        faults.append(f"status {done.status}, expected {mistake.status}")
    if len(re.findall(r"^Error: ", done.err, re.MULTILINE)) != 1:
        faults.append("is not one error")
    faults += [word for word in ("Traceback", "bug in nf4") if word in done.err]
    if re.search(r"\b[0-9a-f]{64}\b|\\b(rb|b)'|\\x", said):
        faults.append("shows raw digests or bytes")
    return faults


MISTAKES: Final = (
    # What is typed
    Mistake("command", "nf4 biuld sample", ("No such command 'biuld'", "Did you mean.*build")),
    Mistake("command", "nf4 quantise sample", ("No such command", "quantize")),
    Mistake("command", "nf4 reproduc model", ("No such command", "reproduce")),
    Mistake("command", "nf4 upload model", ("No such command", "Did you mean 'push'")),
    Mistake("command", "nf4 frobnicate", ("No such command", "nf4 --help"), remedy="nf4 --help"),
    Mistake("command", "nf4 sample", ("No such command", "nf4 build sample")),
    Mistake("command", "nf4 help build", ("an option",), remedy="nf4 build --help"),
    Mistake("command", "nf4 help", ("an option",), remedy="nf4 --help"),
    Mistake("command", "nf4 version", ("nf4 --version",), remedy="nf4 --version"),
    Mistake("option", "nf4 build sample --calibarte self", ("No such option", "--calibrate")),
    Mistake("option", "nf4 build model --max-shard 1GB", ("No such option", "--max-shard-size")),
    Mistake(
        "option",
        "nf4 build model --dry_run",
        ("No such option '--dry_run'", "Did you mean"),
        remedy="'(--dry-run)'",
        typed="nf4 build model {}",
    ),
    Mistake(
        "option",
        "nf4 status --workers 4",
        ("No such option", "one of `nf4 build`, `nf4 quantize`", "Leave it out"),
    ),
    Mistake(
        "option",
        "nf4 build --model sample",
        ("No such option", "MODEL is no option"),
        remedy="nf4 build sample$",
        typed="{} --dry-run",
    ),
    Mistake(
        "option",
        "nf4 build model --gpu",
        ("No such option", "Did you mean '--device cuda'"),
    ),
    Mistake("option", "nf4 build model --output here", ("No such option", "'--build-dir'")),
    Mistake("option", "nf4 build model --token abc", ("No such option", "HF_TOKEN", "hf auth")),
    Mistake(
        "option",
        "nf4 build model --workers many",
        ("--workers is 'many'; expected a whole number from 0 to 1,024",),
        remedy="such as (--workers 4)",
        typed="nf4 build model --dry-run {}",
    ),
    Mistake(
        "option",
        "nf4 build model --device gpu",
        ("--device 'gpu'", "auto, cpu, cuda, or cuda:0 for the first GPU", "mean 'cuda'"),
    ),
    Mistake(
        "option",
        'nf4 prompt model "Hello" --device cuda',
        ("Device cuda", "0 CUDA devices", "--device cpu"),
        1,
    ),
    Mistake("option", "nf4 build model --memory-budget lots", ("--memory-budget", "256MiB|5GB")),
    Mistake("option", "nf4 build model --max-shard-size 5", ("5 bytes", "MB")),
    Mistake(
        "option",
        "nf4 build model --extra-bytes 5",
        ("--extra-bytes needs --calibrate, ", "Or leave --extra-bytes out"),
        remedy="--calibrate self --extra-bytes 5%",
        typed="nf4 build model --dry-run {}",
    ),
    Mistake("option", "nf4 build model --calibrate", ("requires an arg", "--calibrate self$")),
    Mistake(
        "option",
        "nf4 build model --calibrate --extra-bytes 5%",
        ("--calibrate has no value: --extra-bytes follows", "--calibrate self$"),
    ),
    Mistake("option", "nf4 build model --calibrate slef", ("slef", "Did you mean 'self'?")),
    Mistake(
        "option",
        "nf4 build model --bits 4",
        ("No such option '--bits'", "always makes the 4-bit", "Leave it out"),
    ),
    Mistake(
        "option",
        "nf4 build model --skip-modules h.0",
        ("No such option", "key of a recipe, under .quantize."),
        remedy="printf .* && nf4 build model --recipe my.toml$",
        typed="{} --dry-run",
    ),
    Mistake(
        "option",
        "nf4 build model --build-dir /proc/foo",
        ("/proc/foo cannot be made", "belongs to the system"),
        1,
        remedy="--build-dir, such as (artifacts/mine)",
        typed="nf4 build model --dry-run --build-dir {}",
    ),
    Mistake(
        "option",
        "nf4 build model --build-dir notes.txt/build",
        ("notes.txt/build cannot be made", "notes.txt is no folder, but a file"),
        1,
    ),
    Mistake("option", "nf4 build model --calibrate self --extra-bytes 500%", ("500%", '"5%"')),
    Mistake("option", "nf4 build model --revision main", ("--revision main", "local folder")),
    Mistake(
        "option",
        f"nf4 quantize {BUILD} --part 9/8",
        ("--part '9/8': there is no part 9 of 8", "--part 8/8$"),
    ),
    Mistake(
        "option", f"nf4 quantize {BUILD} --part 3", ("--part '3': expected I/N", "such as 3/8")
    ),
    Mistake(
        "option",
        "nf4 build model --ray-address 10.0.0.1:6379",
        ("--ray-address says where a Ray cluster is", "--engine ray"),
    ),
    Mistake(
        "option",
        "nf4 build model --engine ray --calibrate self --build-dir s3://bucket/falcon",
        (
            "--engine ray --calibrate: what is chosen",
            "keeps none of it",
            "folder that all nodes see",
        ),
    ),
    Mistake(
        "option",
        f"nf4 quantize {FETCHED} --merge",
        ("has no parts to merge", "--part 1/3"),
        1,
    ),
    Mistake(
        "option",
        f"nf4 build model --build-dir {BUILD} --max-shard-size 100MB",
        ("is another build", "max_shard_size", "Leave --build-dir out", "--replace"),
        1,
    ),
    # What is named as a model
    Mistake("model", "nf4 build", ("Missing argument 'MODEL': a Hub id", "nf4 build sample$")),
    Mistake(
        "model",
        "nf4 build sample model",
        ("one model at a time", "nf4 build sample && nf4 build model"),
    ),
    Mistake("model", 'nf4 build ""', ("empty", "sample|ORG/NAME")),
    Mistake("model", "nf4 build sampel", ("sampel", "Did you mean.*sample")),
    Mistake("model", "nf4 build Sample", ("Sample: no such folder", "Did you mean 'sample'")),
    Mistake("model", "nf4 build ./modle", ("no such folder", "Did you mean.*model")),
    Mistake(
        "model",
        'nf4 build "~/models/falcon-7b"',
        ("no such folder", "looked for /.*/models/falcon-7b", "Correct the path"),
    ),
    Mistake(
        "model",
        "nf4 build falcon-7b@main",
        ("begins with its owner", "tiiuae/falcon-7b --revision main"),
    ),
    Mistake(
        "model", "nf4 build tiiuae/falcon-7b@main", ("option: tiiuae/falcon-7b --revision main",)
    ),
    Mistake(
        "model",
        "nf4 build falcon-7b@00112233aabb-calibrated-3fa2",
        ("the name of a build", "`nf4 status`", "name the model: ORG/falcon-7b"),
    ),
    Mistake(
        "model",
        "nf4 build falcon-7b-instruct",
        ("no such folder", "ORG/NAME", "Did you mean 'tiiuae/falcon-7b-instruct'"),
    ),
    Mistake(
        "model",
        "nf4 build https://huggingface.co/tiiuae/falcon-7b-instruct",
        ("address", "by its id: tiiuae/falcon-7b-instruct"),
    ),
    Mistake(
        "model",
        "nf4 build https://huggingface.co/tiiuae/falcon-7b/tree/refs%2Fpr%2F3",
        ("address", "by its id: tiiuae/falcon-7b --revision refs/pr/3"),
    ),
    Mistake(
        "model",
        "nf4 build huggingface.co/datasets/allenai/c4",
        ("data ?set", "model"),
    ),
    Mistake(
        "model",
        "nf4 build falcon-7b.Q4_K_M.gguf",
        ("GGUF", "16-bit", "safetensors"),
        2,
    ),
    Mistake(
        "model",
        "nf4 build model/model-00001-of-00002.safetensors",
        ("one file",),
        remedy="folder that holds all of them: (model)$",
        typed="nf4 build {} --dry-run",
    ),
    Mistake("model", "nf4 build notes.txt", ("is a file", "folder")),
    Mistake("model", "nf4 build gguf", ("GGUF files", "16-bit checkpoint"), 1),
    Mistake(
        "model",
        "nf4 build lora",
        ("adapter", "tiiuae/falcon-7b", "merge_and_unload", "nf4 build lora-merged$"),
        1,
    ),
    Mistake("model", "nf4 build awq", ("already quantized", "AWQ", "16-bit", "card"), 1),
    Mistake(
        "model",
        f"nf4 build {BUILD}",
        ("build folder", "nf4 status --build-dir", "To go on with it: nf4 build /"),
        1,
        remedy=f"nf4 build /.* --build-dir {BUILD}$",
        typed="{} --dry-run",
    ),
    Mistake(
        "model",
        f"nf4 build {BUILD}/export",
        ("already quantized", "nf4 prompt", "another from its source: nf4 build"),
        1,
        remedy=f'nf4 prompt {BUILD}/export "Hello"',
        typed="{} --max-new-tokens 1",
    ),
    Mistake("model", "nf4 build pickled", ("pickles", "nf4 build /.*/pickled --allow-pickle$"), 1),
    Mistake("model", "nf4 build t5", ("decoder-only", "choose one such as Falcon"), 1),
    Mistake("model", "nf4 build empty", ("config.json", "save_pretrained|Hub"), 1),
    Mistake("model", "nf4 build models--tiiuae--falcon-7b", ("Hub cache", "snapshots"), 1),
    Mistake("model", f"nf4 serialize {MOVED}", ("dead link", "usb-stick", "[Bb]ring"), 1),
    Mistake("model", "make quantize MODEL=", ("MODEL", "sample")),
    Mistake(
        "model",
        "make quantize tiiuae/falcon-7b",
        ("no target", 'make quantize MODEL="tiiuae/falcon-7b"'),
    ),
    Mistake(
        "model",
        'make prompt "Tell me a story"',
        ("no target", 'make prompt PROMPT="Tell me a story"'),
    ),
    # The Hub and the network
    Mistake(
        "network",
        "nf4 build tiiuae/falcon-7b",
        (f"{NOBODY} cannot be reached .connection refused", "comes from HF_ENDPOINT", "folder"),
        1,
        {"HF_ENDPOINT": NOBODY, "HF_HUB_OFFLINE": UNSET},
    ),
    Mistake(
        "network",
        'nf4 prompt tiiuae/falcon-7b "Hello"',
        ("cannot be reached", "comes from HF_ENDPOINT", "`nf4 status` lists those on this machine"),
        1,
        {"HF_ENDPOINT": NOBODY, "HF_HUB_OFFLINE": UNSET},
    ),
    Mistake(
        "network",
        "nf4 build tiiuae/falcon-7b --offline",
        ("tiiuae/falcon-7b", "cache", "[Uu]nset|without"),
        1,
    ),
    Mistake(
        "network",
        "nf4 build me/tiny --revision main",
        ("HF_ENDPOINT is 'huggingface.co'", "Set it to https://huggingface.co, or unset"),
        1,
        {"HF_ENDPOINT": "huggingface.co", "HF_HUB_OFFLINE": UNSET},
    ),
    Mistake(
        "network",
        "nf4 build me/tiny",
        ("HF_HUB_DOWNLOAD_TIMEOUT is 'soon'; expected a whole number of seconds, such as 10",),
        1,
        {"HF_HUB_DOWNLOAD_TIMEOUT": "soon"},
        hub=True,
    ),
    Mistake(
        "network",
        'nf4 prompt me/tiny "Hello"',
        ("HF_HUB_ETAG_TIMEOUT is 'soon'; expected a whole number of seconds", "unset"),
        1,
        {"HF_HUB_ETAG_TIMEOUT": "soon"},
        hub=True,
    ),
    Mistake("Hub", "nf4 build me/tinny", ("not found", "private", "HF_TOKEN"), 1, hub=True),
    Mistake("Hub", f"nf4 build {GATED}", ("gated", "licence", "HF_TOKEN"), 1, hub=True),
    Mistake(
        "Hub",
        f"nf4 build {GATED}",
        ("does not accept the token", "settings/tokens", "unset HF_TOKEN"),
        1,
        {"HF_TOKEN": "hf_wrong"},
        hub=True,
    ),
    Mistake(
        "Hub",
        f"nf4 build {GATED}",
        ("gated", "the token that is set has no access", "accept the licence at"),
        1,
        {"HF_TOKEN": READER},
        hub=True,
    ),
    Mistake("Hub", f'nf4 prompt {GATED} "Hello"', ("gated", "licence", "HF_TOKEN"), 1, hub=True),
    Mistake("Hub", 'nf4 prompt me/tinny "Hello"', ("not found", "HF_TOKEN"), 1, hub=True),
    Mistake(
        "Hub",
        "nf4 build me/tiny --revision v9",
        ("no revision 'v9'", "Leave --revision out for main", "me/tiny/tree/main"),
        1,
        hub=True,
    ),
    Mistake(
        "Hub", "nf4 build me/lora", ("adapter", "merge_and_unload", "lora-merged$"), 1, hub=True
    ),
    Mistake("Hub", "nf4 build me/model-GGUF", ("GGUF", "16-bit"), 1, hub=True),
    Mistake(
        "Hub",
        f"nf4 build {ON_HUB}",
        (
            f"^Error: {ON_HUB} is already quantized",
            f'Use it: nf4 prompt {ON_HUB} "Hello"',
            "its 16-bit source, a folder called model",
        ),
        1,
        hub=True,
    ),
    # Files that options name
    Mistake("file", "nf4 build model --recipe typo.toml", ("skip_module'", "skip_modules")),
    Mistake("file", "nf4 build model --recipe recipe.json", ("is JSON", "TOML", r"\[quantize\]")),
    Mistake(
        "file",
        "nf4 build model --prompts prompts.txt",
        ("prompts.txt, line 1 is plain text", "a JSON object on each line", "prompt"),
    ),
    Mistake(
        "file",
        "nf4 build model --eval-text missing.txt",
        ("missing.txt", "No such file", "looked in /", "leave --eval-text out"),
    ),
    Mistake(
        "file",
        "nf4 build model --prompts missing.jsonl",
        ("missing.jsonl", "No such file", "looked in /", "leave --prompts out"),
    ),
    Mistake("file", "nf4 build model --calibrate missing.txt", ("missing.txt", "No such file")),
    Mistake(
        "file",
        "nf4 build model --calibrate short.txt",
        ("short.txt", "at least 256, better 16,384", "KB of English", "--calibrate self$"),
    ),
    Mistake("file", "nf4 build no-tokenizer --calibrate short.txt", ("tokenizer", "self")),
    # Artifacts
    Mistake(
        "artifact",
        "nf4 verify nothing",
        ("No build, no folder and no Hub id .* 'nothing'", "Builds there: ", "nf4 build MODEL"),
        1,
    ),
    Mistake(
        "artifact",
        f"nf4 verify --build-dir {BARE}",
        ("not finished", "nothing to verify yet"),
        1,
        remedy=f"nf4 build /.* --build-dir {BARE}$",
        typed="{} --dry-run",
    ),
    Mistake(
        "artifact",
        "nf4 inspect model",
        ("is a checkpoint, not an artifact", r"nf4 inspect artifacts/\S+$|nf4 build model$"),
        1,
    ),
    *(
        Mistake(
            "artifact",
            f"nf4 {command} {ON_HUB}{options}",
            (said, f"hf download {ON_HUB} --local-dir sample-nf4; then: {then}"),
            1,
        )
        for command, options, said, then in (
            ("inspect", "", "is not on this machine", "nf4 inspect sample-nf4"),
            ("reproduce", "", "is not on this machine", "nf4 reproduce sample-nf4"),
            ("verify", "", "compares a build with its 16-bit source", "nf4 reproduce sample-nf4"),
            (
                "push",
                " --repo-id me/mine",
                "publishes only what was built and verified here",
                "hf upload me/mine sample-nf4",
            ),
        )
    ),
    Mistake(
        "artifact",
        f"nf4 verify {SIGNED}",
        ("was not built on this machine", f"nf4 reproduce {SIGNED}$"),
        1,
    ),
    Mistake(
        "artifact",
        f"nf4 push {SIGNED} --repo-id me/mine",
        ("was not built on this machine", f"hf upload me/mine {SIGNED}", "nf4 build"),
        1,
    ),
    Mistake(
        "artifact",
        f"nf4 verify {BUILD} --against defualt",
        ("--against 'defualt': no such build", "Did you mean 'default'?"),
        1,
    ),
    Mistake(
        "artifact",
        f"nf4 verify {BUILD} --against no-tokenizer",
        ("--against no-tokenizer: that is a 16-bit model", "leave --against out"),
        1,
    ),
    Mistake(
        "artifact",
        f"nf4 reproduce {SIGNED} --source no-tokenizer",
        ("no-tokenizer lacks tokenizer.json", "another model", "--source with the folder of"),
        1,
    ),
    Mistake(
        "artifact",
        "nf4 verify artifacts/modle@000000000000",
        ("modle@000000000000: no such folder. Did you mean 'artifacts/model@000000000000'?",),
        1,
    ),
    Mistake(
        "artifact",
        "cd artifacts && nf4 verify",
        ("no build under .*/artifacts/artifacts", "go to the folder above"),
        1,
    ),
    Mistake(
        "artifact",
        'cd empty && nf4 prompt calibrated "Hello"',
        ("looked in .*/empty/artifacts", "folder in which it is started", "Go there first: cd /"),
        1,
    ),
    Mistake(
        "artifact",
        'nf4 prompt "Tell me a story" sample',
        ("The model comes first",),
        remedy='nf4 prompt sample "Tell me a story"$',
        typed="{} --max-new-tokens 1",
    ),
    Mistake(
        "artifact",
        "nf4 prompt model Tell me a story",
        ("several words stands in quotes",),
        remedy='nf4 prompt model "Tell me a story"$',
        typed="{} --max-new-tokens 1",
    ),
    Mistake(
        "artifact",
        'nf4 prompt model --prompt "Hello"',
        ("No such option", "TEXT is no option"),
        remedy="nf4 prompt model Hello$",
        typed="{} --max-new-tokens 1",
    ),
    Mistake("artifact", 'nf4 prompt model ""', ("TEXT is empty", 'nf4 prompt model "Hello"$')),
    Mistake(
        "artifact",
        f'nf4 prompt {BROKEN} "Hello"',
        ("incomplete", "model-00001-of-00002.safetensors is missing"),
        1,
        remedy=f"nf4 build /.* --build-dir {BROKEN}$",
        typed="{} --dry-run",
    ),
    Mistake("artifact", "nf4 inspect nothing", ("No build.*'nothing'", "nf4 build MODEL"), 1),
    Mistake("artifact", "nf4 reproduce nothing", ("No build.*'nothing'", "nf4 build MODEL"), 1),
    Mistake(
        "artifact",
        f'nf4 prompt {BARE} "Hello"',
        ("not finished", "without an export", f"nf4 build /.* --build-dir {BARE}$"),
        1,
    ),
    Mistake("artifact", "nf4 prompt model", ("Missing argument 'TEXT'",)),
    Mistake(
        "artifact",
        'nf4 prompt model "Hello" --temperature hot',
        ("--temperature is 'hot'", "a number"),
        remedy="such as (--temperature 0.7)",
        typed="nf4 prompt model Hello --max-new-tokens 1 {}",
    ),
    Mistake(
        "artifact",
        'nf4 prompt model "Hello" --temperature -1',
        ("--temperature is -1; expected 0 for the likeliest token",),
    ),
    Mistake(
        "artifact",
        'nf4 prompt model "Hello" --top-p 90',
        ("--top-p is 90; expected", "such as --top-p 0.9; 90 % is 0.9"),
    ),
    Mistake(
        "artifact",
        'nf4 prompt model "Hello" --max-new-tokens 0',
        ("--max-new-tokens is 0; expected a whole number from 1", "--max-new-tokens 100$"),
    ),
    Mistake(
        "artifact",
        'nf4 prompt half-tokenizer "Hello"',
        ("has no tokenizer", "tokenizer.json", "Bring it"),
        1,
    ),
    Mistake(
        "artifact",
        f"nf4 check {SIGNED} --key signer.pub",
        ("other bytes", "get it again"),
        1,
    ),
    Mistake(
        "artifact",
        f"nf4 check {SIGNED} --key signre.pub",
        ("The key signre.pub cannot be read", "Did you mean 'signer.pub'"),
    ),
    Mistake(
        "artifact",
        f"nf4 check {SIGNED} --key signer.pem",
        ("signer.pem is a private key", "checked with a public one"),
        remedy=r"openssl ec -in signer.pem -pubout -out \S+$",
    ),
    Mistake("artifact", 'nf4 prompt no-tokenizer "Hello"', ("tokenizer", "tokenizer.json"), 1),
    Mistake(
        "artifact",
        f"nf4 sign {BUILD}",
        ("--key", "openssl ecparam"),
        remedy=r"test -e my-key.pem \|\| openssl .* -out my-key.pem",
    ),
    Mistake(
        "artifact",
        f"nf4 sign {BUILD} --key key.pem",
        ("key.pem is no private key",),
        remedy=r"openssl ecparam .* -out my-key\S*.pem$",
    ),
    Mistake(
        "artifact",
        f"nf4 check {BUILD} --key key.pem",
        ("has no signature", "If you made it, .*nf4 sign", "nf4 reproduce"),
        1,
    ),
    Mistake(
        "artifact",
        f"nf4 push {BUILD}",
        ("Missing option '--repo-id'",),
        remedy=f"nf4 push {BUILD} --repo-id me/sample-nf4$",
        typed="{} --dry-run",
    ),
    Mistake(
        "artifact",
        f"nf4 push {BUILD} --repo-id mine",
        ("--repo-id 'mine': the owner is missing", "user name"),
        remedy="--repo-id USER/mine$",
        typed=f"nf4 push {BUILD} --dry-run {{}}",
    ),
    Mistake(
        "artifact",
        f"nf4 push {BARE} --repo-id me/mine --dry-run",
        ("not finished", "only a verified build can be published", "nf4 build /.* --build-dir"),
        1,
    ),
    Mistake(
        "artifact",
        f"nf4 push {BUILD} --repo-id me/mine",
        ("token", "HF_TOKEN|hf auth login"),
        1,
        hub=True,
    ),
    Mistake(
        "artifact",
        f"nf4 push {BUILD} --repo-id me/tiny",
        ("may write to me/tiny", "settings/tokens", "the owner must be you"),
        1,
        {"HF_TOKEN": READER},
        hub=True,
    ),
)
