"""docs/python-api.md, as it stands, by a program of its own with a Hub on 127.0.0.1.

The models that it names are tiny ones in the working folder, and the build that it starts is done.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from tests.support import hub_uploads
from tests.support.hostile_tokenizers import write_template
from tests.support.hub_client import isolated
from tests.support.hub_server import TOKEN, HubServer
from tests.support.tiny import copy_of

assert hub_uploads  # its routes are registered by importing it

PAGE: Final = Path(__file__).parents[1] / "docs" / "python-api.md"
REPO: Final = "me/falcon-7b-instruct-nf4"
CHAT: Final = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

PROGRAM: Final = """
import json, sys
from pathlib import Path

from nf4_pipeline.api import options
from nf4_pipeline.processes.in_process import in_process
from nf4_pipeline.recipe import TABLES, load_recipe

snippets, recipe = json.loads(Path("snippets.json").read_text()), load_recipe(Path(sys.argv[1]))
read = options._read  # the default recipe is, for once, one that verifies in little time
options._read = lambda said: (recipe, frozenset(TABLES)) if said is None else read(said)
names = {}
with in_process():
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"<snippet {number}>", "exec"), names)
model, pushed = names["model"], names["pushed"]
print(json.dumps({
    "verdict": names["artifact"].verdict,
    "tokens": names["artifact"].verification.text.tokens,
    "answer": names["answer"],
    "class": type(model).__name__,
    "four_bit": model.is_loaded_in_4bit,
    "name": model.name_or_path,
    "commit": model.config._commit_hash,
    "pushed": pushed.commit,
    "vocabulary": len(names["tokenizer"]),
    "bars": names["bars"],
    "trainable": [p.requires_grad for p in names.get("tuned", model).parameters()].count(True),
}))
"""


def snippets() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)


def test_every_snippet_runs(
    verified: Path, tiny_falcon: Path, quick_recipe: Path, tmp_path: Path
) -> None:
    where = tmp_path / "where"
    (where / "tiiuae").mkdir(parents=True)
    (where / "tiiuae" / "falcon-7b-instruct").symlink_to(tiny_falcon)
    copy_of(verified, where / "artifacts" / verified.name)
    chat = copy_of(tiny_falcon, where / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    write_template(chat, CHAT)
    asked = [s for s in snippets() if "peft" not in s or find_spec("peft")]
    (where / "snippets.json").write_text(json.dumps(asked))
    with HubServer() as hub:
        hub.store.users[TOKEN] = "me"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, str(quick_recipe)],
            cwd=where,
            env=isolated(tmp_path / "home", hub.url, HF_TOKEN=TOKEN, OMP_NUM_THREADS="1"),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["commit"] == found["pushed"] == hub.store.repos[REPO].refs["main"]
    assert found["verdict"] == "pass"
    assert found["tokens"] <= 50  # measured again, as the page asks
    assert (found["class"], found["four_bit"]) == ("FalconForCausalLM", True)
    assert found["name"] == REPO  # no folder of this machine
    assert found["vocabulary"] > 200
    assert isinstance(found["answer"], str)
    assert found["bars"] == {}  # every task that began has ended
    assert found["trainable"] > 0 or not find_spec("peft")
    assert re.search(r"me/no-such-model", done.stdout)
