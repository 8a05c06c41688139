"""Sums of codes to codes with one multiply-add a vector: no conversion to float32 and none back.

An int32 added to the bits of 1.5 * 2^23 is, read as float32, that number plus the integer, exactly, while the integer
has fewer than 23 bits; and a float32 of that size holds the nearest integer in its low bits. So sums that begin at
those bits are multiplied and added to as they are, and of what that gives the low 16 bits are the code before it is
held to its range: signed words, which are packed to bytes as they stand. The bias is in the integer that sums begin
at: of a few thousand such integers for each channel, spread over the room that sums leave, one is taken whose product
with the scale has nearly the fraction that is wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mcc.backends.cpu.epilogue import ROUNDER, channel_vectors
from mcc.backends.cpu.integer_sums import LARGEST_CODE, largest_rescaled, largest_sum

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mcc.backends.cpu.epilogue import ToCodes
    from mcc.backends.kernel import Region, RescaleSums

ROUNDER_BITS = 0x4B400000
LARGEST_ADDED = 2**22  # what leaves the sum in [2^23, 2^24), where float32 holds the integers
CANDIDATES = 4096
LARGEST_WORD = 2**15 - 1
LARGEST_REMAINDER = 2e-3  # of a code, that no such integer makes up for


@dataclass(frozen=True)
class DirectRequantize:
    """What turns sums into codes, a value for each channel.

    Attributes:
        start: int32 that sums begin at, besides what stands for the zero point of activations.
        scale: float32.
        shift: float32 added to the product.
        odd: 1 to be added to the bits of what that gives, for an odd zero point; the low 16 bits are then the codes.
        converts: sums are plain integers, to be converted first.
    """

    start: NDArray[np.int64]
    scale: NDArray[np.float32]
    shift: NDArray[np.float32]
    odd: int
    converts: bool = False


def direct_requantize(region: Region, step: ToCodes) -> DirectRequantize | None:
    """The constants for a region that does nothing but requantize.

    None where sums or codes are too large for it, or where a bias cannot be had as an integer of sums exactly enough.
    """
    if region.rescale is not None:
        return _rescaled(region, region.rescale, step)
    vectors, most = channel_vectors(region), largest_sum(region)
    scale, bias = vectors["scale"].astype(np.float64), vectors["bias"].astype(np.float64)
    reached = most * np.abs(scale).max(initial=0.0) + np.abs(bias).max(initial=0.0)
    room = LARGEST_ADDED - 1 - most
    if room < CANDIDATES or not reached + LARGEST_CODE < LARGEST_WORD or np.abs(scale).max() >= 1:
        return None
    # drawn: of integers at equal distances, products with some scales have few fractions
    added = np.random.default_rng(0).integers(-room, room, CANDIDATES)
    value = (ROUNDER + added) * scale[:, None] - bias[:, None]
    remainders = np.abs(value - np.rint(value))
    best = remainders.argmin(1)
    if remainders.min(1).max(initial=0.0) > LARGEST_REMAINDER:
        return None
    odd = step.zero_point % 2  # comes after rounding, which takes halves to even
    shift = ROUNDER + (step.zero_point - odd) - np.rint(value[np.arange(len(scale)), best])
    return DirectRequantize(ROUNDER_BITS + added[best], vectors["scale"], shift.astype(np.float32), odd)


def _rescaled(region: Region, rescale: RescaleSums, step: ToCodes) -> DirectRequantize | None:
    """The same for sums that are rescaled: one multiply-add to `ROUNDER` rounds the exact product to an integer."""
    if rescale.fraction_bits != 0 or not largest_rescaled(region) + LARGEST_CODE < LARGEST_WORD:
        return None
    odd = step.zero_point % 2
    shift = np.full(len(rescale.factors), ROUNDER + step.zero_point - odd, np.float32)
    return DirectRequantize(np.zeros(len(shift), np.int64), rescale.factors, shift, odd, converts=True)
