"""A layer's stored weight in another form, values or codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcc import ops
from mcc.formats import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, fx

    from mcc.graph import Graph, Node


def stored_root(weight: Node) -> Node | None:
    """The tensor of a weight that is stored as it is read or as codes with scales; None where it is computed."""
    root = weight.operand(0) if weight.op is ops.DEQUANTIZE else weight
    packed = root is not None and root.op is ops.UNPACK
    return root if root is not None and (root.is_parameter or packed) else None


def restored_tensor(graph: Graph, node: Node, stored: Node, change: Callable[[Tensor], Tensor]) -> Node:
    """A stored tensor in another form, for a layer; it gets a name of its own."""
    name = graph.free_name(f"{stored.fx.target}_{node.name}")
    graph.set_tensor(name, change(stored.tensor.detach()).contiguous())
    return graph.read(name, node)


def restored_weight(
    graph: Graph,
    node: Node,
    stored: Callable[[Tensor], Tensor],
    scales: Callable[[Tensor], Tensor] = lambda s: s,
) -> fx.Node:
    """A layer's weight in another form: its stored values or codes are changed; it must have a `stored_root`.

    Args:
        graph: of the layer.
        node: the layer.
        stored: the change, of values or codes.
        scales: the change of the scales of codes, which belong to outputs after it.
    """
    top = node.operand(1)
    assert top is not None
    root = stored_root(top)
    assert root is not None

    def changed(old: Node, change: Callable[[Tensor], Tensor]) -> fx.Node:
        if old.op is not ops.UNPACK:
            return restored_tensor(graph, node, old, change).fx
        packed = old.operand(0)
        assert packed is not None
        bits, low, shape = (old.argument(i) for i in (1, 2, 3))
        codes = change(unpack(packed.tensor, bits, low, shape)).contiguous()
        read = restored_tensor(graph, node, packed, lambda _: pack(codes, bits, low))
        return graph.call(node, ops.UNPACK.target, read.fx, bits, low, list(codes.shape))

    values = changed(root, stored)
    if root.fx is top.fx:
        return values
    scale, zero = top.operand(1), top.operand(2)
    assert scale is not None
    assert zero is not None
    return graph.call(node, ops.DEQUANTIZE.target, values, changed(scale, scales), changed(zero, scales), 0)
