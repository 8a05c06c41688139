"""Transposes that meet: two in a row become one, none, or a reshape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from mcc.graph import Node
from mcc.layouts import TO_FIRST
from mcc.ops import OPS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from mcc.graph import Graph

_PERMUTE, _TRANSPOSE, _RESHAPE = OPS["permute"], OPS["transpose.int"], OPS["reshape"]


def simplify_permutes(graph: Graph) -> None:
    """Compose permutes of permutes, in place; what is left that moves only dims of one element becomes a reshape."""
    for node in graph.nodes:
        order = order_of(node)
        if order is None:
            continue
        source = node.operand(0)
        assert source is not None
        while (inner := order_of(source)) is not None:
            order = tuple(inner[o] for o in order)
            before = source.operand(0)
            assert before is not None
            source = before
        if list(order) == sorted(order):
            if not node.is_output:  # an output keeps its name
                node.fx.replace_all_uses_with(source.fx)
        elif _keeps_elements(source.value, order):
            _call(node, _RESHAPE.target, source, [source.shape[d] for d in order])
        elif source != node.operand(0):
            _call(node, _PERMUTE.target, source, order)
        elif (rows := _flattened_image(node, order)) is not None:
            _call(node, _RESHAPE.target, rows, [rows.shape[0], *node.shape[1:]])


def order_of(node: Node) -> tuple[int, ...] | None:
    """The order a permute or transpose gives dims, or None."""
    rank = node.value.dim() if isinstance(node.value, Tensor) else 0
    if node.op is _PERMUTE:
        return tuple(d % rank for d in node.argument(1))
    if node.op is _TRANSPOSE:
        order, (a, b) = list(range(rank)), (node.argument(i) % rank for i in (1, 2))
        order[a], order[b] = b, a
        return tuple(order)
    return None


def _keeps_elements(value: Tensor, order: Sequence[int]) -> bool:
    """Whether a permute moves dims of one element past others alone."""
    moved = [d for d in order if not (isinstance(value.shape[d], int) and value.shape[d] == 1)]
    return moved == sorted(moved)


def _flattened_image(node: Node, order: tuple[int, ...]) -> Node | None:
    """The NHWC value of which this takes [n, c, h * w] to [n, h * w, c], or None."""
    flat = node.operand(0)
    if order != (0, 2, 1) or flat is None or flat.op is not _RESHAPE:
        return None
    image = flat.operand(0)
    if image is None or order_of(image) != TO_FIRST:
        return None
    same = [str(s) for s in image.shape[:2]] == [str(s) for s in flat.shape[:2]]
    return image.operand(0) if same else None


def _call(node: Node, target: Callable[..., object], source: Node, argument: Sequence[int | torch.SymInt]) -> None:
    """Put a call in a node's place; of sizes that vary there may be one, which is left to be worked out."""
    numbers = [a if isinstance(a, int) else -1 for a in argument]
    if numbers.count(-1) > 1:
        return
    with node.graph.module.graph.inserting_before(node.fx):
        made = node.graph.module.graph.call_function(target, (source.fx, numbers))
    made.meta = dict(node.fx.meta)
    Node(made, node.graph).take_place_of(node)
