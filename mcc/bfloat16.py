"""bfloat16: float32 with eight bits of mantissa, which some CPUs multiply twice as many of in an instruction.

A graph stays in float32: values that are rounded stand in it as what they are rounded to.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("mcc::round_bfloat16", mutates_args=())
def round_bfloat16(x: Tensor) -> Tensor:
    """Round to the nearest bfloat16, half to even, in float32; the gradient passes straight through."""
    return x.to(torch.bfloat16).to(torch.float32)


@round_bfloat16.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


round_bfloat16.register_autograd(lambda _ctx, gradient: gradient)


@torch.library.custom_op("mcc::decode_bfloat16", mutates_args=())
def decode_bfloat16(stored: Tensor) -> Tensor:
    """The float32 values of bfloat16 that are stored as their bits, int16."""
    return stored.view(torch.bfloat16).to(torch.float32)


@decode_bfloat16.register_fake
def _(stored: Tensor) -> Tensor:
    return torch.empty_like(stored, dtype=torch.float32)


def encode_bfloat16(x: Tensor) -> Tensor:
    """The bits of x rounded to bfloat16, int16."""
    return x.detach().to(torch.bfloat16).view(torch.int16)
