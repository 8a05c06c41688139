"""Rules of ops that move dims, cut and join them, or pick from them: see `mcc.dim_rules`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mcc import ops
from mcc.axes import UNIT, Axis, Product, Sum, Term, block, cut, regrouped, size, tie
from mcc.graph import Node
from mcc.ties import Dims, Ties, closed, is_number, place, shape

if TYPE_CHECKING:
    from collections.abc import Callable


def _reshape(ties: Ties, node: Node) -> Dims:
    return tuple(regrouped(ties.of(node.operand(0)), shape(node), place(node)))


def _permute(ties: Ties, node: Node) -> Dims:
    dims = ties.of(node.operand(0))
    return tuple(dims[int(i) % len(dims)] for i in node.argument(1))


def _transpose(ties: Ties, node: Node) -> Dims:
    dims = list(ties.of(node.operand(0)))
    if dims:
        a, b = (0, len(dims) - 1) if node.op is ops.OPS["t"] else (int(node.argument(1)), int(node.argument(2)))
        dims[a], dims[b] = dims[b], dims[a]
    return tuple(dims)


def _unsqueeze(ties: Ties, node: Node) -> Dims:
    dims = list(ties.of(node.operand(0)))
    dims.insert(int(node.argument(1)) % (len(dims) + 1), UNIT)
    return tuple(dims)


def _squeeze(ties: Ties, node: Node) -> Dims:
    dims, given = ties.of(node.operand(0)), node.argument(1)
    ties.baked[node.fx] = dims
    listed = given if isinstance(given, list | tuple) else [given]
    gone = {int(d) % len(dims) for d in listed if size(dims[int(d) % len(dims)]) == 1}
    return tuple(d for i, d in enumerate(dims) if i not in gone)


def _expand(ties: Ties, node: Node) -> Dims:
    dims, sizes = ties.of(node.operand(0)), shape(node)
    lead = len(sizes) - len(dims)
    made = [Axis(s) if i < lead or size(dims[i - lead]) != s else dims[i - lead] for i, s in enumerate(sizes)]
    if node.op is ops.OPS["expand_as"]:
        for a, b in zip(made, ties.of(node.operand(1)), strict=True):
            tie(a, b, place(node))
    return tuple(made)


def _reshape_as(ties: Ties, node: Node) -> Dims:
    made, wanted = _reshape(ties, node), ties.of(node.operand(1))
    for a, b in zip(made, wanted, strict=True):
        tie(a, b, place(node))
    return made


# cutting and joining


def _axis(node: Node, position: int, rank: int, default: int = 0) -> int:
    return int(node.argument(position, default)) % rank


def _with(dims: Dims, axis: int, term: Term) -> Dims:
    return (*dims[:axis], term, *dims[axis + 1 :])


def _slice(ties: Ties, node: Node) -> Dims:
    dims = ties.of(node.operand(0))
    axis = _axis(node, 1, len(dims))
    whole, left = size(dims[axis]), shape(node)[axis]
    if left == whole:
        ties.baked[node.fx] = (UNIT, UNIT, UNIT)
        return dims
    start = node.argument(2)
    if node.argument(4, 1) != 1 or not is_number(start) or not is_number(node.argument(3)):
        block(dims[axis], f"{place(node)} takes some of its indices")
        return _with(dims, axis, closed(node, [left], "takes some indices")[0])
    first = 0 if start is None else min(max(int(start) + (whole if start < 0 else 0), 0), whole)
    before, taken, after = cut(dims[axis], [first, first + left, whole])
    ties.baked[node.fx] = (before, taken, after)
    return _with(dims, axis, taken)


def _parts(ties: Ties, node: Node) -> tuple[Dims, ...]:
    """Split, chunk: what each part has of the dim that is cut."""
    dims = ties.of(node.operand(0))
    axis = _axis(node, 2, len(dims))
    sizes = [ops.extent(v.shape[axis]) for v in node.value]
    bounds = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    pieces = cut(dims[axis], bounds)
    ties.baked[node.fx] = tuple(pieces)
    return tuple(_with(dims, axis, piece) for piece in pieces)


def _unbind(ties: Ties, node: Node) -> tuple[Dims, ...]:
    dims = ties.of(node.operand(0))
    axis = _axis(node, 1, len(dims))
    block(dims[axis], f"{place(node)} takes it apart")
    return tuple((*dims[:axis], *dims[axis + 1 :]) for _ in node.value)


def _select(ties: Ties, node: Node) -> Dims:
    dims = ties.of(node.operand(0))
    axis = _axis(node, 1, len(dims))
    block(dims[axis], f"{place(node)} takes one of its indices")
    return (*dims[:axis], *dims[axis + 1 :])


def _cat(ties: Ties, node: Node) -> Dims:
    parts = [ties.of(o) for o in _listed(node)]
    parts = [p for p in parts if len(p) == len(shape(node))]  # aten lets an empty vector join anything
    axis = _axis(node, 1, len(parts[0]))
    for part in parts[1:]:
        for i, (a, b) in enumerate(zip(parts[0], part, strict=True)):
            if i != axis:
                tie(a, b, place(node))
    return _with(parts[0], axis, Sum(tuple(p[axis] for p in parts)))


def _listed(node: Node) -> list[Node]:
    return [Node(n, node.graph) for n in node.argument(0)]


def _stack(ties: Ties, node: Node) -> Dims:
    parts = [ties.of(o) for o in _listed(node)]
    dims = list(ties.broadcast(node, parts))
    dims.insert(_axis(node, 1, len(dims) + 1), closed(node, [len(parts)], "lays values side by side")[0])
    return tuple(dims)


def _pad(ties: Ties, node: Node) -> Dims:
    dims, amounts = list(ties.of(node.operand(0))), node.argument(1)
    constant = node.op is ops.OPS["constant_pad_nd"] or node.argument(2, "constant") == "constant"
    baked: list[Term] = []
    for i in range(len(amounts) // 2):
        axis, (before, after) = len(dims) - 1 - i, amounts[2 * i : 2 * i + 2]
        if not (is_number(before) and is_number(after)) or min(before, after) < 0 or not constant:
            if before != 0 or after != 0:
                block(dims[axis], f"{place(node)} reads it at its ends")
                dims[axis] = closed(node, [shape(node)[axis]], "reads it at its ends")[0]
            baked += [Axis(before), Axis(after)] if is_number(before) and is_number(after) else [UNIT, UNIT]
            continue
        ends = Axis(before), Axis(after)
        baked += ends
        dims[axis] = Sum((ends[0], dims[axis], ends[1]))
    ties.baked[node.fx] = tuple(baked)
    return tuple(dims)


def _repeat(ties: Ties, node: Node) -> Dims:
    dims, counts = ties.of(node.operand(0)), node.argument(1)
    lead = len(counts) - len(dims)
    sizes = shape(node)
    made: list[Term] = []
    times: list[Term] = []
    for i, whole in enumerate(sizes):
        inner = UNIT if i < lead else dims[i - lead]
        times.append(Axis(whole // size(inner) if size(inner) else 1))
        made.append(Product((times[-1], inner)))
    ties.baked[node.fx] = tuple(times)
    return tuple(made)


def _repeat_interleave(ties: Ties, node: Node) -> Dims:
    dims, given = ties.of(node.operand(0)), node.argument(2)
    axis = int(given) % len(dims) if given is not None else 0
    flat = dims if given is not None else (Product(dims),)
    times = Axis(int(node.argument(1)))
    ties.baked[node.fx] = (times,)
    return _with(flat, axis, Product((flat[axis], times)))


def _triangle(ties: Ties, node: Node) -> Dims:
    dims = ties.of(node.operand(0))
    for dim in dims[-2:]:
        block(dim, f"{place(node)} counts along it")
    return dims


def _scatter(ties: Ties, node: Node) -> Dims:
    dims, source = ties.of(node.operand(0)), ties.of(node.operand(1))
    axis = _axis(node, 2, len(dims))
    block(dims[axis], f"{place(node)} writes some of its indices")
    one = node.op is ops.OPS["select_scatter"]
    if not one:
        block(source[axis], f"{place(node)} writes some of its indices")
    kept = (*dims[:axis], *dims[axis + 1 :])
    given = source if one else (*source[:axis], *source[axis + 1 :])
    ties.broadcast(node, [kept, given])
    return dims


def _glu(ties: Ties, node: Node) -> Dims:
    dims = ties.of(node.operand(0))
    axis = _axis(node, 1, len(dims), -1)
    half = size(dims[axis]) // 2
    first, second = cut(dims[axis], [half, 2 * half])
    tie(first, second, place(node))
    return _with(dims, axis, first)


# picking by index


def _index(ties: Ties, node: Node) -> Dims:
    dims, given = ties.of(node.operand(0)), node.argument(1)
    indexed = [i for i, g in enumerate(given) if g is not None]
    for i in indexed:
        block(dims[i], f"{place(node)} picks its indices")
    chosen = [Node(given[i], node.graph) for i in indexed]
    if any(str(c.dtype) == "torch.bool" for c in chosen):
        for dim in dims:
            block(dim, f"{place(node)} picks by a mask")
        return closed(node, shape(node), "picks by a mask")
    picked = ties.broadcast(node, [ties.of(c) for c in chosen])
    together = indexed == list(range(indexed[0], indexed[-1] + 1))
    first = indexed[0] if together else 0
    rest = [d for i, d in enumerate(dims) if i not in indexed]
    return (*rest[:first], *picked, *rest[first:])


def _index_select(ties: Ties, node: Node) -> Dims:
    dims = ties.of(node.operand(0))
    axis = _axis(node, 1, len(dims))
    block(dims[axis], f"{place(node)} picks its indices")
    return _with(dims, axis, ties.of(node.operand(2))[0])


def _gather(ties: Ties, node: Node) -> Dims:
    dims, chosen = ties.of(node.operand(0)), ties.of(node.operand(2))
    axis = _axis(node, 1, len(dims))
    for i, (a, b) in enumerate(zip(dims, chosen, strict=True)):
        if i == axis or size(a) != size(b):
            block(a, f"{place(node)} picks its indices")
            block(b, f"{place(node)} picks by it")
        else:
            tie(a, b, place(node))
    return chosen


MOVES: dict[str, Callable[[Ties, Node], Any]] = {
    "reshape": _reshape, "permute": _permute, "transpose.int": _transpose, "t": _transpose, "unsqueeze": _unsqueeze,
    "squeeze.dim": _squeeze, "squeeze.dims": _squeeze, "expand": _expand, "expand_as": _expand,
    "reshape_as": _reshape_as, "slice.Tensor": _slice, "split.Tensor": _parts, "split_with_sizes": _parts,
    "chunk": _parts, "unbind.int": _unbind, "select.int": _select, "cat": _cat, "stack": _stack, "pad": _pad,
    "constant_pad_nd": _pad, "repeat": _repeat, "repeat_interleave.self_int": _repeat_interleave, "tril": _triangle,
    "triu": _triangle, "slice_scatter": _scatter, "select_scatter": _scatter, "glu": _glu, "index.Tensor": _index,
    "index_select": _index_select, "gather": _gather,
}  # fmt: skip
