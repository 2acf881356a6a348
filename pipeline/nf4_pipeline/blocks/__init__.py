"""A model run block by block, its weights streamed from the checkpoint: it need not fit anywhere.

    find_blocks.py     which modules are the repeated blocks of a model
    block_reader.py    the tensors of a block, read side by side into one buffer, ahead of time
    streamed_model.py  a model whose blocks have weights only while they are needed
    model_replica.py   the same model on another device
    lockstep.py        several runs of a model that pass each block together
    block_row.py       a forward in pieces, so that it goes backward block by block, too

A causal LM is a stem (embeddings, last norm, head), which stays on the device, and a row of blocks.
Runs go through the model's own forward, whatever the architecture does between its blocks; each is
held at a barrier before a block until all have come there, so a pass over many sequences reads the
weights once.
"""
