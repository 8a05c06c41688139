"""AWQ: input channels with large activations are scaled up before their weights are quantized to a few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mcc.channels import divide_gain, groups_behind_gains
from mcc.errors import PassError, SpecError
from mcc.formats import fake_quantize
from mcc.quantization import check_group_size, code_range, group_parameters, layer_weight, ragged
from mcc.rewrite import Context, Exact, Pass
from mcc.statistics import ChannelMoments, channel_moments

if TYPE_CHECKING:
    from mcc.graph import Graph, Node

NARROWEST, WIDEST = 2, 4
CANDIDATES = 20


@dataclass(frozen=True)
class Awq(Pass):
    """Multiply weights of linear layers, input by input, by what the norm before them is divided by.

        %norm: f32[8, 64] = layer_norm(%x, [64], @norm.weight, @norm.bias, 1e-05)
        %fc: f32[8, 10] = linear(%norm, @fc.weight, @fc.bias)
    becomes the same with other values in @norm.weight, @norm.bias and @fc.weight, as `smooth-quant` has it. The factor
    of channel j is mean|x_j|^alpha; of alphas from 0 to 1 the one is taken with which the layers' outputs, over
    calibration data, are closest after rounding their weights. Give this before a pass that does that, with the same
    bits and groups: `awq; quantize{weights='int4', activations=None, group_size=128}`.
    Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han: AWQ: activation-aware weight quantization for on-device LLM
    compression and acceleration. MLSys 2024.

    Attributes:
        bits: of a weight, 2 to 4.
        group_size: inputs that share a scale, a multiple of 32; None for all.
        symmetric: False where groups will have a zero point.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True

    guarantee = Exact()

    def __post_init__(self) -> None:
        if not NARROWEST <= self.bits <= WIDEST:
            raise SpecError(f"awq: bits={self.bits}", remedy="bits are 2, 3 or 4")
        check_group_size("awq", self.group_size)

    @property
    def needs_data(self) -> tuple[str, ...]:
        """How large channels are comes from calibration data."""
        return ("calibration",)

    def run(self, graph: Graph, context: Context) -> Graph:
        """Scale every value that a stored gain gives."""
        groups = [(source, self._whole(layers, context)) for source, layers in groups_behind_gains(graph, context)]
        groups = [(source, layers) for source, layers in groups if layers]
        if not groups:
            raise PassError(f"{self}: no linear layer can be scaled: {context.reasons}", remedy="leave the pass out")
        assert context.data.calibration is not None
        moments = channel_moments(graph, [source.name for source, _ in groups], context.data.calibration)
        before, after = 0.0, 0.0
        for source, layers in groups:
            factors, plain, scaled = self._search(layers, moments[source.name])
            before, after = before + plain / len(groups), after + scaled / len(groups)
            if scaled < plain:
                divide_gain(source, layers, factors)
                context.edited()
            else:
                context.decline(layers[0], "no factors lower the error of its outputs")
        context.note(f"mean error of outputs, relative: {before:.2e} rounded as they were, {after:.2e} scaled before")
        return graph

    def _whole(self, layers: list[Node], context: Context) -> list[Node]:
        """Those of layers that read one value; none where one of them has no whole groups."""
        reasons = [(layer, ragged(layer, self.group_size)) for layer in layers]
        for layer, reason in reasons:
            if reason is not None:
                context.decline(layer, reason)
        return [] if any(reason for _, reason in reasons) else layers

    def _search(self, layers: list[Node], moments: ChannelMoments) -> tuple[Tensor, float, float]:
        """The best factors, float64 [channels], and the relative error of outputs without and with them."""
        weights = [layer_weight(layer)[1].double() for layer in layers]
        power = max(sum(_energy(w, moments.products) for w in weights), torch.finfo(torch.float64).tiny)
        best, least, plain = torch.ones_like(moments.sizes), float("inf"), float("inf")
        # a channel that is always zero has nothing to scale
        sizes = torch.where(moments.sizes > 0, moments.sizes, 1.0)
        for i in range(CANDIDATES):
            factors = sizes ** (i / CANDIDATES)
            factors = factors / (factors.max() * factors.min()).sqrt()
            error = sum(_energy(w - self._rounded(w * factors) / factors, moments.products) for w in weights) / power
            plain = error if i == 0 else plain
            if error < least:
                best, least = factors, error
        return best, plain, least

    def _rounded(self, weight: Tensor) -> Tensor:
        groups = 1 if self.group_size is None else weight.shape[1] // self.group_size
        scale, zero = group_parameters(weight, groups, code_range(self.bits), symmetric=self.symmetric)
        rounded: Tensor = fake_quantize(weight, scale, zero, 0, *code_range(self.bits))
        return rounded


def _energy(weight: Tensor, products: Tensor) -> float:
    """Mean square of what a weight [out, in] gives, summed over outputs."""
    return float((weight @ products * weight).sum())
