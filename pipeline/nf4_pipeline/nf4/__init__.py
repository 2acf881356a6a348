"""The only NF4 arithmetic in the project. Pure: touches no file, no network, no model.

codebook.py       the 16 NF4 levels, the 256 levels for scales, the midpoints between levels
cpu.py            compiled kernels: blocks of weights -> packed codes and absmax; scales -> 8 bit
compensated.py    the same for codes that make up for each other's errors, under a guide
rounding.py       the seam: how codes and scales are chosen, per device
double_quant.py   absmax -> 8-bit absmax, with an offset that is the same on every machine
layout.py         the six stored tensors: names, shapes, and the quant-state JSON
nearest.py        a whole weight rounded to nearest, in memory
dequantize.py     the way back, in plain NumPy: what every reader computes
"""

BLOCK_SIZE = 64
"""Weights that share one scale."""

NESTED_BLOCK_SIZE = 256
"""Scales that share one scale of their own."""
