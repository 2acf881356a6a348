"""Codes that learn: that they do, never for the worse, and the same after any interruption."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import pytest
import torch
from nf4_pipeline.blocks.block_row import BlockRow, NotInARowError
from nf4_pipeline.blocks.find_blocks import find_blocks
from nf4_pipeline.blocks.streamed_model import StreamedModel
from nf4_pipeline.build_folder import Build
from nf4_pipeline.calibration import host_memory, learning_plan
from nf4_pipeline.calibration import learning as learning_module
from nf4_pipeline.calibration.block_store import BlockStore
from nf4_pipeline.calibration.held_models import HeldModels
from nf4_pipeline.calibration.host_memory import HostMemory
from nf4_pipeline.calibration.latents import LearnedWeight, Tables
from nf4_pipeline.calibration.learner import learning_rate, order_of
from nf4_pipeline.calibration.learning import Learning, check_blocks
from nf4_pipeline.calibration.learning_loss import Computed, Gradients
from nf4_pipeline.calibration.learning_state import Progress, read_state, write_state
from nf4_pipeline.calibration.models_by_block import ModelsByBlock
from nf4_pipeline.errors import ArtifactError, RecipeError, ResourceError
from nf4_pipeline.gptq.saved_codes import read_codes
from nf4_pipeline.manifest.manifest import LearningSummary
from nf4_pipeline.manifest.read import read_manifest
from nf4_pipeline.nf4.dequantize import dequantize
from nf4_pipeline.nf4.packing import pack, unpack
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.records import QUANTIZE
from nf4_pipeline.report.calibration import describe_tokens
from nf4_pipeline.reproduce.reproduce import reproduce
from nf4_pipeline.runtime.loader import load
from nf4_pipeline.stages.quantize import Quantize
from nf4_pipeline.stages.verify import Verify
from nf4_pipeline.verification.compare_models import Comparison

from tests.support.calibrated import Listener, downloaded, quantized, settings
from tests.support.checkpoints import make_checkpoint
from tests.support.decoders import DECODERS, write_decoder
from tests.support.jobs import CPU
from tests.support.learning import QUICK, Start, content, small_device
from tests.support.sequences import FIELDS, sequences
from tests.support.tiny import copy_of, flip_byte

pytestmark = pytest.mark.usefixtures("workers_here")

KINDS: Final = ("falcon-7b", "llama", "gpt2", "opt")
"""opt has layers that learn in front of its blocks and behind them."""


Make = Callable[[str], Start]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return cache(lambda kind: Start(tmp_path_factory.mktemp(kind), kind))


@pytest.mark.parametrize("kind", [*KINDS, "mixtral", "rwkv"])
def test_codes_learn_and_scales_stay(
    start: Make, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = replace(QUICK, length=8) if kind == "rwkv" else QUICK  # it goes from token to token
    learning = start(kind).learning(tmp_path, how)
    found = learning.run(SILENT)
    # Where both models do not fit, the same comes of a block of each at a time.
    by_block = start(kind).learning(tmp_path / "by block", how)
    told = Listener()
    most = Watched(monkeypatch)
    with small_device(small_host=kind == "gpt2"):
        assert by_block.run(told) == found
    assert content(by_block) == content(learning)
    assert most.blocks_at_once == 1
    (note,) = (note for note in told.notes if "block by block" in note)
    assert "The result is the same" in note
    assert any("is read once" in note for note in told.notes) == (kind == "gpt2")
    assert not [path for path in by_block.store.folder.iterdir() if "tmp" in path.name]
    assert found.kl_after < found.kl_before
    assert (found.steps, found.sequences, found.held_back) == (16, 16, 4)
    assert found.tokens == 16 * how.length
    before, after = BlockStore(tmp_path / "store").files(), learning.store.files()
    assert before.keys() == after.keys() == {w.name for w in start(kind).plan.quantized}
    changed = 0
    for name, path in before.items():
        (codes, scales), (learned, same) = read_codes(path, name), read_codes(after[name], name)
        assert scales.scales().tobytes() == same.scales().tobytes()
        assert codes.shape == learned.shape
        changed += int((codes != learned).sum())
    assert changed > 0
    assert not list(learning.store.folder.glob("*.state"))


class Watched:
    """Counts the blocks of a model that have weights whenever one of them is run."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.blocks_at_once = 0
        through = BlockRow.through
        monitor = self

        def watched(row: BlockRow, name: str, call: Any, hidden: torch.Tensor) -> torch.Tensor:
            blocks = find_blocks(row._model).values()
            there = [block for block in blocks if not any(p.is_meta for p in block.parameters())]
            monitor.blocks_at_once = max(monitor.blocks_at_once, len(there))
            return through(row, name, call, hidden)

        patch.setattr(BlockRow, "through", watched)


