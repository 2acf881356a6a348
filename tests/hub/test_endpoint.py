"""HF_ENDPOINT as people write it: an address without its scheme is named, and how to write it."""

from __future__ import annotations

import pytest
from huggingface_hub import constants
from nf4_pipeline.errors import HubError
from nf4_pipeline.hub import client
from nf4_pipeline.hub.errors import Request

from tests.support.command_line import refusal

REQUEST = Request("me/model", "main", "looking up me/model@main")


@pytest.mark.parametrize(
    ("endpoint", "meant"),
    [
        ("huggingface.co", "https://huggingface.co"),
        ("hf-mirror.com/hub", "https://hf-mirror.com/hub"),
        ("localhost:8080", "https://localhost:8080"),
        ("https:huggingface.co", "https://huggingface.co"),
        ("https:/huggingface.co", "https://huggingface.co"),
        ("https://", "https://huggingface.co"),
        ("//huggingface.co", "https://huggingface.co"),
        ("HTTPS", "https://HTTPS"),
    ],
)
def test_an_endpoint_without_its_scheme(
    endpoint: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    said = refusal(lambda: client.attempt(lambda: "", REQUEST, lambda _: None))
    assert f"HF_ENDPOINT is '{endpoint}'" in said
    assert said.endswith(f"Set it to {meant}, or unset it.")


def test_a_secret_in_it_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "//me:hf_abcdefghijklmnop@host")
    with pytest.raises(HubError, match="Set it to https://host") as caught:
        client.attempt(lambda: "", REQUEST, lambda _: None)
    assert "hf_abc" not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["https://huggingface.co", "http://127.0.0.1:9/x"])
def test_an_endpoint_with_one(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    assert client.attempt(lambda: "fine", REQUEST, lambda _: None) == "fine"
