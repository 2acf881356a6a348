"""Round to nearest beside an artifact: as if it had been built, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from nf4_pipeline.blocks.streamed_model import StreamedModel
from nf4_pipeline.fidelity.token_scores import TokenScores
from nf4_pipeline.gptq.quantizer import QuantizedWeight
from nf4_pipeline.gptq.saved_codes import tensors_of
from nf4_pipeline.job import run_stage
from nf4_pipeline.nf4 import rtn as nearest
from nf4_pipeline.nf4.double_quant import NestedScales
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import QuantizeRecipe, Recipe
from nf4_pipeline.runtime.loader import load
from nf4_pipeline.sample import MODEL_DIR
from nf4_pipeline.verification import compare_models as compare
from nf4_pipeline.verification.baseline import Baseline, round_weight
from nf4_pipeline.verification.compare_models import Comparison
from nf4_pipeline.verification.messages import SavedCodes
from nf4_pipeline.verification.shares import Share, share_of
from safetensors.numpy import save_file

from tests.support.checkpoints import make_checkpoint, read_tensors
from tests.support.decoders import write_decoder
from tests.support.jobs import CPU, download
from tests.support.sequences import FIELDS, LENGTHS, sequences
from tests.support.tamper import PARTS

pytestmark = pytest.mark.usefixtures("workers_here")

KINDS: Final = ("falcon-7b", "gpt2", "opt")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Source and artifact of each kind, rounded to nearest."""
    found = {}
    for kind in (*KINDS, "sample"):
        folder = tmp_path_factory.mktemp(kind)
        source = MODEL_DIR if kind == "sample" else make_checkpoint(folder / "model", kind)
        build, *_ = download(source, folder / "artifacts")
        for stage in ("quantize", "serialize"):
            run_stage(build, stage, Recipe(), CPU, SILENT)
        found[kind] = source, build.export
    return found


def other_codes(artifact: Path) -> Any:
    """The artifact with codes that no rounding chose: each takes the next level."""
    model = load(artifact, device="cpu")
    for module in model.modules():
        if isinstance(module, Linear4bit):
            codes = module.weight.data
            high, low = codes >> 4, codes & 15
            codes.copy_((high + 1).clamp(max=15) << 4 | (low + 1).clamp(max=15))
    return model


def compared(
    source: Path, model: Any, dtype: torch.dtype | None = None, **options: Any
) -> tuple[TokenScores, TokenScores | None]:
    with StreamedModel(source, "cpu", dtype) as streamed:
        comparison = Comparison(streamed, model, **options)
        scores = comparison.run(sequences(), lambda count: None)
    return scores, comparison.nearest


def same(one: TokenScores, other: TokenScores) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


@pytest.mark.parametrize("kind", [*KINDS, "sample"])
def test_it_is_what_the_built_artifact_of_round_to_nearest_scores(
    kind: str, built: dict[str, tuple[Path, Path]]
) -> None:
    source, artifact = built[kind]
    expected, none = compared(source, load(artifact, device="cpu"))
    assert none is None
    alone, _ = compared(source, other_codes(artifact))
    own, found = compared(source, other_codes(artifact), nearest=())
    assert found is not None
    assert len(found) == sum(LENGTHS) - len(LENGTHS)
    assert same(found, expected)
    assert same(own, alone)  # as if nobody had passed beside it
    assert own.kl.mean() > 2 * found.kl.mean() > 0


