"""What a graph computes from stored tensors alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcc.graph import Graph, Node


def evaluate(call: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
    """Run one call in PyTorch, without gradients, on the values of what it reads."""
    args = fx.node.map_arg(call.args, value)
    kwargs = fx.node.map_arg(call.kwargs, value)
    assert callable(call.target)
    with torch.no_grad():
        return call.target(*args, **kwargs)


def has_symbols(call: fx.Node) -> bool:
    """Whether sizes that vary stand in a call's arguments."""
    return any(isinstance(leaf, torch.SymInt) for leaf in pytree.tree_leaves((call.args, call.kwargs)))


def varying(graph: Graph) -> set[fx.Node]:
    """The nodes that depend on an input; others are computed from stored tensors alone."""
    found: set[fx.Node] = set()
    for node in graph.module.graph.nodes:
        if node.op == "placeholder" or any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def same_tensor(a: Node | None, b: Node | None) -> bool:
    """Whether two nodes read stored tensors of equal values."""
    if a is None or b is None or not (a.is_parameter and b.is_parameter):
        return False
    return a.fx.target == b.fx.target or torch.equal(a.tensor, b.tensor)


def stored_value(graph: Graph, node: Node) -> Tensor | None:
    """The value of a node, or None where it depends on an input or on a size that varies."""
    values: dict[fx.Node, Any] = {}
    waiting = [node.fx]
    while waiting:
        call = waiting[-1]
        if call.op == "placeholder" or has_symbols(call):
            return None
        missing = [n for n in call.all_input_nodes if n not in values]
        waiting += missing
        if not missing:
            read = call.op == "get_attr"
            values[call] = graph.tensor(str(call.target)) if read else evaluate(call, values.__getitem__)
            waiting.pop()
    value = values[node.fx]
    return value.detach() if isinstance(value, Tensor) else None
