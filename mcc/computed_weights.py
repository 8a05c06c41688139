"""Weights that a model computes from stored tensors alone, such as standardized, normalized or transposed ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from mcc import ops
from mcc.constants import stored_value
from mcc.cost import LARGEST_GROWTH, weight_expression
from mcc.products import products_as_layers

if TYPE_CHECKING:
    from mcc.graph import Graph, Node

WIDENED = 4  # times: bytes as float32


def store_computed_weights(graph: Graph) -> Graph:
    """Store them as they are: passes compress what is stored, and kernels read it.

    A product with a stored matrix becomes a linear layer first.

    Masks, quantizers and decodes over a weight stay, and so do products of much smaller tensors. What a weight was
    computed from trains no more, it does.

    Args:
        graph: edited in place.
    """
    edited = products_as_layers(graph)
    made: dict[str, str] = {}
    for layer in [node for node in graph.nodes if node.op in ops.LAYERS]:
        assert layer.op is not None
        for top in [operand for operand in map(layer.operand, layer.op.weights) if operand is not None]:
            if top.is_parameter or weight_expression(top) is not None:
                continue
            expression = spelled(top.fx)
            name = made.get(expression) or _store(graph, layer, top)
            if name is not None:
                made[expression] = name
                layer.fx.replace_input_with(top.fx, graph.read(name, layer).fx)
    return graph.clean().repropagate() if made or edited else graph


def spelled(node: fx.Node) -> str:
    """The expression that a node stands for: a layer that is called twice computes its weight twice."""
    if node.op != "call_function":
        return str(node.target)
    return f"{node.target}({fx.node.map_arg((node.args, node.kwargs), spelled)})"


def _store(graph: Graph, layer: Node, top: Node) -> str | None:
    """Store an operand's value as a parameter; not one that depends on an input, or is much larger than its parts."""
    fixed = all(isinstance(s, int) for s in top.shape)
    if not fixed or top.value.nbytes > max(LARGEST_GROWTH, WIDENED * _bytes_read(graph, top)):
        return None
    value = stored_value(graph, top)
    if value is None:
        return None
    name = graph.free_name(f"{layer.layer}.computed_{top.name}")
    if value.is_floating_point():
        graph.add_parameter(name, value.clone())
    else:
        graph.set_tensor(name, value.clone())
    return name


def _bytes_read(graph: Graph, top: Node) -> int:
    """Bytes of the stored tensors that a value is computed from."""
    seen, waiting = {top.fx}, [top.fx]
    while waiting:
        reads = [n for n in waiting.pop().all_input_nodes if n not in seen]
        seen.update(reads)
        waiting += reads
    return sum(graph.tensor(str(n.target)).nbytes for n in seen if n.op == "get_attr")
