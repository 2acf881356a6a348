"""What `import nf4_pipeline` gives: the names, soon, and with types for other programs."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Final

import nf4_pipeline
import pytest

NAMES: Final = [
    "Artifact",
    "PipelineError",
    "ProgressEvent",
    "build",
    "errors",
    "load",
    "load_tokenizer",
    "prompt",
    "rebuild",
]
HEAVY: Final = ("torch", "transformers", "numpy", "numba", "huggingface_hub", "click", "rich")

LOOK: Final = """
import json, sys
import nf4_pipeline
found = [[name for name in sys.argv[1:] if name in sys.modules]]
names = [name for name in dir(nf4_pipeline) if not name.startswith("_")]
for name in names:
    getattr(nf4_pipeline, name)
found.append([name for name in ("torch", "transformers", "huggingface_hub") if name in sys.modules])
print(json.dumps([names, *found]))
"""


def test_names_are_listed_and_import_nothing_heavy() -> None:
    """`import` brings none of them, and a name that is only named neither torch nor the Hub."""
    done = subprocess.run(
        [sys.executable, "-c", LOOK, *HEAVY], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [NAMES, [], []]


def test_names_are_what_they_say() -> None:
    assert set(NAMES) | {"__version__"} == set(nf4_pipeline.__all__)
    for name in ("build", "load", "load_tokenizer", "prompt", "rebuild"):
        function = getattr(nf4_pipeline, name)
        assert inspect.isfunction(function)
        assert function.__name__ == name
        parameters = list(inspect.signature(function).parameters.values())
        assert all(p.annotation is not inspect.Parameter.empty for p in parameters)
        for parameter in parameters:  # each is explained
            assert f"\n    {parameter.name}: " in (inspect.getdoc(function) or "")
    with pytest.raises(AttributeError, match="'bilds'"):
        nf4_pipeline.bilds  # noqa: B018


STUBS: Final = "class PreTrainedModel: ...\nclass PreTrainedTokenizerBase: ...\n"

PROGRAM: Final = """
import nf4_pipeline
from nf4_pipeline import Artifact, ProgressEvent, build, load, load_tokenizer, prompt

def show(event: ProgressEvent) -> None:
    reveal_type(event.total)

artifact = build("sample", recipe={"verify": {"max_mean_kl": 0.1}}, progress=show)
reveal_type(artifact)
reveal_type(artifact.verdict)
reveal_type(artifact.sizes.artifact_bytes)
reveal_type(Artifact.open("x").verify(prompts="p"))
reveal_type(artifact.push("me/x").commit)
reveal_type(artifact.push("me/x", dry_run=True).total_bytes)
reveal_type(artifact.prompt("hello", seed=1))
reveal_type(load("x", device_map={"": 0}))
reveal_type(artifact.load(device="cpu"))
reveal_type(load_tokenizer("x"))
reveal_type(prompt([{"role": "user", "content": "hello"}], stream=print))
reveal_type(nf4_pipeline.errors.HubError("x").exit_code)
build("sample", "main")
build("sample", revison="main")
artifact.prompt("hello", top_kk=3)
load("x", quantize="yes")
artifact.verdict = "pass"
"""

READ: Final = (
    *("api", "api.artifact", "api.building", "api.options", "documents", "errors", "manifest"),
    *("manifest.manifest", "progress", "records", "runtime", "runtime.loader", "runtime.prompt"),
    *("fidelity", "fidelity.verdict", "stages", "stages.push"),
)
REVEALED: Final = [
    "int | None",
    "nf4_pipeline.api.artifact.Artifact",
    "Literal['pass'] | Literal['fail'] | None",
    "int",
    "nf4_pipeline.api.artifact.Artifact",
    "str",
    "int",
    "list[str]",
    "transformers.PreTrainedModel",
    "transformers.PreTrainedModel",
    "transformers.PreTrainedTokenizerBase",
    "list[str]",
    "int",
]
REFUSED: Final = ["call-arg", "call-arg", "call-arg", "arg-type", "misc"]


def test_other_programs_see_the_types(tmp_path: Path) -> None:
    """mypy in another folder, which reads of this package only where these types stand."""
    assert (Path(nf4_pipeline.__file__).with_name("py.typed")).is_file()
    (tmp_path / "stubs" / "transformers").mkdir(parents=True)
    (tmp_path / "stubs" / "transformers" / "__init__.pyi").write_text(STUBS)
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "mypy.ini").write_text(
        f"[mypy]\nstrict = true\nmypy_path = stubs:{Path(nf4_pipeline.__file__).parents[1]}\n"
        "follow_imports = skip\nignore_missing_imports = true\n"
        f"[mypy-transformers,nf4_pipeline,{','.join(f'nf4_pipeline.{name}' for name in READ)}]\n"
        "follow_imports = normal\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-pretty", "--cache-dir", "/dev/null", "program.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("program.py:")]
    revealed = [line.split('"')[1] for line in lines if "Revealed type" in line]
    errors = [line.rpartition("[")[2].rstrip("]") for line in lines if ": error: " in line]
    assert [name.replace("builtins.", "") for name in revealed] == REVEALED, done.stdout
    assert errors == REFUSED, done.stdout
