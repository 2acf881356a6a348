"""From a second moment to the order of columns and the factor; moments that give none."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Final

import pytest
import torch
from nf4_pipeline.gptq.config import Method
from nf4_pipeline.gptq.hessian import IllConditionedError, guide

from tests.gptq.test_quantizer import moment_of
from tests.support.compensated import prepared

METHOD: Final = Method()


@pytest.mark.parametrize("columns", [64, 256, 3, 100, 131])
@pytest.mark.parametrize("tokens", [16, 1000, 100_000])
def test_the_factor_is_that_of_the_inverse(columns: int, tokens: int) -> None:
    """Fewer tokens than columns, too: such a moment has no inverse of its own."""
    moment = moment_of(columns, min(tokens, 1000))
    found = guide(moment, tokens, METHOD)
    h = torch.from_numpy(prepared(moment.double().numpy(), tokens))
    factor = found.factor.double()
    assert found.factor.dtype == torch.float32
    assert found.factor.is_contiguous()
    assert torch.equal(factor, factor.triu())
    assert sorted(found.order.tolist()) == list(range(columns))
    product = factor.T @ factor @ h[found.order][:, found.order]
    torch.testing.assert_close(product, torch.eye(columns).double(), atol=2e-3, rtol=0)
    torch.testing.assert_close(found.importance.double(), h.diagonal(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("method", "tokens", "share"),
    [
        (Method(), 10, 0.1),
        (Method(), 128 * 20, 0.05),
        (Method(by_sample=False), 128 * 20, 0.1),
        (Method(shrink=0.3), 10, 0.3),
        (Method(shrink=0.0), 10, 0.0),
        (Method(shrink=1.0, by_sample=False), 10, 1.0),
    ],
)
def test_how_far_elements_beside_the_diagonal_shrink(
    method: Method, tokens: int, share: float
) -> None:
    moment = moment_of(128)
    found = guide(moment, tokens, method)
    inverse = torch.linalg.inv(found.factor.double().T @ found.factor.double())
    back = torch.empty_like(inverse)
    back[found.order[:, None], found.order[None, :]] = inverse
    apart = ~torch.eye(128, dtype=torch.bool)
    torch.testing.assert_close(
        back[apart], (1 - share) * moment.double()[apart], rtol=1e-2, atol=1e-4
    )


def test_columns_that_matter_come_first_and_blocks_stay_together() -> None:
    moment = torch.eye(192)
    moment[70, 70], moment[65, 65], moment[130, 130] = 9.0, 5.0, 20.0
    order = guide(moment, 1000, METHOD).order.tolist()
    rest = [j for j in range(128, 192) if j != 130]
    assert order[:64] == [130, *rest]
    assert order[64:128] == [70, 65, 64, *range(66, 70), *range(71, 128)]
    assert order[128:] == list(range(64))


@pytest.mark.parametrize("columns", [128, 100])
def test_ties_stay_in_their_order(columns: int) -> None:
    assert guide(torch.eye(columns), 1000, METHOD).order.tolist() == list(range(columns))
    moment = torch.eye(columns)
    moment[columns - 1, columns - 1] = 2.0
    order = guide(moment, 1000, METHOD).order.tolist()
    first = 64 if columns == 128 else 0
    assert order == [columns - 1, *range(first, columns - 1), *range(first)]


def test_columns_that_do_not_keep_blocks_are_ordered_one_by_one() -> None:
    moment = torch.eye(100)
    moment[70, 70], moment[3, 3] = 9.0, 5.0
    assert guide(moment, 1000, METHOD).order.tolist()[:3] == [70, 3, 0]
    plain = guide(moment, 1000, Method(by_importance=False))
    assert plain.order.tolist() == list(range(100))


def test_dead_columns_are_damped_and_come_last() -> None:
    moment = moment_of(128)
    dead = [3, 4, 100]
    moment[dead] = 0.0
    moment[:, dead] = 0.0
    found = guide(moment, 1000, METHOD)
    assert torch.isfinite(found.factor).all()
    assert (found.importance > 0).all()
    places = [found.order.tolist().index(column) for column in dead]
    assert [place % 64 for place in places] in ([62, 63, 63], [63, 62, 63])


def test_a_moment_is_not_touched() -> None:
    for moment in (moment_of(64), moment_of(64).double()):
        before = moment.clone()
        guide(moment, 1000, METHOD)
        assert torch.equal(moment, before)


def zero() -> torch.Tensor:
    return torch.zeros(64, 64)


def with_(value: float, row: int = 3, column: int = 5) -> torch.Tensor:
    moment = moment_of(64)
    moment[row, column] = moment[column, row] = value
    return moment


def indefinite() -> torch.Tensor:
    moment = torch.eye(64)
    moment[0, 1] = moment[1, 0] = 50.0
    return moment


@pytest.mark.parametrize(
    ("moment", "why"),
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
def test_moments_that_guide_nothing(moment: torch.Tensor, why: str) -> None:
    with pytest.raises(IllConditionedError, match=why):
        guide(moment, 1000, METHOD)


def test_threads_of_torch_do_not_change_a_guide_that_a_thread_makes() -> None:
    """As in a calibration: torch is told to use one thread, and another thread does the work."""
    moment = moment_of(640)
    threads = torch.get_num_threads()
    found = []
    try:
        for allowed in (1, 4):
            torch.set_num_threads(allowed)
            torch.set_num_threads(1)
            with ThreadPoolExecutor(1) as pool:
                found.append(pool.submit(guide, moment, 1000, METHOD).result())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0].factor, found[1].factor)
