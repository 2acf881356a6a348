"""Files at a URL, by fsspec: s3://bucket/prefix, gs://, abfs://, sftp://, file://, memory://.

    address.py     a URL -> the file system that it names, or why there is none
    faults.py      what a store refused, in words; what passes and is tried again
    store.py       the objects below a URL: complete or absent, checked by size and hash
    uploads.py     files that go there while others are made

Nothing of a client is imported before a URL is opened.
"""

from nf4_pipeline.object_store.store import ObjectStore
from nf4_pipeline.object_store.uploads import Uploads

__all__ = ["ObjectStore", "Uploads"]
