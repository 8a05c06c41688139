"""Layers whose inputs, weights and biases are integers in units of their scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mcc import ops
from mcc.cost import WeightExpression, weight_expression
from mcc.formats import along_axis, nearest
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
        scale, zero, low, high = quantizer_tensors(quantizer)
        values, name = self.weight.values, str(self.weight.root.fx.target)
        codes = nearest(values / along_axis(scale.float(), values, 0), torch.zeros(())).clamp(low, high)
        read = place.read(f"{name}_integers", codes)
        if self.weight.mask is not None:
            read = place.call(ops.MUL, read, place.read(f"{name}_integers_mask", self.weight.mask))
        ones = place.read(f"{name}_ones", torch.ones(len(values)))
        zeros = place.read(f"{name}_zeros", torch.zeros(len(values), dtype=zero.dtype))
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
    if source is None or source.op is not ops.FAKE_QUANTIZE or source.argument(3) is not None:
        return "it reads no codes with one scale"
    if bias is not None and not bias.is_parameter:
        return "its bias is computed"
    step = source.operand(1)
    assert step is not None
    unit = (step.tensor.double() * scale.double()).expand(int(node.operand(1).shape[0])).clone()  # type: ignore[union-attr]  # a layer has a weight
    return IntegerLayer(node, expression, (unit, len(node.shape) - len(expression_shape(node)) + 1))


def expression_shape(node: Node) -> tuple[int, ...]:
    """Of a layer's dense weight."""
    top = node.operand(1)
    assert top is not None
    return tuple(int(s) for s in top.shape)
