"""Quantizers of activations with stored scales, whose ranges come from calibration data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mcc import ops
from mcc.formats import SMALLEST_ROW
from mcc.graph import Node
from mcc.quantization import quantizer_tensors
from mcc.rewrite import Rewriter
from mcc.statistics import affine_parameters, observe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

    from mcc.data import Inputs
    from mcc.graph import Graph
    from mcc.statistics import Histogram, Observer

ALL_CODES = (0, 255)


@dataclass(frozen=True)
class ActivationCodes:
    """What codes stand for.

    Attributes:
        low, high: the least and the largest code; signed codes are symmetric, unsigned ones affine with zero exact.
        observer: chooses the range of unsigned codes.
        powers_of_two: whether scales are.
    """

    low: int
    high: int
    observer: Observer
    powers_of_two: bool

    def parameters(self, histogram: Histogram) -> tuple[float, int]:
        """Scale and zero point."""
        low, high = self.low, self.high
        if low < 0:
            reach = max(-histogram.low, histogram.high)
            scale, zero_point = (reach / high if reach > 0 else 1.0), 0
        else:
            chosen = histogram.choose_range(self.observer, high - low + 1)
            scale, zero_point = affine_parameters(*chosen, low, high)
        if self.powers_of_two:
            scale = 2.0 ** math.ceil(math.log2(scale))
            zero_point = 0 if low < 0 else min(max(round(-chosen[0] / scale), low), high)
        return scale, zero_point


def quantize_activations(
    graph: Graph,
    reads: Sequence[tuple[Node, Node]],
    codes: ActivationCodes,
    calibration: Iterable[Inputs],
) -> None:
    """Put one quantizer on each value that is read, for all its readers; the graph is edited in place.

    Args:
        graph: whose weights are quantized already, so that activations are those that layers will see.
        reads: who reads what.
        codes: what codes stand for.
        calibration: batches of inputs.

    Raises:
        DataError: there is no batch, or a batch does not fit the graph's inputs.
    """
    graph.clean()
    values = {x.fx: x for _, x in reads if x.op is not ops.FAKE_QUANTIZE}
    histograms = observe(graph, [x.name for x in values.values()], calibration)
    for x in values.values():
        scale, zero_point = codes.parameters(histograms[x.name])
        readers = [reader.fx for reader, source in reads if source == x]
        convolutions = all(ops.lookup(reader.target) in ops.CONVOLUTIONS for reader in readers)
        if convolutions and (codes.low, codes.high) == ALL_CODES:
            # the residual of a convolutional network is added in codes too: it need not be kept in float beside
            readers += [user.fx for user in x.users if user.op is ops.ADD]
        first = next(n for n in graph.module.graph.nodes if n in readers)
        rewriter = Rewriter(graph, Node(first, graph))
        made = rewriter.call(
            ops.FAKE_QUANTIZE, x, rewriter.read(f"{x.name}_scale", torch.tensor(scale, dtype=torch.float32)),
            rewriter.read(f"{x.name}_zero_point", torch.tensor(zero_point, dtype=torch.int32)), None, codes.low,
            codes.high,
        )  # fmt: skip
        made.rename(f"{x.name}_quantized")
        for reader in readers:
            reader.replace_input_with(x.fx, made.fx)


def round_tokens(graph: Graph, quantizer: Node) -> None:
    """Send the readers of the quantized value through the same arithmetic in plain ATen calls."""
    limit: int = quantizer.argument(1)

    def plain(x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True)
        codes = torch.round(x * torch.where(largest > SMALLEST_ROW, limit / largest, 0.0))
        return codes * (largest / limit)

    _compute_instead(graph, quantizer, plain)


def round_activation(graph: Graph, quantizer: Node) -> None:
    """Send the readers of the quantized value through divide, round, add, clamp, subtract, multiply."""
    scale, zero_point, low, high = quantizer_tensors(quantizer)

    def plain(x: Tensor) -> Tensor:
        codes = torch.clamp(torch.round(x / float(scale)) + int(zero_point), low, high)
        return (codes - int(zero_point)) * float(scale)

    _compute_instead(graph, quantizer, plain)


def _compute_instead(graph: Graph, quantizer: Node, function: Callable[[Tensor], Tensor]) -> None:
    """Let those that read a quantizer of another graph read a function of what it quantizes, in this graph."""
    source = quantizer.operand(0)
    assert source is not None
    readers, value = [graph.node(user.name) for user in quantizer.users], graph.node(source.name)
    order = {n: i for i, n in enumerate(graph.module.graph.nodes)}
    made = Rewriter(graph, min(readers, key=lambda n: order[n.fx])).insert(function, value)
    for reader in readers:
        reader.fx.replace_input_with(value.fx, made.fx)
