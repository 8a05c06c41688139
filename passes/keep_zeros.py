"""Weights that are zero already stay so: a model that another tool pruned becomes sparse for mcc too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mcc.cost import weight_expression
from mcc.errors import SpecError
from mcc.masks import Layers, insert_mask, masked_weights
from mcc.rewrite import Context, Lossy, Pass

if TYPE_CHECKING:
    from mcc.graph import Graph, Node


@dataclass(frozen=True)
class KeepZeros(Pass):
    """Multiply weights by a mask that is zero where they are.

        %fc: f32[8, 10] = linear(%x, @fc.weight, @fc.bias)
    becomes
        %fc_weight_masked: f32[10, 64] = mul.Tensor(@fc.weight, @fc.weight_mask)
        %fc: f32[8, 10] = linear(%x, %fc_weight_masked, @fc.bias)

    A checkpoint pruned elsewhere holds zeros and no masks: with them training keeps the zeros, and what is sparse
    enough is stored and computed so. A mask that torch.nn.utils.prune has left in the model needs no pass.

    Attributes:
        least: share of zeros from which on a layer is taken.
        include: patterns of layer names to take, shell style.
        exclude: patterns of layer names to leave.
    """

    least: float = 0.3
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    guarantee = Lossy()

    def __post_init__(self) -> None:
        if not 0 < self.least <= 1:
            raise SpecError(f"keep-zeros: least={self.least}", remedy="a share above 0 and up to 1, such as 0.3")

    def run(self, graph: Graph, context: Context) -> Graph:
        """Insert the masks."""
        layers = Layers(self.include, self.exclude).taken(self, graph, context, self._refusal)
        for name in layers:
            insert_mask(graph, name, graph.tensor(name).detach() != 0)
            context.edited()
        return graph

    def reference(self, before: Graph, after: Graph) -> Graph:
        """The graph before: its zeros are zero."""
        return masked_weights(before, after)

    def _refusal(self, node: Node) -> str | None:
        expression = weight_expression(node.operand(1))
        assert expression is not None
        share = 1 - expression.kept / max(expression.elements, 1)
        return None if share >= self.least else f"{share:.0%} of its weights are zero, less than {self.least:.0%}"
