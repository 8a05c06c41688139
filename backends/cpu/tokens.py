"""Attention in the layout its neighbours have: [batch, tokens, heads, …], without transposing to heads first."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from mcc import ops
from mcc.backends.cpu.permutes import order_of
from mcc.graph import Node
from mcc.ops import OPS

if TYPE_CHECKING:
    from mcc.graph import Graph
    from mcc.target import Target

_SWAP = (0, 2, 1, 3)


def attend_by_tokens(graph: Graph, target: Target) -> None:
    """Replace attention that the kernel takes by `mcc.attention`, taking in the transposes around it."""
    for node in graph.nodes:
        if node.op is ops.ATTENTION and refusal(node, target) is None:
            _replace(node)


def refusal(node: Node, target: Target) -> str | None:
    """Why the attention kernel cannot take a scaled_dot_product_attention, or None if it can."""
    query, key, value, mask = (node.operand(i) for i in range(4))
    assert query is not None
    assert key is not None
    assert value is not None
    operands = (query, key, value)
    if any(len(x.shape) != 4 or x.dtype is not torch.float32 for x in operands):
        return "its operands are not float32 [batch, heads, tokens, depth]"
    if not all(isinstance(s, int) for x in operands for s in (x.shape[1], x.shape[3])):
        return "its heads or depth vary"
    if value.shape[3] < target.vector_lanes:
        return f"its values have fewer than {target.vector_lanes} elements"
    if query.shape[2] == 1:
        return "a single query is faster by the op library"
    if int(query.shape[1]) % int(key.shape[1]) or key.shape[1] != value.shape[1]:
        return "its heads are no multiple of those of the keys"
    if any(str(x.shape[0]) != str(query.shape[0]) for x in operands):
        return "its batch broadcasts"
    if mask is None:
        return None
    if len(mask.shape) > 4:
        return "its mask has more than four dims"
    wanted = [query.shape[0], query.shape[1], query.shape[2], key.shape[2]][4 - len(mask.shape) :]
    fits = all(str(s) in ("1", str(w)) for s, w in zip(mask.shape, wanted, strict=True))
    return None if fits and mask.dtype in (torch.bool, torch.float32) else "its mask has another shape or type"


def _replace(node: Node) -> None:
    graph = node.graph
    sources, flags = [], []
    for i in range(3):
        operand = node.operand(i)
        assert operand is not None
        before = operand.operand(0) if order_of(operand) == _SWAP else None
        sources.append((operand if before is None else before).fx)
        flags.append(before is not None)
    depth = int(node.operand(0).shape[3])  # type: ignore[union-attr]
    scale = node.argument(6)
    users = node.users
    after = users[0] if len(users) == 1 and not node.is_output and order_of(users[0]) == _SWAP else None
    args = (
        *sources, node.argument(3), bool(node.argument(5, default=False)),
        1 / math.sqrt(depth) if scale is None else float(scale), [*flags, after is not None],
    )  # fmt: skip
    with graph.module.graph.inserting_before(node.fx):
        made = graph.module.graph.call_function(OPS["mcc.attention"].target, args)
    made.meta = dict((after or node).fx.meta)
    Node(made, graph).take_place_of(after or node)
