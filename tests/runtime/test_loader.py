"""`load`: where a model goes, what it computes in, and what other libraries can do with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import nf4_pipeline
import pytest
from nf4_pipeline.errors import PipelineError, ResourceError, UsageError

torch = pytest.importorskip("torch")

TOKENS: Final = torch.arange(12).reshape(2, 6) * 7 + 5


@pytest.fixture(scope="module")
def export(exported_falcon: Path) -> Path:
    return exported_falcon / "export"


@pytest.fixture(scope="module")
def expected(export: Path) -> Any:
    return logits(nf4_pipeline.load(export, device="cpu"))


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(TOKENS).logits


@pytest.fixture(scope="module", autouse=True)
def no_gpu() -> Any:
    """Also on a machine with GPUs, "auto" means the CPU here; tests/gpu has the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.mark.parametrize(
    "device_map",
    [
        "auto",
        "balanced",
        "sequential",
        "cpu",
        torch.device("cpu"),
        {"": "cpu"},
        {"transformer": "cpu", "lm_head": torch.device("cpu")},
    ],
    ids=str,
)
def test_every_form_of_a_device_map(device_map: Any, export: Path, expected: Any) -> None:
    model = nf4_pipeline.load(export, device_map=device_map)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert model.is_loaded_in_4bit
    assert not model.training
    assert torch.equal(logits(model), expected)


REFUSED: Final[dict[str, tuple[dict[str, Any], type[PipelineError], str]]] = {
    "both": ({"device": "cpu", "device_map": "auto"}, UsageError, "give one of them"),
    "no device": ({"device_map": "tpu"}, ResourceError, "'tpu'"),
    "no such GPU": ({"device_map": 7}, ResourceError, "cuda:7"),
    "no such GPU of a module": ({"device_map": {"": "cuda:1"}}, ResourceError, "cuda:1"),
    "no device of a module": ({"device_map": {"": "gpu"}}, ResourceError, "'gpu'"),
    "a disk": ({"device_map": {"": "disk"}}, UsageError, "4-bit weights"),
    "the CPU and a disk": (
        {"device_map": {"transformer": "cpu", "lm_head": "disk"}},
        UsageError,
        "4-bit weights compute only where they lie",
    ),
    "an empty map": ({"device_map": {}}, UsageError, "device_map is empty"),
    "memory of one device": ({"max_memory": {0: "1GB"}}, UsageError, "max_memory needs"),
    "no dtype": ({"device": "cpu", "dtype": "int8"}, UsageError, "'int8'"),
    "no float": ({"device": "cpu", "dtype": torch.int8}, UsageError, "'int8'"),
    "a revision of a folder": ({"revision": "main"}, UsageError, "a local folder"),
    "no device at all": ({"device": "gpu"}, ResourceError, "'gpu'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_means_nothing_here_is_refused(case: str, export: Path) -> None:
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        nf4_pipeline.load(export, **options)


@pytest.mark.parametrize("dtype", [torch.float32, "float32", torch.float16, torch.bfloat16])
def test_what_is_computed_in(dtype: Any, export: Path) -> None:
    model = nf4_pipeline.load(export, device_map="auto", dtype=dtype)
    found = logits(model)
    assert str(found.dtype).endswith(str(dtype).removeprefix("torch."))
    assert found.isfinite().all()


def test_a_plain_checkpoint_may_wait_on_the_cpu(tiny_falcon: Path) -> None:
    """Where nothing is 4 bit, any map of transformers will do."""
    model = nf4_pipeline.load(tiny_falcon, device_map={"": "cpu"}, quantize=False)
    assert not getattr(model, "is_loaded_in_4bit", False)


def test_in_a_pipeline_of_transformers(export: Path) -> None:
    from transformers import pipeline

    model = nf4_pipeline.load(export, device="cpu")
    tokenizer = nf4_pipeline.load_tokenizer(export)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (answer,) = write("Hello", max_new_tokens=5, do_sample=False)
    assert answer["generated_text"].startswith("Hello")
    (ours,) = nf4_pipeline.load_tokenizer(export).batch_decode(
        model.generate(
            **tokenizer("Hello", return_tensors="pt"), max_new_tokens=5, do_sample=False
        ),
        skip_special_tokens=True,
    )
    assert answer["generated_text"] == ours


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by old names
def test_it_is_trained_by_peft(export: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = nf4_pipeline.load(export, device="cpu")
    tuned = peft.get_peft_model(
        peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False),
        peft.LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM"),
    )
    trainable = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=1.0)
    losses = []
    for _ in range(4):
        loss = tuned(TOKENS, labels=TOKENS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        nf4_pipeline.load(export, device="cpu"), tmp_path / "adapter"
    )
    with torch.inference_mode():
        assert torch.allclose(
            again(TOKENS).logits.float(), tuned.eval()(TOKENS).logits.float(), atol=0.05
        )