def test_recomputing_activations_changes_nothing(start: Make, tmp_path: Path) -> None:
    both = [
        start("gpt2").learning(tmp_path / str(again), replace(QUICK, recompute=again))
        for again in (False, True)
    ]
    for learning in both:
        learning.run(SILENT)
    one, other = (
        {name: read_codes(path, name)[0].tobytes() for name, path in each.store.files().items()}
        for each in both
    )
    assert one == other


class Stopped(Exception):
    """Stands for whatever ends a process."""


def test_a_run_that_is_stopped_at_any_state_ends_with_the_same_bytes(
    start: Make, tmp_path: Path
) -> None:
    """Whatever the device is large enough for when it goes on."""
    whole = start("llama").learning(tmp_path / "whole")
    whole.run(SILENT)

    stopped = start("llama").learning(tmp_path / "stopped")
    steps: list[int] = []

    def stop(progress: Progress) -> None:
        steps.append(progress.step)
        if progress.step % 3 == 0:
            raise Stopped

    for number in range(QUICK.steps):
        try:
            with small_device() if number % 2 else nullcontext():
                stopped.run(SILENT, seconds=0.0, saved=stop)
            break
        except Stopped:
            continue
    assert steps == [*range(1, QUICK.steps + 1), QUICK.steps]
    stopped.run(SILENT)
    assert content(stopped) == content(whole)


