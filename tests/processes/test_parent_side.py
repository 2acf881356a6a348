"""Workers in real processes: replies, progress, errors, limits, and the death of either side."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from nf4_pipeline.documents import Document
from nf4_pipeline.errors import ArchitectureError
from nf4_pipeline.processes.in_process import in_process
from nf4_pipeline.processes.messages import Limits
from nf4_pipeline.processes.parent_side import ChildFailed, run, start
from nf4_pipeline.processes.worker import Environment, Worker
from nf4_pipeline.progress import LOADING, SilentReporter, Task

from tests.processes.example_worker import EXAMPLE, PATHS, Order, Outcome


@pytest.fixture(params=["child", "here"])
def wherever(request: pytest.FixtureRequest) -> Iterator[None]:
    """Once in a process of its own, once in this one."""
    if request.param == "here":
        with in_process():
            yield
    else:
        yield


class Recorder(SilentReporter):
    """A reporter that writes down what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def task(self, title: str, total: int | None, *, unit: str = "bytes") -> Iterator[Task]:
        recorder = self

        class Recorded:
            def advance(self, amount: int) -> None:
                recorder.lines.append(f"{title} + {amount}")

        self.lines.append(f"{title}: {total} {unit}")
        yield Recorded()
        self.lines.append(f"{title} ends")

    def note(self, text: str) -> None:
        self.lines.append(text)

    def detail(self, text: str) -> None:
        self.lines.append(f"detail: {text}")


def ask(deed: str, text: str = "", worker: Worker[Order, Outcome] = EXAMPLE) -> Outcome:
    return run(worker, Order(deed, text))


