"""GPTQ: weights of a few bits whose rounding errors later inputs of the layer make up for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mcc.channels import weight_is_shared
from mcc.cost import weight_expression
from mcc.curvature import compensated, inverse_factor, layer_by_layer, layer_hessian
from mcc.errors import SpecError
from mcc.formats import nearest
from mcc.quantization import (
    check_group_size,
    code_range,
    group_parameters,
    insert_quantizer,
    layer_weight,
    linear_layers_taken,
    ragged,
    weights_rounded,
)  # fmt: skip
from mcc.rewrite import Context, Lossy, Pass

if TYPE_CHECKING:
    from mcc.graph import Graph, Node

NARROWEST, WIDEST = 2, 4
ROWS = 16  # outputs whose systems are made at a time


@dataclass(frozen=True)
class Gptq(Pass):
    """Quantize the weights of linear layers one input at a time, and change the inputs not yet done to make up for it.

        %fc: f32[8, 10] = linear(%x, @fc.weight, @fc.bias)
    becomes, with other values in @fc.weight,
        %fc_weight_quantized: f32[10, 64] = mcc.fake_quantize(@fc.weight, @fc.weight_scale, @fc.weight_zero_point,
        axis=0, low=-8, high=7)
        %fc: f32[8, 10] = linear(%x, %fc_weight_quantized, @fc.bias)

    Each layer sees what the quantized layers before it give. Scales and zero points are first those with the least
    error of outputs before any change, inputs taken as independent; once all codes are chosen, scales become those with
    the least error of outputs. Frantar, Ashkboos, Hoefler, Alistarh: GPTQ: accurate post-training quantization for
    generative pre-trained transformers. ICLR 2023.

    Attributes:
        bits: of a weight, 2 to 4.
        group_size: inputs that share a scale, a multiple of 32; None for all.
        symmetric: False gives each group a zero point.
        act_order: take the inputs with the largest activations first, whose errors the others can make up for.
        damping: added to the diagonal of the Hessian, relative to its mean.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True
    act_order: bool = True
    damping: float = 0.01

    guarantee = Lossy()

    def __post_init__(self) -> None:
        if not NARROWEST <= self.bits <= WIDEST or not 0 < self.damping <= 1:
            raise SpecError(
                f"gptq: bits={self.bits}, damping={self.damping}", remedy="bits are 2, 3 or 4, damping in (0, 1]"
            )
        check_group_size("gptq", self.group_size)

    @property
    def needs_data(self) -> tuple[str, ...]:
        """Hessians come from calibration data."""
        return ("calibration",)

    def run(self, graph: Graph, context: Context) -> Graph:
        """Quantize layer by layer while the calibration data runs through the graph."""
        layers = linear_layers_taken(self, graph, context, self._refusal)
        parameters: dict[Node, tuple[Tensor, Tensor]] = {}

        def change(node: Node, arguments: list[list[Any]]) -> None:
            parameters[node] = self._quantize(node, arguments)

        layer_by_layer(graph, context, "gptq", layers, change)
        for node in layers:
            name, _ = layer_weight(node)
            insert_quantizer(node, name, lambda n=node: parameters[n], 0, code_range(self.bits))  # type: ignore[misc]
        return graph

    def reference(self, before: Graph, after: Graph) -> Graph:
        """The graph before, reading the changed weights rounded in their tensors."""
        return weights_rounded(before, after)

    def _refusal(self, node: Node) -> str | None:
        if weight_is_shared(node):
            return "its weight is shared: other readers would see it change"
        return ragged(node, self.group_size)

    def _quantize(self, node: Node, arguments: list[list[Any]]) -> tuple[Tensor, Tensor]:
        """Change a layer's stored weight to values on the grid; returns scales and zero points."""
        name, weight = layer_weight(node)
        curvature = layer_hessian(node, weight.shape[1], arguments)
        expression = weight_expression(node.operand(1))
        assert expression is not None
        groups = 1 if self.group_size is None else weight.shape[1] // self.group_size
        scale, zero = group_parameters(
            weight, groups, code_range(self.bits), symmetric=self.symmetric, importance=curvature.diagonal()
        )
        order = curvature.diagonal().argsort(descending=True) if self.act_order else torch.arange(len(curvature))
        size = weight.shape[1] // groups
        step = scale.float().repeat_interleave(size, 1)[:, order]
        zeros = (zero.float().expand(scale.shape)).repeat_interleave(size, 1)[:, order]
        kept = torch.ones_like(weight) if expression.mask is None else expression.mask.float()
        grid = _Grid(step, zeros, kept[:, order], *code_range(self.bits))
        inverse = inverse_factor(curvature[order][:, order], self.damping, self, node)
        back = order.argsort()
        rounded = compensated(weight[:, order].float(), inverse, grid.nearest)
        codes = (rounded / step)[:, back].reshape(len(weight), groups, size)
        scale = refitted(codes, scale, weight.float(), curvature, self.damping)
        node.graph.set_tensor(name, (codes * scale.float()[..., None]).reshape(weight.shape).to(weight.dtype))
        return scale, zero


@dataclass(frozen=True)
class _Grid:
    """The values that weights may have, all [out, in].

    Attributes:
        step, zeros: scale and zero point.
        kept: 0 where the weight is pruned.
        low, high: codes.
    """

    step: Tensor
    zeros: Tensor
    kept: Tensor
    low: int
    high: int

    def nearest(self, weight: Tensor, i: int) -> Tensor:
        """Input number `i` of every output, rounded."""
        codes = nearest(weight[:, i] / self.step[:, i], self.zeros[:, i]).clamp(self.low, self.high)
        return (codes - self.zeros[:, i]) * self.step[:, i] * self.kept[:, i]


def refitted(codes: Tensor, scale: Tensor, weight: Tensor, curvature: Tensor, damping: float) -> Tensor:
    """The scales with the least squared error of outputs for codes that stay: one linear system for each output.

    Args:
        codes: code - zero point, pruned ones zero, float32 [out, groups, size].
        scale: what the codes were chosen with, [out, groups].
        weight: before it was rounded, [out, in].
        curvature: see `mcc.curvature.hessian`.
        damping: how much a change of a scale counts beside the errors, which come from a sample.

    Returns:
        Scales of the shape and dtype of `scale`; one that would more than double or halve stays.
    """
    outputs, groups, size = codes.shape
    pairs = curvature.float().reshape(groups, size, groups * size)
    wanted = (codes * (weight @ curvature.float()).reshape(codes.shape)).sum(-1).double()
    found = torch.empty(outputs, groups, dtype=torch.float64)
    for some in (slice(start, start + ROWS) for start in range(0, outputs, ROWS)):
        moved = torch.einsum("rgi,gik->rgk", codes[some], pairs).reshape(-1, groups, groups, size)
        matrix = (moved * codes[some, None]).sum(-1).double()
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        held = torch.where(diagonal > 0, diagonal * damping, 1.0)
        found[some] = torch.linalg.solve(matrix + torch.diag_embed(held), wanted[some] + held * scale[some])
    sound = (found > scale / 2) & (found < scale * 2)
    return torch.where(sound, found, scale.double()).to(scale.dtype)
