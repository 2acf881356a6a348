"""Files of the source cut inside: any order of tensors, any room, any kill, any wrong byte.

The Hub is a function that reads the source's files: with a real one, `test_streamed_source.py`.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nf4_pipeline import hub as hub_package
from nf4_pipeline import selection
from nf4_pipeline.build_folder import Build
from nf4_pipeline.build_folder.sent import forget_sent, note_sent
from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.checkpoint.layout import StoredTensor, plan_layout
from nf4_pipeline.checkpoint.safetensors_header import read_header
from nf4_pipeline.checkpoint.writer import writing
from nf4_pipeline.errors import CheckpointError, HubError
from nf4_pipeline.hub import LocalFile, Target
from nf4_pipeline.job import run_stage
from nf4_pipeline.progress import SILENT, Reporter
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.records import DOWNLOAD, QUANTIZE, SERIALIZE
from nf4_pipeline.stages import outgoing, remade, streamed_source
from nf4_pipeline.stages.outgoing import STAYS_HERE, Outgoing
from nf4_pipeline.stages.quantize import FACTS_SUFFIX, Quantize
from nf4_pipeline.stages.streamed_bytes import StreamedBytes
from nf4_pipeline.stages.streamed_source import StreamedSource
from nf4_pipeline.stages.upload_ahead import UploadAhead
from nf4_pipeline.streaming import passing, stretches

from tests.support.jobs import CPU, download
from tests.support.tiny import INDEX, write_falcon
from tests.support.told import Told

pytestmark = pytest.mark.usefixtures("workers_here")

ROOM = 60_000
Hub = Callable[[str, int, int], bytes]


class Killed(BaseException):
    """Whatever ends a process in the middle."""


@dataclass
class Case:
    """A checkpoint, what an ordinary build makes of it, and a build that streams it."""

    model: Path
    ordinary: dict[str, FileDigest]
    build: Build
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    told: Told = field(default_factory=Told)

    def right(self, file: str, start: int, end: int) -> bytes:
        self.asked.append((file, start, end))
        with (self.model / file).open("rb") as source:
            source.seek(start)
            return source.read(end - start)

    def fetched(self, since: int = 0) -> int:
        """Bytes that were asked for."""
        return sum(end - start for _, start, end in self.asked[since:])

    def promised(self) -> StreamedBytes:
        """What headers say of them, if tied tensors are as config.json has them, or known."""
        record = self.build.record(QUANTIZE)
        planner = Quantize(self.build, Recipe(), CPU).planner()
        plan = planner.plan(untied=frozenset(record.facts.untied if record else ()))
        sizes = {path.name: path.stat().st_size for path in self.model.glob("*.safetensors")}
        return StreamedBytes(planner.checkpoint, sizes, plan)


@dataclass
class Room:
    """A Hub that takes each file at once, and what lay here at most until then."""

    build: Build
    room: int | None = None
    lying: int = 0
    peak: int = 0
    sent: list[str] = field(default_factory=list)

    def begin(self, sizes: Collection[int], missing: Collection[int]) -> int:
        return sum(missing)

    def restart(self) -> None:
        pass

    def fitting(self, sizes: Sequence[int]) -> int:
        return len(sizes) if self.room is None else outgoing.fitting(sizes, self.room)

    def reserve(self, nbytes: int) -> None:
        self.lying += nbytes
        self.peak = max(self.peak, self.lying)

    def release(self, nbytes: int) -> None:
        self.lying -= nbytes

    def add(self, path: Path, digest: FileDigest) -> None:
        if self.room is not None:
            self.sent.append(digest.sha256)
            note_sent(self.build.root, "https://hub/me/out", digest)
            path.unlink()
            self.lying -= digest.size

    def settle(self) -> None:
        if self.room is not None:
            assert self.lying == 0


def write_gpt2(folder: Path) -> Path:
    """Its matrices lie transposed, so that columns of all of one are read for a row."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=90, n_embd=64, n_layer=2, n_head=2, n_positions=32)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def shuffled(folder: Path, seed: int, shards: int) -> Path:
    """The same tensors in any order, in any files."""
    dice = random.Random(seed)
    content: dict[str, tuple[StoredTensor, bytes]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        whole = path.read_bytes()
        for one in read_header(path):
            data = whole[one.offset : one.offset + one.nbytes]
            content[one.name] = StoredTensor(one.name, one.dtype, one.shape, one.nbytes), data
        path.unlink()
    names = list(content)
    dice.shuffle(names)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]
        with writing(folder / file, plan_layout(content[name][0] for name in part)) as output:
            for name in part:
                output.write(name, 0, np.frombuffer(content[name][1], np.uint8))
            output.finish()
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def streamed_build(model: Path, folder: Path) -> Build:
    """A build whose `download` left what it leaves of a model that stays on the Hub."""
    build, record, _ = download(model, folder)
    weights = {n: d for n, d in record.outputs.items() if n.endswith(".safetensors")}
    for name in weights:
        path = build.root / name
        header = path.read_bytes()[: read_header(path)[0].offset]
        kept = build.root / streamed_source.header_path(path.name)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(header)
        path.unlink()
    streamed = {Path(name).name: digest for name, digest in weights.items()}
    build.write_record(
        replace(
            record,
            outputs={n: d for n, d in record.outputs.items() if n not in weights},
            stamps={n: s for n, s in record.stamps.items() if n not in weights},
            facts=replace(record.facts, streamed=streamed, commit="1" * 40, repo="me/tiny"),
        )
    )
    return build


