"""Whether sums of products of 8-bit codes stay within the integers that hold them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mcc.backends.kernel import Region, StoredWeight
    from mcc.target import Target

LARGEST_CODE = 255
LARGEST_INT32 = (1 << 31) - 1
EXACT_FLOAT = 1 << 24


def largest_sum(region: Region) -> int:
    """The largest absolute sum that unsigned 8-bit activations can give with the region's weight codes."""
    return region.weight.largest_row * LARGEST_CODE


def integer_bias(region: Region) -> NDArray[np.int64]:
    """What integer sums begin with besides what their codes ask for, [out]: the bias where sums are rescaled."""
    outputs = region.weight.shape[0]
    if region.rescale is None or region.bias is None:
        return np.zeros(outputs, np.int64)
    return region.bias.astype(np.int64)


def largest_total(region: Region) -> int:
    """The largest absolute value of a sum with what it begins with."""
    return largest_sum(region) + int(np.abs(integer_bias(region)).max(initial=0))


def largest_rescaled(region: Region) -> float:
    """The largest absolute value that such a total has behind its multiplication."""
    assert region.rescale is not None
    return largest_total(region) * float(np.abs(region.rescale.factors).max(initial=0.0))


def sums_overflow(region: Region) -> str | None:
    """Why int32 cannot hold the region's sums, or None if it can."""
    largest = largest_total(region)
    return f"its integer sums may reach {largest}, beyond int32" if largest > LARGEST_INT32 else None


def float_sums_inexact(region: Region) -> str | None:
    """Why float32 cannot hold the region's integer sums exactly, or None if it can."""
    largest = largest_total(region)
    if largest < EXACT_FLOAT:
        return None
    return f"its integer sums may reach {largest}, float32 is exact to {EXACT_FLOAT}"


def codes_sum_exactly(weight: StoredWeight) -> bool:
    """Whether float32 holds every sum of products of these codes with unsigned 8-bit codes."""
    return weight.largest_row * LARGEST_CODE < EXACT_FLOAT


def float_codes_refusal(region: Region) -> str | None:
    """Why a kernel that sums codes in float32 cannot take the region, or None if it can; floats it can always."""
    if region.activation is None:
        return None
    if region.weight.scale is None:
        return "the activations are quantized and the weight is not"
    return float_sums_inexact(region)


def float_start(region: Region) -> dict[str, NDArray[np.float32]]:
    """What float sums of a region's codes begin with, if it has codes: "start" [out], -zero point * sum(w) and more."""
    if region.activation is None:
        return {}
    sums = region.weight.decoded().astype(np.int64).reshape(region.weight.shape[0], -1).sum(1)
    return {"start": (integer_bias(region) - region.activation.zero_point * sums).astype(np.float32)}


def zero_sum_factor(region: Region, target: Target) -> int:
    """What sums of weights are multiplied with to begin a region's integer sums: -zero point as `dot4` sees codes."""
    assert region.activation is not None
    return target.code_offset - region.activation.zero_point


def pairs_fit(weight: NDArray[np.int8]) -> bool:
    """Whether no two neighbouring products, along dim 1 of [out, in, …], can leave int16."""
    padding = [(0, 0), (0, weight.shape[1] % 2), *[(0, 0)] * (weight.ndim - 2)]
    padded = np.pad(weight.astype(np.int32), padding)
    pairs = padded.reshape(len(padded), -1, 2, *padded.shape[2:])
    highest = int(np.maximum(pairs, 0).sum(2).max(initial=0)) * LARGEST_CODE
    lowest = int(np.minimum(pairs, 0).sum(2).min(initial=0)) * LARGEST_CODE
    return highest <= 32767 and lowest >= -32768
