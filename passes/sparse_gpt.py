"""SparseGPT: weights that become zero, and the others changed to make up for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mcc import ops
from mcc.channels import weight_is_shared
from mcc.cost import weight_expression
from mcc.curvature import BLOCK, compensated, inverse_factor, layer_by_layer, layer_hessian
from mcc.errors import SpecError
from mcc.masks import Layers, Pattern, best_among, insert_mask, largest, masked_weights
from mcc.quantization import layer_weight
from mcc.rewrite import Context, Lossy, Pass

if TYPE_CHECKING:
    from mcc.graph import Graph, Node


@dataclass(frozen=True)
class SparseGpt(Pass):
    """Prune the weights of linear layers input by input, and change the inputs not yet done to make up for it.

        %fc: f32[8, 10] = linear(%x, @fc.weight, @fc.bias)
    becomes, with other values in @fc.weight,
        %fc_weight_masked: f32[10, 64] = mul.Tensor(@fc.weight, @fc.weight_mask)
        %fc: f32[8, 10] = linear(%x, %fc_weight_masked, @fc.bias)

    Each layer sees what the pruned layers before it give. The mask of 128 inputs, or of M where the pattern is N:M, is
    chosen when their turn comes: what goes is what changes the outputs least, w^2 / [H^-1]_ii, once the others make up
    for it. Frantar, Alistarh: SparseGPT: massive language models can be accurately pruned in one-shot. ICML 2023.

    Attributes:
        ratio: fraction of each layer's weights removed, in (0, 1).
        pattern: "" for single weights, "2:4" for two kept of every four inputs.
        damping: added to the diagonal of the Hessian, relative to its mean.
        include: patterns of layer names to prune, shell style.
        exclude: patterns of layer names to leave.
    """

    ratio: float = 0.5
    pattern: str = ""
    damping: float = 0.01
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    guarantee = Lossy()

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1 or not 0 < self.damping <= 1:
            raise SpecError(
                f"sparse-gpt: ratio={self.ratio}, damping={self.damping}", remedy="both are shares, above 0 and up to 1"
            )
        pattern = Pattern.parse(self.pattern, self.ratio)
        if pattern.rows * pattern.columns > 1:
            raise SpecError(f"sparse-gpt: pattern={self.pattern!r}", remedy="use '' or N:M; prune-weights has blocks")

    @property
    def needs_data(self) -> tuple[str, ...]:
        """Hessians come from calibration data."""
        return ("calibration",)

    def run(self, graph: Graph, context: Context) -> Graph:
        """Prune layer by layer while the calibration data runs through the graph."""
        taken = Layers(self.include, self.exclude).taken(self, graph, context, self._refusal)
        masks: dict[str, Tensor] = {}

        def change(node: Node, arguments: list[list[Any]]) -> None:
            name, mask = self._prune(node, arguments)
            masks[name] = mask

        layer_by_layer(graph, context, "sparse-gpt", [n for nodes in taken.values() for n in nodes], change)
        for name, mask in masks.items():
            insert_mask(graph, name, mask)
        return graph

    def reference(self, before: Graph, after: Graph) -> Graph:
        """The graph before, with the changed and masked weights in its tensors."""
        return masked_weights(before, after)

    def _refusal(self, node: Node) -> str | None:
        if node.op is not ops.LINEAR:
            return f"{node.op} is not linear"
        if node.dtype is not torch.float32:
            return f"it computes in {str(node.dtype).removeprefix('torch.')}, not float32"
        if weight_is_shared(node):
            return "its weight is shared: other readers would see it change"
        root = node.weight
        assert root is not None
        return Pattern.parse(self.pattern, self.ratio).misfit(root.tensor.shape)

    def _prune(self, node: Node, arguments: list[list[Any]]) -> tuple[str, Tensor]:
        """Change a layer's stored weight; returns its name and its mask."""
        name, weight = layer_weight(node)
        expression = weight_expression(node.operand(1))
        assert expression is not None
        inverse = inverse_factor(layer_hessian(node, weight.shape[1], arguments), self.damping, self, node)
        pattern = Pattern.parse(self.pattern, self.ratio)
        mask = torch.ones(weight.shape, dtype=torch.bool) if expression.mask is None else expression.mask.clone()
        width = pattern.among or BLOCK

        def settle(current: Tensor, i: int) -> Tensor:
            if i % width == 0:
                some = slice(i, min(i + width, weight.shape[1]))
                scores = current[:, some].square() / inverse.diagonal()[some].square()
                scores = torch.where(mask[:, some], scores, -1.0)
                if pattern.among:
                    mask[:, some] &= best_among(scores, pattern.kept, pattern.among)
                else:
                    mask[:, some] &= largest(scores.flatten(), self.ratio).reshape(scores.shape)
            return current[:, i] * mask[:, i]

        pruned = compensated(weight.float(), inverse, settle)
        node.graph.set_tensor(name, pruned.to(weight.dtype))
        return name, mask
