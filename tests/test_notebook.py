"""The notebook, as it is stored and as it runs: top to bottom, in a kernel, on the sample."""

from __future__ import annotations

import ast
import getpass
import html
import importlib.util
import json
import os
import re
import socket
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Final

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from traitlets.config import Config

from tests.support import warm
from tests.support.tiny import environment

NOTEBOOK: Final = Path(__file__).parents[1] / "notebooks" / "quantize_falcon.ipynb"

COLAB: Final = {
    "COLAB_RELEASE_TAG": "release-colab_20261101",
    "COLAB_BACKEND_VERSION": "next",
    "COLAB_JUPYTER_IP": "172.28.0.12",
    "COLAB_JUPYTER_TRANSPORT": "ipc",
    "COLAB_NOTEBOOK_ID": "1",
    "DATALAB_SETTINGS_OVERRIDES": "{}",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "ENABLE_DIRECTORYPREFETCHER": "1",
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    "PYTHONUNBUFFERED": "1",
}
"""What Colab sets in a runtime and a process of ours might heed."""

ABSOLUTE_PATH: Final = re.compile(r"""["'`\s(]([/~]\w|[A-Za-z]:\\)""")


@dataclass(frozen=True)
class Ran:
    """The notebook after it ran, and the folder in which it did."""

    folder: Path
    cells: dict[str, Any]

    def outputs(self, cell: str, kind: str) -> list[str]:
        """What a cell displayed, of one MIME type."""
        found = (output.get("data", {}) for output in self.cells[cell].outputs)
        return [data[kind] for data in found if kind in data]

    def printed(self, cell: str, stream: str = "stdout") -> str:
        """What a cell printed."""
        found = (o for o in self.cells[cell].outputs if o.get("name") == stream)
        return "".join(output.text for output in found).strip()

    def json(self, path: str) -> Any:
        """A file that it left in the build folder."""
        return json.loads((self.folder / "artifacts" / "sample" / path).read_text("utf-8"))


