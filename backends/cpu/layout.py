"""Stage 3: choose which values lie with their channels last, and turn the graph so that they do.

Convolutions and pools run channels last; ops that any layout suits go along with their neighbours where that saves
transposing. The choice is a minimum cut: a value read in another layout than it is made in costs its bytes once.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import networkx
from torch import Tensor, fx

from mcc import ops
from mcc.backends.cpu.channels_last import FORMS, PREFERRED, Turner
from mcc.backends.cpu.integerize import depthwise, reads_sparse
from mcc.backends.cpu.permutes import order_of, simplify_permutes
from mcc.backends.cpu.tokens import attend_by_tokens
from mcc.cost import weight_expression
from mcc.graph import Node
from mcc.layouts import TO_FIRST, TO_LAST
from mcc.ops import OPS, shape_of

_PERMUTE = OPS["permute"]

if TYPE_CHECKING:
    from mcc.backends.cpu.lowering import Lowering
    from mcc.graph import Graph


def layout(lowering: Lowering) -> Lowering:
    """Turn what the cut chose to channels last, in a copy of the graph."""
    graph = lowering.graph.copy()
    _give_each_layer_its_dequantize(graph)
    turner = Turner(graph, lowering.target)
    chosen = choose_channels_last(graph, turner)
    for node in graph.nodes:
        if node.fx in chosen:
            turner.turn(node)
    turner.finish()
    graph.clean().repropagate()
    simplify_permutes(graph)
    attend_by_tokens(graph.clean(), lowering.target)
    return replace(lowering, graph=graph.clean().repropagate())


def _give_each_layer_its_dequantize(graph: Graph) -> None:
    """Layers read codes under a dequantize of their own: what has to be transposed for one of them is the codes.

    What is rounded to bfloat16 likewise.
    """
    for node in graph.nodes:
        if node.op not in (ops.DEQUANTIZE, ops.ROUND_BFLOAT16) or weight_expression(node) is not None:
            continue
        for layer in [user for user in node.users if user.op in ops.LAYERS][1:]:
            own = graph.call(layer, node.fx.target, *node.fx.args)
            own.meta["val"] = node.value
            layer.fx.replace_input_with(node.fx, own)


def choose_channels_last(graph: Graph, turner: Turner) -> set[fx.Node]:
    """The nodes that are to give their value channels last."""
    able = {n.fx for n in graph.nodes if n.op is not None and n.op.name in FORMS and turner.able(n)}
    wanted = {n for n in able if ops.lookup(n.target) in PREFERRED}
    if not wanted:
        return set()
    sparse = any(n.op is ops.CONV2D and reads_sparse(n, turner.target) for n in graph.nodes)
    flow: networkx.DiGraph[object] = networkx.DiGraph()
    for node in graph.module.graph.nodes:
        if not turner.varies(node):
            continue
        if node not in able:
            flow.add_edge(node, "first")  # no capacity: it cannot be cut
        elif node in wanted:
            call = Node(node, graph)
            either = sparse and call.op is ops.CONV2D and depthwise(call)
            # between layers with channels first it had better stay so than be transposed twice
            flow.add_edge("last", node, **({"capacity": _bytes(node)} if either else {}))
        elif ops.lookup(node.target) is _PERMUTE:
            flow.add_edge("last", node, capacity=_bytes(node))  # with channels first it has to be done
        if node.all_input_nodes and isinstance(node.all_input_nodes[0].meta.get("val"), list | tuple):
            flow.add_edge(node, node.all_input_nodes[0])  # the parts of a split lie as the whole does
            flow.add_edge(node.all_input_nodes[0], node)
        readers = [_reader(Node(user, graph)) for user in node.users if turner.varies(user)]
        _add_value(flow, node, _bytes(node), readers)
    if "first" not in flow:
        return able
    _, (last, _) = networkx.minimum_cut(flow, "last", "first")
    return {node for node in able if node in last}


def _add_value(flow: networkx.DiGraph[object], node: fx.Node, size: int, readers: list[fx.Node | str]) -> None:
    """A value is transposed once, whatever the number of its readers in the other layout."""
    to_first, to_last = (node, "to first"), (node, "to last")
    flow.add_edge(node, to_first, capacity=size)
    flow.add_edge(to_last, node, capacity=size)
    for reader in readers:
        flow.add_edge(to_first, reader)
        flow.add_edge(reader, to_last)


def _reader(node: Node) -> fx.Node | str:
    """Who reads a value: a permute to or from channels last reads it as it lies, whatever its own value does."""
    if node.op is not _PERMUTE or order_of(node) not in (TO_FIRST, TO_LAST):
        return node.fx
    return "first" if order_of(node) == TO_FIRST else "last"


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 4:
        return 0
    sizes = shape_of(node)
    # moving dims of one element is no work
    return 0 if sizes[1] == 1 or sizes[2] * sizes[3] == 1 else math.prod(sizes) * value.element_size()
