"""The streaming engine: one source file in, one quantized file out, in chunks of whole blocks.

    chunks.py      a plan's tensors cut into chunks, and how each chunk's bytes are read
    quantize.py    worker threads that read, round and write chunks; what is known at the end

A worker owns one chunk at a time from reading to writing, so reading, computing and writing overlap
across workers and memory is `workers x chunk`, whatever the size of a tensor or a shard. Where a
chunk's result goes is fixed by the layout, so the bytes do not depend on the order of the work.
"""
