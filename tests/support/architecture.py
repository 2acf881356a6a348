"""The facts of a model in this process, for tests that have imported transformers anyway."""

from __future__ import annotations

import json
from pathlib import Path

from nf4_pipeline.checkpoint.source import open_checkpoint
from nf4_pipeline.model.architecture import ModelFacts
from nf4_pipeline.model.config import read_config
from nf4_pipeline.model.meta_model import model_facts
from nf4_pipeline.model.tokenizer_facts import TokenizerFacts
from nf4_pipeline.model.tokenizer_probe import tokenizer_facts


class FactsHere:
    """`nf4_pipeline.model.probe.PendingFacts` without its child process."""

    answered = False

    def __init__(self, folder: Path, *, without_weights: bool = False) -> None:
        self._folder = folder
        self._without_weights = without_weights

    def wait(self) -> tuple[ModelFacts, TokenizerFacts]:
        checkpoint = None if self._without_weights else open_checkpoint(self._folder)
        names = [tensor.name for tensor in checkpoint.tensors] if checkpoint else []
        facts = model_facts(read_config(self._folder), names, self._folder)
        tokenizer = tokenizer_facts(self._folder, facts.embedding_rows)
        return (
            ModelFacts.from_json(json.loads(json.dumps(facts.as_json()))),
            TokenizerFacts.from_json(json.loads(json.dumps(tokenizer.as_json()))),
        )

    def cancel(self) -> None:
        pass
