"""The files of an artifact against those of its source, whatever a library makes of either."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.source import open_checkpoint
from nf4_pipeline.fidelity.verdict import Check
from nf4_pipeline.job import run_stage
from nf4_pipeline.manifest.read import read_manifest
from nf4_pipeline.nf4.double_quant import double_quantize
from nf4_pipeline.nf4.stored_weight import StoredWeight
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.verification import compare_weights
from nf4_pipeline.verification.check_model import check_weights
from nf4_pipeline.verification.compare_weights import WeightComparison
from nf4_pipeline.verification.distance import LayerDistance
from safetensors.torch import load_file, save_file

from tests.support.calibrated import downloaded, quantized, settings
from tests.support.checkpoints import make_checkpoint, read_tensors, weight_files
from tests.support.jobs import CPU, download
from tests.support.tamper import agree, change, swap
from tests.support.tiny import copy_of

pytestmark = pytest.mark.usefixtures("workers_here")

UP: Final = "transformer.h.0.mlp.dense_h_to_4h"
NORM: Final = "transformer.h.1.input_layernorm.weight"


def built(model: Path, where: Path) -> Build:
    build, *_ = download(model, where / "artifacts")
    for stage in ("quantize", "serialize"):
        run_stage(build, stage, Recipe(), CPU, SILENT)
    return build


@pytest.fixture
def build(exported_falcon: Path, tmp_path: Path) -> Build:
    return Build(copy_of(exported_falcon, tmp_path / "build"))


def compared(
    build: Build, given: Mapping[str, torch.Tensor] | None = None
) -> tuple[WeightComparison, dict[str, LayerDistance]]:
    layers: dict[str, LayerDistance] = {}
    comparison = WeightComparison(
        open_checkpoint(build.source),
        build.export,
        read_manifest(build.export),
        lambda name: layers.setdefault(name, LayerDistance()),
        torch.device("cpu"),
    )
    comparison.compare(given or {})
    comparison.compare_rest()
    return comparison, layers


@pytest.mark.parametrize("part", [compare_weights._PART, 128])
@pytest.mark.parametrize("kind", ["falcon-7b", "gpt2", "opt"])
def test_every_tensor_is_compared_once(
    kind: str, part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transposed weights, ragged ends, and layers outside of blocks among them."""
    monkeypatch.setattr(compare_weights, "_PART", part)
    build = built(make_checkpoint(tmp_path / kind, kind), tmp_path)
    manifest = read_manifest(build.export)
    given = dict(list(read_tensors(build.source).items())[::2])
    comparison, layers = compared(build, given)
    assert (comparison.changed, comparison.malformed, comparison.missing) == ([], [], [])
    assert comparison.kept == sum(not tensor.quantized for tensor in manifest.tensors)
    assert layers.keys() == manifest.quantized_modules
    by_module = {t.module: t for t in manifest.tensors if t.quantized}
    for name, layer in layers.items():
        assert layer.weight == pytest.approx(by_module[name].relative_rmse, rel=1e-3)
        assert 0 < layer.worst < 0.2
        assert layer.reach == pytest.approx(1, abs=0.02)


def negate(build: Build, weight: str, number: int) -> None:
    """Half the levels of two codes in a byte: another sign, about the same size."""
    codes = read_tensors(build.export)[weight].clone()
    codes.view(-1)[number * 32 : number * 32 + 32] ^= 0x88
    change(build.export, {weight: codes})


@pytest.mark.parametrize(
    ("kind", "module", "number"),
    [
        ("falcon-7b", "transformer.h.1.mlp.dense_h_to_4h", 0),
        ("falcon-7b", "transformer.h.1.mlp.dense_h_to_4h", 700),
        # 45 x 135 weights are 94 blocks and 59 weights: the last block is ragged.
        ("gpt2", "transformer.h.1.attn.c_attn", 94),
    ],
)
def test_64_wrong_weights_are_found(kind: str, module: str, number: int, tmp_path: Path) -> None:
    build = built(make_checkpoint(tmp_path / kind, kind), tmp_path)
    (tensor,) = (t for t in read_manifest(build.export).tensors if t.module == module)
    negate(build, tensor.name, number)
    _, layers = compared(build)
    stored = {name: t.numpy() for name, t in read_tensors(build.export).items() if t.itemsize != 2}
    actual = StoredWeight.read(tensor.name, stored).dequantize().reshape(-1)
    source = read_tensors(build.source)[tensor.source_name].float()
    exact = (source.T if tensor.transposed else source).reshape(-1).numpy()
    span = slice(number * 64, number * 64 + 64)
    off = np.abs(actual[span] - exact[span]).max() / np.abs(exact[span]).max()
    assert layers[module].worst_at == number
    assert layers[module].worst == pytest.approx(float(off), rel=1e-4)
    assert layers[module].worst > 0.5
    assert all(layer.worst < 0.2 for name, layer in layers.items() if name != module)


def test_how_far_a_scale_reaches_whatever_its_sign(build: Build) -> None:
    """Three times as large and of the other sign, among those that round to nearest makes."""
    name = f"{UP}.weight"
    tensors = {n: t.numpy() for n, t in read_tensors(build.export).items() if t.itemsize != 2}
    stored = StoredWeight.read(name, tensors)
    scales = stored.scales.scales()
    scales[2] *= -3
    forged = StoredWeight(stored.packed, double_quantize(scales), stored.shape, stored.dtype)
    change(build.export, {n: torch.from_numpy(a.copy()) for n, a in forged.tensors(name).items()})
    comparison, layers = compared(build)
    assert comparison.malformed == []
    assert (layers[UP].reach_at, layers[UP].worst_at) == (2, 2)
    assert layers[UP].reach == pytest.approx(3, rel=0.05)


