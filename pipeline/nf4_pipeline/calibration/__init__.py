"""Codes and scales chosen from what a layer's inputs look like: less damage at the same bytes.

    sampling.py    the model writes its tokens
    method.py      what is done, in figures
    tokens.py      the tokens that calibration reads: written by the model itself, or from a file
    moments.py     the second moment of each layer's inputs, gathered as the model runs
    guide.py       a moment -> the order of the columns, and what each one passes on to the others
    choose.py      a weight and its guide -> codes and scales, on the CPU
    choose_cuda.py the same on a CUDA device
    store.py       what was chosen, block by block, on disk: a killed run goes on where it stopped
    given.py       what was chosen, as the engine's rounding
    sensitivity.py what each layer loses by 4 bits, measured
    losses.py      which layers to leave in 16 bit for a byte budget
    run.py         the pass through the model that brings all of it together

What is computed follows GPTQ (arXiv:2210.17323) with scales chosen in the loop, in what the format
of bitsandbytes can store; the model that runs is the 16-bit one throughout, so blocks are
independent of each other.
"""
