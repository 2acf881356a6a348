"""GPTQ for a format that bitsandbytes reads: codes that make up for each other's errors.

A linear layer computes W x. Rounding its weight W to Q costs its output, over inputs x whose second
moment is the Hessian H = mean(x x^T) of that squared error,

    tr((W - Q) H (W - Q)^T)

Rounding each weight to its nearest level ignores H. GPTQ (Frantar et al., 2023, arXiv:2210.17323)
rounds the columns of W one after the other, and after each of them corrects all columns that are
still to come, as Optimal Brain Surgeon would. With U the upper Cholesky factor of inverse(H), that
is inverse(H) = U^T U,

    e_j = (w_j - q_j) / U_jj        w_k -= e_j U_jk  for k > j

and the cost is the sum of all e_j^2 exactly. Rows of W do not touch each other.

What is done here beside the paper:

- Scales are part of the search. A block of 64 weights shares a scale, and NF4's levels are not
  symmetric, so scales of both signs are tried: shares of the block's largest weight, first with the
  errors weighted by the diagonal of H (`start_scales`), then again when its columns are due and
  have been corrected (`refine_scales`). Only scales that can be stored are tried: 8-bit levels of
  the largest among 256. The offset of double quantization is 0. None goes beyond twice the largest
  of its weights as the model has them (`scale_limits`), however far these were moved.
- `act_order` sorts columns by the diagonal of H, but keeps blocks of 64 together, so that what is
  stored is an ordinary NF4 weight: blocks by their sum, columns within them.
- Beside `percdamp` of the mean diagonal, elements off the diagonal shrink by columns / tokens, at
  most `shrinkage`: a finite sample exaggerates correlations.
- The inputs y are those behind what is quantized already, which differ from x, those in the 16-bit
  model. So H is mean(y y^T), and W is first moved towards what gives W x from y (`corrected`).
- Everything after the factor is float32 in one fixed order without fused multiply-adds: a CPU and a
  CUDA device give the same codes for the same factor, bit for bit.

To read, in this order:

    config.py          what can be varied; the defaults are the recipe
    device_group.py    several devices that share the work, in pieces
    hessian.py         H -> the order of columns, and U; the correction for the inputs' own error
    scale_limits.py    how large a scale may become
    quantizer.py       a weight and its factor -> codes and scales, on the CPU
    kernels_cpu.py     the loops of it, compiled
    quantizer_cuda.py  the same on CUDA devices
    kernels_triton.py  the loops of it there
    quantizers.py      which of both, by the kind of device
    saved_codes.py     what was chosen, in files, and as the engine's rounding
"""
