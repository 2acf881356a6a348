"""A stand-in for a Ray cluster, in this process, which keeps Ray's promises and no others."""

from __future__ import annotations

import importlib.util
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from nf4_pipeline.cluster.ray_tasks import Claim
from nf4_pipeline.stages import quantize_on_ray, verify
from nf4_pipeline.stages.quantize_on_ray import Order

NOWHERE = Path("/nowhere")


def everything(order: Order) -> Order:
    """What a machine sees that has the same files as this one."""
    return order


def without_ray(patch: pytest.MonkeyPatch) -> None:
    """Ray is not installed."""
    found = importlib.util.find_spec
    patch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "ray" else found(name, *rest),
    )


@dataclass
class StandIn:
    """Two processors of another machine: calls come there as bytes, in any order, some twice.

    Ray's own pickle gives a method of a class back as another one, so no parser there is the one
    that was sent.

    Attributes:
        seen_there: what that machine sees of an order: not everything need be there.
        claims: of the runs so far.
    """

    seen_there: Callable[[Order], Order] = everything
    cpus: int = 2
    gpus: int = 0
    largest: Claim = field(default_factory=lambda: Claim(2))
    claims: list[Claim] = field(default_factory=list)

    def run(
        self,
        call: Callable[[Any], Any],
        items: Sequence[Any],
        claim: Claim,
        check: Callable[[], None] = lambda: None,
        ended: Callable[[Any], None] = lambda item: None,
    ) -> list[Any]:
        self.claims.append(claim)
        sent = [pickle.dumps((call, item)) for item in items]
        numbers = [*range(len(sent)), *random.Random(0).choices(range(len(sent)), k=3)]
        results: dict[int, Any] = {}
        for number in random.Random(1).sample(numbers, len(numbers)):
            there, item = pickle.loads(sent[number])
            if isinstance(item, Order):
                item = self.seen_there(_sent(item))
            elif isinstance(there, partial) and isinstance(there.args[0], Order):
                there = partial(there.func, self.seen_there(_sent(there.args[0])))
            results[number] = pickle.loads(pickle.dumps(there(item)))
            ended(item)
            check()
        return [results[number] for number in range(len(sent))]


def _sent(order: Order) -> Order:
    if order.sent is None:
        return order
    record = order.sent.record
    kind = replace(record.kind, parse=partial(record.kind.parse))
    return replace(order, sent=replace(order.sent, record=replace(record, kind=kind)))


def without_folder(order: Order) -> Order:
    """What a machine sees that has not the build folder, but the source."""
    return replace(order, root=NOWHERE / order.root.name)


def without_files(order: Order) -> Order:
    """What a machine sees that has neither the build folder nor the source."""
    assert order.sent is not None
    places = {name: NOWHERE / place.name for name, place in order.sent.places.items()}
    return replace(without_folder(order), sent=replace(order.sent, places=places))


@contextmanager
def standing_in(seen_there: Callable[[Order], Order] = everything) -> Iterator[StandIn]:
    """Gives `--engine ray` such a cluster while the body runs."""
    cluster = StandIn(seen_there)

    @contextmanager
    def connected(address: str | None) -> Iterator[StandIn]:
        yield cluster

    with (
        mock.patch.object(quantize_on_ray, "connected", connected),
        mock.patch.object(verify, "connected", connected),
        mock.patch("nf4_pipeline.job.check_installed"),
    ):
        yield cluster
