"""The architecture of a checkpoint, from a process of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
from nf4_pipeline.errors import ArchitectureError
from nf4_pipeline.model.probe import WORKER, Probe
from nf4_pipeline.processes.in_process import in_process
from nf4_pipeline.processes.messages import Limits
from nf4_pipeline.processes.worker import Environment

from tests.support.hub_client import PYTHONPATH
from tests.support.tiny import copy_of, edit_json

FROM_TESTS: Final = Environment(add={"PYTHONPATH": PYTHONPATH})


def test_a_process_of_its_own_and_this_one_say_the_same(tiny_falcon: Path) -> None:
    probe = Probe(tiny_falcon)
    with in_process():
        here = Probe(tiny_falcon).wait()
    there = probe.wait()
    assert there == here
    assert here.architecture.class_name == "FalconForCausalLM"
    assert {fact.class_name for fact in here.architecture.linears.values()} == {
        "FalconLinear",
        "Linear",
    }


def test_what_is_no_causal_lm(tiny_falcon: Path, tmp_path: Path) -> None:
    model = copy_of(tiny_falcon, tmp_path / "model")
    edit_json(model / "config.json", model_type="nothing")
    with in_process(), pytest.raises(ArchitectureError, match="has model_type 'nothing', which"):
        Probe(model).wait()


def test_a_config_that_takes_all_processors_is_ended(tmp_path: Path) -> None:
    """What passes for plausible and still never ends: the child has a limit of its own."""
    worker = replace(
        WORKER,
        module="tests.support.endless_worker",
        limits=Limits(processor_seconds=1),
        environment=FROM_TESTS,
    )
    with pytest.raises(ArchitectureError) as caught:
        Probe(tmp_path / "model", worker=worker).wait()
    assert str(caught.value) == (
        f"Building the model of {tmp_path / 'model'} without weights took more than 1 s of "
        "processor time, which no real config.json needs."
    )


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    worker = replace(WORKER, module="tests.support.nothing", environment=FROM_TESTS)
    with pytest.raises(
        ArchitectureError, match=r"ended with status 1: ModuleNotFoundError: No module named 'tests"
    ):
        Probe(tmp_path, worker=worker).wait()
