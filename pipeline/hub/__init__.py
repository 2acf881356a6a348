"""The Hugging Face Hub: pin a model to a commit, fetch its files, prove that the bytes are right.

    resolve(repo) ──► RemoteModel ──► wanted_files(model) ──► fetch(model, files) ──► Fetched
    lookup.py         remote.py       remote.py               download.py

    client.py   every call of huggingface_hub: quiet, tried again, its errors put into one message
    cache.py    the Hub cache on disk: blobs/<hash>, snapshots/<commit>/<path>, refs/<revision>

Only this package imports huggingface_hub, and only inside functions: the import takes a while, and
reads HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE once.

The client does the transfers. What it leaves open is closed here (seen with 2.4.0; each case has a
test in `tests/hub`):

- a look-up that fails falls back to an old commit when one is cached: `resolve` never does
- a connection reset or a 5xx ends a look-up or a blob at once: both are tried again
- wrong bytes of the right length are taken: every file is hashed against what the Hub lists
- a disk that is too small gets a warning, and is filled: `fetch` refuses before the first blob
"""

from pipeline.hub.download import Fetched, fetch, file_digests
from pipeline.hub.lookup import resolve
from pipeline.hub.remote import RemoteFile, RemoteModel, wanted_files

__all__ = [
    "Fetched",
    "RemoteFile",
    "RemoteModel",
    "fetch",
    "file_digests",
    "resolve",
    "wanted_files",
]
