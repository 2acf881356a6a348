"""The only code that knows safetensors bytes on disk.

header.py    parsing and writing the header, strictly: every byte of a file is accounted for
strict_json.py  JSON of strangers, limited before it is parsed
strangers.py    a folder of strangers: links, sizes, small files
source.py    a checkpoint folder (one file, or shards with an index) as a list of tensors
layout.py    where each tensor of an output file will stand, before any byte is written
sink.py      what takes the bytes of an output file: a file, or hashes alone
writer.py    an output file that is complete or absent, written at known places by any thread
durable.py   small files and links that are complete or absent; the order of fsync and rename
digest.py    sha256 of files, and of the tensors in them, in one reading
"""