@pytest.mark.parametrize(
    ("kind", "module"),
    [("falcon-7b", "h.0.mlp.dense_4h_to_h"), ("gpt2", "h.1.attn.c_attn")],
)
def test_layers_that_were_kept_are_4_bit_beside_it(
    kind: str, module: str, built: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    source, artifact = built[kind]
    expected, _ = compared(source, load(artifact, device="cpu"))
    build, *_ = download(source, tmp_path)
    recipe = Recipe(quantize=QuantizeRecipe(skip_modules=(module,)))
    for stage in ("quantize", "serialize"):
        run_stage(build, stage, recipe, CPU, SILENT)
    names = [f"transformer.{module}"]
    own, found = compared(source, load(build.export, device="cpu"), nearest=names)
    assert found is not None
    assert same(found, expected)
    assert not same(own, expected)


def test_it_is_the_same_in_several_passes_and_again(
    built: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, artifact = built["falcon-7b"]
    once = compared(source, other_codes(artifact), nearest=())
    monkeypatch.setattr(compare, "TOGETHER", 40)
    passes = compared(source, other_codes(artifact), nearest=())
    with StreamedModel(source, "cpu") as streamed:
        comparison = Comparison(streamed, other_codes(artifact), nearest=())
        first = comparison.run(sequences(), lambda count: None), comparison.nearest
        again = comparison.run(sequences(), lambda count: None), comparison.nearest
    for other in (passes, first, again):
        for one, two in zip(once, other, strict=True):
            assert one is not None
            assert two is not None
            assert same(one, two)


@pytest.mark.parametrize("of", [2, len(LENGTHS) + 3])
def test_shares_of_the_sequences_make_the_whole(
    of: int, built: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Every figure is the same to the last bit, however many processes computed them."""
    source, artifact = built["falcon-7b"]
    read = sequences()
    with StreamedModel(source, "cpu") as streamed:
        whole = Comparison(streamed, other_codes(artifact), artifact, nearest=())
        expected = whole.run(read, lambda count: None)
    shares = []
    for number in range(of):
        if not (mine := share_of(number, of, len(read))):
            continue
        with StreamedModel(source, "cpu") as streamed:
            part = Comparison(streamed, other_codes(artifact), nearest=())
            own = read[mine.start : mine.stop]
            scores = part.run(own, lambda count: None, first=mine.start)
        path = tmp_path / f"{number}.npz"
        found = Share(scores, part.beside, part.worst.places, part.sums(), 1.5, 2, 3)
        found.save(path)
        shares.append(Share.load(path))
        assert (shares[-1].seconds, shares[-1].memory, shares[-1].device_memory) == (1.5, 2, 3)
    assert len(shares) == min(of, len(read))
    with StreamedModel(source, "cpu") as streamed:
        together = Comparison(streamed, load(artifact, device="cpu"), artifact)
        scores = together.take(shares)
    assert same(scores, expected)
    assert together.nearest is not None
    assert whole.nearest is not None
    assert same(together.nearest, whole.nearest)
    assert together.block_errors() == whole.block_errors()
    assert together.outside_errors() == whole.outside_errors()
    assert together.worst.places == whole.worst.places
    assert len(whole.worst.places) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_codes_in_files_score_what_the_artifact_with_them_scores(
    kind: str, built: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Of some layers; what no file holds is rounded to nearest."""
    source, artifact = built[kind]
    model = load(artifact, device="cpu")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    file, saved = tmp_path / "codes.safetensors", {}
    tensors: dict[str, Any] = {}
    for place, (name, layer) in enumerate(layers.items()):
        codes = layer.weight.data.numpy().reshape(-1)
        if place % 2 == 0:  # the next level each, as in `other_codes`
            codes = np.minimum((codes >> 4) + 1, 15) << 4 | np.minimum((codes & 15) + 1, 15)
            state = layer.weight.quant_state
            nested = NestedScales(state.absmax.numpy(), state.state2.absmax.numpy(), np.float32(0))
            tensors |= tensors_of(name, QuantizedWeight(codes.astype(np.uint8), nested, 0.0))
            saved[name] = SavedCodes(file=file, weight=name)
    save_file(tensors, file)
    other = other_codes(artifact)
    for place, name in enumerate(layers):
        layer = other.get_submodule(name)
        layer.weight.quant_state.offset = torch.tensor(0.0)
        if place % 2 == 1:
            layer.weight, layer.quant_state = layers[name].weight, layers[name].quant_state
    expected, _ = compared(source, other)
    with StreamedModel(source, "cpu") as streamed:
        comparison = Comparison(
            streamed, load(artifact, device="cpu"), nearest=(), before_learning=saved
        )
        own = comparison.run(sequences(), lambda count: None)
    assert comparison.before_learning is not None
    assert comparison.nearest is not None
    assert same(comparison.before_learning, expected)
    assert same(comparison.nearest, own)  # the artifact is rounded to nearest
    assert not same(own, expected)


def test_codes_of_an_rwkv_are_divided_as_its_weights_are(tmp_path: Path) -> None:
    """By powers of two, in every few blocks more: codes and scales are those of what is stored."""
    write_decoder(tmp_path / "model", "rwkv")
    build, *_ = download(tmp_path / "model", tmp_path / "artifacts")
    for stage in ("quantize", "serialize"):
        run_stage(build, stage, Recipe(), CPU, SILENT)
    model = load(build.export, device="cpu")
    file, saved = tmp_path / "codes.safetensors", {}
    tensors: dict[str, Any] = {}
    for name, layer in model.named_modules():
        if _is_4bit(layer):
            state = layer.weight.quant_state
            state.offset = torch.tensor(0.0)
            nested = NestedScales(state.absmax.numpy(), state.state2.absmax.numpy(), np.float32(0))
            codes = layer.weight.data.numpy().reshape(-1)
            tensors |= tensors_of(name, QuantizedWeight(codes, nested, 0.0))
            saved[name] = SavedCodes(file=file, weight=name)
    save_file(tensors, file)
    stored = {name: _values(model.get_submodule(name)) for name in saved}
    divisors = []
    with StreamedModel(tmp_path / "model", "cpu") as streamed:
        baseline = Baseline(streamed, model, saved=saved)
        for block in streamed.blocks:
            streamed.open(block)
            baseline.open(block)
            for name in (name for name in saved if name.startswith(f"{block}.")):
                divisors.append(streamed.divisor(f"{name}.weight"))
                found = _values(baseline.model.get_submodule(name))
                assert torch.equal(found * divisors[-1], stored[name])
            streamed.close(block)
            baseline.close(block)
    assert sorted(divisors) == [1] * (len(saved) - 2) + [2, 2]


def _values(layer: Any) -> torch.Tensor:
    values: torch.Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return values.float()


def test_the_reference_stays_what_it_is(built: dict[str, tuple[Path, Path]]) -> None:
    """Within a block, while it is open, and outside of them; of the twin nothing is left."""
    source, artifact = built["opt"]
    model = other_codes(artifact)
    codes = {n: m.weight.data.clone() for n, m in model.named_modules() if n and _is_4bit(m)}
    with StreamedModel(source, "cpu") as streamed:
        twin = Baseline(streamed, model)
        stem = dict(streamed.model.state_dict())
        for block in streamed.blocks:
            streamed.open(block)
            before = {n: p.clone() for n, p in streamed.blocks[block].named_parameters()}
            twin.open(block)
            assert len(before) > 0
            for name, parameter in streamed.blocks[block].named_parameters():
                assert torch.equal(parameter, before[name])
            layers = {n: m for n, m in twin.blocks[block].named_modules() if _is_4bit(m)}
            for name, layer in layers.items():
                assert not torch.equal(layer.weight.data, codes[f"{block}.{name}"])
            streamed.close(block)
            twin.close(block)
            for name, layer in layers.items():
                assert layer.weight is model.get_submodule(f"{block}.{name}").weight
        for name, value in streamed.model.state_dict().items():
            assert value.is_meta or torch.equal(value, stem[name])
    for name, before_codes in codes.items():
        assert torch.equal(model.get_submodule(name).weight.data, before_codes)
    kept = {n: p for n, p in model.named_parameters() if not _is_4bit_weight(p)}
    twins = dict(twin.model.named_parameters())
    assert all(twins[name] is parameter for name, parameter in kept.items())  # no copies


def _is_4bit(module: Any) -> bool:
    return isinstance(module, Linear4bit)


def _is_4bit_weight(parameter: Any) -> bool:
    return type(parameter).__name__ == "Params4bit"


def test_a_layer_that_stays_in_16_bit_stays_so(
    tmp_path: Path, built: dict[str, tuple[Path, Path]]
) -> None:
    """What is 4 bit in the artifact is rounded, and nothing else."""
    source, _ = built["falcon-7b"]
    recipe = Recipe(quantize=QuantizeRecipe(skip_modules=("h.0.mlp",)))
    build, *_ = download(source, tmp_path)
    for stage in ("quantize", "serialize"):
        run_stage(build, stage, recipe, CPU, SILENT)
    expected, _ = compared(source, load(build.export, device="cpu"))
    _, found = compared(source, other_codes(build.export), nearest=())
    assert found is not None
    assert same(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 96), (7, 45), (1, 1)])
def test_codes_and_scales_are_those_that_bitsandbytes_makes(
    dtype: torch.dtype, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    stock_kernel = torch.ops.bitsandbytes.quantize_4bit.default
    codes, absmax = stock_kernel(weight, 64, "nf4", torch.uint8)
    monkeypatch.setattr(nearest, "_PART", 128)  # several threads, and an end that is ragged
    found, beside = round_weight(weight)
    assert torch.equal(found, codes.reshape(-1, 1))
    state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)[1]
    offset = absmax.mean()
    levels = beside[".nested_quant_map"][beside[".absmax"].long()]
    nested = beside[".nested_absmax"].repeat_interleave(256)[: len(levels)]
    stock = torch.ops.bitsandbytes.dequantize_blockwise.default(
        state.absmax, state.state2.absmax, state.state2.code, 256, torch.float32
    )
    assert levels * nested + offset == pytest.approx(stock + state.offset, rel=1e-5)


def test_the_stored_tensors_are_those_of_the_built_artifact(
    built: dict[str, tuple[Path, Path]],
) -> None:
    for kind in ("falcon-7b", "gpt2"):
        source, artifact = built[kind]
        tensors = read_tensors(artifact)
        weights = [name.removesuffix(".absmax") for name in tensors if name.endswith(".absmax")]
        weights = [name for name in weights if not name.endswith("nested")]
        assert len(weights) == 8
        plain = read_tensors(source)
        for name in weights:
            original = next(plain[n] for n in plain if name.endswith(n))
            codes, beside = round_weight(original.T if kind == "gpt2" else original)
            assert torch.equal(codes, tensors[name])
            for part in PARTS:
                assert torch.equal(beside[part], tensors[name + part]), part
