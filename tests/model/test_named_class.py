"""The class that config.json names against the one that transformers builds."""

from __future__ import annotations

import pytest
from nf4_pipeline.errors import ArchitectureError
from nf4_pipeline.model.named_class import check_named_class
from transformers import GPTBigCodeForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3_5Config
from transformers import Qwen3_5ForCausalLM as TextModel


@pytest.mark.parametrize("named", [None, [], ["LlamaForCausalLM"], ["LLaMAForCausalLM"]])
def test_the_same_class(named: list[str] | None) -> None:
    check_named_class({"architectures": named}, LlamaForCausalLM, LlamaConfig())


def test_an_older_ending() -> None:
    config = {"architectures": ["GPTBigCodeLMHeadModel"]}
    check_named_class(config, GPTBigCodeForCausalLM, GPTBigCodeForCausalLM.config_class())


def test_a_larger_model_whose_text_model_transformers_builds() -> None:
    config = {"architectures": ["Qwen3_5ForConditionalGeneration"]}
    check_named_class(config, TextModel, Qwen3_5Config())
    with pytest.raises(ArchitectureError, match="names the class Qwen9ForConditionalGeneration"):
        check_named_class(
            {"architectures": ["Qwen9ForConditionalGeneration"]}, TextModel, Qwen3_5Config()
        )


@pytest.mark.parametrize("named", ["BitnetForCausalLM", "MistralForCausalLM"])
def test_another_class(named: str) -> None:
    config = {
        "model_type": "llama",
        "architectures": [named],
        "auto_map": {"AutoModelForCausalLM": f"modeling_own.{named}"},
    }
    with pytest.raises(ArchitectureError, match=rf"{named}.*modeling_own.*LlamaForCausalLM"):
        check_named_class(config, LlamaForCausalLM, LlamaConfig())
