"""On a CUDA device: codes are chosen as on a CPU, read right by bitsandbytes, and chosen again.

The results stand in docs/performance.md.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.calibration.calibrator import TOKENS_FILE
from nf4_pipeline.checkpoint.atomic import make_folder
from nf4_pipeline.gptq.scale_limits import scale_limits
from nf4_pipeline.job import run_build, run_stage
from nf4_pipeline.machine import Machine
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import QuantizeRecipe, Recipe
from nf4_pipeline.records import QUANTIZE, VERIFY
from nf4_pipeline.stages.download_request import DownloadRequest

from tests.support.jobs import download

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = "cuda:0"
SHAPES: Final = [
    (96, 256, "bfloat16"),
    (200, 1024, "float16"),
    (37, 640, "float32"),
    (1, 64, "bfloat16"),
    (96, 768, "bfloat16"),
    (37, 101, "bfloat16"),  # rows that are no whole blocks, and an odd number of weights
    (1500, 4544, "bfloat16"),
]


def _weight(rows: int, columns: int, dtype: str) -> Any:
    """Random weights with what is awkward: a row, a block and a whole group of scales of zeros."""
    dice = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=dice) * 0.02
    if rows > 8:
        weight[5] = 0.0
        weight[7, 64:128] = 0.0
        weight[8] *= 1e-2 if dtype == "float16" else 1e-4  # not into subnormal numbers
    if columns == 768:  # the second group of 256 blocks begins and ends within a row
        weight.view(-1)[256 * 64 : 512 * 64] = 0.0
    return weight.to(getattr(torch, dtype))


def _inputs(columns: int, device: str) -> tuple[Any, int]:
    """The second moment of inputs that hang together and differ in size, and of how many."""
    dice = torch.Generator().manual_seed(columns)
    tokens = 2 * columns + 64
    common = torch.randn(tokens, 8, generator=dice) @ torch.randn(8, columns, generator=dice)
    sizes = torch.randn(columns, generator=dice).exp()
    x = ((torch.randn(tokens, columns, generator=dice) + 0.3 * common) * sizes).to(device)
    return x.T @ x / tokens, tokens


@pytest.mark.parametrize("signs", [1, 2])
@pytest.mark.parametrize(("rows", "columns", "dtype"), SHAPES)
def test_cuda_chooses_what_the_cpu_chooses(rows: int, columns: int, dtype: str, signs: int) -> None:
    """For the same guide, bit for bit: codes, scales, and what they cost."""
    from nf4_pipeline.gptq.config import GptqConfig
    from nf4_pipeline.gptq.device_group import DeviceGroup
    from nf4_pipeline.gptq.hessian import factorize
    from nf4_pipeline.gptq.quantizer import GptqOnCpu
    from nf4_pipeline.gptq.quantizer_cuda import GptqOnCuda

    config = GptqConfig(negative_scales=signs == 2)
    weight = _weight(rows, columns, dtype)
    hessian, tokens = _inputs(columns, DEVICE)
    group = DeviceGroup([torch.device(DEVICE)])
    on_device = factorize(hessian, tokens, config, group)
    on_host = on_device.cpu()
    with ThreadPoolExecutor(4) as pool, torch.inference_mode():
        limits = scale_limits(weight)
        found = GptqOnCuda(config, group, pool).quantize([weight.to(DEVICE)], [on_device], limits)
        expected = GptqOnCpu(config, pool).quantize([weight], [on_host], limits)
    assert np.count_nonzero(found.packed != expected.packed) == 0
    assert np.count_nonzero(found.scales.codes != expected.scales.codes) == 0
    assert found.scales.absmax.tobytes() == expected.scales.absmax.tobytes()
    assert found.scales.offset == expected.scales.offset == 0.0
    assert found.cost == pytest.approx(expected.cost, rel=1e-4)
    assert expected.cost > 0.0


@pytest.mark.parametrize("share", [0.2, 0.4])
@pytest.mark.parametrize(("rows", "columns"), [(96, 256), (300, 768), (37, 101)])
def test_limits_that_bind_are_kept_to_as_on_a_cpu(rows: int, columns: int, share: float) -> None:
    from nf4_pipeline.gptq.config import GptqConfig
    from nf4_pipeline.gptq.device_group import DeviceGroup
    from nf4_pipeline.gptq.hessian import factorize
    from nf4_pipeline.gptq.quantizer import GptqOnCpu
    from nf4_pipeline.gptq.quantizer_cuda import GptqOnCuda

    config, weight = GptqConfig(), _weight(rows, columns, "bfloat16")
    group = DeviceGroup([torch.device(DEVICE)])
    on_device = factorize(*_inputs(columns, DEVICE), config, group)
    limits = np.float32(share) * scale_limits(weight)
    with ThreadPoolExecutor(4) as pool, torch.inference_mode():
        there = GptqOnCuda(config, group, pool).quantize([weight.to(DEVICE)], [on_device], limits)
        here = GptqOnCpu(config, pool).quantize([weight], [on_device.cpu()], limits)
        free = GptqOnCpu(config, pool).quantize([weight], [on_device.cpu()], scale_limits(weight))
    assert np.count_nonzero(there.packed != here.packed) == 0
    assert np.count_nonzero(there.scales.codes != here.scales.codes) == 0
    assert (np.abs(here.scales.scales()) <= limits).all()
    assert (np.abs(free.scales.scales()) > limits).mean() > 0.8


def _calibrated(rows: int, columns: int, dtype: str) -> Any:
    """Codes and scales of a weight, as an artifact would hold them."""
    from nf4_pipeline.gptq.config import GptqConfig
    from nf4_pipeline.gptq.hessian import factorize
    from nf4_pipeline.gptq.quantizer import GptqOnCpu

    prepared = factorize(*_inputs(columns, "cpu"), GptqConfig())
    with ThreadPoolExecutor(4) as pool, torch.inference_mode():
        weight = _weight(rows, columns, dtype)
        result = GptqOnCpu(GptqConfig(), pool).quantize([weight], [prepared], scale_limits(weight))
    negative = float((result.scales.scales() < 0).mean())
    assert 0.2 < negative < 0.8
    return result


def _stock(
    result: Any, shape: tuple[int, ...], dtype: str, device: str, *, nested: bool = True
) -> tuple[Any, Any]:
    """What bitsandbytes makes of it: packed codes and their state on a device.

    Args:
        result: codes and scales.
        shape: of the weight; on a CPU, bitsandbytes reads rows of whole blocks alone right.
        dtype: of the weight.
        device: where.
        nested: scales of 8 bits as they are stored; else the same scales in float32.
    """
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit
    from nf4_pipeline.nf4.codebook import NF4_LEVELS
    from nf4_pipeline.nf4.stored_weight import companions

    packed = torch.from_numpy(result.packed.copy())[:, None]
    if not nested:
        scales = torch.from_numpy(result.scales.scales().copy()).to(device)
        state = QuantState(
            absmax=scales,
            shape=torch.Size(shape),
            code=torch.from_numpy(NF4_LEVELS.copy()).to(device),
            blocksize=64,
            quant_type="nf4",
            dtype=getattr(torch, dtype),
        )
        return packed.to(device), state
    parts = companions("", shape, dtype, result.scales)
    beside = {suffix: torch.from_numpy(part.copy()) for suffix, part in parts.items()}
    parameter = Params4bit.from_prequantized(packed, beside, device=device)
    return parameter.data, parameter.quant_state


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "dtype"), [shape for shape in SHAPES if shape[0] > 1 and shape[1] < 4544]
)
def test_negative_scales_are_dequantized_alike(
    rows: int, columns: int, dtype: str, nested: bool
) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from nf4_pipeline.nf4.dequantize import dequantize

    result = _calibrated(rows, columns, dtype)
    ours = dequantize(result.packed, result.scales.scales(), (rows, columns))
    expected = torch.from_numpy(ours).to(getattr(torch, dtype))
    flat = (1, rows * columns)
    for device, shape in ((DEVICE, (rows, columns)), ("cpu", flat)):
        packed, state = _stock(result, shape, dtype, device, nested=nested)
        found = dequantize_4bit(packed, state).cpu().reshape(rows, columns)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected), device


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 4, 16, 64])
@pytest.mark.parametrize(
    ("rows", "columns", "dtype"),
    [(96, 256, "bfloat16"), (200, 1024, "float16"), (4544, 1024, "bfloat16")],
)
def test_negative_scales_are_multiplied_right(
    rows: int, columns: int, dtype: str, batch: int, nested: bool
) -> None:
    """One row takes bitsandbytes' fused kernel, many may be multiplied after dequantizing."""
    from bitsandbytes import matmul_4bit
    from nf4_pipeline.nf4.dequantize import dequantize

    result = _calibrated(rows, columns, dtype)
    weight = torch.from_numpy(
        dequantize(result.packed, result.scales.scales(), (rows, columns))
    ).double()
    dice = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, columns, generator=dice).to(getattr(torch, dtype))
    packed, state = _stock(result, (rows, columns), dtype, DEVICE, nested=nested)
    with torch.inference_mode():
        found = matmul_4bit(x.to(DEVICE), packed.t(), quant_state=state).cpu()
    assert found.dtype == x.dtype
    expected = x.double() @ weight.T
    # Inputs, levels and scales may be rounded to 16 bit, products are, and so is the result.
    size = (x.double().square() @ weight.square().T).sqrt()
    unit = torch.finfo(x.dtype).eps
    off = (found.double() - expected).abs() / (unit * (expected.abs() + 4 * size) + 1e-12)
    assert float(off.max()) < 1.0
    # The measure can tell: a sign that is lost is far beyond it.
    absolute = dequantize(result.packed, np.abs(result.scales.scales()), (rows, columns))
    lost = (x.double() @ torch.from_numpy(absolute).double().T - expected).abs()
    assert float((lost / (unit * (expected.abs() + 4 * size) + 1e-12)).median()) > 5.0


