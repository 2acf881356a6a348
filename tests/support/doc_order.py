"""What `doc_runner` is told: pages in their order, what the Hub holds, what must hold after."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Final

from tests.support.doc_blocks import DOCS, blocks_of, pages
from tests.support.doc_runner import MODEL
from tests.support.hostile_tokenizers import write_template
from tests.support.hub_server import TOKEN, HubServer
from tests.support.tiny import copy_of

FIRST: Final = ("publishing.md",)
"""Pages that publish what others fetch."""

LAST: Final = ("calibration.md", "choosing.md")
"""Pages that take long."""

README: Final = DOCS.parent / "README.md"

CHAT_MODEL: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
_CHAT: Final = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

CLAIMS: Final = {
    "python-api.md": (
        "artifact.verdict == 'pass'",
        "artifact.verification.text.tokens <= 50",  # measured again, as the page asks
        "type(model).__name__ == 'FalconForCausalLM' and model.is_loaded_in_4bit",
        "model.name_or_path == 'me/falcon-7b-instruct-nf4'",  # no folder of this machine
        "model.config._commit_hash == pushed.commit",
        "len(tokenizer) > 200",
        "isinstance(answer, str)",
        "bars == {}",  # every task that began has ended
        "any(parameter.requires_grad for parameter in tuned.parameters())",
    ),
    "README.md": (
        "artifact.verdict == 'pass'",
        "type(model).__name__ == 'FalconForCausalLM' and model.is_loaded_in_4bit",
        "len(tokenizer) > 200",
        "modeling_falcon.FalconLinear is torch.nn.Linear",
    ),
    "serving.md": ("isinstance(answer, str)", "model.is_loaded_in_4bit"),
}
"""What must be true of the names that a page's Python leaves."""

VARIABLES: Final = {
    "HF_TOKEN": TOKEN,
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


def order(path: Path, model: Path, recipe: Path | None, *, only: str = "") -> None:
    """Writes it down.

    Args:
        path: where.
        model: the checkpoint that stands for all others.
        recipe: for builds that verify little, in one process; without, `nf4` is the real program.
        only: part of the names of the pages that are wanted.
    """
    found = {page.relative_to(DOCS).as_posix(): blocks_of(page) for page in pages()}
    others = [name for name in found if name not in (*FIRST, *LAST)]
    # Of the README, whose commands make an environment first; last, since it changes transformers.
    found[README.name] = [block for block in blocks_of(README) if block.language == "python"]
    wanted = [*FIRST, *others, *LAST, README.name]
    path.write_text(
        json.dumps(
            {
                "pages": {
                    name: [asdict(block) | {"commands": block.commands} for block in found[name]]
                    for name in wanted
                    if only in name and found[name]
                },
                "model": str(model),
                "recipe": recipe and str(recipe),
                "in_process": recipe is not None,
                "slow": recipe is None,
                "claims": CLAIMS,
            }
        ),
        "utf-8",
    )


def serve(hub: HubServer, model: Path, folder: Path) -> None:
    """What the Hub holds before anything is published."""
    hub.store.users[TOKEN] = "me"
    hub.store.add(MODEL, model)
    chat = copy_of(model, folder / "chat-model")
    write_template(chat, _CHAT)
    hub.store.add(CHAT_MODEL, chat)
