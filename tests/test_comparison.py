"""docs/comparison.md: its table is what was measured; what reads the peers' files reads them right.

That its evaluation agrees with verify is held in tests/test_calibrated_sample.py.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import pytest
from nf4_pipeline.sample import MODEL_DIR, TEXT

ROOT: Final = Path(__file__).parents[1]
SCRIPTS: Final = ROOT / "scripts"
RESULTS: Final = ROOT / "docs" / "comparison.json"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is imported stands where the comparison's own programs find it."""
    monkeypatch.syspath_prepend(SCRIPTS / "peers" / "drivers")
    monkeypatch.syspath_prepend(SCRIPTS)


@pytest.fixture
def results() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(RESULTS.read_text("utf-8"))
    return value


@pytest.mark.usefixtures("scripts")
def test_the_page_shows_what_was_measured(results: dict[str, Any]) -> None:
    table: str = import_module("peers.table").render(results)
    assert table in (ROOT / "docs" / "comparison.md").read_text("utf-8")


@pytest.mark.usefixtures("scripts")
def test_every_contestant_has_a_row(results: dict[str, Any]) -> None:
    contestants = import_module("peers.contestants").CONTESTANTS
    for model in results["models"]:
        assert [row["name"] for row in model["rows"]] == [one.name for one in contestants]
        for row in model["rows"]:
            assert ("fidelity" in row) != ("error" in row)


def test_what_verify_says_of_ours_agrees(results: dict[str, Any]) -> None:
    """It multiplies with bitsandbytes' CPU kernels, which round scales; here nothing is rounded."""
    ours = [row for m in results["models"] for row in m["rows"] if "verify_mean_kl" in row]
    assert len(ours) >= 3
    for row in ours:
        assert row["fidelity"]["mean_kl"]["value"] == pytest.approx(row["verify_mean_kl"], rel=0.05)


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize("fault", ["other values", "another shape", "another name"])
def test_a_wrong_decoder_is_no_row(fault: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    evaluation = import_module("peers.evaluation")
    name = "transformer.h.0.self_attention.dense.weight"
    weight = evaluation.read_source(MODEL_DIR)[name].float()
    if fault == "other values":
        weight = weight.flip(0)
    elif fault == "another shape":
        weight = weight[:-1]
    else:
        name = "model.layers.0.self_attn.o_proj.weight"
    save_file({name: weight.contiguous()}, tmp_path / "decoded.safetensors")
    short = evaluation.Evaluation(MODEL_DIR, TEXT, 64)
    with pytest.raises(evaluation.WrongDecoding, match=name):
        short.fidelity(tmp_path / "decoded.safetensors")
    assert torch.isfinite(weight).all()


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize("order", [False, True], ids=["in order", "columns in another order"])
@pytest.mark.parametrize("offset", [0, 1])
def test_codes_of_gptq_are_unpacked(offset: int, order: bool) -> None:
    """Against codes that are packed here, one by one, as the format has them."""
    import torch

    rows, columns, group = 16, 64, 32
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (columns, rows), generator=generator)
    zeros = torch.randint(1, 16, (columns // group, rows), generator=generator)
    scales = torch.rand(columns // group, rows, generator=generator).half()
    places = torch.arange(columns) // group
    if order:
        places = places[torch.randperm(columns, generator=generator)]

    def packed(values: torch.Tensor, dim: int) -> torch.Tensor:
        first = values.movedim(dim, 0)
        parts = first.reshape(-1, 8, first.shape[1]).long()
        words = torch.stack([parts[:, i] << (4 * i) for i in range(8)]).sum(dim=0)
        return words.to(torch.int32).movedim(0, dim)  # wraps, as the format's words do

    tensors = {
        "layer.qweight": packed(codes, 0),
        "layer.qzeros": packed(zeros - offset, 1),
        "layer.scales": scales,
        "layer.g_idx": places.int(),
    }
    if not order:
        del tensors["layer.g_idx"]
    ((name, (values, nbytes)),) = import_module("common").decode_gptq(tensors, offset).items()
    assert name == "layer.weight"
    expected = (codes - zeros[places]).float() * scales[places].float()
    assert torch.equal(values, expected.T)
    assert nbytes == sum(t.numel() * t.element_size() for t in tensors.values())
