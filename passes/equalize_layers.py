"""Cross-layer equalization: channels that one layer gives small and the next reads large meet in the middle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mcc import ops
from mcc.channels import multiply_inputs, weight_is_shared
from mcc.cost import weight_expression
from mcc.errors import PassError, SpecError
from mcc.ops import OPS
from mcc.quantization import not_in_float
from mcc.rewrite import Context, Exact, Pass
from mcc.statistics import channels_read

if TYPE_CHECKING:
    from torch import Tensor

    from mcc.graph import Graph, Node

# f(s x) = s f(x) for every s > 0, channel by channel
_HOMOGENEOUS = {OPS[name] for name in ("relu", "leaky_relu", "dropout", "feature_dropout", "neg", "abs")}
_OVER_SPACE = {row for row in OPS.values() if row.family == "window" and row is not OPS["pixel_shuffle"]}
_MEASURED = 1e-3  # a change of the factors that ends the sweeps


@dataclass(frozen=True)
class EqualizeLayers(Pass):
    """Divide each channel between two layers by a factor, in the weight that gives it, and multiply what reads it.

        %a: f32[1, 16, 8, 8] = conv2d(%x, @a.weight, @a.bias)
        %relu: f32[1, 16, 8, 8] = relu(%a)
        %b: f32[1, 8, 6, 6] = conv2d(%relu, @b.weight, @b.bias)
    becomes the same with other values in @a.weight, @a.bias and @b.weight. The factor of channel c is
    sqrt(max|a_c| / max|b_c|), after which both reach as far: rounding then costs no channel more than others. A bias
    counts to a_c, so that a channel that is little but its bias does not outgrow the others. What lies between must
    scale with what it reads: relu, leaky relu, pooling, upsampling, dropout, abs, a change of sign, or nothing. Give
    this after `fold-batch-norm` and before `quantize`.
    Nagel, van Baalen, Blankevoort, Welling: Data-free quantization through weight equalization and bias correction.
    ICCV 2019; Meller, Finkelstein, Almog, Grobman: Same, same but different. ICML 2019.

    Attributes:
        sweeps: the most times that all pairs are visited; a layer between two others belongs to two pairs.
    """

    sweeps: int = 20

    guarantee = Exact()

    def __post_init__(self) -> None:
        if not isinstance(self.sweeps, int) or self.sweeps < 1:
            raise SpecError(f"equalize-layers: sweeps={self.sweeps!r}", remedy="one or more")

    def run(self, graph: Graph, context: Context) -> Graph:
        """Find the pairs, and equalize them in turns until nothing changes."""
        pairs = []
        for node in graph.nodes:
            if node.op not in ops.LAYERS:
                continue
            found = _next_layer(node)
            if isinstance(found, str):
                context.decline(node, found)
            else:
                pairs.append((node, found))
        if not pairs:
            raise PassError(
                f"{self}: no two layers can be equalized: {context.reasons}",
                remedy="give fold-batch-norm before it, or leave it out",
            )
        for _ in range(self.sweeps):
            changes = [_equalize(first, second) for first, second in pairs]
            if max(changes) < _MEASURED:
                break
        for _ in pairs:
            context.edited()
        return graph


def _next_layer(node: Node) -> Node | str:
    """The layer that alone reads what another gives, channel by channel; or why there is none."""
    if (reason := _fixed(node)) is not None:
        return reason
    if node.op is ops.CONV_TRANSPOSE2D and _groups(node) > 1:
        return "it is transposed, with groups"
    value = node
    while True:
        if value.is_output or len(value.users) != 1:
            return f"%{value.name} is read elsewhere too, or is an output"
        reader = value.users[0]
        if reader.op in ops.LAYERS and reader.operand(0) == value:
            break
        scales = reader.op in _HOMOGENEOUS or (reader.op in _OVER_SPACE and _pools_space_of(node, reader))
        if not scales or reader.operand(0) != value:
            return f"{reader.op} follows it, which scales no channel by itself"
        value = reader
    if (reason := _fixed(reader)) is not None:
        return f"the layer behind it: {reason}"
    if _channels(reader) != int(node.shape[_channel_dim(node)]) or _channel_dim(reader) != _channel_dim(node):
        return f"{reader.layer} reads its channels as something else"
    return reader


def _pools_space_of(layer: Node, pool: Node) -> bool:
    """Whether a pool or upsampling works on the dims behind a layer's channels."""
    assert pool.op is not None
    spaces = next(int(c) for c in pool.op.name if c.isdigit())
    return spaces == len(layer.shape) - 1 - _channel_dim(layer)


def _fixed(node: Node) -> str | None:
    """Why a layer's weight cannot be scaled, or None."""
    reason, bias = not_in_float(node), node.operand(2)
    if reason is not None:
        return reason
    if weight_is_shared(node):
        return "its weight is shared"
    alone = bias is None or (bias.is_parameter and len(bias.fx.users) == 1)
    return None if alone else "its bias is computed or shared"


def _channel_dim(node: Node) -> int:
    """The dim of the channels in what a layer reads and gives, which has as many dims."""
    return channels_read(node)[1] % len(node.shape)


def _groups(node: Node) -> int:
    return 1 if node.op is ops.LINEAR else int(node.argument(6, 1))


def _channels(node: Node) -> int:
    """How many channels a layer reads."""
    weight = node.weight_operand
    assert weight is not None
    return int(weight.shape[0]) if node.op is ops.CONV_TRANSPOSE2D else int(weight.shape[1]) * _groups(node)


def _given(node: Node, weight: Tensor) -> Tensor:
    """A layer's weight as [channels it gives, …]."""
    return weight.transpose(0, 1) if node.op is ops.CONV_TRANSPOSE2D else weight


def _read(node: Node, weight: Tensor) -> Tensor:
    """A layer's weight as [channels it reads, …]."""
    if node.op is ops.CONV_TRANSPOSE2D:
        return weight
    groups = _groups(node)
    by_group = weight.reshape(groups, len(weight) // groups, *weight.shape[1:])
    return by_group.transpose(1, 2).reshape(groups * weight.shape[1], -1)


def _equalize(first: Node, second: Node) -> float:
    """Scale the channels between two layers; returns the largest change of one, as a power of e."""
    before, after = (weight_expression(n.weight_operand) for n in (first, second))
    assert before is not None
    assert after is not None
    reach = _given(first, before.values).abs().flatten(1).amax(1).double()
    bias = first.operand(2)
    if bias is not None:
        reach = torch.maximum(reach, bias.tensor.detach().abs().double())
    read = _read(second, after.values).abs().flatten(1).amax(1).double()
    # a channel that is always zero, or that nothing reads, has nothing to share
    factors = torch.where((reach > 0) & (read > 0), (reach / read).sqrt(), 1.0)
    graph, tensor = first.graph, before.root.tensor.detach()
    axis = 1 if first.op is ops.CONV_TRANSPOSE2D else 0
    divided = tensor.double() / factors.reshape([-1 if i == axis else 1 for i in range(tensor.dim())])
    graph.set_tensor(str(before.root.fx.target), divided.to(tensor.dtype))
    if bias is not None:
        graph.set_tensor(str(bias.fx.target), (bias.tensor.detach().double() / factors).to(bias.dtype))
    multiply_inputs(second, factors)
    return float(factors.log().abs().max())
