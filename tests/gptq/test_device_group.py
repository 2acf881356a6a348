"""Work that is shared by devices: cut by its size alone, dealt out whole, computed alike."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import get_ident

import pytest
import torch
from nf4_pipeline.gptq.config import GptqConfig
from nf4_pipeline.gptq.device_group import DIVISIONS, DeviceGroup, Division
from nf4_pipeline.gptq.hessian import factorize

from tests.support.gptq_inputs import hessian_of

CPU = torch.device("cpu")
COUNTS = [1, 2, 3, 5, 8, 11]


@pytest.mark.parametrize("division", [Division(), Division(8, 512), Division(4, 1), Division(3, 7)])
@pytest.mark.parametrize("count", [1, 6, 7, 22, 511, 512, 1024, 4544, 18176, 65024])
def test_pieces_are_all_there_is(division: Division, count: int) -> None:
    pieces = division.pieces(count)
    assert pieces[0].start == 0
    assert pieces[-1].stop == count
    assert all(one.stop == other.start for one, other in pairwise(pieces))
    sizes = [piece.stop - piece.start for piece in pieces]
    assert 1 <= len(pieces) <= division.most
    assert set(sizes[:-1]) <= {sizes[0]}
    assert 0 < sizes[-1] <= sizes[0]
    if len(pieces) > 1:
        assert sizes[0] >= division.least


def test_a_cpu_does_not_cut_and_a_gpu_cuts_in_eight() -> None:
    assert DIVISIONS["cpu"].pieces(18176) == [slice(0, 18176)]
    assert len(DIVISIONS["cuda"].pieces(18176)) == len(DIVISIONS["cuda"].pieces(4544)) == 8
    assert len(DIVISIONS["cuda"].pieces(1023)) == 1


@pytest.mark.parametrize("devices", COUNTS)
@pytest.mark.parametrize("count", [1, 7, 16, 100])
def test_each_piece_is_dealt_once(devices: int, count: int) -> None:
    group = DeviceGroup([CPU] * devices, Division(8, 2))
    shares = group.shares(count)
    assert [piece for share in shares for piece in share] == group.division.pieces(count)
    sizes = [len(share) for share in shares]
    assert sizes == sorted(sizes, reverse=True)  # those without any are the last ones
    assert sizes[0] - sizes[-1] <= 1
    dealt = group.dealt(count)
    assert len(dealt) == devices
    assert sorted(number for own in dealt for number in own) == list(range(count))


@pytest.mark.parametrize(("devices", "most"), [(2, 0.53), (4, 0.32), (8, 0.32)])
def test_what_grows_is_dealt_evenly(devices: int, most: float) -> None:
    """Columns of a factor: the first take the longest, by the square of what is below them."""
    costs = [(8 - number) ** 2 for number in range(8)]
    dealt = DeviceGroup([CPU] * devices, Division(8)).dealt(8)
    assert max(sum(costs[n] for n in own) for own in dealt) / sum(costs) <= most


@pytest.mark.parametrize(
    ("devices", "busy", "counts"),
    [
        (1, 3.0, [8]),
        (2, 0.0, [4, 4]),
        (2, 3.0, [3, 5]),
        (4, 3.0, [0, 3, 3, 2]),
        (9, 1.5, [0] + [1] * 8),
    ],
)
def test_the_lead_gets_less_while_it_is_busy(devices: int, busy: float, counts: list[int]) -> None:
    dealt = DeviceGroup([CPU] * devices, Division(8)).dealt_beside(8, busy)
    assert [len(own) for own in dealt] == counts
    assert sorted(number for own in dealt for number in own) == list(range(8))


def test_each_device_has_a_thread_of_its_own_and_errors_come_back() -> None:
    with ThreadPoolExecutor(3) as pool, torch.inference_mode():
        group = DeviceGroup([CPU] * 3, Division(), pool)
        assert group.each(lambda index: index * index) == [0, 1, 4]
        assert get_ident() not in group.each(lambda index: get_ident())
        assert all(group.each(lambda index: torch.is_inference_mode_enabled()))
        with pytest.raises(ZeroDivisionError):
            group.each(lambda index: 1 // (index - 1))
    alone = DeviceGroup([CPU] * 3, Division(5)).alone(1)
    assert (len(alone), alone.division) == (1, Division(5))
    assert alone.each(lambda index: get_ident()) == [get_ident()]


@pytest.mark.parametrize("columns", [64, 100, 131, 257])
@torch.inference_mode()
def test_a_factor_is_the_same_whoever_computes_it(columns: int) -> None:
    hessian, division = hessian_of(columns), Division(8, 16)
    whole = factorize(hessian, 1000, GptqConfig())
    one = factorize(hessian, 1000, GptqConfig(), DeviceGroup([CPU], division))
    torch.testing.assert_close(one.factor, whole.factor, rtol=1e-5, atol=1e-7)
    assert torch.equal(one.factor, one.factor.triu())
    assert one.factor.is_contiguous()
    for devices in COUNTS:
        with ThreadPoolExecutor(devices) as pool:
            group = DeviceGroup([CPU] * devices, division, pool)
            found = factorize(hessian, 1000, GptqConfig(), group)
        assert torch.equal(found.factor, one.factor)
        assert torch.equal(found.order, one.order)
        assert torch.equal(found.diagonal, one.diagonal)
