"""config.json of a checkpoint: read as untrusted data, turned into a transformers config.

`auto_map` points at Python files in the repository. They are never run and never come along; a
config that transformers itself does not know is refused.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.checkpoint.folder_advice import without_config
from nf4_pipeline.checkpoint.named_source import named_source
from nf4_pipeline.checkpoint.quantized_formats import quantization_of
from nf4_pipeline.checkpoint.source import Checkpoint, read_json
from nf4_pipeline.checkpoint.weight_files import NAMED_IN_CONFIG
from nf4_pipeline.errors import AlreadyQuantizedError, ArchitectureError, SourceError
from nf4_pipeline.sample import SAMPLE_REPO

CONFIG_FILE: Final = "config.json"

_ONLY_DECODERS: Final = (
    "Only decoder-only models, which have no encoder, are quantized here: choose one such as "
    "Falcon, Llama, Mistral or Qwen."
)
_CAUSAL_SUFFIXES: Final = ("ForCausalLM", "LMHeadModel")


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json, as it stands.

    Raises:
        SourceError: the folder has no config.json, so it is no Hugging Face checkpoint.
        CheckpointError: config.json is no JSON object.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        if (advice := without_config(folder)) is not None:
            raise SourceError(advice)
        raise SourceError(
            f"{folder} has no {CONFIG_FILE}, so it is not a Hugging Face checkpoint. "
            "Name a folder that `save_pretrained` wrote, or a model id on the Hub."
        )
    return read_json(path)


def check_not_quantized(
    config: dict[str, Any],
    checkpoint: Checkpoint | None,
    where: Path,
    *,
    repo: str | None = None,
    others: Collection[str] = (),
) -> None:
    """Refuses a checkpoint that is quantized already.

    Args:
        config: its config.json.
        checkpoint: the headers of its weights; None if they cannot be read yet.
        where: the folder.
        repo: by which it is called, if it is on the Hub.
        others: names of files that are there and not in the folder.

    Raises:
        AlreadyQuantizedError: the config, the tensors or a file beside them say so.
    """
    tensors = [tensor.header for tensor in checkpoint.tensors] if checkpoint else []
    names = {*others, *(path.name for path in where.iterdir())} if where.is_dir() else {*others}
    called = repo or str(where)
    how = quantization_of(tensors, config, names)
    if how is not None and "manifest.json" in names:
        raise AlreadyQuantizedError(
            f"{called} is already quantized: it is an artifact that nf4 made. Use it: nf4 prompt "
            f'{shlex.quote(called)} "Hello". {_how_to_build_another(where)}'
        )
    if how is not None:
        raise AlreadyQuantizedError(
            f"{called} is already quantized, as {how}. "
            "Start from the 16-bit model that it was made from; the card of its repository on the "
            "Hub names that."
        )


def _how_to_build_another(artifact: Path) -> str:
    """How to make another artifact of the same source, as far as its manifest says which."""
    repo, commit = named_source(artifact) or ("", None)
    if repo == SAMPLE_REPO:
        return "To build another: nf4 build sample"
    if commit is not None:
        return f"To build another, start from its source: nf4 build {repo} --revision {commit}"
    named = f", a folder called {repo} where it was made" if repo else ""
    return f"To build another, start from its 16-bit source{named}."


def without_remote_code(config: dict[str, Any]) -> dict[str, Any]:
    """The config without its pointers to custom code and without a quantization config."""
    dropped = {"auto_map", "custom_pipelines", "quantization_config", NAMED_IN_CONFIG}
    return {key: value for key, value in config.items() if key not in dropped}


def _with_floats(value: Any) -> Any:
    """transformers writes numbers that JSON lacks as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_floats(item) for key, item in value.items()}
    return [_with_floats(item) for item in value] if isinstance(value, list) else value


def brief_text(error: Exception) -> str:
    """What an exception of a library says, in one line of bearable length."""
    return " ".join(str(error).split())[:400] or type(error).__name__


def causal_lm_config(config: dict[str, Any], where: Path) -> Any:
    """A transformers config object for a causal LM.

    Args:
        config: the JSON object.
        where: the folder, for messages.

    Raises:
        ArchitectureError: transformers does not know the model type, has no causal LM for it, or
            rejects the config's values.
    """
    import transformers
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ArchitectureError(
            f"{where / CONFIG_FILE} has model_type {repr(model_type)[:80]}, which transformers "
            f"{transformers.__version__} does not know. Code that comes with a checkpoint is never "
            "run; a newer transformers may know it."
        )
    try:
        built = CONFIG_MAPPING[model_type].from_dict(_with_floats(without_remote_code(config)))
    except Exception as error:  # a config class may reject values in any way it likes
        raise ArchitectureError(
            f"{where / CONFIG_FILE} is not a valid {model_type} config: {brief_text(error)}"
        ) from error
    if type(built) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ArchitectureError(
            f"{where} is a {model_type} model, and that is no decoder-only language model: "
            f"transformers {transformers.__version__} has no causal LM for it. {_ONLY_DECODERS}"
        )
    names = config.get("architectures") or []
    causal = any(str(name).endswith(_CAUSAL_SUFFIXES) for name in names)
    if names and not causal and not has_text_model(built):
        raise ArchitectureError(
            f"{where} holds a {str(names[0])[:80]}, which is no causal LM. {_ONLY_DECODERS}"
        )
    return built


def has_text_model(config: Any) -> bool:
    """True of the config of a larger model from which transformers builds only the text model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    text = type(config).sub_configs.get("text_config")
    classes = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    several = classes if isinstance(classes, tuple | list) else (classes,)
    return text is not None and any(getattr(item, "config_class", None) is text for item in several)
