"""Codes and scales chosen from what a layer's inputs look like: less damage at the same bytes.

    tokens.py            the tokens that calibration reads: the model's own, or from a text
    tokens_request.py    asks the tokenizer, a stranger's program, in a process of its own
    tokens_worker.py     that process
    beginnings.py        how the texts begin that the model writes
    openings.txt         what a chat model is asked, so that it writes tokens
    seeds.toml           what code, languages, tables and arithmetic begin with
    drawing.py           texts drawn from the model's probabilities
    sampling.py          the model writes its tokens
    calibration_pass.py  the pass through the model: block after block is rounded by `gptq`
    block_inputs.py      what comes to a block's layers, in 16 bit and behind the quantized part
    calibrator.py        all of it in order: tokens, then codes and scales for a whole checkpoint
    learning.py          calibrated codes learn from the 16-bit model: into another store
    learning_plan.py     how long, on what, and what that takes
    learning_tokens.py   what they learn from
    learner.py           the loop: steps, held-back samples
    learning_loss.py     the KL that they lessen, and its gradients
    held_models.py       both models on the device, where they fit
    models_by_block.py   a block of each at a time, where they do not; the same bytes
    host_memory.py       where all else waits meanwhile
    latents.py           a latent for each weight, and the step that it takes
    learning_state.py    how far it is, for a killed run
    calibration_facts.py  what the record of quantize says of it
    block_store.py       what was chosen, block by block, on disk: a killed run goes on from there
    sensitivity.py       what each layer loses by 4 bits, measured
    allocation.py        which layers to leave in 16 bit for a byte budget

How a weight is rounded once its inputs are known is told in `nf4_pipeline.gptq`. Each layer is
rounded for the inputs that it will have: those behind the layers that are in 4 bit already.
"""
