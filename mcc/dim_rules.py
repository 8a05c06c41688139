"""How the dims of what an op gives are made of those of what it takes: one rule for each row of the op table.

A rule ties dims that keep step, as those of a sum, and gives the terms of the op's own dims. Axes over which an op
works are blocked, with the reason. What an op adds up over an axis stays right only while the values it leaves out are
zero: that is noted as a need, and judged when all ties are known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mcc import ops
from mcc.axes import UNIT, Axis, Product, Term, block, regrouped, size, tie
from mcc.dim_moves import MOVES
from mcc.ties import Dims, Need, Ties, closed, place, shape, tensor_operands, unknown

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcc.graph import Node


def _elementwise(ties: Ties, node: Node) -> Dims:
    return ties.broadcast(node, [ties.of(o) for o in tensor_operands(node)])


def _first(ties: Ties, node: Node) -> Dims:
    return ties.of(node.operand(0))


def _prelu(ties: Ties, node: Node) -> Dims:
    dims, slopes = ties.of(node.operand(0)), ties.of(node.operand(1))
    if slopes and size(slopes[0]) > 1:
        tie(dims[1], slopes[0], place(node))
    return dims


# layers with weights


def _linear(ties: Ties, node: Node) -> Dims:
    x, w = ties.of(node.operand(0)), ties.of(node.operand(1))
    ties.contract(node, x[-1], w[-1], (node.operand(0), node.operand(1)))
    if node.operand(2) is not None:
        tie(w[0], ties.of(node.operand(2))[0], place(node))
    ties.gives(node, w[0], "neuron")
    return (*x[:-1], w[0])


def _convolution(ties: Ties, node: Node) -> Dims:
    x, w = ties.of(node.operand(0)), ties.of(node.operand(1))
    lead, spatial = x[: len(x) - len(w) + 1], x[len(x) - len(w) + 2 :]
    channels, groups = x[len(lead)], int(node.argument(6, 1))
    outer, inner = _grouped(node, channels, groups)
    transposed = node.op is ops.CONV_TRANSPOSE2D
    rows, columns = _grouped(node, w[0], groups)
    tie(outer, rows, place(node))
    ties.contract(node, inner, columns if transposed else w[1], (node.operand(0), node.operand(1)))
    out: Term = Product((rows, w[1])) if transposed else w[0]
    if node.operand(2) is not None:
        tie(out, ties.of(node.operand(2))[0], place(node))
    for dim in (*spatial, *w[2:]):
        block(dim, f"{place(node)} slides over it")
    ties.baked[node.fx] = (rows,)
    ties.gives(node, out, "channel")
    return (*lead, out, *closed(node, shape(node)[len(lead) + 1 :], "slides over it"))


def _grouped(node: Node, channels: Term, groups: int) -> tuple[Term, Term]:
    """Channels as groups of channels."""
    if groups == 1:
        return UNIT, channels
    outer, inner = regrouped([channels], [groups, size(channels) // groups], place(node))
    return outer, inner


def _embedding(ties: Ties, node: Node) -> Dims:
    w = ties.of(node.operand(0))
    block(w[0], f"{place(node)} looks rows up")
    ties.gives(node, w[1], "neuron")
    return (*ties.of(node.operand(1)), w[1])


# products of values


def _matmul(ties: Ties, node: Node) -> Dims:
    left, right = node.operand(0), node.operand(1)
    a, b = ties.of(left), ties.of(right)
    if len(a) == 1:
        a = (UNIT, *a)
    column = b if len(b) > 1 else (*b, UNIT)
    batch = ties.broadcast(node, [a[:-2], column[:-2]])
    ties.contract(node, a[-1], column[-2], (left, right))
    if a[:-2] and column[:-2]:
        ties.roles += [(term, "head") for term in batch]
        ties.roles += [(term, "head dim") for term in (a[-1], column[-1])]
    elif len(b) == 2:
        ties.gives(node, b[1], "neuron")
    rows = a[-2:-1] if len(ties.of(left)) > 1 else ()
    return (*batch, *rows, *(column[-1:] if len(b) > 1 else ()))


def _added_matmul(ties: Ties, node: Node) -> Dims:
    a, b = ties.of(node.operand(1)), ties.of(node.operand(2))
    batch = ties.broadcast(node, [a[:-2], b[:-2]])
    ties.contract(node, a[-1], b[-2], (node.operand(1), node.operand(2)))
    ties.roles += [(term, "head") for term in batch]
    if not batch:
        ties.gives(node, b[-1], "neuron")
    return ties.broadcast(node, [(*batch, a[-2], b[-1]), ties.of(node.operand(0))])


def _attention(ties: Ties, node: Node) -> Dims:
    q, k, v = (ties.of(node.operand(i)) for i in range(3))
    batch = ties.broadcast(node, [k[:-2], v[:-2]])
    if node.argument(7, False) and size(q[-3]) != size(batch[-1]):
        heads, shared = regrouped([q[-3]], [size(batch[-1]), size(q[-3]) // size(batch[-1])], place(node))
        tie(heads, batch[-1], place(node))
        ties.roles.append((shared, "head"))
        batch = (*ties.broadcast(node, [q[:-3], batch[:-1]]), Product((heads, shared)))
    batch = ties.broadcast(node, [q[:-2], batch])
    ties.contract(node, q[-1], k[-1], (node.operand(0), node.operand(1)))
    tie(k[-2], v[-2], place(node))
    block(k[-2], f"{place(node)} weighs its indices against each other")
    if node.argument(5, False):
        block(q[-2], f"{place(node)} is causal")
    if node.operand(3) is not None:
        ties.broadcast(node, [(*batch, q[-2], k[-2]), ties.of(node.operand(3))])
    ties.baked[node.fx] = (q[-1],)
    ties.roles += [(term, "head") for term in batch]
    ties.roles += [(q[-1], "head dim"), (v[-1], "head dim")]
    return (*batch, q[-2], v[-1])


# norms


def _batch_norm(ties: Ties, node: Node) -> Dims:
    dims = ties.of(node.operand(0))
    for position in range(1, 5):
        vector = node.operand(position)
        if vector is not None:
            tie(dims[1], ties.of(vector)[0], place(node))
    return dims


def _instance_norm(ties: Ties, node: Node) -> Dims:
    dims = _batch_norm(ties, node)
    for dim in dims[2:]:
        block(dim, f"{place(node)} normalizes over it")
    return dims


def _group_norm(ties: Ties, node: Node) -> Dims:
    dims = ties.of(node.operand(0))
    groups, inner = _grouped(node, dims[1], int(node.argument(1)))
    for dim in (inner, *dims[2:]):
        block(dim, f"{place(node)} normalizes over it")
    for position in (2, 3):
        vector = node.operand(position)
        if vector is not None:
            tie(dims[1], ties.of(vector)[0], place(node))
    ties.baked[node.fx] = (groups,)
    return dims


def _layer_norm(ties: Ties, node: Node) -> Dims:
    dims = ties.of(node.operand(0))
    normalized = dims[len(dims) - len(node.argument(1)) :]
    for position in (2, 3):
        vector = node.operand(position)
        if vector is not None:
            ties.broadcast(node, [normalized, ties.of(vector)])
    for dim in normalized:
        block(dim, f"{place(node)} normalizes over it")
    return dims


def _weight_norm(ties: Ties, node: Node) -> Dims:
    v, g = node.operand(0), node.operand(1)
    assert v is not None
    worked = int(node.argument(2, 0))
    ties.needs += [Need(d, (v.fx,), place(node)) for i, d in enumerate(ties.of(v)) if i != worked]
    return ties.broadcast(node, [ties.of(v), ties.of(g)])


# reductions and what works along a dim


def _reduction(ties: Ties, node: Node) -> Any:
    source = node.operand(0)
    assert source is not None
    dims = ties.of(source)
    over, keep = _reduced(node, len(dims))
    for i in over:
        if node.op in _SUMS and not _is_least(node):
            ties.needs.append(Need(dims[i], (source.fx,), place(node)))
        else:
            block(dims[i], f"{place(node)} reduces it")
    made = tuple(UNIT if i in over else d for i, d in enumerate(dims) if keep or i not in over)
    return (made, made) if node.op is ops.OPS["max.dim"] else made


def _is_least(node: Node) -> bool:
    """Whether this is a norm of negative order, which zeros change."""
    return node.op is ops.OPS["linalg_vector_norm"] and float(node.argument(1, 2)) < 0


def _reduced(node: Node, rank: int) -> tuple[set[int], bool]:
    """The dims a reduction ends, and whether they stay with size 1."""
    assert node.op is not None
    position = 2 if node.op.name == "linalg_vector_norm" else 1
    given = node.argument(position)
    keep = bool(node.argument(3 if node.op.name in ("linalg_vector_norm", "var.correction") else 2, default=False))
    if node.op.name in ("mean", "sum") or given is None or given == []:
        return set(range(rank)), keep and len(shape(node)) == rank
    listed = given if isinstance(given, list | tuple) else [given]
    return {int(d) % rank for d in listed}, keep


def _along(ties: Ties, node: Node) -> Any:
    dims = ties.of(node.operand(0))
    assert node.op is not None
    given = node.argument(2 if node.op.name in ("topk", "roll") else 1, () if node.op.name == "roll" else -1)
    listed = given if isinstance(given, list | tuple) else [given]
    worked = {int(d) % len(dims) for d in listed} or set(range(len(dims)))
    for i in worked:
        block(dims[i], f"{place(node)} works along it")
    if node.op.name in ("topk", "sort"):
        left = [ops.extent(s) for s in node.value[0].shape]
        made = [closed(node, [left[i]], "works along it")[0] if i in worked else d for i, d in enumerate(dims)]
        return tuple(made), tuple(made)
    return dims


def _window(ties: Ties, node: Node) -> Dims:
    dims = ties.of(node.operand(0))
    assert node.op is not None
    count = next((n for n in (1, 3) if f"{n}d" in node.op.name), 2)
    for dim in dims[-count:]:
        block(dim, f"{place(node)} slides over it")
    return (*dims[:-count], *closed(node, shape(node)[-count:], "slides over it"))


def _pixel_shuffle(ties: Ties, node: Node) -> Dims:
    dims, factor = ties.of(node.operand(0)), int(node.argument(1)) ** 2
    for dim in dims[-2:]:
        block(dim, f"{place(node)} moves channels into it")
    channels, within = regrouped([dims[-3]], [size(dims[-3]) // factor, factor], place(node))
    block(within, f"{place(node)} moves it into space")
    return (*dims[:-3], channels, *closed(node, shape(node)[-2:], "moves channels into it"))


# made values, recurrence, formats


def _filled(ties: Ties, node: Node) -> Dims:
    del ties
    return tuple(Axis(s) for s in shape(node))


def _counted(ties: Ties, node: Node) -> Dims:
    del ties
    return closed(node, shape(node), "counts")


def _recurrent(ties: Ties, node: Node) -> tuple[Dims, ...]:
    """Projected [a, b, gates hidden], states [batch, hidden], weight [hidden, gates hidden], bias."""
    count = 2 if node.op is ops.LSTM else 1
    projected, weight = ties.of(node.operand(0)), ties.of(node.operand(count + 1))
    hidden = weight[0]
    gates, inner = regrouped([weight[1]], [size(weight[1]) // size(hidden), size(hidden)], place(node))
    block(gates, f"{place(node)} has a use for each of its gates")
    tie(inner, hidden, place(node))
    tie(projected[2], weight[1], place(node))
    if node.operand(count + 2) is not None:
        tie(ties.of(node.operand(count + 2))[0], weight[1], place(node))
    first = bool(node.argument(count + 4))
    block(projected[1 if first else 0], f"{place(node)} goes along it")
    for i in range(1, count + 1):
        tie(ties.of(node.operand(i))[0], projected[0 if first else 1], place(node))
        tie(ties.of(node.operand(i))[1], hidden, place(node))
    state = (projected[0 if first else 1], hidden)
    weights = node.operand(count + 1)
    assert weights is not None
    ties.needs.append(Need(hidden, (weights.fx,), place(node)))
    ties.gives(node, hidden, "state")
    return ((*projected[:2], hidden), *(state for _ in range(count)))


def _fake_quantize(ties: Ties, node: Node) -> Dims:
    dims, axis = ties.of(node.operand(0)), node.argument(3)
    for position in (1, 2):
        vector = ties.of(node.operand(position))
        if len(vector) == 1 and axis is not None:
            tie(dims[int(axis)], vector[0], place(node))
        elif len(vector) == 2:
            tie(dims[0], vector[0], place(node))
            block(dims[1], f"{place(node)} has scales for groups of it")
            block(vector[1], f"{place(node)} has scales for groups")
    return dims


def _quantize_per_token(ties: Ties, node: Node) -> Dims:
    source = node.operand(0)
    assert source is not None
    dims = ties.of(source)
    ties.needs.append(Need(dims[-1], (source.fx,), place(node)))
    return dims


_SUMS = tuple(ops.OPS[n] for n in ("sum.dim_IntList", "sum", "linalg_vector_norm"))  # to which zeros add nothing
_BY_NAME: dict[str, Callable[[Ties, Node], Any]] = {
    **MOVES,
    "linear": _linear, "embedding": _embedding, "matmul": _matmul, "bmm": _matmul,
    "addmm": _added_matmul, "baddbmm": _added_matmul, "scaled_dot_product_attention": _attention,
    "mcc.rounded_attention": _attention,
    "batch_norm": _batch_norm, "instance_norm": _instance_norm, "group_norm": _group_norm, "layer_norm": _layer_norm,
    "rms_norm": _layer_norm, "linalg_vector_norm": _reduction, "_weight_norm": _weight_norm, "prelu": _prelu,
    "pixel_shuffle": _pixel_shuffle,
    "zeros_like": _first, "ones_like": _first, "full_like": _first, "empty_like": _first, "zeros": _filled,
    "ones": _filled, "full": _filled, "new_zeros": _filled, "new_ones": _filled, "new_full": _filled,
    "arange": _counted, "arange.start": _counted, "arange.start_step": _counted, "eye": _counted,
    "scalar_tensor": _counted, "mcc.lstm": _recurrent, "mcc.gru": _recurrent, "mcc.fake_quantize": _fake_quantize,
    "mcc.fake_quantize_per_token": _quantize_per_token, "mcc.round_bfloat16": _first,
    "mcc.conv2d_nhwc": unknown, "mcc.attention": unknown,
    "mcc.grouped_matmul": unknown,
}  # fmt: skip
_BY_FAMILY: dict[str, Callable[[Ties, Node], Any]] = {
    "weights": _convolution, "pointwise": _elementwise, "reduction": _reduction, "along": _along, "window": _window,
    "cast": _first, "mode": _first,
}  # fmt: skip


def rule(op: ops.Op | None) -> Callable[[Ties, Node], Any]:
    """The rule of a row of the op table."""
    if op is None or op.name.endswith("_nhwc"):
        return unknown
    return _BY_NAME.get(op.name) or _BY_FAMILY.get(op.family, unknown)