@pytest.fixture(scope="module", params=["shuffled", "untied", "gpt2"])
def prepared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, FileDigest], Path]:
    """Models whose files are several outputs each, small stretches, and a window of a few."""
    folder = tmp_path_factory.mktemp(request.param)
    model = folder / "model"
    if request.param == "gpt2":
        shuffled(write_gpt2(model), 3, 2)
    else:
        write_falcon(model, layers=3, shards=1)
    if request.param in ("shuffled", "untied"):
        shuffled(model, 1, 2)
    if request.param == "untied":
        path = next(p for p in model.glob("*.safetensors") if b"lm_head.weight" in p.read_bytes())
        place = next(one for one in read_header(path) if one.name == "lm_head.weight")
        whole = bytearray(path.read_bytes())
        whole[place.offset] ^= 1
        path.write_bytes(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "LARGEST_FILE", 30_000)
        build, *_ = download(model, folder / "ordinary")
        run_stage(build, "quantize", Recipe(), CPU, SILENT)
        streamed = streamed_build(model, folder / "streamed")
    return model, build.need(QUANTIZE).outputs, streamed.root


@pytest.fixture
def case(
    prepared: tuple[Path, dict[str, FileDigest], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Case:
    model, ordinary, root = prepared
    monkeypatch.setattr(selection, "LARGEST_FILE", 30_000)
    monkeypatch.setattr(stretches, "LARGEST", 5000)
    monkeypatch.setattr(passing, "LARGEST", 5000)
    monkeypatch.setattr(passing, "AHEAD", 15_000)
    shutil.copytree(root, tmp_path / "build", symlinks=True)
    return Case(model, ordinary, Build(tmp_path / "build"))


def quantize(case: Case, hub: Hub, monkeypatch: pytest.MonkeyPatch, room: Outgoing) -> None:
    """The stage, from a Hub, to another; whatever comes again, no task passes its total."""

    def read_range(model: Any, file: Any, start: int, end: int, *_: Any) -> bytes:
        return hub(file.path, start, end)

    monkeypatch.setattr(streamed_source, "read_range", read_range)
    with case.build.locked():
        Quantize(case.build, Recipe(), CPU, case.told, room).run()


def check(case: Case, room: Room) -> None:
    assert case.build.need(QUANTIZE).outputs == case.ordinary
    left = {path.name for path in case.build.quantized.glob("*.safetensors")}
    assert left == (set() if room.room else {Path(name).name for name in case.ordinary})
    if room.room:
        assert room.peak <= room.room


@pytest.mark.parametrize("limited", [False, True], ids=["stays", "goes"])
@pytest.mark.parametrize("prepared", ["shuffled", "untied", "one file", "gpt2"], indirect=True)
def test_the_same_bytes(limited: bool, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where all of a file fits, no byte of it comes twice."""
    room = Room(case.build, ROOM if limited else None)
    quantize(case, case.right, monkeypatch, room)
    check(case, room)
    untied = case.build.need(QUANTIZE).facts.untied
    if not limited and not untied:
        assert len(case.asked) == len(set(case.asked))
    if limited and not untied:
        assert len(room.sent) == len(set(room.sent))
    if limited and len(case.ordinary) > 5:  # then some find no room before the hash
        assert len(case.asked) > len(set(case.asked))
    shown = sum(task.total or 0 for task in case.told.of("stream source"))
    assert shown == case.fetched()
    if not untied:  # which nobody knows before
        assert case.fetched() == case.promised().to_quantize(room.room)
        assert case.promised().to_quantize(of_tasks=True) >= case.fetched()


def test_killed_at_any_moment(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times; what was sent is not sent again, and what has passed by does not again."""
    dice = random.Random(0)
    sent: list[str] = []
    room = Room(case.build, ROOM, sent=sent)
    for _ in range(10):
        after = len(case.asked) + dice.randrange(40)
        passed = {p.name for p in (case.build.root / "streamed" / "passed").glob("*")}

        def dying(file: str, start: int, end: int, after: int = after) -> bytes:
            if len(case.asked) >= after:
                raise Killed
            return case.right(file, start, end)

        before = len(case.asked)
        room = Room(case.build, ROOM, sent=sent)
        try:
            quantize(case, dying, monkeypatch, room)
            break
        except Killed:
            pass
        begun = {file for file, start, _ in case.asked[before:] if start == 0}
        assert not {f"{file}.json" for file in begun} & passed
    else:
        room = Room(case.build, ROOM, sent=sent)
        quantize(case, case.right, monkeypatch, room)
    check(case, room)
    if not case.build.need(QUANTIZE).facts.untied:
        assert len(sent) == len(set(sent))


@dataclass
class SlowHub:
    """Takes its time for each file, and hashes it at the end of that."""

    sent: list[str] = field(default_factory=list)

    def __call__(
        self, files: Mapping[str, LocalFile], target: Target, reporter: Reporter
    ) -> list[str]:
        for file in files.values():
            time.sleep(0.05)
            assert isinstance(file.content, Path)
            assert FileDigest.of(file.content.read_bytes()).sha256 == file.sha256
            self.sent.append(file.sha256)
        return []


def quantize_ahead(
    case: Case, monkeypatch: pytest.MonkeyPatch, largest: int, room: int, goes: bool = True
) -> tuple[UploadAhead, list[str]]:
    """The stage, from a Hub to another that is slow; what sent, and the hashes that it sent."""
    slow = SlowHub()
    monkeypatch.setattr(outgoing, "LARGEST_FILE", room)
    monkeypatch.setattr(hub_package, "send_ahead", slow)
    monkeypatch.setattr(hub_package, "repo_url", lambda repo: f"https://hub/{repo}")
    ahead = UploadAhead(Target("me/out"), largest, SILENT)
    ahead.follow(case.build, makes_room=goes)
    pool = ThreadPoolExecutor(1)
    try:
        pool.submit(quantize, case, case.right, monkeypatch, ahead).result(60)
    finally:
        pool.shutdown(wait=False)
    ahead.drain()
    return ahead, slow.sent


@pytest.mark.parametrize("goes", [True, False], ids=["goes", "stays"])
@pytest.mark.parametrize(
    "finished", [slice(None), slice(1), slice(1, None), slice(-1, None)], ids=str
)
@pytest.mark.parametrize("prepared", ["shuffled"], indirect=True)
def test_files_of_an_earlier_run_decide_nothing(
    goes: bool, finished: slice, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever stand there, the largest or all: files go, or stay, as in a run from the start."""
    quantize(case, case.right, monkeypatch, STAYS_HERE)
    case.build.forget(QUANTIZE)
    by_size = sorted(case.ordinary, key=lambda name: case.ordinary[name].size, reverse=True)
    for name in set(by_size) - set(by_size[finished]):
        (case.build.root / name).unlink()
        (case.build.root / (name + FACTS_SUFFIX)).unlink()
    largest = case.ordinary[by_size[0]].size
    ahead, sent = quantize_ahead(case, monkeypatch, largest if goes else largest - 1, 30_000)
    assert case.build.need(QUANTIZE).outputs == case.ordinary
    left = {path.name for path in case.build.quantized.glob("*.safetensors")}
    assert left == (set() if goes else {Path(name).name for name in case.ordinary})
    below = {digest.sha256 for digest in case.ordinary.values() if digest.size < largest}
    assert {*sent} == ({d.sha256 for d in case.ordinary.values()} if goes else below)
    assert len(sent) == len({*sent})
    ahead.__exit__(None, None, None)


@pytest.mark.parametrize("goes", [True, False], ids=["goes", "stays"])
@pytest.mark.parametrize("prepared", ["untied"], indirect=True)
def test_a_second_plan_while_files_of_the_first_are_sent(
    goes: bool, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is taken away, or made anew, under the hands of what sends it; the new one is sent."""
    ahead, sent = quantize_ahead(case, monkeypatch, 10**9, 10**9, goes)
    assert case.build.need(QUANTIZE).facts.untied
    assert case.build.need(QUANTIZE).outputs == case.ordinary
    assert {digest.sha256 for digest in case.ordinary.values()} <= {*sent}
    left = {path.name for path in case.build.quantized.glob("*.safetensors")}
    assert left == (set() if goes else {Path(name).name for name in case.ordinary})
    ahead.__exit__(None, None, None)


@pytest.mark.parametrize("lasting", [False, True])
def test_a_wrong_byte_anywhere(lasting: bool, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """It never counts: the file comes again, or is refused, and nothing made of it is left."""
    dice = random.Random(str(case.model))
    bad = max(case.model.glob("*.safetensors")).name
    place = dice.randrange(read_header(case.model / bad)[0].offset, 40_000)
    wrong = [0]

    def hub(file: str, start: int, end: int) -> bytes:
        data = bytearray(case.right(file, start, end))
        if file == bad and start <= place < end and (lasting or not wrong[0]):
            data[place - start] ^= 0x7F  # may be a NaN, of which nothing may be said
            wrong[0] += 1
        return bytes(data)

    room = Room(case.build, ROOM)
    if lasting:
        with pytest.raises(HubError, match=rf"{bad} of me/tiny@1+ came wrong twice"):
            quantize(case, hub, monkeypatch, room)
        assert wrong[0] == 2
        assert case.build.record(QUANTIZE) is None
        assert not (case.build.root / "streamed" / "passed" / f"{bad}.json").exists()
        assert not list(case.build.quantized.glob("*.safetensors"))
        room = Room(case.build, ROOM)
        quantize(case, case.right, monkeypatch, room)
    else:
        quantize(case, hub, monkeypatch, room)
        assert wrong[0] == 1
    check(case, room)


def test_other_bytes_when_it_comes_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub that lost a file, so that it is made again, and a mirror that changed meanwhile."""
    room = Room(case.build, ROOM)
    quantize(case, case.right, monkeypatch, room)
    name, digest = sorted(case.ordinary.items())[1]
    forget_sent(case.build.root, [digest.sha256])
    before = len(case.asked)
    with pytest.raises(HubError, match="came wrong twice"):
        quantize(case, lambda *asked: bytes(len(case.right(*asked))), monkeypatch, room)
    assert not (case.build.root / name).exists()
    again = len(case.asked)
    room = Room(case.build, ROOM)
    quantize(case, case.right, monkeypatch, room)
    check(case, room)
    assert room.sent == [digest.sha256]
    size = sum(path.stat().st_size for path in case.model.glob("*.safetensors"))
    assert sum(end - start for _, start, end in case.asked[again:]) < size
    assert all(start > 0 for _, start, _ in case.asked[before:])


def test_verify_reads_what_was_made_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory, by the names of the export; the folder itself stays as it is."""
    quantize(case, case.right, monkeypatch, Room(case.build, ROOM))
    run_stage(case.build, "serialize", Recipe(), CPU, SILENT)
    assert not list(case.build.export.glob("model-*.safetensors"))
    before = len(case.asked)
    with remade.whole_export(case.build, Recipe(), CPU, case.told) as (folder, made):
        assert made == len(case.ordinary)
        assert case.fetched(before) == case.promised().to_make_again()
        found = case.build.need(SERIALIZE).outputs_in("export")
        for name, digest in found.items():
            assert FileDigest.of((folder / name).read_bytes()) == digest
        assert str(folder).startswith("/dev/shm/")
    assert not folder.exists()
    forget_sent(case.build.root)
    assert case.build.state(SERIALIZE, case.build.need(SERIALIZE).key).status == "stale"


def test_what_was_forgotten_passes_by_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that verify can be served; each byte of it once, though it is shown twice."""
    quantize(case, case.right, monkeypatch, STAYS_HERE)
    known = sorted((case.build.root / "streamed" / "passed").iterdir())
    known[0].unlink()
    streamed = StreamedSource.of(case.build, told := Told())
    assert streamed is not None
    with streamed.served():
        pass
    size = (case.model / known[0].stem).stat().st_size
    assert [(task.title, task.total) for task in told.tasks] == [
        ("hash source", size),
        ("stream source", size),
    ]


def test_a_source_that_cannot_be_quantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own NaN is named, when it is known that the file is the Hub's; nothing is left."""
    model = write_falcon(tmp_path / "model", shards=1)
    path = next(model.glob("*.safetensors"))
    place = next(t for t in read_header(path) if t.name.endswith("dense.weight"))
    whole = bytearray(path.read_bytes())
    whole[place.offset : place.offset + 2] = b"\xff\x7f"
    path.write_bytes(whole)
    case = Case(model, {}, streamed_build(model, tmp_path / "streamed"))
    for _ in range(2):  # the second time, its stretches are known
        with pytest.raises(CheckpointError, match="holds an infinity or a NaN"):
            quantize(case, case.right, monkeypatch, Room(case.build, ROOM))
        assert not list(case.build.quantized.glob("*.facts.json"))
    assert len({asked for asked in case.asked if asked[1] == 0}) == 1
    assert (case.build.root / "streamed" / "passed" / f"{path.name}.json").exists()
    assert case.build.need(DOWNLOAD).facts.streamed


@pytest.mark.parametrize(
    ("sizes", "room"),
    [
        ([3, 5], 8),
        ([10**9] * 9, 2 * 10**9),
        ([5 * 10**9, 10**9], 5 * 10**9),
        ([10**9, 7 * 10**8], 17 * 10**8),
        ([10**9], 10**9),
    ],
)
def test_how_much_lies_there_at_a_time(sizes: list[int], room: int) -> None:
    assert outgoing.room_for(sizes) == room
    assert outgoing.fitting(sizes, room) >= 1


def test_no_files_take_no_room() -> None:
    assert outgoing.room_for([]) == 0
