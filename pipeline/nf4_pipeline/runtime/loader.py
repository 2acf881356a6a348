"""Loads an NF4 artifact on transformers >= 5.5, or quantizes a plain checkpoint while loading it.

transformers >= 5.5 makes a module a `Linear4bit` only if `type(module) is nn.Linear`, so a Falcon,
whose projections are a subclass, fails to load with a size mismatch. The subclass here hands the
stock quantizer a model in which every plain subclass has become an nn.Linear; nothing else differs.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypedDict

from nf4_pipeline.checkpoint.folder_advice import cache_commit
from nf4_pipeline.checkpoint.source import open_checkpoint
from nf4_pipeline.errors import ArtifactError, PipelineError, ResourceError, UsageError
from nf4_pipeline.machine import no_such_device
from nf4_pipeline.model.check_folder import building, check_model_fits
from nf4_pipeline.model.config import brief_text, read_config
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer
from nf4_pipeline.model.linear import is_plain_linear
from nf4_pipeline.model.load_dtype import compute_dtype, float32_parts
from nf4_pipeline.progress import ProgressCallback, reporting_to
from nf4_pipeline.quiet_libraries import quiet_loading
from nf4_pipeline.runtime.artifact import is_quantized, open_folder
from nf4_pipeline.runtime.bnb_cpu_fixes import repair

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    DeviceMap = str | int | torch.device | Mapping[str, str | int | torch.device]
    """Where the modules of a model go, as transformers takes it."""

_SPREAD: Final = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps that transformers makes by itself."""
_ELSEWHERE: Final = ("cpu", "disk")
"""Where a device map may put modules that no GPU holds."""
_NO_ROOM: Final = "dispatched on the CPU or the disk"  # in what transformers says of it

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


class LoadOptions(TypedDict, total=False):
    """The keywords of `load`."""

    device: str
    device_map: DeviceMap | None
    max_memory: Mapping[int | str, int | str] | None
    dtype: str | torch.dtype
    quantize: bool
    revision: str | None
    offline: bool
    progress: ProgressCallback | None


def load(
    path_or_repo: str | PathLike[str] | None = None,
    *,
    device: str = "auto",
    device_map: DeviceMap | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    dtype: str | torch.dtype = "auto",
    quantize: bool = True,
    revision: str | None = None,
    offline: bool = False,
    progress: ProgressCallback | None = None,
) -> PreTrainedModel:
    """Loads a causal LM, ready to generate.

    A model on the Hub is pinned to a commit, and every file's hash is checked; the commit is left
    in `model.config._commit_hash`.

    Args:
        path_or_repo: an artifact, a build folder, a plain 16-bit checkpoint, or a Hub id; None
            takes the newest build under ./artifacts.
        device: the one device of the model: "auto" (a GPU where there is one), "cpu", "cuda" or
            "cuda:N".
        device_map: for several devices, instead of `device`, as transformers takes it: "auto" or
            "balanced" (over all GPUs), "balanced_low_0", "sequential", or the device of each
            module by its name.
        max_memory: with such a word as `device_map`, how much of each device may be used, such as
            {0: "10GiB", 1: "20GiB"}.
        dtype: what is computed in: "bfloat16", "float16", "float32" or a torch dtype of these, or
            "auto" for what the checkpoint is stored in (float16 for bfloat16 on a GPU older than
            Ampere, such as a T4, which has no bfloat16 arithmetic).
        quantize: a plain checkpoint is quantized to NF4 while it is loaded; False loads it in the
            precision it is stored in. An artifact is loaded as it is.
        revision: branch, tag or commit of a model on the Hub; None for its main branch.
        offline: take a model on the Hub as it is cached; HF_HUB_OFFLINE says so, too.
        progress: told how far a download is.

    Returns:
        A transformers model in eval mode on its devices.

    Raises:
        ArtifactError: the folder holds no model that transformers can load, or 4-bit weights
            without scales.
        SourceError: the folder holds no weights in safetensors, a file leads out of it or is not
            what its name says, or the config is not that of the weights.
        HubError: the Hub does not give the model, or not the bytes that it lists.
        ResourceError: this machine has no such device, or its devices have too little memory.
        UsageError: the name means nothing, or an option is out of its range or does not go with
            another one.
    """
    return load_with_report(
        path_or_repo,
        device=device,
        device_map=device_map,
        max_memory=max_memory,
        dtype=dtype,
        quantize=quantize,
        revision=revision,
        offline=offline,
        progress=progress,
    )[0]