@pytest.mark.parametrize("seed", range(2))
def test_block_by_block_is_stopped_anywhere(
    start: Make, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two blocks, in the middle of a step, while everything is laid out."""
    whole = start("falcon-7b").learning(tmp_path / "whole")
    whole.run(SILENT)
    stopped = start("falcon-7b").learning(tmp_path / "stopped")
    rng = np.random.default_rng(seed)
    places: dict[str, Any] = {"arrive": LearnedWeight.arrive, "leave": LearnedWeight.leave}
    calls, last = 0, 0

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == last:
                raise Stopped
            return places[name](*args, **kwargs)

        return call

    for name in places:
        monkeypatch.setattr(LearnedWeight, name, counted(name))
    with small_device():
        for _ in range(3):
            calls, last = 0, int(rng.integers(1, 200))
            with pytest.raises(Stopped):
                stopped.run(SILENT, seconds=0.0)
        last = 0
        stopped.run(SILENT, seconds=0.0)
    assert content(stopped) == content(whole)


def test_a_device_that_turns_out_too_small(
    start: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out in the fourth step: the rest is learned block by block."""
    whole = start("llama").learning(tmp_path / "whole")
    whole.run(SILENT)
    learning = start("llama").learning(tmp_path / "small")
    learn, steps = HeldModels.learn, 0
    held: list[weakref.ref[Any]] = []

    def too_much(models: HeldModels, *args: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 4:
            held.extend(map(weakref.ref, (models, models._teacher.model, models._student.model)))
            held.extend(weakref.ref(weight.latent) for weight in models.weights.values())
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        learn(models, *args)

    def by_block(*args: Any) -> ModelsByBlock:
        assert len(held) > 3
        assert not [each for each in held if each() is not None]
        return ModelsByBlock(*args)

    monkeypatch.setattr(HeldModels, "learn", too_much)
    monkeypatch.setattr(learning_module, "ModelsByBlock", by_block)
    told = Listener()
    learning.run(told, seconds=0.0)
    assert steps == 4
    assert any("block by block" in note and "too little" in note for note in told.notes)
    assert content(learning) == content(whole)


class Locks:
    """Stands in for the runtime of CUDA: memory that it locks must stay until it is unlocked."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.locked: dict[int, tuple[int, weakref.ref[mmap.mmap]]] = {}
        mapped: list[weakref.ref[mmap.mmap]] = []

        class Mapped(mmap.mmap):
            """The last one that was made is the next that is locked."""

            def __init__(self, *_: Any) -> None:
                mapped.append(weakref.ref(self))

        self._mapped = mapped
        patch.setattr(host_memory, "mmap", SimpleNamespace(mmap=Mapped))
        patch.setattr(host_memory, "_cudart", lambda: self)

    def check(self) -> None:
        """All that is locked is there."""
        assert not [there for _, there in self.locked.values() if there() is None]

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.check()
        for other, (size, _) in self.locked.items():
            assert address + nbytes <= other or other + size <= address
        self.locked[address] = nbytes, self._mapped[-1]
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.check()
        del self.locked[address]
        return 0


@pytest.mark.parametrize(
    "kind", ["gptj", "codegen", "mpt", "mixtral", "llama", "gpt2", "bloom", "opt", "gpt_neox"]
)
def test_memory_is_locked_as_long_as_it_is_there(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of models whose blocks have computed buffers, which do not wait, and of others."""
    if kind in DECODERS:
        write_decoder(tmp_path, kind)
    else:
        make_checkpoint(tmp_path, kind)
    locks = Locks(monkeypatch)
    ids = (np.arange(128, dtype=np.int32) * 7 % 250).reshape(4, 32)
    with (
        StreamedModel(tmp_path, "cpu", torch.float32) as teacher,
        StreamedModel(tmp_path, "cpu", torch.float32) as student,
        HostMemory(tmp_path, 10**9, torch.device("cuda")) as memory,
        ThreadPoolExecutor(1) as pool,
    ):
        models = ModelsByBlock(teacher, student, (), (), {}, QUICK, memory, ids)
        blocks = student.blocks.values()
        assert memory.in_memory == sum(p.nbytes for block in blocks for p in block.parameters())
        memory.keep(torch.ones(1000))  # and what nobody needs any more
        assert models.kl(ids, pool) == 0
        locks.check()
        assert sum(nbytes for nbytes, _ in locks.locked.values()) == memory.in_memory
    assert not locks.locked


KILLED: Final = """
import os, signal, sys
from pathlib import Path
from nf4_pipeline.processes.in_process import in_process
from tests.support.learning import QUICK, Start, small_device
start = Start.__new__(Start)
start.__dict__.update(__import__("pickle").loads(Path(sys.argv[1]).read_bytes()))
from nf4_pipeline.calibration.block_store import BlockStore
from nf4_pipeline.calibration.learning import Learning, check_blocks
from nf4_pipeline.progress import SILENT
def saved(progress):
    if progress.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
with in_process(), small_device():
    Learning(start.source, start.plan, (), BlockStore(Path(sys.argv[2])), None, "cpu", QUICK).run(
        SILENT, seconds=0.0, saved=saved
    )
"""


def test_a_killed_process_is_gone_on_with(start: Make, tmp_path: Path) -> None:
    """One that learned block by block, by one that does not."""
    import pickle

    whole = start("llama").learning(tmp_path / "whole")
    whole.run(SILENT)
    killed = start("llama").learning(tmp_path / "killed")
    (tmp_path / "start").write_bytes(pickle.dumps(start("llama").__dict__))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "start"), str(tmp_path / "killed" / "store")],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    (state,) = killed.store.folder.glob("*.state")
    kept = read_state(state)
    assert kept is not None
    assert kept[0].step == 5
    killed.run(SILENT)
    assert content(killed) == content(whole)


@pytest.mark.parametrize("place", [0, 20, 5000, -1])
def test_a_damaged_state_is_not_gone_on_with(tmp_path: Path, place: int) -> None:
    path = tmp_path / "state"
    arrays: dict[str, Any] = {
        "a": np.arange(6, dtype=np.int16).reshape(2, 3),
        "b": np.ones(2000, np.float32),
    }
    progress = Progress(step=3, since=3, start_kl=0.5, best_kl=0.25)
    write_state(path, progress, arrays)
    kept = read_state(path)
    assert kept is not None
    assert kept[0] == progress
    assert {name: array.tobytes() for name, array in kept[1].items()} == {
        name: array.tobytes() for name, array in arrays.items()
    }
    flip_byte(path, place % path.stat().st_size)
    assert read_state(path) is None
    path.write_bytes(path.read_bytes()[:-5])
    assert read_state(path) is None


