"""From a Hessian to the order of columns and the factor; Hessians that give none."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Final

import pytest
import torch
from nf4_pipeline.gptq.config import GptqConfig
from nf4_pipeline.gptq.hessian import IllConditionedError, factorize

from tests.support.gptq_inputs import hessian_of
from tests.support.gptq_reference import prepared

CONFIG: Final = GptqConfig()


@pytest.mark.parametrize("columns", [64, 256, 3, 100, 131])
@pytest.mark.parametrize("tokens", [16, 1000, 100_000])
def test_the_factor_is_that_of_the_inverse(columns: int, tokens: int) -> None:
    """Fewer tokens than columns, too: such a Hessian has no inverse of its own."""
    hessian = hessian_of(columns, min(tokens, 1000))
    found = factorize(hessian, tokens, CONFIG)
    h = torch.from_numpy(prepared(hessian.double().numpy(), tokens))
    factor = found.factor.double()
    assert found.factor.dtype == torch.float32
    assert found.factor.is_contiguous()
    assert torch.equal(factor, factor.triu())
    assert sorted(found.order.tolist()) == list(range(columns))
    product = factor.T @ factor @ h[found.order][:, found.order]
    torch.testing.assert_close(product, torch.eye(columns).double(), atol=2e-3, rtol=0)
    torch.testing.assert_close(found.diagonal.double(), h.diagonal(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("config", "tokens", "share"),
    [
        (GptqConfig(), 10, 0.1),
        (GptqConfig(), 128 * 20, 0.05),
        (GptqConfig(adaptive_shrinkage=False), 128 * 20, 0.1),
        (GptqConfig(shrinkage=0.3), 10, 0.3),
        (GptqConfig(shrinkage=0.0), 10, 0.0),
        (GptqConfig(shrinkage=1.0, adaptive_shrinkage=False), 10, 1.0),
    ],
)
def test_how_far_elements_beside_the_diagonal_shrink(
    config: GptqConfig, tokens: int, share: float
) -> None:
    hessian = hessian_of(128)
    found = factorize(hessian, tokens, config)
    inverse = torch.linalg.inv(found.factor.double().T @ found.factor.double())
    back = torch.empty_like(inverse)
    back[found.order[:, None], found.order[None, :]] = inverse
    apart = ~torch.eye(128, dtype=torch.bool)
    torch.testing.assert_close(
        back[apart], (1 - share) * hessian.double()[apart], rtol=1e-2, atol=1e-4
    )


def test_columns_that_matter_come_first_and_blocks_stay_together() -> None:
    hessian = torch.eye(192)
    hessian[70, 70], hessian[65, 65], hessian[130, 130] = 9.0, 5.0, 20.0
    order = factorize(hessian, 1000, CONFIG).order.tolist()
    rest = [j for j in range(128, 192) if j != 130]
    assert order[:64] == [130, *rest]
    assert order[64:128] == [70, 65, 64, *range(66, 70), *range(71, 128)]
    assert order[128:] == list(range(64))


@pytest.mark.parametrize("columns", [128, 100])
def test_ties_stay_in_their_order(columns: int) -> None:
    assert factorize(torch.eye(columns), 1000, CONFIG).order.tolist() == list(range(columns))
    hessian = torch.eye(columns)
    hessian[columns - 1, columns - 1] = 2.0
    order = factorize(hessian, 1000, CONFIG).order.tolist()
    first = 64 if columns == 128 else 0
    assert order == [columns - 1, *range(first, columns - 1), *range(first)]


def test_columns_that_do_not_keep_blocks_are_ordered_one_by_one() -> None:
    hessian = torch.eye(100)
    hessian[70, 70], hessian[3, 3] = 9.0, 5.0
    assert factorize(hessian, 1000, CONFIG).order.tolist()[:3] == [70, 3, 0]
    plain = factorize(hessian, 1000, GptqConfig(act_order=False))
    assert plain.order.tolist() == list(range(100))


def test_dead_columns_are_damped_and_come_last() -> None:
    hessian = hessian_of(128)
    dead = [3, 4, 100]
    hessian[dead] = 0.0
    hessian[:, dead] = 0.0
    found = factorize(hessian, 1000, CONFIG)
    assert torch.isfinite(found.factor).all()
    assert (found.diagonal > 0).all()
    places = [found.order.tolist().index(column) for column in dead]
    assert [place % 64 for place in places] in ([62, 63, 63], [63, 62, 63])


def test_a_hessian_is_not_touched() -> None:
    for hessian in (hessian_of(64), hessian_of(64).double()):
        before = hessian.clone()
        factorize(hessian, 1000, CONFIG)
        assert torch.equal(hessian, before)


def zero() -> torch.Tensor:
    return torch.zeros(64, 64)


def with_(value: float, row: int = 3, column: int = 5) -> torch.Tensor:
    hessian = hessian_of(64)
    hessian[row, column] = hessian[column, row] = value
    return hessian


def indefinite() -> torch.Tensor:
    hessian = torch.eye(64)
    hessian[0, 1] = hessian[1, 0] = 50.0
    return hessian


@pytest.mark.parametrize(
    ("hessian", "why"),
    [
        (zero(), "all zero"),
        (with_(float("nan")), "not finite"),
        (with_(float("inf")), "not finite"),
        (with_(float("inf"), 3, 3), "not finite"),
        (with_(float("nan"), 3, 3), "not finite"),
        (-torch.eye(64), "all zero"),
        (indefinite(), "not positive definite"),
        (torch.eye(64) * 1e-45, "all zero"),
        (torch.eye(64) * 1e-25, "all zero"),
        (torch.eye(64).double() * 1e300, "ill-conditioned|not finite"),
    ],
)
def test_hessians_without_a_factor(hessian: torch.Tensor, why: str) -> None:
    with pytest.raises(IllConditionedError, match=why):
        factorize(hessian, 1000, CONFIG)


def test_threads_of_torch_do_not_change_a_factor_that_a_thread_makes() -> None:
    """As in a calibration: torch is told to use one thread, and another thread does the work."""
    hessian = hessian_of(640)
    threads = torch.get_num_threads()
    found = []
    try:
        for allowed in (1, 4):
            torch.set_num_threads(allowed)
            torch.set_num_threads(1)
            with ThreadPoolExecutor(1) as pool:
                found.append(pool.submit(factorize, hessian, 1000, CONFIG).result())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0].factor, found[1].factor)
