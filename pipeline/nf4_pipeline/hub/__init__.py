"""The Hugging Face Hub, both ways: pinned downloads, and pushes that are proved.

    resolve(repo) ──► RemoteModel ──► wanted_files(model) ──► fetch(model, files) ──► Fetched
    lookup.py         remote.py       remote.py               download.py

    publish(files, target, message) ──► Published                   upload.py, local.py

    headers.py    what weights hold, before they are fetched
    ranges.py     a part of a file, without the rest of it
    client.py     every call of huggingface_hub: quiet, patient to a limit, tried again
    publisher.py  a CI job's identity, exchanged for a token of an hour
    transport.py  every request and answer of it: to whom the token goes, what may come back
    replies.py    the forms of what a Hub says: names, hashes, addresses, JSON
    limits.py     how much one call may take: bytes, time in proportion, requests
    xet.py        what hf_xet, which asks by itself, is told
    errors.py     its errors: may they pass, and one message each that says what to do
    cache.py      the Hub cache on disk: blobs/<hash>, snapshots/<commit>/<path>, refs/<revision>

Only this package imports huggingface_hub, and only inside functions: the import takes a while, and
reads HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE once.

The client does the transfers. What it leaves open is closed here (seen with 2.4.0; each case has a
test in `tests/hub`):

- a look-up that fails falls back to an old commit when one is cached: `resolve` never does
- a connection reset or a 5xx ends a look-up or a blob at once: both are tried again
- wrong bytes of the right length are taken: every file is hashed against what the Hub lists
- a disk that is too small gets a warning, and is filled: `fetch` refuses before the first blob
- a killed download leaves its half file for ever: `fetch` removes those that nobody writes to
- listings, uploads and commits wait for ever for an answer: every session gets a timeout
- an ETag is joined into a path, and may lead anywhere: `transport` lets none pass that is not the
  hash of the file that is fetched
- the token goes to whom a listing's next page, an upload's verification or a Xet route names:
  `transport` sends it to HF_ENDPOINT alone
- a body, a listing and a slow answer have no end: `limits`
- a failed commit is not tried again, and one whose answer is lost would be made twice with a pull
  request: `publish` looks at the repo first
- with Xet, `upload_folder` may make several commits: `publish` makes one
"""

from nf4_pipeline.hub.cache import cache_at, snapshot
from nf4_pipeline.hub.download import Fetched, fetch, file_digests
from nf4_pipeline.hub.headers import fetch_headers
from nf4_pipeline.hub.local import LocalFile
from nf4_pipeline.hub.lookup import resolve
from nf4_pipeline.hub.ranges import read_range
from nf4_pipeline.hub.remote import RemoteFile, RemoteModel, named, small_files, wanted_files
from nf4_pipeline.hub.upload import (
    CommitMessage,
    Earlier,
    Published,
    Target,
    commit_url,
    lost,
    prepare,
    publish,
    pull_request_url,
    repo_url,
    send_ahead,
)

__all__ = [
    "CommitMessage",
    "Earlier",
    "Fetched",
    "LocalFile",
    "Published",
    "RemoteFile",
    "RemoteModel",
    "Target",
    "cache_at",
    "commit_url",
    "fetch",
    "fetch_headers",
    "file_digests",
    "lost",
    "named",
    "prepare",
    "publish",
    "pull_request_url",
    "read_range",
    "repo_url",
    "resolve",
    "send_ahead",
    "small_files",
    "snapshot",
    "wanted_files",
]
