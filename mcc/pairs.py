"""Weights of 8 bits whose neighbours one instruction multiplies and adds exactly.

x86's `vpmaddubsw` adds two products of an unsigned activation code (to 255) and a signed weight code in 16 bits, where
127 + 127 saturates. To halve all codes, as other quantizers do, costs a bit of every weight; here a pair of neighbours
of one sign shares 128 steps, and few pairs of a layer need to be changed for that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mcc import ops
from mcc.channels import weight_is_shared
from mcc.quantization import channel_scales

if TYPE_CHECKING:
    from torch import Tensor

    from mcc.graph import Node

LARGEST = 127
LARGEST_SUM = 128  # of the codes of two neighbours of one sign: 128 * 255 < 2^15
SPREADS = (*(1 + i / 10 for i in range(11)), LARGEST / 63)  # of scales; with the last every pair fits as it is


def reads_pairs(node: Node) -> bool:
    """Whether kernels multiply neighbours along a layer's inputs, an even number, of a weight that it alone reads."""
    weight = node.weight_operand
    assert weight is not None
    even = node.op is not ops.CONV_TRANSPOSE2D and int(weight.shape[1]) % 2 == 0
    return even and not weight_is_shared(node)


def fitted(in_steps: Tensor) -> Tensor:
    """The codes nearest to values in steps, in squared error, of which all pairs fit.

    Args:
        in_steps: float, [out, in, …], an even number of inputs.

    Returns:
        whole numbers from -127 to 127 of the same shape.
    """
    pairs = in_steps.reshape(len(in_steps), -1, 2, *in_steps.shape[2:])
    codes = torch.round(pairs).clamp(-LARGEST, LARGEST)
    first, second = codes.unbind(2)
    over = (first * second > 0) & (first.abs() + second.abs() > LARGEST_SUM)
    a, b = pairs.abs().unbind(2)
    share = torch.round((a - b + LARGEST_SUM) / 2).clamp(LARGEST_SUM - LARGEST, LARGEST)
    changed = torch.stack([share * first.sign(), (LARGEST_SUM - share) * second.sign()], 2)
    return torch.where(over[:, :, None], changed, codes).flatten(1, 2)


def fit_pairs(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of outputs whose codes fit in pairs with the least squared error, and a weight that rounds to these codes.

    Args:
        weight: float32, [out, in, …], an even number of inputs.

    Returns:
        scales, float32 [out], and the weight, of which only what would not fit is changed.
    """
    values = weight.detach().float()
    full = channel_scales(values, 0, (-LARGEST, LARGEST))
    shape = [-1, *[1] * (values.dim() - 1)]
    best = torch.full_like(full, torch.inf)
    scales, chosen = full, values
    for spread in SPREADS:
        step = (full * spread).reshape(shape)
        in_steps = values / step
        codes = fitted(in_steps)
        error = ((codes - in_steps) * spread).square().flatten(1).sum(1)
        better = error < best
        kept = torch.where(codes == torch.round(in_steps), values, codes * step)
        best, scales = torch.where(better, error, best), torch.where(better, full * spread, scales)
        chosen = torch.where(better.reshape(shape), kept, chosen)
    return scales, chosen
