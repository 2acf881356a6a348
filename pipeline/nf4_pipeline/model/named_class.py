"""Whether the class that transformers would build is the one that config.json names.

transformers builds by model_type alone; "architectures" is a word of the checkpoint's makers. Where
the two differ, the repository's own code holds the model that they mean, and what transformers
builds in its place lacks parts of it, and takes the weights all the same.
"""

from __future__ import annotations

from typing import Any, Final

from nf4_pipeline.errors import ArchitectureError
from nf4_pipeline.model.config import has_text_model

_ENDINGS: Final = ("forcausallm", "lmheadmodel")


def check_named_class(config: dict[str, Any], built: type, transformers_config: Any) -> None:
    """Refuses a config whose architectures name another class than the one that is built.

    Taken for the same are names that differ in case or in "ForCausalLM" and "LMHeadModel" alone
    (MPTForCausalLM, LLaMAForCausalLM: their makers' spelling of what transformers took over), and
    what transformers itself maps: the text model of a config that has one inside.

    Args:
        config: config.json.
        built: the class that `AutoModelForCausalLM` builds from it.
        transformers_config: what it builds it from.

    Raises:
        ArchitectureError: architectures name other classes.
    """
    named = [str(name) for name in config.get("architectures") or []]
    if not named or any(_stem(name) == _stem(built.__name__) for name in named):
        return
    if any(_is_whole_of(name, transformers_config) for name in named):
        return
    auto_map = config.get("auto_map")
    own = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
    code = f", from code that comes with the checkpoint ({own})" if own else ""
    raise ArchitectureError(
        f"config.json names the class {', '.join(named)}{code}; from its model_type "
        f"{config.get('model_type')!r} transformers would build {built.__name__}. They are not the "
        "same model: what the one has and the other lacks would be lost in silence, and code of a "
        "checkpoint is never run. Take a checkpoint of a class that transformers knows; if this is "
        f'one, and only the name is old, write "architectures": ["{built.__name__}"].'
    )


def _stem(name: str) -> str:
    lower = name.lower()
    for ending in _ENDINGS:
        if lower.endswith(ending):
            return lower.removesuffix(ending)
    return lower


def _is_whole_of(name: str, transformers_config: Any) -> bool:
    """True if transformers maps the config of class `name`, text and more, to the text model."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

    if not has_text_model(transformers_config):
        return False
    for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING):
        if type(transformers_config) in mapping:
            found = mapping[type(transformers_config)]
            classes = found if isinstance(found, tuple | list) else (found,)
            if any(item.__name__ == name for item in classes):
                return True
    return False
