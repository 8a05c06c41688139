"""Attention that a model spells out, softmax(a query times keys, plus masks) times values, as the op that has a kernel.

The scores may be scaled by a number or, with one for each head, by a tensor; masks and position biases may be added,
also in a view that splits the batch, as shifted windows do; or a mask sets some to minus infinity or nearly so. Where
all keys of a query are hidden by infinity the op gives zeros, and the softmax gave NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from mcc import ops
from mcc.attention_products import PRODUCTS, Fill, fill_of, softmax_of
from mcc.backends.cpu.permutes import order_of
from mcc.backends.cpu.tokens import refusal
from mcc.graph import Node
from mcc.ops import OPS
from mcc.writing import Writer

if TYPE_CHECKING:
    from mcc.graph import Graph
    from mcc.target import Target

_ADD, _DIV = OPS["add.Tensor"], OPS["div.Tensor"]


@dataclass(frozen=True)
class _Scores:
    """What stands between the product of queries and keys and the softmax, from there down.

    Attributes:
        scale: the product of the numbers that scores are multiplied by.
        by_head: tensors that they are multiplied by, [heads, 1, 1] or so.
        masks: what is added, each with the scale of later steps.
        hidden: where scores are set to minus infinity, or None.
    """

    scale: float = 1.0
    by_head: tuple[fx.Node, ...] = ()
    masks: tuple[tuple[fx.Node, float], ...] = ()
    hidden: fx.Node | None = None


def gather_attention(graph: Graph, target: Target) -> None:
    """Replace attention that is spelled out, where the kernel takes it; the graph is edited in place."""
    for node in graph.nodes:
        if node.op in PRODUCTS:
            _gather(_Writer(graph, node), target)
        elif node.op in ops.ATTENTIONS and len(node.shape) != 4:
            _with_four_dims(_Writer(graph, node))
    graph.clean()


@dataclass(frozen=True)
class _Writer:
    """Calls in front of a node, with their fake values."""

    graph: Graph
    before: Node

    def __call__(self, op: str, *args: Any, **kwargs: Any) -> fx.Node:
        return Writer(self.graph.module, self.before.fx)(OPS[op].target, *args, **kwargs)


def _gather(write: _Writer, target: Target) -> None:
    node = write.before
    weights, value = node.operand(0), node.operand(1)
    limit = 0
    if weights is not None and weights.op is ops.FAKE_QUANTIZE_PER_TOKEN and len(weights.users) == 1:
        limit, weights = weights.argument(1), weights.operand(0)
    softmax = softmax_of(weights)
    if softmax is None or value is None or softmax.dtype is not torch.float32:
        return
    dims, top = len(softmax.shape), softmax.operand(0)
    if dims < 3 or top is None:
        return
    found = _walk(write, top, _Scores())
    if found is None:
        return
    product, scores = found
    query, keys = product.operand(0), product.operand(1)
    assert query is not None
    assert keys is not None
    batches = [[str(s) for s in x.shape[:-2]] for x in (query, keys, value)]
    if len(query.shape) != dims or any(batch != batches[0] for batch in batches):
        return
    if dims > 4 and not _joins_batches((query, keys, value), scores):
        return
    made = _attention(write, (query, keys, value), scores, limit)
    if refusal(made, target) is None:
        node.fx.replace_all_uses_with(_with_own_dims(write, made.fx))


def _with_four_dims(write: _Writer) -> None:
    """See attention of other dims that has no mask as [batch, heads, tokens, depth]."""
    node = write.before
    parts = [operand for operand in map(node.operand, range(3)) if operand is not None]
    batches = {str(x.shape[:-2]) for x in parts}
    if len(parts) != 3 or len(node.shape) < 3 or len(batches) != 1 or node.argument(3) is not None:
        return
    if len(node.shape) > 4 and not _joins_batches((parts[0], parts[1], parts[2]), _Scores()):
        return
    views = [_of_four_dims(write, x.fx) for x in parts]
    options = (None, node.argument(4, 0.0), node.argument(5, False))
    assert node.op is not None
    made = write(node.op.name, *views, *options, **node.fx.kwargs)
    node.fx.replace_all_uses_with(_with_own_dims(write, made))


def _of_four_dims(write: _Writer, part: fx.Node) -> fx.Node:
    """Queries, keys or values as [batch, heads, tokens, depth]: one head, or all batches in one."""
    shape = part.meta["val"].shape
    if len(shape) == 4:
        return part
    return write("unsqueeze", part, 1) if len(shape) == 3 else write("reshape", part, [-1, *shape[-3:]])


def _with_own_dims(write: _Writer, made: fx.Node) -> fx.Node:
    """What was computed with four dims, with those of the node that it takes the place of."""
    shape = write.before.shape
    if len(shape) == 4:
        return made
    return write("squeeze.dim", made, 1) if len(shape) == 3 else write("reshape", made, [-1, *shape[1:]])


def _joins_batches(operands: tuple[Node, Node, Node], scores: _Scores) -> bool:
    """Whether operands of more than four dims may be seen with four: nothing else is joined to their scores."""
    fixed = all(isinstance(s, int) for x in operands for s in x.shape[1:])
    return fixed and not scores.masks and not scores.by_head and scores.hidden is None


def _attention(write: _Writer, operands: tuple[Node, Node, Node], scores: _Scores, limit: int) -> Node:
    """The op, for operands of four dims, three (without heads) or more (with several batches).

    With a `limit` it is the one that rounds probabilities.
    """
    query, keys, value = (x.fx for x in operands)
    for factor in scores.by_head:
        query = write("mul.Tensor", query, factor)
    source = operands[1].operand(0)
    key = source.fx if source is not None and _swaps_last(operands[1]) else write("transpose.int", keys, -2, -1)
    mask = None
    for added, after in scores.masks:
        scaled = added if after == 1 else write("mul.Tensor", added, after)
        mask = scaled if mask is None else write("add.Tensor", mask, scaled)
    if scores.hidden is not None:
        mask = write("logical_not", scores.hidden)
    if mask is not None and len(operands[0].shape) == mask.meta["val"].dim() == 3:
        mask = write("unsqueeze", mask, 1)
    parts = [_of_four_dims(write, part) for part in (query, key, value)]
    arguments = (*parts, mask, 0.0, False)
    if limit:
        made = write("mcc.rounded_attention", *arguments, scale=scores.scale, limit=limit)
    else:
        made = write("scaled_dot_product_attention", *arguments, scale=scores.scale)
    return Node(made, write.graph)


def _walk(write: _Writer, node: Node, scores: _Scores) -> tuple[Node, _Scores] | None:
    """The product of queries and keys below `node`, and `scores` with what stands between, or None."""
    if len(node.users) != 1 or node.is_output or node.dtype is not torch.float32:
        return None
    if node.op in PRODUCTS:
        return node, scores
    if node.op in (ops.MUL, _DIV):
        return _walk_scaled(write, node, scores)
    inner = node.operand(0)
    if (fill := fill_of(node)) is not None:
        return _walk_filled(write, node, scores, fill)
    if scores.by_head or scores.hidden is not None:
        return None  # a mask would have to be multiplied too, or joined
    if node.op is _ADD and not node.fx.kwargs:
        return _walk_sum(write, node, scores)
    if node.op is ops.RESHAPE and inner is not None and inner.op is _ADD and not inner.fx.kwargs:
        return _walk_split_sum(write, node, inner, scores)
    return None


def _walk_filled(write: _Writer, node: Node, scores: _Scores, fill: Fill) -> tuple[Node, _Scores] | None:
    """Scores of hidden keys set to minus infinity, or to a number that takes in any score: a mask that is added."""
    inner, where = fill.scores, fill.where
    if _shape(inner) != _shape(node) or not 2 <= len(where.shape) <= len(node.shape):
        return None
    if scores.hidden is not None or scores.scale <= 0:
        return None
    hidden = where.fx if fill.hides else write("logical_not", where.fx)
    if fill.number == -math.inf:
        return None if scores.masks else _walk(write, inner, replace(scores, hidden=hidden))
    if scores.by_head or scores.scale != 1:
        return None
    added = write("mul.Tensor", write("to.dtype", hidden, torch.float32), fill.number)
    return _walk(write, inner, replace(scores, masks=(*scores.masks, (added, 1.0))))


def _walk_sum(write: _Writer, node: Node, scores: _Scores) -> tuple[Node, _Scores] | None:
    for position in range(2):
        below, added = node.operand(position), node.operand(1 - position)
        if below is None or added is None or _shape(below) != _shape(node) or not _is_mask(added, len(node.shape)):
            continue
        found = _walk(write, below, replace(scores, masks=(*scores.masks, (added.fx, scores.scale))))
        if found is not None:
            return found
    return None


def _is_mask(added: Node, dims: int) -> bool:
    """Whether the op takes it: of float32, the last dims those of queries and keys."""
    return added.dtype is torch.float32 and 2 <= len(added.shape) <= dims


def _walk_scaled(write: _Writer, node: Node, scores: _Scores) -> tuple[Node, _Scores] | None:
    below, factor = node.operand(0), node.argument(1)
    if below is None:
        return None
    if isinstance(factor, int | float):
        if factor == 0:
            return None
        return _walk(write, below, replace(scores, scale=scores.scale * (1 / factor if node.op is _DIV else factor)))
    operand = node.operand(1)
    single = operand is not None and _is_mask(operand, 4) and all(str(s) == "1" for s in operand.shape[-2:])
    if node.op is not ops.MUL or operand is None or not single or _shape(below) != _shape(node):
        return None
    return _walk(write, below, replace(scores, by_head=(*scores.by_head, operand.fx)))


def _walk_split_sum(write: _Writer, node: Node, inner: Node, scores: _Scores) -> tuple[Node, _Scores] | None:
    """Scores seen as [batch / windows, windows, heads, …], a mask of windows added, and seen as they were."""
    for position in range(2):
        view, added = inner.operand(position), inner.operand(1 - position)
        if view is None or added is None or view.op is not ops.RESHAPE or len(node.shape) != 4:
            continue
        below = view.operand(0)
        if below is None or _shape(below) != _shape(node) or len(inner.users) != 1 or len(view.users) != 1:
            continue
        sizes = (*added.shape, *view.shape, node.shape[0])
        if len(added.shape) != 5 or added.dtype is not torch.float32 or not all(isinstance(s, int) for s in sizes):
            continue
        outer, windows, *rest = (int(s) for s in view.shape)
        if _shape(view) != _shape(inner) or outer * windows != node.shape[0] or rest != [*node.shape[1:]]:
            continue
        spread = write("expand", added.fx, [outer, windows, *added.shape[2:]])
        mask = write("reshape", spread, [outer * windows, *added.shape[2:]])
        return _walk(write, below, replace(scores, masks=(*scores.masks, (mask, scores.scale))))
    return None


def _shape(node: Node) -> list[str]:
    return [str(s) for s in node.shape]


def _swaps_last(node: Node) -> bool:
    """Whether a node transposes the last two dims of its operand."""
    order = order_of(node)
    dims = len(node.shape)
    return order is not None and tuple(order) == (*range(dims - 2), dims - 1, dims - 2)
