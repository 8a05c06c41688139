"""Stage 5: let a region take in what follows its anchor."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from mcc import ops
from mcc.arguments import CLAMPS, clamp_bounds
from mcc.backends.cpu.integer_sums import LARGEST_INT32
from mcc.backends.cpu.integerize import quantized_source
from mcc.backends.cpu.kernels import first_kernel
from mcc.backends.kernel import (
    Activation,
    Add,
    Clamp,
    EpilogueStep,
    Multiply,
    QuantizedInput,
    Region,
    Relu,
    Requantize,
    Rescale,
    RescaleSums,
    Scale,
)
from mcc.ops import OPS

if TYPE_CHECKING:
    from torch import fx

    from mcc.backends.cpu.lowering import Lowering
    from mcc.graph import Node

_ACTIVATIONS = {OPS[name]: Activation(name) for name in ("sigmoid", "silu", "tanh", "hardsigmoid", "hardswish")}

_JOINS, _DIV = (ops.ADD, ops.MUL), OPS["div.Tensor"]


def fuse(lowering: Lowering) -> Lowering:
    """Extend each region over activations, additions and a final quantize, while nothing else reads what is between.

    Regions later in the graph go first: an addition of two layers goes to the one that is computed last.
    """
    regions: dict[fx.Node, Region] = {}
    taken: set[fx.Node] = set()
    for region in reversed(list(lowering.regions.values())):
        extended = _rescaled(region, lowering)
        taken |= {extended.output.fx} - {region.output.fx}
        while (following := _following(extended, taken, lowering)) is not None:
            extended = following
            taken.add(extended.output.fx)
        regions[extended.output.fx] = extended
    return replace(lowering, regions=dict(reversed(regions.items())))


def _rescaled(region: Region, lowering: Lowering) -> Region:
    """A region of integers with what they are multiplied with, if a kernel that has them whole takes both."""
    output = region.output
    rescale = _factors(output.users[0], output) if len(output.users) == 1 and not output.is_output else None
    if rescale is None or not _gives_integers(region):
        return region
    inner = (*region.inner, output)
    extended = replace(region, output=output.users[0], epilogue=(rescale,), inner=inner)
    return region if first_kernel(extended, lowering.target)[0] is None else extended


def _factors(node: Node, source: Node) -> RescaleSums | None:
    """What a node multiplies the outputs of a layer with, each with its own factor; None where it does not."""
    factors, last = node.operand(1), len(source.shape) - 1
    if node.operand(0) != source or factors is None or not factors.is_parameter or node.fx.kwargs:
        return None
    values, outputs = factors.tensor.detach().float().numpy(), int(source.shape[-1])
    if node.op is ops.RESCALE and node.argument(2) in (None, last):
        return RescaleSums(np.broadcast_to(values, outputs).copy(), node.argument(3))
    by_output = node.op is ops.MUL and values.shape[-1:] == (outputs,) and values.size == outputs
    return RescaleSums(values.reshape(-1), None) if by_output else None


def _gives_integers(region: Region) -> bool:
    """Whether a layer multiplies codes, less their zero points, by codes, and adds integers."""
    activation, scale, bias = region.activation, region.weight.scale, region.bias
    codes = activation is not None and not activation.per_token and activation.scale == 1
    whole = bias is None or bool((bias == np.rint(bias)).all() and (np.abs(bias) < LARGEST_INT32).all())
    return codes and scale is not None and not region.weight.grouped and bool((scale == 1).all()) and whole


def _following(region: Region, taken: set[fx.Node], lowering: Lowering) -> Region | None:
    """The region with the one node that reads its output, or None; not every sparse kernel reads another value."""
    users = region.output.users
    if len(users) != 1 or region.output.is_output or region.output_dtype == "uint8" or users[0].fx in taken:
        return None
    step = _step(users[0], region)
    if step is None:
        return None
    inner = (*region.inner, region.output)
    extended = replace(region, output=users[0], epilogue=(*region.epilogue, step), inner=inner)
    sparse = region.weight.sparse is not None and region.anchor.op is ops.LINEAR
    refused = sparse and isinstance(step, Add | Multiply) and first_kernel(extended, lowering.target)[0] is None
    return None if refused else extended


def _step(node: Node, region: Region) -> EpilogueStep | None:
    if node.op in _JOINS and (step := _joined(node, region)) is not None:
        return step
    return own_step(node) if node.operand(0) == region.output else None


def own_step(node: Node) -> EpilogueStep | None:
    """What a node does to its first operand as an epilogue step that reads nothing else, or None."""
    if node.op is ops.RELU:
        return Relu()
    if node.op is OPS["gelu"]:
        return Activation("gelu_tanh" if node.fx.kwargs.get("approximate") == "tanh" else "gelu")
    if node.op in _ACTIVATIONS:
        return _ACTIVATIONS[node.op]
    if node.op in (ops.MUL, _DIV):
        number = node.argument(1)
        scales = isinstance(number, int | float) and node.dtype is torch.float32 and number != 0
        return Scale(1 / number if node.op is _DIV else float(number)) if scales else None
    if node.op in CLAMPS:
        low, high = clamp_bounds(node)
        return Clamp(low, high) if isinstance(low, int | float) and isinstance(high, int | float) else None
    if node.op is ops.RESCALE:
        factor = node.operand(1)
        one = factor is not None and factor.is_parameter and not factor.shape
        return Rescale(float(factor.tensor), node.argument(3)) if one else None  # type: ignore[union-attr]  # as said
    return requantize_step(node) if node.op is ops.QUANTIZE else None


def _joined(node: Node, region: Region) -> Add | Multiply | None:
    """Another value of the same shape added or multiplied by."""
    first, second = node.operand(0), node.operand(1)
    if first is None or second is None or first == second or node.fx.kwargs:
        return None
    other = second if first == region.output else first
    alike = [str(s) for s in other.value.shape] == [str(s) for s in region.output.shape]
    if not alike or other.dtype is not torch.float32 or other.is_parameter:
        return None
    scaled = _rescaled_codes(other) if node.op is ops.ADD else None
    if scaled is not None:
        return Add(*scaled)
    activation, codes = quantized_source(other)
    kind = Add if node.op is ops.ADD else Multiply
    return kind(other) if codes is None else kind(codes, activation)


def _rescaled_codes(node: Node) -> tuple[Node, QuantizedInput] | None:
    """The codes whose integers a node rescales, and how; None where it does not, or something else reads it."""
    source, factor = node.operand(0), node.operand(1)
    if node.op is not ops.RESCALE or source is None or factor is None or not factor.is_parameter:
        return None
    activation, codes = quantized_source(source)
    if activation is None or codes is None or activation.scale != 1 or factor.shape or len(node.fx.users) > 1:
        return None
    return codes, replace(activation, scale=float(factor.tensor), fraction_bits=node.argument(3))


def requantize_step(node: Node) -> Requantize | None:
    """A quantize node with one stored scale and unsigned codes as an epilogue step, or None."""
    scale, zero_point = node.operand(1), node.operand(2)
    if node.argument(3) is not None or node.argument(4) < 0 or scale is None or zero_point is None:
        return None
    if not (scale.is_parameter and zero_point.is_parameter):
        return None
    return Requantize(float(scale.tensor), int(zero_point.tensor), node.argument(4), node.argument(5))
