"""The Python that card and page give to paste: load, generate, the same with this package. Pure.

Tests run every snippet as it stands.
"""

from __future__ import annotations

import json
from typing import Final

from nf4_pipeline.checkpoint.files import is_of_tokenizer
from nf4_pipeline.manifest.manifest import Manifest
from nf4_pipeline.printable import printable
from nf4_pipeline.readers.promises import published_lines

_REQUEST: Final = "Tell me a story about a fox."
_BEGINNING: Final = "Once upon a time"


def has_tokenizer(manifest: Manifest) -> bool:
    """Whether an artifact has a tokenizer."""
    return any(is_of_tokenizer(name) for name in manifest.files)


def is_stock(manifest: Manifest) -> bool:
    """Whether today's transformers loads an artifact by itself, with a line where it needs one."""
    lines = published_lines(manifest.model_class, manifest.hidden_modules)
    return not manifest.hidden_modules or lines is not None


def load_snippet(manifest: Manifest, name: str) -> str:
    """Loads with transformers alone, after the line that some architectures need.

    Args:
        manifest: of the artifact.
        name: a Hub repo or a folder.
    """
    lines = published_lines(manifest.model_class, manifest.hidden_modules) or ""
    imports, _, line = lines.partition("\n\n")
    loading = {*imports.splitlines(), "from transformers import AutoModelForCausalLM"}
    ordered = sorted(loading, key=lambda text: (text.startswith("from"), text))
    if line:
        line = f"# transformers >= 5.5 passes over subclasses of nn.Linear, and then fails\n{line}"
    loads = f'AutoModelForCausalLM.from_pretrained({_text(name)}, device_map="auto")'
    return "\n".join(ordered) + f"\n\n{line}model = {loads}"


def generate_snippet(name: str, *, chat: bool) -> str:
    """Answers with the model of `load_snippet`; ids and mask go in, which every model takes.

    Args:
        name: a Hub repo or a folder.
        chat: the tokenizer has a chat template that works.
    """
    head = (
        "from transformers import AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({_text(name)})\n"
    )
    if chat:
        head += (
            f'messages = [{{"role": "user", "content": "{_REQUEST}"}}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
            ").to(model.device)\n"
        )
    else:
        head += f'inputs = tokenizer("{_BEGINNING}", return_tensors="pt").to(model.device)\n'
    return head + (
        "answer = model.generate(\n"
        "    inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=128\n"
        ")\n"
        "print(tokenizer.decode(answer[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))"
    )


def own_snippet(manifest: Manifest, name: str) -> str:
    """Both with this package.

    Args:
        manifest: of the artifact.
        name: a Hub repo or a folder.
    """
    if not has_tokenizer(manifest):
        return f"from nf4_pipeline import load\n\nmodel = load({_text(name)})"
    return (
        "from nf4_pipeline import load, load_tokenizer, prompt\n\n"
        f'print(prompt("{_REQUEST}", {_text(name)})[0])\n'
        f"model = load({_text(name)})\n"
        f"tokenizer = load_tokenizer({_text(name)})"
    )


def _text(name: str) -> str:
    return json.dumps(printable(name))
