"""Codes of rows that come at run time, each group of a row with a scale of its own: how a key-value cache is kept.

Codes of 8 bits are int8. Those of 4 bits lie two in a byte of uint8: code + 8 of element i in the low half of byte i,
that of element i + size / 2 in its high half, so that a vector of either half is a vector of bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mcc.formats import SMALLEST_ROW

LIMITS = {8: 127, 4: 7}  # the largest code, by bits; the least is its negative
ZERO = 8  # of the codes of 4 bits, as stored


def _in_groups(x: Tensor, groups: int) -> Tensor:
    return x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)


@torch.library.custom_op("mcc::token_scales", mutates_args=())
def token_scales(x: Tensor, bits: int, groups: int) -> Tensor:
    """The scales of rows: the largest |x| of each group over the largest code.

    Args:
        x: float32, [..., size].
        bits: of a code, 8 or 4.
        groups: that a row is cut into; divides size.

    Returns:
        float32, [..., groups].
    """
    largest = _in_groups(x, groups).abs().amax(-1)
    return largest.clamp_min(SMALLEST_ROW) / LIMITS[bits]


@token_scales.register_fake
def _(x: Tensor, bits: int, groups: int) -> Tensor:
    del bits
    return x.new_empty((*x.shape[:-1], groups))


@torch.library.custom_op("mcc::quantize_tokens", mutates_args=())
def quantize_tokens(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes of rows: round(x / scale), half to even, within the largest code.

    Args:
        x: float32, [..., size].
        scale: float32, [..., groups], as `token_scales` gives it.
        bits: of a code, 8 or 4.

    Returns:
        int8 [..., size], or, of 4 bits, uint8 [..., size / 2].
    """
    limit = LIMITS[bits]
    in_steps = _in_groups(x, scale.shape[-1]) / scale.unsqueeze(-1)
    codes = torch.round(in_steps).clamp(-limit, limit).flatten(-2).to(torch.int8)
    if bits == 8:
        return codes
    low, high = (codes + ZERO).to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4)


@quantize_tokens.register_fake
def _(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    del scale
    if bits == 8:
        return torch.empty_like(x, dtype=torch.int8)
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8)


@torch.library.custom_op("mcc::dequantize_tokens", mutates_args=())
def dequantize_tokens(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Float32 values [..., size] of what `quantize_tokens` gives: code * scale."""
    if bits != 8:
        codes = torch.cat((codes & 15, codes >> 4), dim=-1).to(torch.int8) - ZERO
    values = _in_groups(codes.to(torch.float32), scale.shape[-1])
    return (values * scale.unsqueeze(-1)).flatten(-2)


@dequantize_tokens.register_fake
def _(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    return scale.new_empty((*codes.shape[:-1], codes.shape[-1] * 8 // bits))
