"""Weights that a model computes from stored tensors alone, such as standardized, normalized or transposed ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from mcc import ops
from mcc.constants import stored_value
from mcc.cost import LARGEST_GROWTH, weight_expression
from mcc.graph import Node

if TYPE_CHECKING:
    from mcc.graph import Graph

WIDENED = 4  # times: bytes as float32


def store_computed_weights(graph: Graph) -> Graph:
    """Store them as they are: passes compress what is stored, and kernels read it.

    A product with a stored matrix becomes a linear layer first: x @ w is linear(x, w.T).

    Masks, quantizers and decodes over a weight stay, and so do products of much smaller tensors. What a weight was
    computed from trains no more, it does.

    Args:
        graph: edited in place.
    """
    edited = [_as_layer(graph, node) for node in graph.nodes if node.op in _PRODUCTS]
    made: dict[str, str] = {}
    for layer in [node for node in graph.nodes if node.op in ops.LAYERS]:
        assert layer.op is not None
        for top in [operand for operand in map(layer.operand, layer.op.weights) if operand is not None]:
            if top.is_parameter or weight_expression(top) is not None:
                continue
            spelled = _spelled(top.fx)
            name = made.get(spelled) or _store(graph, layer, top)
            if name is not None:
                made[spelled] = name
                layer.fx.replace_input_with(top.fx, graph.read(name, layer).fx)
    return graph.clean().repropagate() if made or any(edited) else graph


_PRODUCTS = (ops.OPS["matmul"], ops.OPS["addmm"])


def _as_layer(graph: Graph, node: Node) -> bool:
    """Make a linear layer of rows times a stored float matrix, with a stored vector added or none; whether it was."""
    added = node.op is ops.OPS["addmm"]
    rows, matrix = (node.operand(i + added) for i in (0, 1))
    bias = node.operand(0) if added else None
    if rows is None or matrix is None or len(matrix.shape) != 2 or len(rows.shape) < 2 or any(node.fx.kwargs.values()):
        return False
    if not matrix.value.is_floating_point() or not all(isinstance(s, int) for s in matrix.shape):
        return False
    if bias is not None and (not bias.is_parameter or tuple(bias.shape) != (matrix.shape[1],)):
        return False
    if stored_value(graph, matrix) is None:
        return False
    before = matrix.operand(0) if matrix.op in _TURNS else None
    turned = before if before is not None and len(before.shape) == 2 else None
    if turned is None:
        turned = Node(graph.call(node, ops.OPS["t"].target, matrix.fx), graph)
        turned.fx.meta["val"] = matrix.value.t()
    made = graph.call(node, ops.LINEAR.target, rows.fx, turned.fx, None if bias is None else bias.fx)
    made.meta["val"] = node.value
    Node(made, graph).take_place_of(node)
    return True


_TURNS = (ops.OPS["t"], ops.OPS["permute"], ops.OPS["transpose.int"])


def _spelled(node: fx.Node) -> str:
    """The expression that a node stands for: a layer that is called twice computes its weight twice."""
    if node.op != "call_function":
        return str(node.target)
    return f"{node.target}({fx.node.map_arg((node.args, node.kwargs), _spelled)})"


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