RECIPE: Final = Recipe(quantize=QuantizeRecipe(calibrate="self"))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The sample, calibrated on tokens of its own and verified, all of it on the device."""
    machine = Machine(device=DEVICE, require_gpu=DEVICE != "cpu")
    request = DownloadRequest("sample", tmp_path_factory.mktemp("calibrated"))
    build, _ = run_build(request, RECIPE, machine, SILENT)
    return build


def _again(first: Build, folder: Path, device: str) -> Build:
    """Another build of the sample from the tokens of the first one, up to serialize."""
    build, *_ = download("sample", folder)
    make_folder(build.calibration)
    shutil.copy(first.calibration / TOKENS_FILE, build.calibration)
    for stage in ("quantize", "serialize"):
        run_stage(build, stage, RECIPE, Machine(device=device), SILENT)
    return build


def _codes(build: Build) -> tuple[Any, Any]:
    """All codes of an artifact, one each, and all 8-bit scales."""
    from nf4_pipeline.nf4.packing import unpack
    from safetensors.torch import load_file

    manifest = json.loads((build.export / "manifest.json").read_text())
    files: dict[str, Any] = {}
    for path in sorted(build.export.glob("*.safetensors")):
        files |= load_file(path)
    names = [tensor["name"] for tensor in manifest["tensors"] if tensor["quantized"]]
    assert names
    packed = np.concatenate([files[name].numpy().reshape(-1) for name in names])
    scales = np.concatenate([files[f"{name}.absmax"].numpy() for name in names])
    return unpack(packed, 2 * packed.size), scales


def test_the_sample_is_much_closer_than_round_to_nearest(
    calibrated: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    record = calibrated.need(VERIFY)
    assert [check for check in record.facts.to_json()["checks"] if not check["passed"]] == []
    assert record.facts.to_json()["verdict"] == "pass"
    found = json.loads((calibrated.export / "verification.json").read_text())
    ratio = found["nearest"]["difference"]["mean_kl_ratio"]
    with capsys.disabled():
        print(f"\nmean KL over round to nearest's: {ratio}")
    assert 0.0 < ratio["value"] < 0.45
    assert ratio["high"] < 0.6
    manifest = json.loads((calibrated.export / "manifest.json").read_text())
    assert manifest["calibration"]["device"] == torch.device(DEVICE).type
    assert manifest["calibration"]["fallbacks"] == {}
    assert manifest["calibration"]["source"] == "self"
    facts = calibrated.need(QUANTIZE).facts.to_json()["calibration"]
    assert facts["seconds"]["sampling"] > 0.0
    assert facts["seconds"]["pass"] >= facts["seconds"]["whole"] > 0.0
    # A model of 10 MB: what it takes are activations, guides and workspaces.
    for part in ("sampling", "pass"):
        assert 0 < facts["peak_device_memory_bytes"][part] < 2 * 2**30


def test_the_same_tokens_give_the_same_bytes(calibrated: Build, tmp_path: Path) -> None:
    again = _again(calibrated, tmp_path, DEVICE)
    mine, other = ((b.export / "manifest.json").read_bytes() for b in (calibrated, again))
    for name in json.loads(mine)["files"]:
        assert (calibrated.export / name).read_bytes() == (again.export / name).read_bytes(), name
    assert mine == other


def test_the_command_derives_it_again_here(calibrated: Build, tmp_path: Path) -> None:
    published = tmp_path / "published"
    shutil.copytree(calibrated.export, published)
    done = subprocess.run(
        [sys.executable, "-m", "nf4_pipeline", "reproduce", "-q", "--json", str(published)],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout)
    assert found["reproduced"]
    assert found["equal"] == found["files"] > 5
    assert found["differences"] == []
    named = "cpu" if DEVICE == "cpu" else torch.cuda.get_device_name(DEVICE)
    assert found["calibrated_on"] == named


def test_how_far_a_cpu_comes_from_it_is_said(
    calibrated: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody promises equality from one kind of device to the other; the share is printed."""
    other = _again(calibrated, tmp_path, "cpu")
    mine, theirs = _codes(calibrated), _codes(other)
    codes, scales = (float((a != b).mean()) for a, b in zip(mine, theirs, strict=True))
    with capsys.disabled():
        print(
            f"\n{DEVICE} and cpu, same tokens: {codes:.2%} of codes, {scales:.2%} of scales differ"
        )
    assert mine[0].size == theirs[0].size > 10**6
    # What they have in common is far more than chance: it is the same weights.
    assert codes < 0.5
