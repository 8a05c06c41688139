"""Folding batch normalization into the layer before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mcc import ops
from mcc.rewrite import Exact, Match, Reject, Rewrite, Rewriter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mcc.graph import Node


@dataclass(frozen=True)
class FoldBatchNorm(Rewrite):
    """Multiply a batch norm's scale into the weights of the layer before it, and its shift into the bias.

        %conv: f32[1, 4, 8, 8] = conv2d(%x, @conv.weight)
        %bn: f32[1, 4, 8, 8] = batch_norm(%conv, @bn.weight, @bn.bias, @bn.running_mean, @bn.running_var)
    becomes
        %bn: f32[1, 4, 8, 8] = conv2d(%x, @conv.weight, @conv.bias)

    with W' = W * g, b' = (b - mean) * g + beta, g = gamma / sqrt(var + eps), computed in float64. The scales of
    a weight quantized by output channel are multiplied too, so that its codes stay as they are.
    Krishnamoorthi: Quantizing deep convolutional networks for efficient inference. arXiv 1806.08342, 2018, section
    3.2.2.
    """

    guarantee = Exact()

    def match(self, node: Node) -> Match | Reject:
        """Find a batch norm whose producer is a layer nothing else reads."""
        if node.op is not ops.BATCH_NORM:
            return Reject.other_op(node)
        if node.operand(3) is None:
            return Reject(node, "it has no running statistics")
        producer = node.operand(0)
        if producer is None or producer.op not in ops.LAYERS:
            kind = "an input" if producer is None or producer.op is None else producer.op.name
            return Reject(node, f"it follows {kind}, not a convolution or linear layer")
        if len(producer.fx.users) > 1:
            return Reject(node, f"%{producer.name} is read elsewhere too")
        weight, bias = producer.weight, producer.operand(2)
        if weight is None or (bias is not None and not bias.is_parameter):
            return Reject(node, f"the weight or bias of %{producer.name} is computed")
        direct = producer.operand(1)
        if direct is not None and direct.op in (*ops.FIXED, ops.ROUND_BFLOAT16):
            how = "rounded" if direct.op is ops.ROUND_BFLOAT16 else "encoded"
            return Reject(node, f"the weight of %{producer.name} is {how}: fold before that")
        quantizer = direct if direct is not None and direct.op is ops.FAKE_QUANTIZE else None
        if quantizer is not None and not _scales_by_output(quantizer, producer, _affine(node)[0]):
            return Reject(node, f"the weight of %{producer.name} is quantized, but not symmetrically by output channel")
        if len(producer.shape) != weight.tensor.dim():
            return Reject(node, f"the channels of %{producer.name} are not its dim 1: shape {list(producer.shape)}")
        if any(len(n.fx.users) > 1 for n in _weight_chain(producer)) or (bias is not None and len(bias.fx.users) > 1):
            return Reject(node, f"the weight or bias of %{producer.name} is shared with another layer")
        return Match(node, producer=producer, weight=weight, bias=bias, quantizer=quantizer)

    def rewrite(self, match: Match, rewriter: Rewriter) -> Node:
        """Change the stored weight and bias, and call the layer in the batch norm's place."""
        producer: Node = match.producer
        gain, mean, shift = _affine(match.node)
        weight = match.weight.tensor.detach()
        out_axis = 1 if producer.op is ops.CONV_TRANSPOSE2D else 0
        if match.quantizer is None:
            scaled = _scale_outputs(weight.double(), gain, out_axis, groups=_groups(producer))
        else:
            scaled = _scale_codes(match.quantizer, weight, gain)
        rewriter.graph.set_tensor(str(match.weight.fx.target), scaled.to(weight.dtype))
        bias = torch.zeros_like(mean) if match.bias is None else match.bias.tensor.detach().double()
        folded = ((bias - mean) * gain + shift).to(weight.dtype)
        if match.bias is None:
            owner = str(match.weight.fx.target).rpartition(".")[0]
            name = rewriter.graph.free_name(f"{owner}.bias" if owner else "bias")
            rewriter.graph.add_parameter(name, folded)
        else:
            name = str(match.bias.fx.target)
            rewriter.graph.set_tensor(name, folded)
        assert producer.op is not None
        args = [producer.operand(0), producer.operand(1), rewriter.read(name), *producer.fx.args[3:]]
        return rewriter.call(producer.op, *args, **producer.fx.kwargs)


def _affine(node: Node) -> tuple[Tensor, Tensor, Tensor]:
    """The batch norm as (x - mean) * gain + shift: gain, mean and shift in float64, [channels]."""
    gamma, beta, mean, variance = (node.operand(i) for i in range(1, 5))
    assert mean is not None
    assert variance is not None
    gain = torch.rsqrt(variance.tensor.double() + float(node.argument(7)))
    if gamma is not None:
        gain = gain * gamma.tensor.detach().double()
    shift = torch.zeros_like(gain) if beta is None else beta.tensor.detach().double()
    return gain, mean.tensor.double(), shift


def _scales_by_output(quantizer: Node, producer: Node, gain: Tensor) -> bool:
    """Whether a weight's quantizer has a scale for each output, and codes that may change sign where the gain is so."""
    scale, zero = quantizer.operand(1), quantizer.operand(2)
    if scale is None or zero is None or not scale.is_parameter or not zero.is_parameter:
        return False
    by_output = (
        quantizer.argument(3) == 0
        and scale.tensor.dim() == 1
        and producer.op is not ops.CONV_TRANSPOSE2D
        and len(scale.fx.users) == 1
    )
    invertible = quantizer.argument(4) == -quantizer.argument(5) or bool((gain >= 0).all())
    return bool(by_output and invertible and not torch.count_nonzero(zero.tensor))


def _scale_codes(quantizer: Node, weight: Tensor, gain: Tensor) -> Tensor:
    """Scale a quantized weight with its scales: a weight of the same codes, up to sign, so that rounding stays."""
    node = quantizer.operand(1)
    assert node is not None
    scale = node.tensor.double()
    codes = torch.clamp(
        torch.round(_by_output(weight.double(), 1 / scale)), quantizer.argument(4), quantizer.argument(5)
    )
    after = torch.where(gain == 0, scale, scale * gain.abs())
    quantizer.graph.set_tensor(str(node.fx.target), after.to(node.tensor.dtype))
    return _by_output(codes, torch.sign(gain) * after)


def _by_output(weight: Tensor, factor: Tensor) -> Tensor:
    return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))


def _weight_chain(producer: Node) -> Iterator[Node]:
    """The nodes from the layer's weight operand, masks included, down to the stored tensor."""
    node = producer.operand(1)
    while node is not None:
        yield node
        node = None if node.is_parameter else node.operand(0)


def _groups(node: Node) -> int:
    return int(node.argument(6, 1)) if node.op is ops.CONV_TRANSPOSE2D else 1


def _scale_outputs(weight: Tensor, gain: Tensor, out_axis: int, groups: int) -> Tensor:
    """Scale the output channels; a transposed convolution's [in, out / groups, …] counts them group by group."""
    if out_axis == 0:
        return _by_output(weight, gain)
    blocks = weight.reshape(groups, -1, *weight.shape[1:])
    scale = gain.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
    return (blocks * scale).reshape(weight.shape)
