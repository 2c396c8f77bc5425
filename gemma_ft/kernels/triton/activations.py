"""What more than one of the Triton kernels computes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """By the exponential, which every version of Triton has, its interpreter too; exact to float32's own steps at 1."""
    falling = tl.exp(tl.where(x < 0, 2.0 * x, -2.0 * x))
    size = (1.0 - falling) / (1.0 + falling)
    return tl.where(x < 0, -size, size)


@triton.jit
def gelu_tanh_and_slope(g):
    """tanh(u) and du/dg of GELU's tanh approximation, u = sqrt(2 / pi) (g + 0.044715 g^3). Source: arXiv:1606.08415."""
    square = g * g
    return tanh(0.7978845608028654 * g * (1.0 + 0.044715 * square)), 0.7978845608028654 * (1.0 + 0.134145 * square)
