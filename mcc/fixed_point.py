"""Fixed-point arithmetic as a graph has it: integers in float32, and `rescale`, which multiplies them by a fraction.

A float32 scale is a multiplier of 24 bits and a shift, m / 2^s. So round(x * scale), the product exact and rounded
once, is what integer hardware computes with a multiplier and a shift; and so does one fused multiply-add of a CPU, to a
number so large that float32 holds no fractions beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mcc.formats import along_axis

LARGEST = 1 << 14
"""The largest absolute value that `rescale` gives: with eight bits behind the point, what float32 rounds to exactly."""
MOST_FRACTION_BITS = 8
EXACT_BITS = 24  # of a float32 integer


@torch.library.custom_op("mcc::rescale", mutates_args=())
def rescale(x: Tensor, scale: Tensor, axis: int | None, fraction_bits: int) -> Tensor:
    """X * scale, exact, rounded half to even to so many bits behind the point, and held to ±`LARGEST`.

    Jacob et al.: Quantization and training of neural networks for efficient integer-arithmetic-only inference. CVPR
    2018, section 2.2, with 24 bits in place of 31.

    Args:
        x: float32, any shape: integers, or multiples of a power of two.
        scale: float32, [] or [x.shape[axis]].
        axis: the dim of x that scale runs along, or None for one scale.
        fraction_bits: 0 to `MOST_FRACTION_BITS`.
    """
    product = x.double() * along_axis(scale, x, axis).double()  # of 24 bits each: exact
    finest = float(1 << fraction_bits)
    return (torch.round(product * finest) / finest).clamp(-LARGEST, LARGEST).float() + 0.0  # of two zeros the positive


@rescale.register_fake
def _(x: Tensor, scale: Tensor, axis: int | None, fraction_bits: int) -> Tensor:
    del scale, axis, fraction_bits
    return torch.empty_like(x)


def bits_behind_the_point(added: int) -> int | None:
    """How many bits sums of so many rescaled values may have there for float32 to hold them, or None."""
    left = EXACT_BITS - (LARGEST - 1).bit_length() - (added - 1).bit_length()
    return min(left, MOST_FRACTION_BITS) if left >= 0 else None
