"""The streaming engine: checkpoint files in, quantized files out, in chunks of whole blocks.

    chunks.py               a plan's tensors cut into chunks, and how each chunk's bytes are read
    buffers.py              a fixed memory budget, divided among the workers
    finite.py               infinities and NaNs among copied values, found as they pass by
    tied_weights.py         tensors that the source stores twice, compared as one of them is copied
    shard_job.py            one output file: what happens to its chunks, what is known at the end
    scheduler.py            worker threads over the chunks of all files
    parts.py                the output files, dealt out to processes
    quantize_checkpoint.py  a checkpoint, planned and run; planned again if tied tensors differ

A worker owns one chunk at a time from reading to writing, so reading, computing and writing overlap
across workers, and memory is `workers x chunk`, whatever the size of a tensor or a shard. Where a
chunk's result goes is fixed by the layout, so the bytes do not depend on the order of the work.
"""