def load_with_report(
    path_or_repo: str | PathLike[str] | None = None,
    *,
    device: str = "auto",
    device_map: DeviceMap | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    dtype: str | torch.dtype = "auto",
    quantize: bool = True,
    revision: str | None = None,
    offline: bool = False,
    progress: ProgressCallback | None = None,
) -> tuple[PreTrainedModel, LoadReport]:
    """Loads a model as `load` does, and says what did not fit."""
    placement = _place(device, device_map, max_memory)
    with reporting_to(progress) as reporter:
        where = open_folder(_named(path_or_repo), reporter, revision=revision, offline=offline)
    folder = str(where)
    from transformers import AutoModelForCausalLM

    _check_quantization(where)
    plain = quantize and not is_quantized(folder)
    if plain or is_quantized(folder):
        placement.check_4bit()
    check_model_fits(open_checkpoint(where))
    try:
        computed_in = _computed_in(_declared_dtype(folder), placement, dtype)
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
                device_map=placement.device_map,
                **({"max_memory": dict(max_memory)} if max_memory else {}),
                **options,
            )
    except PipelineError:
        raise
    except Exception as error:  # untrusted configs and weights fail in any way they like
        raise _refused(error, folder, placement) from error
    if plain or is_quantized(folder):
        placement.check_spread(model, folder)
    _check_scales(model, folder)
    _unify_dtypes(model)
    repair(model)
    _name_as_on_hub(model, where)
    names = LoadReport(
        tuple(sorted(report["missing_keys"])), tuple(sorted(report["unexpected_keys"]))
    )
    return model.eval(), names


