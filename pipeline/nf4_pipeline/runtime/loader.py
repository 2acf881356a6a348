"""Loads an NF4 artifact on transformers >= 5.5, or quantizes a plain checkpoint while loading it.

transformers >= 5.5 makes a module a `Linear4bit` only if `type(module) is nn.Linear`, so a Falcon,
whose projections are a subclass, fails to load with a size mismatch. The subclass here hands the
stock quantizer a model in which every plain subclass has become an nn.Linear; nothing else differs.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.checkpoint.source import open_checkpoint
from nf4_pipeline.errors import ArtifactError, PipelineError, ResourceError
from nf4_pipeline.model.check_folder import building, check_model_fits
from nf4_pipeline.model.config import brief_text, read_config
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer
from nf4_pipeline.model.linear import is_plain_linear
from nf4_pipeline.model.load_dtype import compute_dtype, float32_parts
from nf4_pipeline.quiet_libraries import quiet_loading
from nf4_pipeline.runtime.artifact import is_quantized, open_folder
from nf4_pipeline.runtime.bnb_cpu_fixes import repair

_QUANTIZER_NAME: Final = "bitsandbytes_4bit"
_swap = threading.Lock()  # the table of quantizers belongs to the whole process


@dataclass(frozen=True)
class LoadReport:
    """What a loader says of the names in a checkpoint.

    Attributes:
        missing: parameters of the model that the files did not give.
        unexpected: tensors in the files that the model has no place for.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def load(
    artifact: str | Path | None = None,
    *,
    device: str = "auto",
    quantize: bool = True,
    dtype: str = "auto",
) -> Any:
    """Loads a causal LM, ready to generate.

    Args:
        artifact: an artifact, a build folder, a plain 16-bit checkpoint, or a Hub id; None takes
            the newest build under ./artifacts.
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N".
        quantize: a plain checkpoint is quantized to NF4 while it is loaded; False loads it in the
            precision it is stored in. An artifact is loaded as it is.
        dtype: what is computed in: "bfloat16", "float16", "float32", or "auto" for what the
            checkpoint is stored in (float16 for bfloat16 on a GPU older than Ampere, such as a T4,
            which has no bfloat16 arithmetic).

    Returns:
        A transformers model in eval mode on the device.

    Raises:
        ArtifactError: the folder holds no model that transformers can load, or 4-bit weights
            without scales.
        SourceError: the folder holds no weights in safetensors, a file leads out of it or is not
            what its name says, or the config is not that of the weights.
        HubError: the Hub does not give the model.
        ResourceError: this machine has no such device.
        UsageError: the name means nothing, or `dtype` is none that models are computed in.
    """
    return load_with_report(artifact, device=device, quantize=quantize, dtype=dtype)[0]


def load_with_report(
    artifact: str | Path | None = None,
    *,
    device: str = "auto",
    quantize: bool = True,
    dtype: str = "auto",
) -> tuple[Any, LoadReport]:
    """Loads a model as `load` does, and says what did not fit."""
    where = open_folder(artifact)
    folder = str(where)
    target = pick_device(device)
    from transformers import AutoModelForCausalLM

    _check_quantization(where)
    check_model_fits(open_checkpoint(where))
    try:
        computed_in = compute_dtype(_declared_dtype(folder), target, dtype) or "auto"
        plain = quantize and not is_quantized(folder)
        # Named only where it is wanted: None would go over what the artifact's own config says.
        options = {"quantization_config": _nf4_config(computed_in)} if plain else {}
        with quiet_loading(), _quantize_plain_subclasses():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                dtype=computed_in,
                device_map={"": target},
                **options,
            )
    except PipelineError:
        raise
    except Exception as error:  # untrusted configs and weights fail in any way they like
        raise ArtifactError(
            f"{folder} could not be loaded on {target}: {brief_text(error)}"
        ) from error
    _check_scales(model, folder)
    _unify_dtypes(model)
    repair(model)
    names = LoadReport(
        tuple(sorted(report["missing_keys"])), tuple(sorted(report["unexpected_keys"]))
    )
    return model.eval(), names


def load_tokenizer(artifact: str | Path | None = None) -> Any:
    """The tokenizer that belongs to a model; see `load` for the names it takes.

    It is a stranger's program and runs in this process: what it takes is not limited here.

    Raises:
        ArtifactError: the tokenizer does not load.
        SourceError: a file of it leads out of the folder, or is not what its name says.
        UsageError: the name means nothing.
    """
    return LimitedTokenizer.open(open_folder(artifact, weights=False)).tokenizer


