"""Layers whose inputs, weights and biases are integers in units of their scales."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from mcc import ops
from mcc.cost import WeightExpression, weight_expression
from mcc.fixed_point import EXACT_BITS
from mcc.formats import quantize
from mcc.integer_islands import is_quantizer
from mcc.quantization import quantizer_tensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, fx

    from mcc.graph import Node
    from mcc.rewrite import Rewriter

_INTEGER = (ops.LINEAR, ops.CONV1D, ops.CONV2D, ops.CONV3D)


@dataclass(frozen=True)
class IntegerLayer:
    """A layer that can compute in integers.

    Attributes:
        node: the layer.
        weight: its weight.
        unit: what an integer of its output stands for, float64 [out], and the outputs' axis.
    """

    node: Node
    weight: WeightExpression
    unit: tuple[Tensor, int]

    @property
    def largest(self) -> float:
        """The largest absolute value that its output can have."""
        return float((self._largest_sums * self.unit[0].abs()).max())

    @property
    def sums_exactly(self) -> bool:
        """Whether float32 holds every sum that there can be, in any order."""
        return bool(self._largest_sums.max() < 1 << EXACT_BITS)

    @cached_property
    def _largest_sums(self) -> Tensor:
        """Absolute ones, [out]."""
        source, bias = self.node.operand(0), self.node.operand(2)
        assert source is not None
        _, zero, low, high = quantizer_tensors(source)
        rows = self._codes.abs().double().flatten(1).sum(1) * max(high - int(zero), int(zero) - low)
        added = 0 if bias is None else (bias.tensor.detach().double() / self.unit[0]).abs()
        return rows + added

    @cached_property
    def _codes(self) -> Tensor:
        """Of the weight, as float32."""
        assert self.weight.quantizer is not None
        scale, zero, low, high = quantizer_tensors(self.weight.quantizer)
        codes: Tensor = quantize(self.weight.values, scale, zero, 0, low, high, torch.int8)
        return codes.float()

    def write(self, place: Rewriter, integers: Callable[[Node], Node], weights: dict[fx.Node, Node]) -> Node:
        """The layer in integers.

        Args:
            place: where to write it.
            integers: an activation's integers.
            weights: by the quantizer, the weights written so far, to which this one's is added.
        """
        source, quantizer, bias = self.node.operand(0), self.weight.quantizer, self.node.operand(2)
        assert source is not None
        assert quantizer is not None
        if quantizer.fx not in weights:
            weights[quantizer.fx] = self._weight(place, quantizer)
        added = None
        if bias is not None:
            steps = torch.round(bias.tensor.detach().double() / self.unit[0])
            added = place.read(f"{bias.fx.target}_integers", steps.float())
        arguments = (integers(source), weights[quantizer.fx], added, *self.node.fx.args[3:])
        assert self.node.op is not None
        return place.call(self.node.op, *arguments, **self.node.fx.kwargs)

    def _weight(self, place: Rewriter, quantizer: Node) -> Node:
        _, zero, low, high = quantizer_tensors(quantizer)
        name, codes = str(self.weight.root.fx.target), self._codes
        read = place.read(f"{name}_integers", codes)
        if self.weight.mask is not None:
            read = place.call(ops.MUL, read, place.read(f"{name}_integers_mask", self.weight.mask))
        ones = place.read(f"{name}_ones", torch.ones(len(codes)))
        zeros = place.read(f"{name}_zeros", torch.zeros(len(codes), dtype=zero.dtype))
        made = place.call(ops.FAKE_QUANTIZE, read, ones, zeros, 0, low, high)
        quantizer.fx.name, made.fx.name = f"{quantizer.name}_before", quantizer.name
        return made


def integer_layer(node: Node) -> IntegerLayer | str:
    """A layer as one that can compute in integers, or why it cannot."""
    if node.op not in _INTEGER:
        return f"{node.op} has no integer form"
    expression, source, bias = weight_expression(node.operand(1)), node.operand(0), node.operand(2)
    quantizer = None if expression is None else expression.quantizer
    if expression is None or quantizer is None or quantizer.op is not ops.FAKE_QUANTIZE:
        return "its weight is not of codes with scales"
    scale, zero, _, _ = quantizer_tensors(quantizer)
    if scale.dim() > 1 or bool(zero.any()) or quantizer.argument(3) not in (0, None):
        return "its weight has scales of groups, or zero points"
    if source is None or not is_quantizer(source):
        return "it reads no codes of up to ten bits with one scale"
    if bias is not None and not bias.is_parameter:
        return "its bias is computed"
    step = source.operand(1)
    assert step is not None
    outputs, rank = int(quantizer.shape[0]), len(quantizer.shape)
    unit = (step.tensor.double() * scale.double()).expand(outputs).clone()
    return IntegerLayer(node, expression, (unit, len(node.shape) - rank + 1))
