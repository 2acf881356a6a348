"""On a CUDA device: a Falcon computes attention by a fast kernel, and says the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.checkpoints import falcon

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_the_fast_kernel_takes_it_and_says_the_same_within_its_precision(tmp_path: Path) -> None:
    from nf4_pipeline.model.fast_attention import use_fast_attention
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = falcon(tmp_path / "model").to("cuda:0")
    ids = torch.arange(48, device="cuda:0").reshape(2, 24)
    with torch.inference_mode():
        before = model(ids).logits.float()
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError):
            model(ids)
        use_fast_attention(model)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            after = model(ids).logits.float()
            first = model(ids[:, :-1], use_cache=True)
            cache = first.past_key_values
            last = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits.float()
    precision = 0.02 * before.abs().max()
    assert (after - before).abs().max() < precision
    assert (last[:, 0] - before[:, -1]).abs().max() < precision


def test_gradients_are_the_same_each_time(tmp_path: Path) -> None:
    from nf4_pipeline.model.fast_attention import use_fast_attention
    from nf4_pipeline.runtime.determinism import deterministic

    model = falcon(tmp_path / "model").to("cuda:0")
    use_fast_attention(model)
    ids = torch.arange(96, device="cuda:0").reshape(4, 24)
    found = []
    with deterministic("cuda:0", strict=True):
        for _ in range(3):
            model.zero_grad()
            model(ids, use_cache=False).logits.float().square().mean().backward()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert found[0]
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))
