"""A CycloneDX 1.6 bill of materials of an artifact: model, ancestor, licenses, files. Pure."""

from __future__ import annotations

import uuid
from typing import Any, Final

from nf4_pipeline import __version__
from nf4_pipeline.checkpoint.source_card import SourceCard
from nf4_pipeline.manifest.manifest import Manifest, Source
from nf4_pipeline.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE
from nf4_pipeline.provenance.identifiers import licenses, model_purl

_NAMESPACE: Final = uuid.uuid5(uuid.NAMESPACE_URL, "pkg:pypi/nf4-pipeline#bom")


def bill_of_materials(manifest: Manifest, manifest_sha256: str, card: SourceCard) -> dict[str, Any]:
    """Puts the bill together; deterministic, as the manifest is.

    Args:
        manifest: of the artifact.
        manifest_sha256: of its file.
        card: what the source's model card says; its license is inherited.
    """
    source = manifest.source
    name = source.repo.rpartition("/")[2]
    model: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": f"{name}-nf4",
        "version": source.version,
        "description": f"{source.repo} in 4 bit: {manifest.format}",
        "hashes": [{"alg": "SHA-256", "content": manifest_sha256}],
    }
    inherited = licenses(card)
    if inherited:
        model["licenses"] = inherited
    model["pedigree"] = {
        "ancestors": [_ancestor(source, inherited)],
        "notes": "Weights of linear layers were rounded to NF4; no weight was trained.",
    }
    model["modelCard"] = {
        "modelParameters": {
            "task": "text-generation",
            "modelArchitecture": manifest.model_class,
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        }
    }
    model["properties"] = _properties(manifest)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, manifest_sha256)}",
        "version": 1,
        "metadata": {
            "tools": {
                "components": [
                    {"type": "application", "name": "nf4-pipeline", "version": __version__}
                ]
            },
            "component": model,
        },
        "components": [
            {
                "type": "file",
                "bom-ref": f"file:{path}",
                "name": path,
                "hashes": [{"alg": "SHA-256", "content": digest.sha256}],
            }
            for path, digest in sorted(manifest.files.items())
        ],
    }


def _ancestor(source: Source, inherited: list[dict[str, dict[str, str]]]) -> dict[str, Any]:
    ancestor: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": "source",
        "name": source.repo,
        "version": source.version,
    }
    purl = model_purl(source.repo, source.commit)
    if purl is not None:
        ancestor["purl"] = purl
    if inherited:
        ancestor["licenses"] = inherited
    return ancestor


def _properties(manifest: Manifest) -> list[dict[str, str]]:
    totals = manifest.totals
    values = {
        "method": "bitsandbytes",
        "type": manifest.codebook.lower(),
        "double_quantization": "true",
        "block_size": BLOCK_SIZE,
        "nested_block_size": NESTED_BLOCK_SIZE,
        "bits_per_weight": totals.bits_per_weight,
        "bits_per_quantized_weight": totals.bits_per_quantized_weight,
        "original_bytes": totals.original_bytes,
        "artifact_bytes": totals.artifact_bytes,
        "tensors_quantized": totals.tensors.quantized,
        "tensors_kept": totals.tensors.kept,
        "tensors_dropped": totals.tensors.dropped,
        "source_content_sha256": manifest.source.content_sha256,
    }
    return [
        {"name": f"nf4-pipeline:quantization:{name}", "value": str(value)}
        for name, value in values.items()
    ]
