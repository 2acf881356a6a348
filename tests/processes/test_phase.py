"""A stranger's program in a phase: whatever it does, one error names it, and limits go again."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from nf4_pipeline.errors import ArchitectureError, ArtifactError, PipelineError
from nf4_pipeline.processes.in_process import in_process
from nf4_pipeline.processes.parent_side import ChildFailed, Session, run

from tests.processes.example_worker import EXAMPLE, Order, Outcome

LONG = r"The deed takes longer than 0\.5 s, which no real one needs\. Do another\."
LARGE = r"The deed takes more than 0\.25 GiB of memory, which no real one needs\. Do another\."

DEADLY = {
    "spin": LONG,
    "sleep": LONG,
    "hold the interpreter": LONG,
    "after nested": LONG,
    "abort": r"The deed ended the process that ran it with SIGABRT: .*Do another\.",
    "segfault": r"The deed ended the process that ran it with SIGSEGV: .*Do another\.",
    "die": r"The deed .* with SIGKILL \(as a rule, memory ran out\)\. Do another\.",
    "exit": r"The deed ended the process that ran it without a word: no message\. Do another\.",
}
FAILING = {
    "allocate": LARGE,
    "recurse": r"The deed calls itself too deep\. Do another\.",
    "fail": r"The deed fails: no \\x1b\[31m way\. Do another\.",
    "panic": r"The deed fails: index 14\. Do another\.",
}


@pytest.fixture(scope="module")
def session() -> Iterator[Session[Order, Outcome]]:
    found = Session(EXAMPLE)
    yield found
    found.close()


@pytest.mark.parametrize("deed", DEADLY)
def test_what_ends_the_process_is_named(deed: str) -> None:
    with pytest.raises(ArchitectureError) as caught:
        run(EXAMPLE, Order("phase", deed))
    assert re.fullmatch(DEADLY[deed], str(caught.value), re.S)


def test_waiting_for_the_processor_is_no_fault(session: Session[Order, Outcome]) -> None:
    """As on a machine where others work: twice the limit by the clock."""
    assert session.ask(Order("phase", "wait")).text == "0"


def test_the_narrower_limits_count_and_the_inner_program_is_named() -> None:
    with pytest.raises(ArtifactError, match="inner deed takes longer"):
        run(EXAMPLE, Order("phase", "nested"))


@pytest.mark.parametrize("deed", FAILING)
def test_what_fails_is_named_and_the_process_goes_on(
    deed: str, session: Session[Order, Outcome]
) -> None:
    with pytest.raises(ArchitectureError, match=FAILING[deed]):
        session.ask(Order("phase", deed))
    assert session.is_usable
    # Neither time nor memory is limited any more.
    assert session.ask(Order("phase", "allocate little; 600")).text == str(600 * 2**20)


def test_errors_of_ours_pass(session: Session[Order, Outcome]) -> None:
    with pytest.raises(ArtifactError, match=r"^as it is$"):
        session.ask(Order("phase", "refuse"))


@pytest.mark.parametrize("deed", ["recurse", "fail", "panic", "refuse"])
def test_in_this_process_only_the_words_are_the_same(deed: str) -> None:
    with in_process(), pytest.raises(PipelineError, match=FAILING.get(deed, "as it is")):
        run(EXAMPLE, Order("phase", deed))


def test_an_exit_in_a_library_is_no_failure_of_the_program() -> None:
    with in_process(), pytest.raises(ChildFailed, match="SystemExit"):
        run(EXAMPLE, Order("exit", "0"))