@pytest.mark.parametrize("by_block", [False, True])
def test_harm_is_undone(start: Make, tmp_path: Path, by_block: bool) -> None:
    """A rate that destroys the model: what comes of it is not worse than the beginning."""
    learning = start("llama").learning(tmp_path, replace(QUICK, rate=5.0))
    told = Listener()
    with small_device() if by_block else nullcontext():
        found = learning.run(told)
    assert found.kl_after <= found.kl_before
    assert found.halvings == 2
    assert found.steps < QUICK.steps
    assert any("did harm" in note for note in told.notes)


def test_what_is_kept_or_was_not_calibrated_does_not_learn(start: Make, tmp_path: Path) -> None:
    first = start("llama")
    kept, fallen = first.plan.quantized[0], first.plan.quantized[-1]
    learning = first.learning(tmp_path, kept=(str(kept.module),))
    store = BlockStore(tmp_path / "store")
    path = store.files()[fallen.name]
    block = path.name.removesuffix(".safetensors")
    facts = store.facts(block)
    assert facts is not None
    from nf4_pipeline.gptq.quantizer import QuantizedWeight

    weights = {
        name: QuantizedWeight(*read_codes(path, name), facts.costs[name])
        for name in facts.weights
        if name != fallen.name
    }
    store.write(block, weights, {fallen.name: "no tokens came to it"})
    learning = Learning(first.source, first.plan, (str(kept.module),), store, None, "cpu", QUICK)
    found = learning.run(SILENT)
    assert found.kl_after < found.kl_before
    names = {weight.name for weight in first.plan.quantized}
    assert learning.store.files().keys() == names - {kept.name, fallen.name}
    assert learning.run(SILENT) == found
    before = content(learning)
    shutil.rmtree(learning.store.folder)
    with small_device():
        assert learning.run(SILENT) == found
    assert content(learning) == before


# The arithmetic


