"""Products with stored matrices as linear layers: x @ w is linear(x, w.T), and what is added to it a bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mcc import ops
from mcc.constants import varying
from mcc.graph import Node
from mcc.ops import OPS
from mcc.writing import Writer

if TYPE_CHECKING:
    from torch import fx

    from mcc.graph import Graph

_ADDMM = OPS["addmm"]
_TURNS = (OPS["t"], OPS["permute"], OPS["transpose.int"])


def products_as_layers(graph: Graph) -> bool:
    """Make linear layers of rows times a stored float32 matrix; returns whether there was anything to edit.

    Of `addmm`, and where a stored vector is added to a linear layer without a bias, the vector becomes the bias. A
    layer of rows that were joined to one dim, and are taken apart behind it, reads them as they were.
    """
    inputs = varying(graph)
    biases = [_uncommon_bias(graph, node) for node in graph.nodes if node.op is ops.LINEAR]
    layers = [_product(graph, node, inputs) for node in graph.nodes if node.op in (OPS["matmul"], _ADDMM)]
    biases += [_addition(graph, node) for node in graph.nodes if node.op is ops.ADD]
    views = [_between_views(graph, node) for node in graph.nodes if node.op is ops.LINEAR]
    return any(layers) or any(biases) or any(views)


def turned(node: Node) -> Node | None:
    """The matrix that a node gives the transpose of, or None."""
    source = node.operand(0) if node.op in _TURNS else None
    if source is None or len(source.shape) != 2:
        return None
    if node.op is OPS["t"]:
        return source
    dims = node.argument(1) if node.op is OPS["permute"] else (node.argument(1), node.argument(2))
    first, second = (int(d) % 2 for d in dims)
    swaps = (first, second) == (1, 0) if node.op is OPS["permute"] else first != second
    return source if swaps else None


def _product(graph: Graph, node: Node, inputs: set[fx.Node]) -> bool:
    added = node.op is _ADDMM
    rows, matrix = (node.operand(i + added) for i in (0, 1))
    bias = node.operand(0) if added else None
    if rows is None or matrix is None or len(matrix.shape) != 2 or len(rows.shape) < 2:
        return False
    if any(factor != 1 for factor in node.fx.kwargs.values()) or matrix.dtype is not torch.float32:
        return False
    if bias is not None and not _is_vector(bias, matrix.shape[1]):
        return False
    if matrix.fx in inputs or not all(isinstance(s, int) for s in matrix.shape):
        return False
    weight = turned(matrix)
    if weight is None:
        weight = Node(Writer(graph.module, node.fx)(OPS["t"].target, matrix.fx), graph)
    _put_layer(graph, node, rows, weight, bias)
    return True


def _addition(graph: Graph, node: Node) -> bool:
    first, second = node.operand(0), node.operand(1)
    if first is None or second is None or node.fx.kwargs or len(node.fx.args) != 2:
        return False
    layer, vector = (first, second) if first.op is ops.LINEAR else (second, first)
    if layer.op is not ops.LINEAR or layer.operand(2) is not None or layer.is_output or len(layer.users) != 1:
        return False
    rows, weight = layer.operand(0), layer.operand(1)
    if rows is None or weight is None or not _is_vector(vector, layer.shape[-1]):
        return False
    _put_layer(graph, node, rows, weight, vector)
    return True


def _uncommon_bias(graph: Graph, node: Node) -> bool:
    """Let a bias that is no vector of the outputs be added behind the layer."""
    bias, weight = node.operand(2), node.operand(1)
    if bias is None or weight is None or [*bias.shape] == [*weight.shape[:1]]:
        return False
    made = Writer(graph.module, node.fx)(ops.LINEAR.target, *node.fx.args[:2])
    Node(Writer(graph.module, node.fx)(ops.ADD.target, made, bias.fx), graph).take_place_of(node)
    return True


def _between_views(graph: Graph, node: Node) -> bool:
    joined, users = node.operand(0), node.users
    rows = joined.operand(0) if joined is not None and joined.op is ops.RESHAPE else None
    weight = node.operand(1)
    if rows is None or weight is None or node.is_output or not users or len(rows.shape) < 2:
        return False
    if len(weight.shape) != 2 or rows.shape[-1] != weight.shape[1]:
        return False
    wanted = [str(s) for s in (*rows.shape[:-1], node.shape[-1])]
    if any(user.op is not ops.RESHAPE or [str(s) for s in user.shape] != wanted for user in users):
        return False
    made = Writer(graph.module, node.fx)(ops.LINEAR.target, rows.fx, *node.fx.args[1:], **node.fx.kwargs)
    for user in users:
        Node(made, graph).take_place_of(user)
    return True


def _is_vector(node: Node, size: int | torch.SymInt) -> bool:
    """Whether this is a stored float32 tensor of so many elements."""
    return node.is_parameter and node.dtype is torch.float32 and tuple(node.shape) == (size,)


def _put_layer(graph: Graph, node: Node, rows: Node, weight: Node, bias: Node | None) -> None:
    operands = rows.fx, weight.fx, None if bias is None else bias.fx
    made = Writer(graph.module, node.fx)(ops.LINEAR.target, *operands)
    Node(made, graph).take_place_of(node)
