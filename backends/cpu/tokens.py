"""Attention in the layout its neighbours have: [batch, tokens, heads, …], without transposing to heads first."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from mcc import ops
from mcc.attention import LARGEST_CODE
from mcc.backends.cpu.hoist import dequantize_behind
from mcc.backends.cpu.permutes import order_of
from mcc.graph import Node
from mcc.ops import OPS

if TYPE_CHECKING:
    from mcc.graph import Graph
    from mcc.target import Target

_SWAP = (0, 2, 1, 3)
_EXPAND, _UNSQUEEZE, _REPEAT = OPS["expand"], OPS["unsqueeze"], OPS["repeat_interleave.self_int"]


def attend_by_tokens(graph: Graph, target: Target) -> None:
    """Replace attention that the kernel takes by `mcc.attention`, taking in the transposes around it."""
    for node in graph.nodes:
        if node.op in ops.ATTENTIONS and refusal(node, target) is None:
            _replace(node)


def refusal(node: Node, target: Target) -> str | None:
    """Why the attention kernel cannot take a scaled_dot_product_attention, or one that rounds, or None if it can."""
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


def reads_codes(decode: Node, target: Target) -> bool:
    """Whether the attention kernel reads codes of these: a vector of elements lies in one group, and in one half."""
    scale, size, lanes = decode.operand(1), int(decode.shape[-1]), target.vector_lanes
    assert scale is not None
    groups = int(scale.shape[-1])
    run = size // groups if decode.argument(2) == 8 else math.gcd(size // groups, size // 2)
    whole = groups == 1 and decode.argument(2) == 8  # vectors may start anywhere, and the last ones overlap
    return whole or run % lanes == 0


def _shared_heads(node: Node) -> Node:
    """Keys or values [batch, heads, tokens, size] before each head was repeated for the queries that share it."""
    if node.op is _REPEAT and isinstance(node.argument(1), int) and (node.argument(2) or 0) % 4 == 1:
        return node.operand(0) or node
    spread = node.operand(0) if node.op is ops.RESHAPE else None
    alone = spread.operand(0) if spread is not None and spread.op is _EXPAND else None
    if spread is None or alone is None or alone.op is not _UNSQUEEZE or alone.argument(1) % 5 != 2:
        return node
    source = alone.operand(0)
    assert source is not None
    batch, heads, repeats, *rest = spread.shape
    shapes = (node.shape, (batch, heads * repeats, *rest)), (source.shape, (batch, heads, *rest))
    return source if all([*map(str, found)] == [*map(str, wanted)] for found, wanted in shapes) else node


def _before_swap(operand: Node) -> Node | None:
    """What tokens and heads of an operand were swapped of, itself or the codes that it stands for; or None."""
    if order_of(operand) == _SWAP:
        return operand.operand(0)
    codes = operand.operand(0) if operand.op is ops.DEQUANTIZE else None
    before = codes.operand(0) if codes is not None and order_of(codes) == _SWAP else None
    if codes is None or before is None or operand.argument(3) is not None:
        return None
    made = operand.graph.call(operand, ops.DEQUANTIZE.target, before.fx, *operand.fx.args[1:])
    made.meta["val"] = operand.value.transpose(1, 2)
    return Node(made, operand.graph)


def _replace(node: Node) -> None:
    graph = node.graph
    for view in map(node.operand, range(3)):
        # of a single head the layout cut turns codes to channels last and back, which moves nothing
        if view is not None and view.op is ops.RESHAPE:
            dequantize_behind(view)
    sources, flags = [], []
    keys, values = (node.operand(i) for i in (1, 2))
    assert keys is not None
    assert values is not None
    shared = [_shared_heads(keys), _shared_heads(values)]
    if shared[0].shape[1] != shared[1].shape[1]:
        shared = [keys, values]
    for operand in (node.operand(0), *shared):
        assert operand is not None
        source = _before_swap(operand)
        sources.append((operand if source is None else source).fx)
        flags.append(source is not None)
    depth = int(node.operand(0).shape[3])  # type: ignore[union-attr]
    scale = node.argument(6)
    users = node.users
    after = users[0] if len(users) == 1 and not node.is_output and order_of(users[0]) == _SWAP else None
    args = (
        *sources, node.argument(3), bool(node.argument(5, default=False)),
        1 / math.sqrt(depth) if scale is None else float(scale), [*flags, after is not None],
        node.argument(8, LARGEST_CODE) if node.op is ops.ROUNDED_ATTENTION else 0,
    )  # fmt: skip
    with graph.module.graph.inserting_before(node.fx):
        made = graph.module.graph.call_function(OPS["mcc.attention"].target, args)
    made.meta = dict((after or node).fx.meta)
    Node(made, graph).take_place_of(after or node)
