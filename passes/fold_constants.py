"""Computing at compile time what depends on no input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from mcc import ops
from mcc.constants import evaluate, has_symbols
from mcc.cost import LARGEST_GROWTH
from mcc.graph import WEIGHT_WRAPPERS, Graph, Node
from mcc.rewrite import Context, Exact, Pass


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace calls that read only parameters, constants and fixed sizes by their stored result.

        %p: f32[16] = arange(end=16)
        %s: f32[16] = mul.Tensor(%p, @scale)
        %y: f32[8, 16] = add.Tensor(%x, %s)
    becomes
        %y: f32[8, 16] = add.Tensor(%x, @folded.s)

    Masks, quantizers and decodes over a weight stay: they are how it is stored. A result that would add more than
    1 MiB to the artifact is left to be computed. Trainable parameters that are folded train no more.
    """

    guarantee = Exact()

    def run(self, graph: Graph, context: Context) -> Graph:
        """Evaluate constant calls in order and store those that a non-constant call, or the output, reads."""
        values: dict[fx.Node, object] = {}
        for node in graph.nodes:
            if _is_constant(node, values):
                values[node.fx] = evaluate(node.fx, lambda n: values[n] if n in values else graph.tensor(str(n.target)))
        for node in graph.nodes:
            value = values.get(node.fx)
            if not isinstance(value, Tensor) or all(user in values for user in node.fx.users):
                continue
            growth = value.nbytes - sum(graph.tensor(name).nbytes for name in _read_only_by(node))
            if growth > LARGEST_GROWTH:
                context.decline(node, f"its {growth:,} bytes would be stored instead of computed")
                continue
            name = graph.free_name(f"folded.{node.name}")
            graph.set_tensor(name, value.detach().clone())
            node.fx.replace_all_uses_with(graph.read(name, node).fx)
            context.edited()
        return graph


def _read_only_by(node: Node) -> set[str]:
    """Stored tensors that nothing but a node, and what it is computed from, reads."""
    inside, waiting, stored = {node.fx}, [node.fx], set()
    while waiting:
        for read in waiting.pop().all_input_nodes:
            if read not in inside and all(user in inside for user in read.users):
                inside.add(read)
                waiting.append(read)
                if read.op == "get_attr":
                    stored.add(str(read.target))
    return stored


def _is_constant(node: Node, values: dict[fx.Node, object]) -> bool:
    if node.op is None or node.op in (*WEIGHT_WRAPPERS[1:], ops.QUANTIZE):
        return False
    if node.op is ops.MUL and any(u.op in WEIGHT_WRAPPERS or (u.op and u.op.weights) for u in node.users):
        return False
    if has_symbols(node.fx):
        return False
    return all(n.op == "get_attr" or n in values for n in node.fx.all_input_nodes)