@pytest.mark.parametrize("columns", [64, 45, 1])
@pytest.mark.parametrize("seed", range(3))
def test_a_latent_begins_in_the_bin_of_its_code(columns: int, seed: int) -> None:
    """Whatever the code and the scale, however far error compensation moved the weight."""
    rng = np.random.default_rng(seed)
    shape = 7, columns
    blocks = -(-7 * columns // 64)
    exact = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    exact[0, 0] = 1e6
    scales = (rng.normal(size=blocks) * 2).astype(np.float32)
    scales[rng.random(blocks) < 0.2] = 0.0
    codes = rng.integers(0, 16, 7 * columns).astype(np.uint8)
    module = torch.nn.Linear(columns, 7, bias=False)
    weight = LearnedWeight(module, exact, pack(codes), scales, Tables(torch.device("cpu")))
    assert (unpack(weight.packed(), codes.size) == codes).all()
    expected = dequantize(pack(codes), scales, shape)
    assert torch.equal(module.weight.detach(), torch.from_numpy(expected))
    before = weight.latent.clone()
    weight.momentum.fill_(float("nan"))
    weight.step(1e-2, 1)
    assert torch.equal(weight.latent, before)


def test_a_step_goes_against_the_gradient() -> None:
    rng = np.random.default_rng(0)
    exact = torch.from_numpy(rng.normal(size=(64, 64)).astype(np.float32))
    scales = np.where(np.arange(64) % 2, 2.0, -2.0).astype(np.float32)
    codes = rng.integers(4, 12, 4096).astype(np.uint8)
    module = torch.nn.Linear(64, 64, bias=False)
    weight = LearnedWeight(module, exact, pack(codes), scales, Tables(torch.device("cpu")))
    before = module.weight.detach().clone()
    gradient = torch.from_numpy(rng.normal(size=(64, 64)).astype(np.float32))
    for number in range(1, 30):
        weight.decay()
        weight.add(gradient)
        weight.step(2e-2, number)
    moved = module.weight.detach() - before
    assert float((moved * gradient).sum()) < 0
    assert float((moved != 0).float().mean()) > 0.3
    assert bool((moved.sign() * gradient.sign() <= 0).all())


@pytest.mark.parametrize("seed", range(8))
def test_channels_of_other_sizes_learn_alike(seed: int) -> None:
    """What one layer divides and the next one multiplies is the same model, and learns the same.

    Rows and blocks of columns are taken times powers of two; gradients then are divided by them.
    """
    rng = np.random.default_rng(seed)
    rows, blocks = 7, 5
    exact = rng.normal(size=(rows, 64 * blocks)).astype(np.float32)
    scales = (rng.normal(size=(rows, blocks)) * 2).astype(np.float32)
    codes = pack(rng.integers(0, 16, exact.size).astype(np.uint8))
    sizes = np.exp2(rng.integers(-5, 6, (rows, 1)) + rng.integers(-5, 6, (1, blocks)))
    spread = np.repeat(sizes, 64, axis=1).astype(np.float32)

    def weight_times(wide: Any, narrow: Any) -> LearnedWeight:
        module = torch.nn.Linear(64 * blocks, rows, bias=False)
        own = (scales * narrow).astype(np.float32).reshape(-1)
        tables = Tables(torch.device("cpu"))
        return LearnedWeight(module, torch.from_numpy(exact * wide), codes, own, tables)

    plain, other = weight_times(np.ones_like(spread), 1.0), weight_times(spread, sizes)
    assert torch.equal(plain.latent, other.latent)
    before = plain.latent.clone()
    for number in range(1, 7):
        gradient = rng.choice([-1.0, 1.0], exact.shape).astype(np.float32)
        for weight, divided in ((plain, np.ones_like(spread)), (other, spread)):
            weight.decay()
            weight.add(torch.from_numpy(gradient / divided))
            weight.step(1e-2, number)
    assert (plain.latent - before).abs().max() > 100
    assert (plain.latent.int() - other.latent.int()).abs().max() <= 6  # a unit for each rounding


@pytest.mark.parametrize("fails", range(6))
def test_gradients_of_a_step_count_once(fails: int) -> None:
    """Those of two calls, one of which is done again as it has no deterministic gradient."""
    rng = np.random.default_rng(0)
    exact, *gradients = torch.from_numpy(rng.normal(size=(7, 64, 64)).astype(np.float32))
    codes = pack(rng.integers(0, 16, 4096).astype(np.uint8))
    sums = []
    calls = 0
    try:
        for at in (None, fails):
            module = torch.nn.Linear(64, 64, bias=False)
            scales = np.ones(64, np.float32)
            weight = LearnedWeight(module, exact, codes, scales, Tables(torch.device("cpu")))
            calls = 0

            def compute(part: int, module: Any = module, at: int | None = at) -> Computed:
                nonlocal calls
                calls += 1
                if calls - 1 == at:
                    raise RuntimeError("op does not have a deterministic implementation")
                return module.weight * 1.0, gradients[part], None

            with ThreadPoolExecutor(1) as pool:
                adding = Gradients(torch.device("cpu"), pool, SILENT)
                adding.add([weight], range(3), compute)
                adding.add([weight], range(3, 6), compute, fades=False)
            assert adding.repeatable == (at is None)
            sums.append(weight.sums())
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls > 6
    assert all(torch.equal(one, other) for one, other in zip(*sums, strict=True))


def test_the_rate_rises_and_falls() -> None:
    rates = [learning_rate(QUICK, step) for step in range(QUICK.steps)]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < max(rates) <= QUICK.rate
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)


def test_every_sequence_has_its_turn() -> None:
    order = order_of(QUICK)
    assert order.shape == (16, 4)
    for part in order.reshape(4, 16):
        assert sorted(part) == list(range(16))


# Refusals


def test_a_text_that_is_too_short_is_refused(start: Make, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 26) for i in range(32 * 40)))
    with pytest.raises(RecipeError, match=r"expected at least 64.*leave --effort out"):
        start("llama").learning(tmp_path, text=text).run(SILENT)


def test_a_text_is_learned_from(start: Make, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 26) for i in range(32 * 100)))
    how = replace(QUICK, sequences=200, steps=1000)
    found = start("llama").learning(tmp_path, how, text=text).run(SILENT)
    assert found.held_back + found.sequences > 64
    assert found.held_back == round((found.held_back + found.sequences) * 0.05) or (
        found.held_back == QUICK.held_back
    )
    assert found.steps < 1000