def load_tokenizer(
    path_or_repo: str | PathLike[str] | None = None,
    *,
    revision: str | None = None,
    offline: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model.

    It is a stranger's program and runs in this process: what it takes is not limited here.

    Args:
        path_or_repo: as `load` takes it; of a Hub model, the weights are not fetched.
        revision: branch, tag or commit of a model on the Hub; None for its main branch.
        offline: take a model on the Hub as it is cached; HF_HUB_OFFLINE says so, too.

    Raises:
        ArtifactError: the tokenizer does not load.
        SourceError: a file of it leads out of the folder, or is not what its name says.
        HubError: the Hub does not give the model, or not the bytes that it lists.
        UsageError: the name means nothing, or a revision was given for a local folder.
    """
    folder = open_folder(_named(path_or_repo), weights=False, revision=revision, offline=offline)
    tokenizer: PreTrainedTokenizerBase = LimitedTokenizer.open(folder).tokenizer
    return tokenizer


def _named(path_or_repo: str | PathLike[str] | None) -> str | None:
    return None if path_or_repo is None else fspath(path_or_repo)


@dataclass(frozen=True)
class _Placement:
    """Where a model goes.

    Attributes:
        device_map: as transformers takes it.
        devices: that it may compute on, as "cpu" or "cuda:N".
    """

    device_map: Any
    devices: tuple[str, ...]

    def check_4bit(self) -> None:
        """Refuses what 4-bit weights cannot do: wait on the CPU or a disk for their turn."""
        places = set(self.device_map.values()) if isinstance(self.device_map, dict) else set()
        if places & {*_ELSEWHERE} and places != {"cpu"}:
            raise UsageError(
                "device_map puts modules on the CPU or a disk beside those on a GPU, and 4-bit "
                "weights compute only where they lie. Name GPUs for all modules, or the CPU."
            )

    def check_spread(self, model: Any, folder: str) -> None:
        """Refuses a spread for which transformers took the CPU or a disk beside the GPUs.

        Raises:
            ResourceError: the GPUs have too little memory.
        """
        # Not hf_device_map: where all of it lies on the CPU, transformers leaves none.
        places = {parameter.device.type for parameter in model.parameters()}
        if isinstance(self.device_map, str) and self.devices != ("cpu",) and places != {"cuda"}:
            raise _no_room(folder, self)

    def __str__(self) -> str:
        return ", ".join(self.devices)


def _place(
    device: str, device_map: DeviceMap | None, max_memory: Mapping[int | str, int | str] | None
) -> _Placement:
    """What `device` and `device_map` mean on this machine.

    Raises:
        ResourceError: a device is named that this machine does not have.
        UsageError: options were given that do not go together.
    """
    spread = isinstance(device_map, str) and device_map in _SPREAD
    if device_map is not None and device != "auto":
        raise UsageError(
            f"device is {device!r} and device_map is {str(device_map)[:80]!r}; give one of them."
        )
    if max_memory and not spread:
        raise UsageError(f"max_memory needs a device_map that is one of {', '.join(_SPREAD)}.")
    if spread:
        return _Placement(device_map, tuple(cuda_devices("auto")) or ("cpu",))
    if isinstance(device_map, Mapping):
        places = {name: _device_name(place) for name, place in device_map.items()}
        if not places:
            raise UsageError("device_map is empty; expected the device of each module by its name.")
        computing = {place for place in places.values() if place != "disk"}
        return _Placement(places, tuple(sorted(computing)) or ("cpu",))
    target = pick_device(device) if device_map is None else _device_name(device_map)
    return _Placement({"": target}, (target,))


def _device_name(place: Any) -> str:
    """ "cpu", "disk" or "cuda:N" for what transformers takes as a device."""
    if isinstance(place, int):
        place = f"cuda:{place}"
    return str(place) if str(place) in _ELSEWHERE else pick_device(str(place))


def _computed_in(declared: Any, placement: _Placement, wanted: str | torch.dtype) -> Any:
    """The dtype that all devices of a model can compute in; "auto" if nothing says any."""
    import torch

    name = wanted if isinstance(wanted, str) else str(wanted).removeprefix("torch.")
    found = [compute_dtype(declared, device, name) for device in placement.devices]
    return torch.float16 if torch.float16 in found else found[0] or "auto"


def _refused(error: Exception, folder: str, placement: _Placement) -> PipelineError:
    """What transformers or torch raised while a model was loaded, as an error of ours."""
    import torch

    if isinstance(error, torch.OutOfMemoryError) or _NO_ROOM in str(error):
        return _no_room(folder, placement)
    return ArtifactError(f"{folder} could not be loaded on {placement}: {brief_text(error)}")


def _no_room(folder: str, placement: _Placement) -> ResourceError:
    return ResourceError(
        f"{folder} does not fit the memory of {placement}. End what else runs there, or spread "
        'it over more GPUs (device_map="auto", without a max_memory that is too small).'
    )


def _name_as_on_hub(model: Any, folder: Path) -> None:
    """Lets a model of the Hub carry its repo and commit, not a folder of this machine's cache.

    PEFT writes that name into an adapter, for whoever loads it.
    """
    if (found := cache_commit(folder)) is not None:
        model.name_or_path = model.config._name_or_path = found[0]
        model.config._commit_hash = found[1]


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
        raise no_such_device(device, count)
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


def devices_alike(device: str) -> list[str]:
    """The devices that compute the same bits as the first one that a choice stands for.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".

    Returns:
        "cpu", or the CUDA devices of the first one's name.

    Raises:
        ResourceError: `device` is no name of a device, or this machine does not have it.
    """
    import torch

    found = cuda_devices(device)
    names = [torch.cuda.get_device_name(each) for each in found]
    alike = [each for each, name in zip(found, names, strict=True) if name == names[0]]
    return alike or ["cpu"]


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
