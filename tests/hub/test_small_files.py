"""Files beside the weights that are larger, or more, than those of any real model: not fetched."""

from __future__ import annotations

import pytest
from nf4_pipeline.errors import HubError
from nf4_pipeline.hub import RemoteFile, RemoteModel, fetch
from nf4_pipeline.progress import SILENT

MIB = 1 << 20
SHA1 = "a" * 40
LARGE = {
    "README.md": 16 * MIB,
    "config.json": 4 * MIB,
    "chat_template.jinja": 4 * MIB,
    "additional_chat_templates/x.jinja": 4 * MIB,
    "LICENSE": 16 * MIB,
    "tokenizer.json": 256 * MIB,
    "model.safetensors.index.json": 32 * MIB,
    "anything.else": 256 * MIB,
}


def refused(*files: RemoteFile) -> str:
    with pytest.raises(HubError) as caught:
        fetch(RemoteModel("org/name", "c" * 40, files), files, SILENT)
    return str(caught.value)


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("more", [1, 1 << 52])
def test_one_that_is_too_large(name: str, more: int) -> None:
    said = refused(RemoteFile(name, LARGE[name] + more, None, SHA1))
    assert f"{name} is listed with {LARGE[name] + more:,} bytes; no real one has more" in said


@pytest.mark.parametrize(("count", "size"), [(501, 1), (5, 256 * MIB), (90, 12 * MIB)])
def test_too_many(count: int, size: int) -> None:
    files = [RemoteFile(f"vocab.{number}", size, None, SHA1) for number in range(count)]
    assert f"lists {count:,} files beside its weights, with {count * size:,}" in refused(*files)


def test_weights_are_as_large_as_they_like() -> None:
    weights = [
        RemoteFile(f"model-{number}.safetensors", 1 << 50, "b" * 64, None) for number in range(999)
    ]
    weights.append(RemoteFile("pytorch_model.bin", 1 << 50, "b" * 64, None))
    assert "config.json is listed with" in refused(
        *weights, RemoteFile("config.json", 1 << 50, None, SHA1)
    )
