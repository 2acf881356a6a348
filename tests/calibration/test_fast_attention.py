"""Fast attention leaves a Falcon as it was where no fast kernel is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nf4_pipeline.model.fast_attention import use_fast_attention

from tests.support.checkpoints import falcon


def modes() -> int:
    return int(torch._C._len_torch_function_stack())


def test_on_a_cpu_the_same_bits(tmp_path: Path) -> None:
    model = falcon(tmp_path / "model")
    ids = torch.arange(48).reshape(2, 24)
    with torch.inference_mode():
        before = model(ids).logits
        use_fast_attention(model)
        assert torch.equal(model(ids).logits, before)
    assert modes() == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_a_layer_leaves_nothing_active(
    tmp_path: Path, error: type[BaseException]
) -> None:
    model = falcon(tmp_path / "model")
    use_fast_attention(model)
    layer = next(m for m in model.modules() if type(m).__name__ == "FalconAttention")

    def fail(*_: Any) -> None:
        raise error

    layer.dense.register_forward_pre_hook(fail)
    with torch.inference_mode(), pytest.raises(error):
        model(torch.arange(8).reshape(1, 8))
    assert modes() == 0