def test_two_rows_that_were_swapped_are_seen_by_what_the_manifest_promises(tmp_path: Path) -> None:
    """In a calibrated artifact, in which no single weight of theirs is beyond a bound."""
    build = downloaded(make_checkpoint(tmp_path / "model", "falcon-whole"), tmp_path)
    quantized(build, settings())
    name = f"{UP}.weight"  # [512, 128]: a row is 64 bytes of codes and two scales
    manifest = read_manifest(build.export)

    def check() -> Check:
        _, layers = compared(build)
        errors = [layer.error(module) for module, layer in layers.items()]
        return check_weights(manifest, [], errors)

    assert check().passed
    tensors = {n: t.clone() for n, t in read_tensors(build.export).items()}
    for part, width in ((name, 64), (f"{name}.absmax", 2)):
        rows = tensors[part].view(-1, width)
        rows[[8, 9]] = rows[[9, 8]]
    change(build.export, {part: tensors[part] for part in (name, f"{name}.absmax")})
    found = check()
    assert not found.passed
    assert found.found.startswith(f"{UP} is off by 0.1")
    assert found.found.endswith("as promised")


def test_another_layers_weight_is_far_away(build: Build) -> None:
    swap(f"{UP}.weight", "transformer.h.1.mlp.dense_h_to_4h.weight")(build)
    _, layers = compared(build)
    assert layers[UP].worst > 0.9
    assert layers[UP].weight > 0.9


MALFORMED: Final[dict[str, Callable[[dict[str, torch.Tensor]], Any]]] = {
    ".quant_map": lambda parts: parts[".quant_map"].flip(0),
    ".nested_quant_map": lambda parts: parts[".nested_quant_map"] * 2,
    ".absmax": lambda parts: parts[".absmax"][:-1],
    ".nested_absmax": lambda parts: parts[".nested_absmax"].to(torch.float64),
    ".quant_state.bitsandbytes__nf4": lambda parts: state(parts, blocksize=128),
    ".quant_state.bitsandbytes__nf4 of another shape": lambda parts: state(parts, shape=[16, 1024]),
    ".quant_state.bitsandbytes__nf4 of another dtype": lambda parts: state(parts, dtype="float16"),
    ".quant_state.bitsandbytes__nf4 without an offset": lambda parts: state(
        parts, nested_offset=None
    ),
}


def state(parts: dict[str, torch.Tensor], **changes: Any) -> torch.Tensor:
    """A quant state with other entries, as long as it was."""
    old = parts[".quant_state.bitsandbytes__nf4"]
    value = json.loads(bytes(old.tolist())) | changes
    text = json.dumps(value).encode()[: old.numel()].ljust(old.numel())
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


@pytest.mark.parametrize("case", MALFORMED)
def test_what_stands_beside_the_codes_is_as_the_format_has_it(build: Build, case: str) -> None:
    """Some readers look at a table that others know by heart."""
    part, name = case.partition(" ")[0], f"{UP}.weight"
    tensors = read_tensors(build.export)
    parts = {n.removeprefix(name): t for n, t in tensors.items() if n.startswith(name)}
    change(build.export, {name + part: MALFORMED[case](parts)})
    agree(build)
    comparison, layers = compared(build)
    (problem,) = comparison.malformed
    assert problem.startswith(f"{UP} ")
    assert UP not in layers


# --- what is not 4 bit ---


def test_a_nan_equals_itself(tiny_falcon: Path, tmp_path: Path, exported_falcon: Path) -> None:
    """Both sides hold the same NaN, bit for bit, and another one is another tensor."""
    build = Build(copy_of(exported_falcon, tmp_path / "build"))
    norm = read_tensors(build.export)[NORM].clone()
    norm.view(torch.int16)[0] = 0x7FC1
    change(build.export, {NORM: norm})
    for path in weight_files(build.source):
        tensors = load_file(path)
        if NORM in tensors:
            path.unlink()
            save_file({**tensors, NORM: norm}, path, metadata={"format": "pt"})
    assert compared(build)[0].changed == []
    other = norm.clone()
    other.view(torch.int16)[0] = 0x7FC2
    change(build.export, {NORM: other})
    assert compared(build)[0].changed == [NORM]


@pytest.mark.parametrize(("value", "same"), [(1.25, True), (1.0 + 2**-12, True), (1.5, False)])
def test_a_tensor_that_was_cast_equals_the_cast_of_the_source(
    build: Build, value: float, same: bool
) -> None:
    """float32 in the source; the manifest says that it is stored in bfloat16."""
    wide = read_tensors(build.source)[NORM].float() + 0.0
    wide[0], wide[1] = value, torch.nan
    stored = wide.bfloat16()
    if not same:
        stored[0] = 1.25
    change(build.export, {NORM: stored})
    agree(build)
    comparison, _ = compared(build, {NORM: wide})
    assert comparison.changed == ([] if same else [NORM])


def test_no_tensor_of_the_source_is_lost_in_silence(build: Build) -> None:
    path = build.export / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tensors"] = [t for t in manifest["tensors"] if t["name"] != NORM]
    path.write_text(json.dumps(manifest))
    assert compared(build)[0].changed == [NORM]


def test_a_tensor_of_which_the_source_knows_nothing_is_named(build: Build) -> None:
    path = build.export / "manifest.json"
    manifest = json.loads(path.read_text())
    (entry,) = (t for t in manifest["tensors"] if t["name"] == NORM)
    entry["source_name"] = "nowhere"
    path.write_text(json.dumps(manifest))
    comparison, _ = compared(build)
    assert (comparison.changed, comparison.missing) == ([NORM], [NORM])