def test_a_device_that_is_too_small_is_refused_before_anything_is_done(
    start: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning_plan, "_TEMPORARIES", 10**12)
    learning = start("llama").learning(tmp_path)
    expected = r"needs some .* GB .* a block at a time.* are free. Leave --effort out"
    with pytest.raises(ResourceError, match=expected):
        learning.run(SILENT)
    build = downloaded(start("llama").checkpoint, tmp_path)
    with pytest.raises(ResourceError, match="Leave --effort out"):
        quantized(build, settings(effort="high"))
    assert not build.calibration.exists()


def test_neither_memory_nor_disk_has_room(tmp_path: Path) -> None:
    with HostMemory(tmp_path, 2000, torch.device("cpu")) as memory:
        tensors = [memory.keep(torch.arange(200) + shift) for shift in range(3)]
        assert (memory.in_memory, memory.on_disk) == (1600, 3200)
        assert memory.empty((0, 4), torch.int16).shape == (0, 4)
        with pytest.raises(ResourceError, match=r"neither .* nor the disk .* has room"):
            memory.empty((2**59,), torch.int16)
        for shift, tensor in enumerate(tensors):
            assert torch.equal(tensor, torch.arange(200) + shift)
    assert list(tmp_path.iterdir()) == []


def test_blocks_that_are_no_row_cannot_be_taken_one_by_one(
    start: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halved(row: BlockRow, *_: Any) -> None:
        raise NotInARowError("its hidden states are halved in between")

    monkeypatch.setattr(BlockRow, "check", halved)
    expected = r"both models at once need .* block by block either, as its hidden states are"
    with small_device(), pytest.raises(ResourceError, match=expected):
        start("llama").learning(tmp_path).run(SILENT)


def test_that_is_known_before_anything_is_calibrated(
    start: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where it matters, and by a run that begins."""
    looked: list[int] = []

    def halved(row: BlockRow, *_: Any) -> None:
        looked.append(1)
        raise NotInARowError("its hidden states are halved in between")

    monkeypatch.setattr(BlockRow, "check", halved)
    build = downloaded(start("llama").checkpoint, tmp_path)
    recipe = settings(effort="high")
    Quantize(build, recipe, CPU)._calibrator().check_memory(start("llama").plan)
    assert not looked
    with small_device():
        with pytest.raises(ResourceError, match="cannot learn block by block either"):
            Quantize(build, recipe, CPU).run()
        assert not build.calibration.exists()
        # A plain --calibrate that was stopped has not looked; one that learned has.
        copy_of(start("llama").calibrated, build.calibration / "begun")
        with pytest.raises(ResourceError, match="cannot learn block by block either"):
            Quantize(build, recipe, CPU).run()
        copy_of(start("llama").calibrated, build.calibration / "begun-learned")
        Quantize(build, recipe, CPU)._calibrator().check_memory(start("llama").plan)
    assert looked == [1, 1]


@pytest.mark.parametrize("kind", ["falcon-7b", "rwkv"])
def test_models_that_can_learn_block_by_block_are_not_refused(start: Make, kind: str) -> None:
    with small_device():
        check_blocks(start(kind).source, start(kind).plan, start(kind).plan.quantized, "cpu")


def test_what_a_block_at_a_time_takes(start: Make) -> None:
    """Less by far than both models, the more so the deeper they are."""
    plan = start("llama").plan
    for kind in ("cpu", "cuda"):
        assert learning_plan.memory_by_block(plan, plan.quantized, kind) < (
            learning_plan.memory_of_learning(plan, plan.quantized, kind)
        )


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"tokens_sha256": "0" * 64}, "writes others on this machine"),
        ({"rate": 2e-3}, "learned in steps of 0.002, and this version"),
    ],
)
def test_other_learning_than_expected_is_refused(
    start: Make, tmp_path: Path, changed: dict[str, Any], told: str
) -> None:
    found = start("llama").learning(tmp_path / "first").run(SILENT)
    again = start("llama").learning(tmp_path / "again")
    with pytest.raises(ResourceError, match=told) as refused:
        again.run(SILENT, expected=replace(found, **changed))
    assert "cannot be derived again here" in str(refused.value)
    assert again.run(SILENT, expected=found) == found


def test_larger_models_learn_less_and_recompute(
    start: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = start("llama").plan.quantized
    small = learning_plan.plan_learning(weights, "cuda", None)
    assert (small.sequences, small.length, small.steps) == (16384, 512, 1024)
    assert not small.recompute
    monkeypatch.setattr(learning_plan, "_LARGE", 1000)
    large = learning_plan.plan_learning(weights, "cuda", 2048)
    assert (large.sequences, large.steps, large.rate, large.recompute) == (2048, 128, 1.6e-3, True)
    assert learning_plan.plan_learning(weights, "cpu", 100).length == 100


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_short_text_is_learned_in_fewer_and_longer_steps(start: Make, kind: str) -> None:
    plan = learning_plan.plan_learning(start("llama").plan.quantized, kind, None)
    plans = [plan.of_text(rows) for rows in (64, 100, 500, 1000, 5000, 20_000)]
    for one, longer in pairwise(plans):
        assert one.steps <= longer.steps
        assert one.rate >= longer.rate
    for found in plans:
        law = plan.rate * (plan.steps / found.steps) ** 0.5
        assert found.rate == pytest.approx(min(law, 1.6e-3), rel=0.05)
        assert found.batch <= found.sequences
    assert plans[-1] == plan
    assert (plans[0].sequences, plans[0].held_back) == (61, 3)


# A whole build


def _check_beside_what_they_began_with(checkpoint: Path, build: Build, before: Path) -> None:
    """The codes that stay behind score what the artifact of calibration alone does."""
    asked = Verify(build, Recipe(), CPU).baselines(read_manifest(build.export))
    found = []
    for folder, saved in ((before, None), (build.export, asked.before_learning)):
        with StreamedModel(checkpoint, "cpu") as streamed:
            model = load(folder, device="cpu")
            comparison = Comparison(streamed, model, before_learning=saved)
            own = comparison.run(sequences(), lambda count: None)
            found.append(comparison.before_learning or own)
    one, other = found
    assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in FIELDS)
    assert Verify(build, Recipe(), CPU).baselines(read_manifest(before)).before_learning is None


def test_the_record_and_the_manifest_say_so(
    start: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning_module, "plan_learning", lambda *_: QUICK)
    build = downloaded(start("llama").checkpoint, tmp_path)
    plain = Build(copy_of(build.root, tmp_path / "plain"))
    quantized(build, settings(effort="high"))
    quantized(plain, settings())
    manifest = json.loads((build.export / "manifest.json").read_text())
    before = json.loads((plain.export / "manifest.json").read_text())
    found = LearningSummary.from_json(manifest["calibration"].pop("learning"))
    assert found.kl_after < found.kl_before
    assert manifest["calibration"] == before["calibration"]
    assert "learning" not in before["calibration"]
    facts = build.need(QUANTIZE).facts.calibration
    assert facts is not None
    seconds = facts.seconds
    assert 0 < seconds["drawing"] + seconds["steps"] <= seconds["learning"] + 0.1
    assert manifest["recipe"]["quantize"]["effort"] == "high"
    assert "effort" not in before["recipe"]["quantize"]
    assert manifest["totals"] == before["totals"]
    same = (build.export / "calibration.json", plain.export / "calibration.json")
    assert same[0].read_bytes() == same[1].read_bytes()
    assert [path.name for path in build.calibration.iterdir() if path.is_dir()] == [
        "before_learning"
    ]
    assert not [path for path in plain.calibration.iterdir() if path.is_dir()]
    _check_beside_what_they_began_with(start("llama").checkpoint, build, plain.export)
    summary = read_manifest(build.export).calibration
    assert summary is not None
    assert "Then the codes learned, end to end" in describe_tokens(summary)

    # Derived again: the model writes the same tokens once more, and nothing but them will do.
    checkpoint = start("llama").checkpoint
    with small_device():
        again = reproduce(build.export, checkpoint, SILENT, CPU)
    assert again.differences == []
    other = copy_of(build.export, tmp_path / "other")
    manifest["calibration"]["learning"] = found.to_json() | {"tokens_sha256": "0" * 64}
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ResourceError, match="cannot be derived again here"):
        reproduce(other, checkpoint, SILENT, CPU)
    manifest["calibration"] |= {"source": "text", "learning": found.to_json()}
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ResourceError, match="learned from a text, which is not part of it"):
        reproduce(other, checkpoint, SILENT, CPU)
    del manifest["calibration"]["learning"]
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match='expected "learning"'):
        reproduce(other, checkpoint, SILENT, CPU)
