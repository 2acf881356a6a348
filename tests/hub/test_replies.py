"""What a Hub may say, with generated answers: read, or refused in one way."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4_pipeline.hub import replies
from nf4_pipeline.hub.replies import Origin, ReplyError

HOME = Origin("https", "huggingface.co", 443)
PATHS = [
    ("GET", "/api/models/a/b/revision/main"),
    ("GET", "/api/models/a/b/tree/main"),
    ("GET", "/api/models/a/b/discussions"),
    ("POST", "/oauth/token"),
    ("POST", "/api/models/a/b/preupload/main"),
    ("POST", "/api/models/a/b/commit/main"),
    ("POST", "/a/b.git/info/lfs/objects/batch"),
    ("POST", "/api/validate-yaml"),
    ("POST", "/api/repos/create"),
]
KEYS = (
    "sha id private type path size oid lfs pointerSize name discussions num title author status "
    "count start files uploadMode shouldIgnore objects actions upload href header chunk_size "
    "verify error code message commitOid commitUrl pullRequestUrl url errors warnings "
    "isPullRequest 00001 access_token token_type expires_in"
).split()
WORDS = [
    "file", "directory", "lfs", "regular", "config.json", "../x", "/x", "a" * 40, "a" * 64, "", "1",
    "https://huggingface.co/x", "http://127.0.0.1/x", "https://evil.example/discussions/7",
    "\x1b[2J",
]  # fmt: skip

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(max_size=20)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner, max_size=8)
    ),
    max_leaves=20,
)


def texts(value: Any) -> list[str]:
    """Every text in a value, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for each in [*value, *value.values()] for text in texts(each)]
    return [text for each in value for text in texts(each)] if isinstance(value, list) else []


@settings(max_examples=400, deadline=1_000)
@given(st.sampled_from(PATHS), values)
def test_any_json_is_read_or_refused(path: tuple[str, str], value: Any) -> None:
    try:
        made = replies.read(*path, json.dumps(value).encode(), HOME, "https://huggingface.co")
    except ReplyError as error:
        refusal = str(error)
    else:
        refusal = ""
    assert refusal.isprintable()
    if refusal:
        return
    for text in texts(json.loads(made)):
        if "path" not in json.dumps(value):
            assert text.isprintable()


@settings(max_examples=300, deadline=1_000)
@given(st.sampled_from(PATHS), st.binary(max_size=200), st.text(max_size=20))
def test_any_bytes_are_read_or_refused(path: tuple[str, str], body: bytes, kind: str) -> None:
    try:
        replies.read(*path, body, HOME, "https://huggingface.co")
    except ReplyError as error:
        refusal = str(error)
    else:
        refusal = ""
    assert refusal.isprintable()
    assert isinstance(json.loads(replies.written(replies.fault(body, kind))), dict)


@settings(max_examples=400, deadline=1_000)
@given(values)
def test_any_refusal_has_words(value: Any) -> None:
    found = replies.fault(json.dumps(value).encode(), "application/json")
    assert set(found) <= {"error", "errors", "warnings", "url"}
    assert all(text.isprintable() for text in texts(found))


@given(st.lists(values, max_size=4))
def test_a_listing_that_is_read_has_names_and_sizes_and_hashes(entries: list[Any]) -> None:
    try:
        listed = replies.tree(entries)
    except ReplyError:
        return
    for entry in listed:
        parts = entry["path"].split("/")
        assert not {"", ".", ".."} & set(parts)
        assert re.fullmatch("([0-9a-f]{40})?", entry["oid"])
        assert entry["type"] == "directory" or 0 <= entry["size"] <= 1 << 53


@given(st.text(max_size=60) | st.from_regex(r"https?://[^/]{0,30}/.{0,10}", fullmatch=True))
def test_what_is_the_hubs_own_address_is_so_for_other_parsers(address: str) -> None:
    """As urllib and the HTTP library of the client read it."""
    from urllib.parse import urlsplit

    httpx2 = pytest.importorskip("httpx2", reason="the client's parser from 2.0 on")

    try:
        found = replies.origin(address)
    except ReplyError:
        return
    host = found.host.strip("[]")
    assert (urlsplit(address).hostname or "").lower() == host
    try:
        url = httpx2.URL(address)
    except httpx2.InvalidURL:
        return
    assert (url.scheme, url.host.lower()) == (found.scheme, host)
    assert url.userinfo == b""


@pytest.mark.parametrize(
    "address",
    [
        "https://huggingface.co/x",
        "HTTPS://HuggingFace.CO:443/x",
        "https://hub-ci.huggingface.co/x",
        "https://huggingface.co",
    ],
)
def test_own_addresses(address: str) -> None:
    replies.own_address(address, HOME)


@pytest.mark.parametrize(
    "address",
    [
        "http://huggingface.co/x",
        "https://huggingface.co:444/x",
        "https://huggingface.co./x",
        "https://huggingface.co.evil.example/x",
        "https://evil.example/https://huggingface.co/",
        "https://huggingface.co@evil.example/",
        "https://evil.example\\@huggingface.co/",
        "https://evil.example#@huggingface.co/",
        "https://huggingface.co\t/",
        "https://hugging\u212aace.co/",
        "//huggingface.co/",
        "https:/huggingface.co/",
    ],
)
def test_addresses_of_others(address: str) -> None:
    with pytest.raises(ReplyError):
        replies.own_address(address, HOME)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.1", "2130706433", "0x7f.1", "[::1]", "10.0.0.1", "169.254.169.254",
     "localhost", "a.localhost", "printer.local", "metadata.google.internal", "[fe80::1]", "0"],
)  # fmt: skip
def test_a_hub_of_the_world_names_no_address_of_this_network(host: str) -> None:
    with pytest.raises(ReplyError, match="this machine or its network"):
        replies.check_target(f"https://{host}/x", HOME)
    replies.check_target(f"http://{host}/x", Origin("http", "127.0.0.1", 80))


def test_https_stays_https() -> None:
    with pytest.raises(ReplyError, match="not encrypted"):
        replies.check_target("http://cdn.example/x", HOME)


@pytest.mark.parametrize("name", ["main", "refs/pr/7", "v1.0", "a" * 40, "feature/x", "käse"])
def test_revisions(name: str) -> None:
    assert replies.is_revision(name)


def test_more_lists_than_any_page_has_are_not_made() -> None:
    with pytest.raises(ReplyError, match="more than 500,000 lists and objects"):
        replies.parsed(b"[" + b"[]," * 600_000 + b"[]]")
