"""Which block of a model a tensor is in, by its name: for what is planned before there is a model.

Of the 173 causal LMs of transformers 5.23 that build by default, 169 have no tensor for which
`blocks.find_blocks` says something else; four number pieces outside of their blocks, too: bare
projections of gemma3n_text and git, convolutions of phi4_multimodal, norms of xlm.
"""

from __future__ import annotations

import re
from typing import Final

_NUMBERED: Final = re.compile(r"(.*?\.\d+)\.")


def numbered_block(name: str) -> str:
    """What stands in front of the first number and with it, such as "model.layers.0"; else "".

    Experts are numbered in their block, and so behind its number.
    """
    found = _NUMBERED.match(name)
    return found[1] if found else ""
