"""What layers lose: measured once, gone on with after a kill, and used for any budget."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.calibration import sensitivity
from nf4_pipeline.calibration.allocation import NOT_FINITE, LayerLoss, select_within_budget
from nf4_pipeline.calibration.sensitivity import measure_losses
from nf4_pipeline.calibration.tokens import CalibrationTokens, parse_tokens
from nf4_pipeline.manifest.read import read_manifest
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.selection import TensorPlan
from nf4_pipeline.stages.quantize import Quantize
from numpy.typing import NDArray

from tests.support.calibrated import Listener, downloaded, quantized, settings
from tests.support.checkpoints import make_checkpoint
from tests.support.jobs import CPU
from tests.support.tiny import copy_of

pytestmark = pytest.mark.usefixtures("workers_here")

KINDS: Final = ("falcon-7b", "llama", "gpt2", "opt")


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Build]:
    """Calibrated builds with some layers in 16 bit."""
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        build = downloaded(make_checkpoint(folder / "model", kind), folder)
        quantized(build, settings(extra_bytes="40%"))
        found[kind] = build
    return found


def parts_of(build: Build) -> tuple[list[TensorPlan], CalibrationTokens]:
    tokens = parse_tokens(json.loads((build.calibration / "tokens.json").read_text()))
    return list(Quantize(build, Recipe(), CPU).plan().quantized), tokens


def measured(build: Build, kept: Path, key: str = "key") -> list[LayerLoss]:
    weights, tokens = parts_of(build)
    return measure_losses(build.source, weights, tokens, kept, key, device="cpu", reporter=SILENT)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("waves", [1, 2, 3])
def test_a_run_that_is_stopped_measures_nothing_twice(
    kind: str,
    waves: int,
    builds: dict[str, Build],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = measured(builds[kind], tmp_path / "whole.json")
    monkeypatch.setattr(sensitivity, "_TOGETHER", 2)
    wave, ran = sensitivity._Wave.run, list[int]()
    last = [waves]

    def run(self: sensitivity._Wave) -> None:
        if len(ran) == last[0]:
            raise StoppedError
        ran.append(len(self._weights))
        wave(self)

    monkeypatch.setattr(sensitivity._Wave, "run", run)
    with pytest.raises(StoppedError):
        measured(builds[kind], tmp_path / "kept.json")
    last[0] = 1000
    assert measured(builds[kind], tmp_path / "kept.json") == whole
    assert sum(ran) == len(whole)
    assert measured(builds[kind], tmp_path / "kept.json") == whole
    assert sum(ran) == len(whole)  # nothing is left to measure
    measured(builds[kind], tmp_path / "kept.json", "of other tokens")
    assert sum(ran) == 2 * len(whole)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": "key"}', '{"key": "key", "kl": 3}'])
def test_what_cannot_be_read_is_measured_again(
    content: str, builds: dict[str, Build], tmp_path: Path
) -> None:
    (tmp_path / "kept.json").write_text(content)
    found = measured(builds["opt"], tmp_path / "kept.json")
    assert found == measured(builds["opt"], tmp_path / "whole.json")


@pytest.mark.parametrize("kind", KINDS)
def test_another_budget_measures_nothing(
    kind: str, builds: dict[str, Build], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Build(copy_of(builds[kind].root, tmp_path / "build"))
    monkeypatch.setattr(sensitivity, "_Wave", None)
    quantized(build, settings(extra_bytes="15%"), Listener())
    more, less = (
        manifest.kept
        for manifest in (read_manifest(one.export).calibration for one in (builds[kind], build))
        if manifest is not None
    )
    assert sum(module.bytes for module in less) < sum(module.bytes for module in more)
    assert sum(module.kl for module in less) < sum(module.kl for module in more)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_chosen_for_a_model_in_which_kept_layers_are_exact(
    kind: str, builds: dict[str, Build], tmp_path: Path
) -> None:
    """They are those of a recipe that names these layers."""
    manifest = read_manifest(builds[kind].export)
    assert manifest.calibration is not None
    kept = [module.module for module in manifest.calibration.kept]
    assert kept
    build = Build(copy_of(builds[kind].root, tmp_path / "build"))
    quantized(build, settings(skip_modules=tuple(kept)))
    named = read_manifest(build.export)
    assert named.calibration is not None
    assert named.calibration.tokens_sha256 == manifest.calibration.tokens_sha256
    hashes = [{t.name: t.stored for t in m.tensors} for m in (manifest, named)]
    assert hashes[0] == hashes[1]


def test_most_per_byte_come_first() -> None:
    losses = [LayerLoss("a", 3.0, 30), LayerLoss("b", 2.0, 10), LayerLoss("c", 1.0, 20)]
    names = [
        [one.module for one in select_within_budget(losses, n)] for n in (9, 10, 29, 30, 40, 60)
    ]
    assert names == [[], ["b"], ["b"], ["a"], ["b", "a"], ["b", "a", "c"]]


@pytest.mark.parametrize("seed", range(30))
def test_no_other_layers_that_fit_lose_more(seed: int) -> None:
    """Of all there are; some lose what is not finite, or nothing."""
    dice = np.random.default_rng(seed)
    budget = 1 << 14  # of which no part is lost by counting
    losses = [
        LayerLoss(f"layer {n}", float(kl), int(size))
        for n, (kl, size) in enumerate(
            zip(
                dice.choice([0.0, NOT_FINITE, *dice.exponential(size=20)], 11),
                dice.integers(0, dice.choice([budget // 8, 2 * budget]), 11),
                strict=True,
            )
        )
    ]
    selected = select_within_budget(losses, budget)
    assert len({one.module for one in selected}) == len(selected)
    assert sum(max(1, one.bytes) for one in selected) <= budget
    lost = [one.kl / max(1, one.bytes) for one in selected]
    assert lost == sorted(lost, reverse=True)

    def worth(found: Iterable[LayerLoss]) -> tuple[int, float]:
        values = [one.kl for one in found]
        return values.count(NOT_FINITE), sum(value for value in values if value < NOT_FINITE)

    best = max(
        worth(some)
        for count in range(len(losses) + 1)
        for some in combinations(losses, count)
        if sum(max(1, one.bytes) for one in some) <= budget
    )
    assert worth(selected) == pytest.approx(best)


def test_room_is_not_left_for_the_sake_of_one_layer() -> None:
    """What loses most per byte may stand in the way of two that lose more together."""
    losses = [LayerLoss("a", 7.0, 60), LayerLoss("b", 5.0, 50), LayerLoss("c", 5.0, 50)]
    assert [one.module for one in select_within_budget(losses, 100)] == ["b", "c"]


def test_texts_all_over_the_tokens_are_measured(builds: dict[str, Build], tmp_path: Path) -> None:
    """Not the first ones, which begin alike."""
    build = builds["llama"]
    weights, tokens = parts_of(build)
    ids = np.tile(tokens.ids[:1], (64, 1))
    ids[-1] = ids[-1][::-1]

    def losses(changed: NDArray[np.int32], name: str) -> list[float]:
        given = CalibrationTokens(changed, "self", name)
        kept = tmp_path / name
        found = measure_losses(
            build.source, weights[:2], given, kept, name, device="cpu", reporter=SILENT
        )
        return [loss.kl for loss in found]

    assert losses(ids, "the last is another") != losses(ids[:-1], "all alike")
