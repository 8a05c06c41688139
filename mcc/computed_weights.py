"""Weights that a model computes from stored tensors alone, such as standardized or normalized ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mcc import ops
from mcc.constants import stored_value
from mcc.cost import weight_expression

if TYPE_CHECKING:
    from torch import fx

    from mcc.graph import Graph, Node


def store_computed_weights(graph: Graph) -> Graph:
    """Store them as they are: passes compress what is stored, and kernels read it.

    Masks, quantizers and decodes over a weight stay. What they were computed from trains no more, they do.

    Args:
        graph: edited in place.
    """
    made: dict[fx.Node, str] = {}
    for layer in [node for node in graph.nodes if node.op in ops.LAYERS]:
        assert layer.op is not None
        for top in [operand for operand in map(layer.operand, layer.op.weights) if operand is not None]:
            if top.fx not in made and (top.is_parameter or weight_expression(top) is not None):
                continue
            name = made[top.fx] if top.fx in made else _store(graph, layer, top)
            if name is not None:
                made[top.fx] = name
                layer.fx.replace_input_with(top.fx, graph.read(name, layer).fx)
    return graph.clean().repropagate() if made else graph


def _store(graph: Graph, layer: Node, top: Node) -> str | None:
    """Store an operand's value as a parameter of its layer, or do nothing where it depends on an input."""
    value = stored_value(graph, top)
    if value is None:
        return None
    name = graph.free_name(f"{layer.layer}.{top.name}")
    if value.is_floating_point():
        with torch.no_grad():
            graph.add_parameter(name, value.clone())
    else:
        graph.set_tensor(name, value.clone())
    return name
