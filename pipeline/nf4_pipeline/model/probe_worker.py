"""The process that builds a checkpoint's model on the meta device; see `probe.py`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from nf4_pipeline.checkpoint.generation_config import GENERATION_CONFIG
from nf4_pipeline.checkpoint.source import open_checkpoint
from nf4_pipeline.errors import CheckpointError
from nf4_pipeline.model.check_folder import build_seconds, building
from nf4_pipeline.model.config import brief_text, read_config
from nf4_pipeline.model.meta_model import read_architecture
from nf4_pipeline.model.probe import ProbeReply, ProbeRequest
from nf4_pipeline.model.tokenizer_probe import probe_tokenizer
from nf4_pipeline.progress import Reporter


def prepare() -> None:
    """Imports what building a model and loading a tokenizer need."""
    import_module("transformers.models.auto.modeling_auto")
    import_module("transformers.models.auto.tokenization_auto")


def run(request: ProbeRequest, reporter: Reporter) -> ProbeReply:
    """The architecture and the tokenizer of the checkpoint in a folder.

    Raises:
        ArchitectureError: there is no causal LM for its config.
        SourceError: a file of it is missing or malformed.
    """
    folder = request.folder
    names = [tensor.name for tensor in open_checkpoint(folder).tensors]
    _check_generation_config(folder)
    with building(folder, build_seconds(len(names))):
        architecture = read_architecture(read_config(folder), names, folder)
    return ProbeReply(architecture, probe_tokenizer(folder, architecture.embedding_rows))


def _check_generation_config(folder: Path) -> None:
    """Has transformers read it, as everybody's transformers will when the artifact is loaded.

    Raises:
        CheckpointError: transformers does not take it.
    """
    from transformers import GenerationConfig

    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return
    try:
        GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # it may reject values in any way it likes
        raise CheckpointError(
            f"{path} is none that transformers takes: {brief_text(error)} Correct it there, or "
            "delete the file."
        ) from error