def _check_quantization(folder: Path) -> None:
    """Refuses formats whose loaders are others' code, and were not looked at."""
    said = read_config(folder).get("quantization_config")
    method = said.get("quant_method", "bitsandbytes") if isinstance(said, dict) else said
    if said is not None and method != "bitsandbytes":
        raise ArtifactError(
            f"{folder} is quantized, and not by bitsandbytes: its config.json gives "
            f"{str(method)[:80]!r} as the method. Load it with transformers itself."
        )


def _check_scales(model: Any, folder: str) -> None:
    """Refuses weights that should be 4 bit and came as something else: their layers cannot run."""
    from bitsandbytes.nn import Linear4bit

    wrong = [
        f"{name} ({str(module.weight.dtype).removeprefix('torch.')})"
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit) and getattr(module.weight, "quant_state", None) is None
    ]
    if wrong:
        raise ArtifactError(
            f"{folder}: its config.json says that {len(wrong)} layers are 4 bit, and their weights "
            f"came without scales: {', '.join(wrong[:3])}. Build it again, or name them in "
            "llm_int8_skip_modules there."
        )


def _unify_dtypes(model: Any) -> None:
    """Casts what is not 4 bit to the model's dtype, as loading the 16-bit checkpoint would.

    An artifact holds exact copies, and transformers does not cast what it loads beside 4-bit
    weights; a checkpoint of mixed dtypes would not run.
    """
    import torch
    from bitsandbytes.nn import Linear4bit

    wanted = getattr(model.config, "dtype", None)
    if wanted is None or not getattr(model, "is_loaded_in_4bit", False):
        return
    exempt = float32_parts(model, wanted)
    for name, parameter in model.named_parameters():
        plain = type(parameter).__name__ == "Parameter" and parameter.is_floating_point()
        in_float32 = exempt is not None and exempt.search(name)
        if plain and parameter.dtype != wanted and not in_float32:
            parameter.data = parameter.data.to(wanted)
    for module in model.modules():
        if isinstance(module, Linear4bit) and module.compute_dtype == torch.bfloat16 != wanted:
            module.compute_dtype = wanted


def pick_device(device: str) -> str:
    """Turns "auto" into "cuda:0" or "cpu", and checks that the device exists.

    Raises:
        ResourceError: `device` is no name of a device, or this machine does not have it.
    """
    import torch

    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return "cpu"
    index = device.partition(":")[2]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not re.fullmatch("cuda(:[0-9]{1,4})?", device):
        raise ResourceError(f"No device is called {device!r}; expected auto, cpu, cuda or cuda:N.")
    number = int(index or 0)
    if number >= count:
        raise ResourceError(
            f"Device {device} was asked for, but this machine has {count} CUDA devices. "
            "Use --device cpu, or look at nvidia-smi."
        )
    return f"cuda:{number}"


def cuda_devices(device: str) -> list[str]:
    """The CUDA devices that a choice stands for: all for "auto" and "cuda", one if it has a number.

    Raises:
        ResourceError: `device` is no name of a device, or this machine does not have it.
    """
    import torch

    picked = pick_device(device)
    if picked == "cpu":
        return []
    if device in ("auto", "cuda"):
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [picked]


def _declared_dtype(folder: str) -> Any:
    from transformers import AutoConfig

    with building(Path(folder)):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        return getattr(config, "dtype", None)


def _nf4_config(dtype: Any) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype if isinstance(dtype, torch.dtype) else torch.bfloat16,
    )


@contextmanager
def _quantize_plain_subclasses() -> Iterator[None]:
    """Lets transformers quantize plain subclasses of nn.Linear, too, while the body runs."""
    from torch import nn
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    class PlainSubclassQuantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
        def _process_model_before_weight_loading(self, model: Any, *args: Any, **kw: Any) -> Any:
            for module in model.modules():
                if is_plain_linear(module):
                    module.__class__ = nn.Linear
            return super()._process_model_before_weight_loading(model, *args, **kw)

    with _swap:
        stock = AUTO_QUANTIZER_MAPPING[_QUANTIZER_NAME]
        AUTO_QUANTIZER_MAPPING[_QUANTIZER_NAME] = PlainSubclassQuantizer
        try:
            yield
        finally:
            AUTO_QUANTIZER_MAPPING[_QUANTIZER_NAME] = stock
