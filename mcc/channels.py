"""Factors of channels, moved from what gives a value into the weights that read it: the product stays what it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mcc import ops
from mcc.cost import weight_expression
from mcc.ops import OPS
from mcc.rewrite import Context, Rewriter

if TYPE_CHECKING:
    from torch import Tensor

    from mcc.graph import Graph, Node

# where the gain and the shift of a value stand among the arguments of what gives it
GAINS = {OPS["layer_norm"]: (2, 3), OPS["rms_norm"]: (2, None), ops.MUL: (1, None)}


def groups_behind_gains(graph: Graph, context: Context) -> list[tuple[Node, list[Node]]]:
    """Values that a stored gain of each channel gives, with the linear layers that read them; others are declined.

    The gain is that of a layer or RMS norm, or a stored vector that something is multiplied by, as in an RMS norm
    written out.
    """
    groups: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op is not ops.LINEAR:
            continue
        source = node.operand(0)
        reason = _refusal(node, source)
        if reason is not None:
            context.decline(node, reason)
        elif source is not None:
            groups.setdefault(source.name, []).append(node)
    return [(graph.node(name), layers) for name, layers in groups.items()]


def _refusal(node: Node, source: Node | None) -> str | None:
    """Why a linear layer's inputs cannot be scaled, or None."""
    if source is None or source.op not in GAINS:
        origin = "an input" if source is None or source.op is None else source.op.name
        return f"it reads {origin}, which has no gain for each channel"
    shift = GAINS[source.op][1]
    stored = shift is None or source.argument(shift) is None or _is_vector(source.operand(shift), source)
    if _gain(source) is None or not stored:
        return f"the gain of %{source.name} is not a stored vector"
    if node.dtype is not torch.float32:
        return f"it computes in {str(node.dtype).removeprefix('torch.')}, not float32"
    expression = weight_expression(node.operand(1))
    if expression is None or any((expression.quantizer, expression.sparse, expression.rounded)):
        return "its weight is computed, quantized or rounded"
    return "its weight is shared" if weight_is_shared(node) else None


def _gain(source: Node) -> Node | None:
    assert source.op is not None
    places = (0, 1) if source.op is ops.MUL else (GAINS[source.op][0],)
    found = [n for n in (source.operand(i) for i in places) if n is not None and _is_vector(n, source)]
    return found[0] if len(found) == 1 else None


def _is_vector(node: Node | None, source: Node) -> bool:
    """Whether this is a stored float32 tensor with an element for each channel of `source`, its last dim."""
    if node is None or not node.is_parameter or node.dtype is not torch.float32:
        return False
    return tuple(node.shape) == (source.shape[-1],)


def weight_is_shared(node: Node) -> bool:
    """Whether anything else reads a layer's weight, in whatever form."""
    top, expression = node.operand(1), weight_expression(node.operand(1))
    assert top is not None
    assert expression is not None
    return readers(expression.root) > 1 or len(top.fx.users) > 1


def readers(parameter: Node) -> int:
    """How many places read a stored tensor."""
    reads = [n for n in parameter.graph.module.graph.nodes if n.op == "get_attr" and n.target == parameter.fx.target]
    return sum(len(n.users) for n in reads)


def divide_gain(source: Node, layers: list[Node], factors: Tensor) -> None:
    """Divide the channels that `layers` read by `factors`, float64 [channels], and multiply the layers' weights.

    The gain itself changes where nothing else reads it or what it gives; else the layers read a second value.
    """
    assert source.op is not None
    gain, shift = _gain(source), GAINS[source.op][1]
    vectors = [v for v in (gain, None if shift is None else source.operand(shift)) if v is not None]
    alone = all(readers(v) == 1 for v in vectors) and {u.name for u in source.users} == {n.name for n in layers}
    rewriter, replaced = Rewriter(source.graph, source), {}
    for vector in vectors:
        name, divided = str(vector.fx.target), (vector.tensor.detach().double() / factors).to(vector.dtype)
        if alone and not source.is_output:
            source.graph.set_tensor(name, divided)
        else:
            replaced[vector.fx] = rewriter.read(f"{name}_smoothed", divided).fx
    if replaced:
        # behind the value itself, which other readers keep
        made = rewriter.call(source.op, *source.fx.args, **source.fx.kwargs)
        for old, new in replaced.items():
            made.fx.replace_input_with(old, new)
        made.rename(f"{source.name}_smoothed")
        for layer in layers:
            layer.fx.replace_input_with(source.fx, made.fx)
    for layer in layers:
        multiply_inputs(layer, factors)


def multiply_inputs(layer: Node, factors: Tensor) -> None:
    """Multiply what a layer's weight has for each channel that it reads by `factors`, float64 [channels]."""
    expression = weight_expression(layer.weight_operand)
    assert expression is not None
    weight = expression.root.tensor.detach()
    ones = [1] * (weight.dim() - 2)
    if layer.op is ops.CONV_TRANSPOSE2D:
        scaled = weight.double() * factors.reshape(-1, 1, *ones)
    else:
        groups = len(factors) // weight.shape[1]
        by_group = weight.double().reshape(groups, -1, *weight.shape[1:])
        scaled = (by_group * factors.reshape(groups, 1, -1, *ones)).reshape(weight.shape)
    layer.graph.set_tensor(str(expression.root.fx.target), scaled.to(weight.dtype))