def is_running(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """A variable that only the workers of this test inherit: other tests run beside it."""
    value = uuid.uuid4().hex
    monkeypatch.setenv("NF4_TEST_MARK", value)
    return f"NF4_TEST_MARK={value}"


def pids_of_workers(mark: str) -> set[int]:
    """Those processes that run the example worker and were started by the test of the mark."""
    marked = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (
                (process / name).read_bytes().split(b"\0") for name in ("cmdline", "environ")
            )
        except OSError:
            continue  # it ended, or is another user's
        if b"tests.processes.example_worker" in command and mark.encode() in environment:
            marked.add(int(process.name))
    return {pid for pid in marked if is_running(pid)}


def eventually(condition: object, seconds: float = 20.0) -> bool:
    """Whether a callable gives something true within some seconds."""
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.usefixtures("wherever")
def test_progress_and_reply() -> None:
    recorder = Recorder()
    text = "ein Wort, \ud800 and 70 kB " + "x" * 70_000  # more than a pipe holds
    assert run(EXAMPLE, Order("progress", text), recorder).text == text
    assert [line for line in recorder.lines if not line.startswith(LOADING)] == [
        "begun",
        "detail: why",
        "outer: 3 steps",
        "inner: 7 bytes",
        "outer + 1",
        "inner + 7",
        "outer + 2",
        "inner ends",
        "outer ends",
    ]


@pytest.mark.usefixtures("wherever")
def test_an_error_of_ours_keeps_its_class_and_text() -> None:
    with pytest.raises(ArchitectureError, match=r"^no head\nand no tail$"):
        ask("refuse", "no head\nand no tail")


@pytest.mark.usefixtures("wherever")
def test_any_other_exception_comes_whole() -> None:
    with pytest.raises(ChildFailed) as caught:
        ask("panic", "for slice of length 4")
    assert caught.value.status == 1
    assert caught.value.cause.startswith(
        "tests.processes.example_worker.PanicException: "
        "range end index 8 out of range: for slice of length 4 (at processes/example_worker.py:"
    )
    assert "in _panic, called at processes/example_worker.py:" in caught.value.cause
    assert "\n" not in caught.value.cause


@pytest.mark.usefixtures("wherever")
def test_an_exit_in_a_library_is_no_reply() -> None:
    with pytest.raises(ChildFailed, match=r"SystemExit: 0 \(at .*in _exit"):
        ask("exit", "0")


def test_this_process_and_another_one() -> None:
    assert ask("print").pid != os.getpid()
    with in_process():
        assert ask("progress").pid == os.getpid()
    assert ask("print").pid != os.getpid()


def test_what_libraries_print_harms_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert ask("print", '{"reply": {}}').text == '{"reply": {}}'
    assert capfd.readouterr() == ("", "")


def test_a_child_that_is_killed_says_by_what_and_its_last_words() -> None:
    with pytest.raises(ChildFailed) as caught:
        ask("die", str(int(signal.SIGKILL)))
    assert caught.value.status == -signal.SIGKILL
    assert caught.value.cause.startswith("it was killed (first words / last words); as a rule, ")
    assert "memory ran out. End other programs" in caught.value.cause


def test_a_module_that_cannot_be_imported() -> None:
    with pytest.raises(ChildFailed, match=r"ModuleNotFoundError: No module named 'tests\.nothing'"):
        ask("print", worker=replace(EXAMPLE, module="tests.nothing"))


def test_a_reply_of_another_kind() -> None:
    @dataclass(frozen=True)
    class Other(Document):
        number: int

    other: Worker[Order, Other] = Worker(EXAMPLE.module, Other, environment=EXAMPLE.environment)
    with pytest.raises(ChildFailed, match="malformed: number: expected an integer, got nothing"):
        run(other, Order("print"))


def test_processor_time_is_limited_in_the_child_alone() -> None:
    limited = replace(EXAMPLE, limits=Limits(processor_seconds=1))
    assert ask("limits", worker=limited).text == "1"
    with pytest.raises(ChildFailed) as caught:
        ask("spin", worker=limited)
    assert caught.value.status == -signal.SIGXCPU
    assert resource.getrlimit(resource.RLIMIT_CPU)[0] == resource.RLIM_INFINITY


def test_memory_is_limited() -> None:
    limited = replace(EXAMPLE, limits=Limits(data_bytes=256 * 2**20))
    assert ask("allocate", "1000000", limited).text == "1000000"
    with pytest.raises(ChildFailed, match=r"MemoryError \(at .*in _allocate"):
        ask("allocate", str(2**30), limited)


def test_time_is_limited() -> None:
    with pytest.raises(ChildFailed) as caught:
        ask("sleep", worker=replace(EXAMPLE, limits=Limits(seconds=1.0)))
    assert (caught.value.timed_out, caught.value.status) == (True, -signal.SIGKILL)


def test_no_secret_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = (
        "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN", "WANDB_API_KEY", "OPENAI_APIKEY", "db_password", "GH_PAT", "NETRC",
        "MYSQL_PWD", "DB_PASS", "PGPASSFILE", "NPM_AUTH", "SSH_AUTH_SOCK", "OPENAI_KEY", "GPG_KEYS",
        "GOOGLE_APPLICATION_CREDENTIALS", "AZURE_STORAGE_CONNECTION_STRING", "SENTRY_DSN",
        "SESSION_COOKIE", "HF_TOKEN_PATH", "TWINE_PASSWORD", "CI_JOB_JWT", "aws_creds",
    )  # fmt: skip
    for name in secrets:
        monkeypatch.setenv(name, "hf_secret")
    values = (
        "https://me:hf_secret@proxy:80", "hf_secretabcdefghijklmn", "ghp_abcdefghijklmnophf_secret",
        "Bearer sk-abcdefghijklmnopqrst_hf_secret", "-----BEGIN PRIVATE KEY-----hf_secret",
    )  # fmt: skip
    for number, value in enumerate(values):
        monkeypatch.setenv(f"ODD_{number}", value)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    text = ask("environment").text
    assert "hf_secret" not in text
    assert "TOKENIZERS_PARALLELISM=true" in text
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in text
    assert f"PATH={os.environ['PATH']}" in text
    assert "HF_HUB_OFFLINE=1" in text

    few = Environment(keep=frozenset({"PATH"}), add=PATHS | {"CUDA_VISIBLE_DEVICES": ""})
    text = ask("environment", worker=replace(EXAMPLE, environment=few)).text
    assert "CUDA_VISIBLE_DEVICES=\n" in text
    assert "CUDA_DEVICE_ORDER" not in text


def test_the_request_is_not_in_the_arguments() -> None:
    text = ask("arguments", "between you and me").text
    assert "tests.processes.example_worker" in text
    assert "between you and me" not in text


def test_what_it_leaves_in_its_temporary_folder_goes() -> None:
    left = Path(ask("temporary").text)
    assert left.parent.name.startswith("nf4-")
    assert not left.parent.exists()


def test_an_interrupt_is_for_the_parent_to_decide() -> None:
    assert ask("interrupt").text == "still here"


def test_leaving_the_with_ends_it(mark: str) -> None:
    with start(EXAMPLE, Order("sleep")):
        assert eventually(lambda: pids_of_workers(mark))
    assert not pids_of_workers(mark)


def test_a_task_that_is_open_when_the_child_dies_is_closed() -> None:
    recorder = Recorder()
    with pytest.raises(ChildFailed):
        run(replace(EXAMPLE, limits=Limits(seconds=1.5)), Order("sleep"), recorder)
    assert recorder.lines == [
        f"{LOADING}: None ",
        f"{LOADING} ends",
        "sleep: 1 bytes",
        "sleep ends",
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_child_does_not_outlive_its_parent(number: signal.Signals, mark: str) -> None:
    program = textwrap.dedent(
        """
        from nf4_pipeline.processes.parent_side import run
        from tests.processes.example_worker import EXAMPLE, Order

        class Reporter:
            def task(self, title, total, *, unit="bytes"):
                from nf4_pipeline.progress import SILENT
                if title == "sleep":
                    print("at work", flush=True)
                return SILENT.task(title, total)

        run(EXAMPLE, Order("sleep"), Reporter())
        """
    )
    environment = {**os.environ, **PATHS}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE
    ) as parent:
        try:
            assert parent.stdout is not None
            assert parent.stdout.readline() == b"at work\n"
            assert len(pids_of_workers(mark)) == 1
            parent.send_signal(number)
            assert parent.wait(120) == -number
        finally:
            parent.kill()
    assert eventually(lambda: not pids_of_workers(mark))


def test_a_child_whose_parent_died_before_it_could_ask() -> None:
    """An orphan gets no envelope, or one of a parent that is not its own."""
    command = [sys.executable, "-P", "-m", "nf4_pipeline.processes.child_side", EXAMPLE.module]
    orphan = b'{"parent": 1, "limits": {}, "request": {"deed": "sleep"}}'
    for sent in (b"", orphan):
        done = subprocess.run(
            command, input=sent, env={**os.environ, **PATHS}, capture_output=True, check=False
        )
        assert (done.returncode, done.stdout) == (1, b"")
