"""The only NF4 arithmetic in the project. Pure: touches no file, no network, no model.

codebook.py           the 16 NF4 levels, the 256 levels of scales, midpoints between levels
nearest_level.py      which level is nearest, for compiled kernels
packing.py            weights counted in blocks, two codes in a byte
float_bits.py         floats as the unsigned integers of their bits
compiling.py          says when kernels are compiled
cpu.py                compiled kernels: blocks of weights -> codes and absmax; scales -> 8 bit
cuda.py               rounding to nearest on CUDA devices
rounding_triton.py    codes, scales and what an error needs, on a CUDA device
rounding.py           the seam: how codes and scales are chosen, per device
double_quant.py       absmax -> 8-bit absmax, with an offset that is the same on every machine
rtn.py                a whole weight rounded to nearest, in memory
dequantize.py         the way back, in NumPy and on a device of torch
stored_weight.py      the six stored tensors of a weight: predicted, written, read back
"""

BLOCK_SIZE = 64
"""Weights that share one scale."""

NESTED_BLOCK_SIZE = 256
"""Scales that share one scale of their own."""
