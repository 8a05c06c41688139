"""HQQ: zero points of weight groups chosen for a norm of the errors that lets few of them be large. Needs no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mcc.cost import weight_expression
from mcc.errors import SpecError
from mcc.formats import nearest
from mcc.quantization import (
    check_group_size,
    code_range,
    insert_quantizer,
    layer_weight,
    linear_layers_taken,
    ragged,
    reader_in_float,
    scale_dtype,
    weights_rounded,
)  # fmt: skip
from mcc.rewrite import Context, Lossy, Pass

if TYPE_CHECKING:
    from mcc.graph import Graph, Node

NORM, PENALTY, GROWTH = 0.7, 10.0, 1.01  # as its authors have them
ROUNDS = 10
LARGEST_ZERO = 1000
SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # of scales that span a group's whole range


@dataclass(frozen=True)
class Hqq(Pass):
    """Quantize the weights of linear layers in groups, with zero points that need not be codes.

        %fc: f32[8, 10] = linear(%x, @fc.weight, @fc.bias)
    becomes
        %fc_weight_quantized: f32[10, 64] = mcc.fake_quantize(@fc.weight, @fc.weight_scale, @fc.weight_zero_point,
        axis=0, low=-8, high=7)
        %fc: f32[8, 10] = linear(%x, %fc_weight_quantized, @fc.bias)
    with @fc.weight_zero_point: f16[10, 64 / group_size]. A zero point minimizes the sum of |error|^0.7 of its group by
    half-quadratic splitting; of scales that span the group's range or less, the one with the least squared error is
    taken. Badri, Shaji: Half-quadratic quantization of large machine learning models. Mobius Labs, 2023.

    Attributes:
        bits: of a weight, 2 to 4.
        group_size: inputs that share a scale, a multiple of 32; None for all.
    """

    bits: int = 4
    group_size: int | None = 64

    guarantee = Lossy()

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise SpecError(f"hqq: bits={self.bits!r}", remedy="use 2, 3 or 4")
        check_group_size("hqq", self.group_size)

    def run(self, graph: Graph, context: Context) -> Graph:
        """Quantize every linear layer."""
        for node in linear_layers_taken(self, graph, context, self._refusal):
            name, weight = layer_weight(node)
            groups = 1 if self.group_size is None else weight.shape[1] // self.group_size
            grid = half_quadratic(weight.detach().reshape(len(weight), groups, -1), code_range(self.bits))
            insert_quantizer(node, name, lambda grid=grid: grid, 0, code_range(self.bits))  # type: ignore[misc]
            context.edited()
        return graph

    def reference(self, before: Graph, after: Graph) -> Graph:
        """The graph before, reading weights rounded in their tensors."""
        return weights_rounded(before, after)

    def _refusal(self, node: Node) -> str | None:
        """Why a linear layer with a float weight is not taken, or None if it is."""
        expression = weight_expression(node.operand(1))
        assert expression is not None
        if expression.mask is not None:
            return "its pruned weights would not stay zero: no code stands for it"
        if (reader := reader_in_float(node)) is not None:
            return f"its weight is read by {reader.op} as well"
        return ragged(node, self.group_size)


def half_quadratic(groups: Tensor, codes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Scales and zero points of groups.

    Args:
        groups: weights, float [out, groups, size].
        codes: the least and the largest.

    Returns:
        scales and zero points, float16 [out, groups]; scales float32 where float16 cannot hold them.
    """
    low, high = codes
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    whole = (most - least) / (high - low)
    # of a group that hardly varies code 1 stands for the middle: its zero point would be beyond float16's whole numbers
    middle = (least + most) / 2
    flat = (whole <= torch.finfo(torch.float32).tiny) | (middle.abs() > LARGEST_ZERO * whole)
    whole = torch.where(flat, torch.where(middle == 0, 1.0, middle), whole)
    kind = scale_dtype(whole.abs(), SHRINKS[-1])
    best_scale, best_zero, smallest = whole, torch.zeros_like(whole), torch.full_like(whole, float("inf"))
    for shrink in SHRINKS:
        scale = torch.where(flat, whole, whole * shrink).to(kind).float()
        centred = (low + high) / 2 - (least + most) / 2 / scale
        zero = _zero_point(groups, scale, torch.where(flat, 0.0, centred), codes)
        size = _error(groups, scale, zero, codes).square().sum(-1, keepdim=True)
        better = size < smallest
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        smallest = torch.where(better, size, smallest)
    return best_scale[..., 0].to(kind), best_zero[..., 0].to(torch.float16)


def _error(groups: Tensor, scale: Tensor, zero: Tensor, codes: tuple[int, int]) -> Tensor:
    return groups - (nearest(groups / scale, zero).clamp(*codes) - zero) * scale


def _zero_point(groups: Tensor, scale: Tensor, start: Tensor, codes: tuple[int, int]) -> Tensor:
    """The best zero points seen for scales that stay, [out, groups, 1], exact in float16."""
    zero, best, penalty = start, start.to(torch.float16).float(), PENALTY
    smallest = torch.full_like(start, float("inf"))
    for _ in range(ROUNDS):
        zero = zero.to(torch.float16).float()
        error = _error(groups, scale, zero, codes)
        size = error.abs().pow(NORM).sum(-1, keepdim=True)
        best, smallest = torch.where(size < smallest, zero, best), torch.minimum(size, smallest)
        # the errors that stay: generalized soft thresholding
        kept = error.sign() * (error.abs() - error.abs().clamp(min=1e-12).pow(NORM - 1) / penalty).clamp(min=0)
        # code - (weight - kept) / scale, of which code - zero is (weight - error) / scale
        zero = zero + ((kept - error) / scale).mean(-1, keepdim=True)
        penalty *= GROWTH
    return best
