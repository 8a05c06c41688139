"""SmoothQuant: activations that are hard to quantize hand some of their spread to the weights that read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mcc.channels import divide_gain, groups_behind_gains
from mcc.cost import weight_expression
from mcc.errors import PassError, SpecError
from mcc.rewrite import Context, Exact, Pass
from mcc.statistics import channel_peaks

if TYPE_CHECKING:
    from mcc.graph import Graph, Node


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Divide what linear layers read by a factor for each channel, in the norm before them; multiply their weights.

        %norm: f32[8, 64] = layer_norm(%x, [64], @norm.weight, @norm.bias, 1e-05)
        %fc: f32[8, 10] = linear(%norm, @fc.weight, @fc.bias)
    becomes the same with other values in @norm.weight, @norm.bias and @fc.weight; or, where others read %norm too,
        %norm_smoothed: f32[8, 64] = layer_norm(%x, [64], @norm.weight_smoothed, @norm.bias_smoothed, 1e-05)
        %fc: f32[8, 10] = linear(%norm_smoothed, @fc.weight, @fc.bias)

    The factor of channel j is max|x_j|^alpha / max|w_j|^(1 - alpha), over calibration data and over all layers that
    read the value. Give this before `quantize`.
    Xiao, Lin, Seznec, Wu, Demouth, Han: SmoothQuant: accurate and efficient post-training quantization for large
    language models. ICML 2023.

    Attributes:
        alpha: how much of the spread goes to the weights, 0 to 1.
    """

    alpha: float = 0.5

    guarantee = Exact()

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise SpecError(f"smooth-quant: alpha={self.alpha}", remedy="a share, from 0 to 1")

    @property
    def needs_data(self) -> tuple[str, ...]:
        """How far channels reach comes from calibration data."""
        return ("calibration",)

    def run(self, graph: Graph, context: Context) -> Graph:
        """Smooth every value that a stored gain gives."""
        groups = groups_behind_gains(graph, context)
        if not groups:
            raise PassError(f"{self}: no linear layer can be smoothed: {context.reasons}", remedy="leave the pass out")
        assert context.data.calibration is not None
        peaks = channel_peaks(graph, [source.name for source, _ in groups], context.data.calibration)
        for source, layers in groups:
            divide_gain(source, layers, self._factors(peaks[source.name], layers))
            context.edited()
        return graph

    def _factors(self, peaks: Tensor, layers: list[Node]) -> Tensor:
        """What each channel is divided by, float64 [channels]."""
        expressions = (weight_expression(layer.operand(1)) for layer in layers)
        columns = torch.stack([e.values.double().abs().amax(0) for e in expressions if e is not None]).amax(0)
        factors = peaks.double() ** self.alpha / columns ** (1 - self.alpha)
        # a channel that is always zero, or that no weight reads, has nothing to hand over
        return torch.where((peaks > 0) & (columns > 0), factors, 1.0)
