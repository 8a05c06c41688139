"""Layers in bfloat16: half the bytes of float32, and twice the products in an instruction; no data is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mcc import ops
from mcc.cost import weight_expression
from mcc.errors import PassError
from mcc.graph import identifier
from mcc.patterns import Patterns
from mcc.quantization import nodes_taken
from mcc.rewrite import Context, Lossy, Pass, Rewriter

if TYPE_CHECKING:
    from torch import fx

    from mcc.graph import Graph, Node

TAKEN = (ops.LINEAR, ops.CONV2D)
IMAGES = 4  # dims


@dataclass(frozen=True)
class RoundBfloat16(Pass):
    """Round what layers read, and their weights, to bfloat16; sums and everything else stay float32.

        %fc: f32[8, 10] = linear(%x, @fc.weight, @fc.bias)
    becomes
        %x_rounded: f32[8, 64] = mcc.round_bfloat16(%x)
        %fc_weight_rounded: f32[10, 64] = mcc.round_bfloat16(@fc.weight)
        %fc: f32[8, 10] = linear(%x_rounded, %fc_weight_rounded, @fc.bias)

    The artifact stores such a weight in two bytes an element, and a kernel rounds what it reads itself. It is for
    targets that multiply bfloat16, `cpu:avx512bf16` and `cpu:amx`; others are refused, where digits would be lost for
    nothing.
    Kalamkar, Mudigere, Mellempudi et al.: A study of bfloat16 for deep learning training. 2019.

    Attributes:
        include: patterns of layer names to round, shell style.
        exclude: patterns of layer names to leave in float32.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    guarantee = Lossy()

    def run(self, graph: Graph, context: Context) -> Graph:
        """Round every layer that a kernel multiplies in bfloat16, and the embeddings that are tied to one."""
        if not context.target.bfloat16:
            raise PassError(
                f"{self}: {context.target} does not multiply bfloat16",
                remedy="compile for target='cpu:avx512bf16' or 'cpu:amx', or leave the pass out",
            )
        layers = [n for n in graph.nodes if n.op in ops.LAYERS]
        patterns = Patterns(self.include, self.exclude)
        taken = nodes_taken(layers, context, lambda n: patterns.refusal([n.layer]) or _refusal(n))
        if patterns.unmatched or not taken:
            raise patterns.failure(self, f"there is no layer to round: {context.reasons}", (n.layer for n in layers))
        made: dict[fx.Node, fx.Node] = {}
        for node in taken:
            for position in (0, 1):
                _round(node, position, made)
            context.edited()
        return graph

    def reference(self, before: Graph, after: Graph) -> Graph:
        """The graph before, with the same values rounded by casts of PyTorch's."""
        rounded = before.copy()
        known = {node.name for node in before.nodes}
        for node in after.nodes:
            if node.op is not ops.ROUND_BFLOAT16 or node.name in known:
                continue
            for reader in node.users:
                plain = rounded.node(reader.name)
                position = next(i for i, a in enumerate(reader.fx.args) if a is node.fx)
                value, rewriter = plain.operand(position), Rewriter(rounded, plain)
                short = rewriter.call(ops.OPS["_to_copy"], value, dtype=torch.bfloat16)
                plain.fx.update_arg(position, rewriter.call(ops.OPS["_to_copy"], short, dtype=torch.float32).fx)
        return rounded.clean()


def _refusal(node: Node) -> str | None:
    """Why a layer stays in float32, or None."""
    expression, source, bias = weight_expression(node.operand(1)), node.operand(0), node.operand(2)
    assert source is not None
    if node.op not in TAKEN:
        return f"no kernel of {node.op} multiplies bfloat16"
    if node.op is ops.CONV2D and (node.argument(6, 1) != 1 or len(source.shape) != IMAGES):
        return "it has groups, or no batch: such convolutions run in float32"
    if expression is None or (bias is not None and not bias.is_parameter):
        return "its weight or bias is computed"
    if node.dtype is not torch.float32:
        return f"it computes in {str(node.dtype).removeprefix('torch.')}, not float32"
    if expression.rounded is not None:
        return "its weight is rounded already"
    if expression.quantizer is not None or expression.mask is not None or expression.sparse is not None:
        return "its weight is quantized or has a mask, which no kernel reads in bfloat16"
    return None if expression.elements else "its weight has no elements"


def _round(node: Node, position: int, made: dict[fx.Node, fx.Node]) -> None:
    """Let a layer read an operand rounded, which all that read it here share; of a weight tied embeddings too."""
    x = node.operand(position)
    assert x is not None
    if x.fx not in made:
        tied = [user for user in x.users if position == 1 and user.op is ops.EMBEDDING]
        rounded = Rewriter(node.graph, min((node, *tied), key=lambda n: n.fx)).call(ops.ROUND_BFLOAT16, x)
        rounded.rename(f"{identifier(str(x.fx.target)) if x.is_parameter else x.name}_rounded")
        made[x.fx] = rounded.fx
        for embedding in tied:
            embedding.fx.replace_input_with(x.fx, rounded.fx)
    node.fx.replace_input_with(x.fx, made[x.fx])