def stored() -> Any:
    """The notebook as it is in the repository."""
    return nbformat.read(NOTEBOOK, nbformat.NO_CONVERT)  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Nobody's home, no network, no GPU, `nf4` not on the PATH, and Colab's variables."""
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("notebook")
    own = {str(Path(sys.executable).parent), str(Path(sys.prefix) / "bin")}
    paths = [path for path in os.environ["PATH"].split(os.pathsep) if path not in own]
    own_home = {"HOME": str(home), "PATH": os.pathsep.join(paths)}
    notebook = stored()
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory(prefix="nf4-") as sockets:
        patch.setenv("HOME", str(home))  # where the kernel is looked up
        # Ports are chosen before they are taken, and somebody else may take them in between. The
        # names of sockets must be short.
        named = {"transport": "ipc", "ip": f"{sockets}/kernel"}
        NotebookClient(
            notebook,
            timeout=1200,
            startup_timeout=600,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
            config=Config({"KernelManager": named}),
        ).execute(env=warm.variables(environment(home) | own_home | COLAB))
    return Ran(folder, {cell.id: cell for cell in notebook.cells})


def test_it_is_stored_as_a_reader_should_find_it() -> None:
    notebook = stored()
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    ids = [cell.id for cell in notebook.cells]
    assert all(re.fullmatch("[a-z-]+", name) for name in ids)  # given, not drawn by chance
    assert len(set(ids)) == len(ids)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_the_model_is_chosen_in_one_cell() -> None:
    notebook = stored()
    code = {cell.id: cell.source for cell in notebook.cells if cell.cell_type == "code"}
    assert [name for name, text in code.items() if re.search(r"\bMODEL\s*=", text)] == ["model"]
    (assignment,) = ast.parse(code["model"]).body
    assert ast.unparse(assignment) == "MODEL = 'sample'"
    for name, text in code.items():
        assert name == "model" or "tiiuae" not in text


@pytest.mark.parametrize(
    ("checkout", "present"), [(True, True), (False, False), (False, True), (True, False)]
)
def test_it_installs_what_is_missing_and_keeps_torch(
    checkout: bool, present: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    if checkout:
        (tmp_path / "pipeline" / "nf4_pipeline").mkdir(parents=True)
    monkeypatch.chdir(folder)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "nf4_pipeline" and not present else find(name),
    )
    asked: list[tuple[str, str]] = []
    names: dict[str, Any] = {}

    def run_line_magic(name: str, line: str, **_: Any) -> None:
        asked.append((name, line.format(**names)))  # as IPython puts variables in

    names["get_ipython"] = lambda: SimpleNamespace(run_line_magic=run_line_magic)
    (cell,) = [cell.source for cell in stored().cells if cell.id == "install"]
    exec(TransformerManager().transform_cell(cell), names)  # type: ignore[no-untyped-call]
    if present:
        assert asked == []
        return
    source = ".." if checkout else "nf4-pipeline"
    assert asked == [("pip", f"install --quiet --constraint kept.txt {source}")]
    kept = (folder / "kept.txt").read_text().splitlines()
    assert f"torch=={version('torch')}" in kept
    assert f"numpy=={version('numpy')}" in kept


def test_it_names_no_place_of_this_machine() -> None:
    text = NOTEBOOK.read_text("utf-8")
    for private in (str(Path.home()), str(NOTEBOOK.parents[1]), sys.prefix, socket.gethostname()):
        assert private not in text
    assert not re.search(rf"\b{re.escape(getpass.getuser())}\b", text)
    for cell in stored().cells:
        assert not ABSOLUTE_PATH.search(cell.source), cell.source
    assert ABSOLUTE_PATH.search('open("/content/x")')


def test_it_runs_from_top_to_bottom_without_complaints(ran: Ran) -> None:
    code = [cell for cell in ran.cells.values() if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    complaints = {
        word
        for cell in code
        for word in re.findall(r"\w*(?:Warning|Error)\b", ran.printed(cell.id, "stderr"))
    }
    # tqdm, which transformers imports, misses the widgets of a graphical notebook here.
    assert complaints <= {"TqdmWarning"}


def test_it_shows_sizes_pictures_answers_and_the_verdict(ran: Ran) -> None:
    found = ran.json("export/verification.json")
    (sizes,) = ran.outputs("sizes", "text/html")
    for count in ("original_bytes", "artifact_bytes", "footprint_bytes"):
        assert f"{found['sizes'][count] / 2**20:.2f} MiB" in sizes
    assert f"{found['sizes']['bits_per_weight']:.3f}" in sizes
    assert len(ran.outputs("pictures", "image/png")) >= 3
    (answers,) = ran.outputs("answers", "text/html")
    for answer in found["answers"][:8]:
        assert f">{answer['prompt']}</td>" in answers
        assert f">{answer['answer_16bit']}</td>" in answers
        assert f">{answer['answer_4bit']}</td>" in answers
    assert "verdict: pass, measured on" in ran.printed("verdict")
    (checks,) = ran.outputs("verdict", "text/html")
    assert all(html.escape(check["found"]) in checks for check in found["checks"])


def test_it_generates_text_with_and_without_the_package(ran: Ran) -> None:
    assert "fox" in ran.printed("prompt")
    stories = re.findall(r"^\d\. (.+)$", ran.printed("several"), re.MULTILINE)
    assert len(set(stories)) == 3
    assert "FalconForCausalLM on cpu" in ran.printed("load")
    assert len(ran.printed("stock")) > len("Once upon a time, ")
    assert ran.printed("stock").startswith("Once upon a time")


def test_it_leaves_a_summary_and_could_publish(ran: Ran) -> None:
    summary, found = ran.json("summary.json"), ran.json("export/verification.json")
    assert summary["verdict"] == "pass"
    assert summary["sizes"]["original_bytes"] == found["sizes"]["original_bytes"]
    assert summary["mean_kl"] == found["fidelity"]["mean_kl"]
    assert summary["answers"] == found["answers"][:8]
    assert len(summary["samples"]) == 3
    for sample in summary["samples"]:
        assert sample["prompt"] == "Tell me a story about a fox."
        assert " ".join(sample["answer"].split()) in " ".join(ran.printed("several").split())
    listed = ran.printed("publish")
    assert all(name in listed for name in ran.json("export/manifest.json")["files"])
