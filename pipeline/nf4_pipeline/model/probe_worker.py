"""The process that builds a checkpoint's model on the meta device; see `probe.py`."""

from __future__ import annotations

from nf4_pipeline.checkpoint.source import open_checkpoint
from nf4_pipeline.model.check_folder import build_seconds, building
from nf4_pipeline.model.config import read_config
from nf4_pipeline.model.meta_model import read_architecture
from nf4_pipeline.model.probe import ProbeReply, ProbeRequest
from nf4_pipeline.model.tokenizer_probe import probe_tokenizer
from nf4_pipeline.progress import Reporter


def run(request: ProbeRequest, reporter: Reporter) -> ProbeReply:
    """The architecture and the tokenizer of the checkpoint in a folder.

    Raises:
        ArchitectureError: there is no causal LM for its config.
        SourceError: a file of it is missing or malformed.
    """
    folder = request.folder
    names = [tensor.name for tensor in open_checkpoint(folder).tensors]
    with building(folder, build_seconds(len(names))):
        architecture = read_architecture(read_config(folder), names, folder)
    return ProbeReply(architecture, probe_tokenizer(folder, architecture.embedding_rows))
