"""Ops that move, cut and join dims, in relax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import relax, te, tirx
from tvm.sym.analyzer import Analyzer

from mcc.backends.relax.emitter import (
    Emitter,
    Expression,
    axis,
    dtype,
    is_float,
    is_one,
    rank,
    shape,
    size,
    static,
    widest,
)  # fmt: skip
from mcc.backends.relax.pointwise import sigmoid

R, NN = relax.op, relax.op.nn
Rule = Callable[..., Any]
_NO_END = 1 << 62


def _transpose(e: Emitter, x: Expression, a: int, b: int) -> Expression:
    order = list(range(rank(x)))
    a, b = axis(x, a), axis(x, b)
    order[a], order[b] = b, a
    return e(R.permute_dims(x, order))


def _squeeze(e: Emitter, x: Expression, dims: Any) -> Expression:
    places = [axis(x, d) for d in ([dims] if isinstance(dims, int) else dims)]
    places = [d for d in places if is_one(shape(x)[d])]
    return e(R.squeeze(x, places)) if places else x


def _expand(e: Emitter, x: Expression, sizes: list[Any], implicit: object = None) -> Expression:
    del implicit
    new = len(sizes) - rank(x)
    dims = [shape(x)[i - new] if isinstance(s, int) and s == -1 else s for i, s in enumerate(sizes)]
    return e(R.broadcast_to(x, dims))


def cut(e: Emitter, x: Expression, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Expression:
    """x[start:end:step] of one dim; bounds outside are clamped, negative ones count from the end."""
    d = axis(x, dim)
    extent = shape(x)[d]

    def bound(value: Any, default: Any) -> Any:
        if value is None or (isinstance(value, int) and value > _NO_END):
            return default
        known = static(extent)
        if isinstance(value, int) and known is not None:
            return min(max(value + known if value < 0 else value, 0), known)
        if isinstance(value, int) and value < 0:
            return tirx.max(extent + value, size(0))
        if static(value) == 0 or value is extent:
            return value
        return tirx.min(value, extent)

    analyzer = Analyzer()
    first, last = (analyzer.simplify(size(b)) for b in (bound(start, 0), bound(end, extent)))
    if static(first) == 0 and step == 1 and analyzer.can_prove_equal(last, extent):
        return x
    if e.expected is not None and step == 1 and static(last) is None:
        last = analyzer.simplify(first + e.expected[d])
    if static(first) is not None and static(last) is not None:
        last = size(max(int(first), int(last)))  # an end before the start aborts the process in strided_slice
    return e.cut(x, d, first, last, step)


def select(e: Emitter, x: Expression, dim: int, index: Any) -> Expression:
    """One index of a dim; a negative one is resolved here, since TVM would read outside the buffer."""
    d = axis(x, dim)
    if isinstance(index, int) and index < 0:
        index = shape(x)[d] + index
    return e(R.squeeze(e.cut(x, d, index, index + 1), [d]))


def join(e: Emitter, tensors: list[Expression], dim: int = 0) -> Expression:
    """Concatenate; PyTorch lets an empty 1-d tensor stand among others."""
    if any(rank(t) > 1 for t in tensors):
        tensors = [t for t in tensors if rank(t) > 1 or static(shape(t)[0]) != 0]
    kind = widest([dtype(t) for t in tensors])
    same = [e.cast(t, kind) for t in tensors]
    return same[0] if len(same) == 1 else e(R.concat(same, axis(same[0], dim)))


def _stack(e: Emitter, tensors: list[Expression], dim: int = 0) -> Expression:
    d = axis(tensors[0], dim, 1)
    return e(R.concat([e(R.expand_dims(t, d)) for t in tensors], d))


def _split_with_sizes(e: Emitter, x: Expression, sizes: list[Any], dim: int = 0) -> list[Expression]:
    parts, start = [], 0
    for length in sizes:
        parts.append(e.cut(x, axis(x, dim), start, start + length))
        start = start + length
    return parts


def _split(e: Emitter, x: Expression, length: int, dim: int = 0) -> list[Expression]:
    extent = int(shape(x)[axis(x, dim)])
    return _split_with_sizes(e, x, [min(length, extent - start) for start in range(0, extent, length)], dim)


def _chunk(e: Emitter, x: Expression, count: int, dim: int = 0) -> list[Expression]:
    return _split(e, x, -(-int(shape(x)[axis(x, dim)]) // count), dim)


def _unbind(e: Emitter, x: Expression, dim: int = 0) -> list[Expression]:
    d = axis(x, dim)
    return [select(e, x, d, i) for i in range(int(shape(x)[d]))]


def _glu(e: Emitter, x: Expression, dim: int = -1) -> Expression:
    a, b = _chunk(e, x, 2, dim)
    return e(R.multiply(a, sigmoid(e, b)))


def pad(
    e: Emitter, x: Expression, amounts: list[Any], mode: str = "constant", value: float | None = None
) -> Expression:
    """torch.nn.functional.pad: amounts from the last dim on, negative ones crop."""
    n = rank(x)
    low: list[Any] = [0] * n
    high: list[Any] = [0] * n
    for i in range(len(amounts) // 2):
        low[n - 1 - i], high[n - 1 - i] = amounts[2 * i], amounts[2 * i + 1]
    for i in range(n):
        if isinstance(low[i], int) and isinstance(high[i], int) and min(low[i], high[i]) < 0:
            x = e.cut(x, i, max(-low[i], 0), shape(x)[i] - max(-high[i], 0))
            low[i], high[i] = max(low[i], 0), max(high[i], 0)
    fixed = all(isinstance(v, int) for v in (*low, *high))
    if fixed and not any((*low, *high)):
        return x
    if mode == "constant" and fixed and is_float(dtype(x)):
        return e(NN.pad(x, [v for both in zip(low, high, strict=True) for v in both], "constant", float(value or 0)))
    return e.compute(lambda t: _pad_by_index(t, (low, high), mode, value or 0), x, name="pad")


def _pad_by_index(x: Expression, amounts: tuple[list[Any], list[Any]], mode: str, value: float) -> Expression:
    low, high = amounts

    def source(i: int, place: Expression) -> tuple[Expression, list[Expression]]:
        if isinstance(low[i], int) and isinstance(high[i], int) and low[i] == high[i] == 0:
            return place, []
        extent, p = x.shape[i], place - low[i]
        if mode == "constant":
            return p, [p >= 0, p < extent]
        if mode == "reflect":
            p = tirx.if_then_else(p < 0, -p, p)
            return tirx.if_then_else(p >= extent, 2 * extent - 2 - p, p), []
        if mode == "replicate":
            return tirx.max(tirx.min(p, extent - 1), size(0)), []
        return tirx.if_then_else(p < 0, p + extent, tirx.if_then_else(p >= extent, p - extent, p)), []

    def element(*places: Expression) -> Expression:
        found = [source(i, place) for i, place in enumerate(places)]
        read = x(*[index for index, _ in found])
        inside = [condition for _, conditions in found for condition in conditions]
        return tirx.if_then_else(tirx.all(*inside), read, tirx.const(value, x.dtype)) if inside else read

    return te.compute([s + a + b for s, a, b in zip(x.shape, low, high, strict=True)], element)


def _repeat(e: Emitter, x: Expression, counts: list[Any]) -> Expression:
    while rank(x) < len(counts):
        x = e(R.expand_dims(x, 0))
    return e(R.tile(x, list(counts)))


def _repeat_interleave(e: Emitter, x: Expression, count: int, dim: int | None = None) -> Expression:
    if dim is None:
        x, dim = e(R.reshape(x, [-1])), 0
    return e(R.repeat(x, count, axis(x, dim)))


def roll(e: Emitter, x: Expression, shifts: Any, dims: Any = ()) -> Expression:
    """Rotate dims; without a modulo in the index, which TVM gets wrong once three loops are fused."""
    amounts = [shifts] if isinstance(shifts, int) else list(shifts)
    places = [dims] if isinstance(dims, int) else list(dims)
    if not places:
        return e(R.reshape(roll(e, e(R.reshape(x, [-1])), amounts, [0]), shape(x)))
    by_dim: dict[int, int] = {}
    for amount, place in zip(amounts, places, strict=True):
        by_dim[axis(x, place)] = by_dim.get(axis(x, place), 0) + amount

    def body(t: Expression) -> Expression:
        def source(i: int, place: Expression) -> Expression:
            if i not in by_dim:
                return place
            shift = tirx.floormod(size(by_dim[i]), t.shape[i])
            return tirx.if_then_else(place < shift, place - shift + t.shape[i], place - shift)

        return te.compute(t.shape, lambda *places: t(*[source(i, p) for i, p in enumerate(places)]))

    return e.compute(body, x, name="roll")


def _flip(e: Emitter, x: Expression, dims: list[int]) -> Expression:
    flipped = {axis(x, d) for d in dims}

    def body(t: Expression) -> Expression:
        return te.compute(t.shape, lambda *i: t(*[t.shape[k] - 1 - p if k in flipped else p for k, p in enumerate(i)]))

    return e.compute(body, x, name="flip")


RULES: dict[str, Rule] = {
    "reshape": lambda e, x, sizes: e(R.reshape(x, list(sizes))),
    "reshape_as": lambda e, x, other: e(R.reshape(x, shape(other))),
    "transpose.int": _transpose, "permute": lambda e, x, order: e(R.permute_dims(x, [axis(x, d) for d in order])),
    "t": lambda e, x: e(R.permute_dims(x, [1, 0])) if rank(x) == 2 else x,
    "unsqueeze": lambda e, x, dim: e(R.expand_dims(x, axis(x, dim, 1))),
    "squeeze.dim": _squeeze, "squeeze.dims": _squeeze,
    "expand": _expand, "expand_as": lambda e, x, other: e(R.broadcast_to(x, shape(other))),
    "slice.Tensor": cut, "select.int": select, "cat": join, "stack": _stack,
    "split_with_sizes": _split_with_sizes, "split.Tensor": _split, "chunk": _chunk, "unbind.int": _unbind, "glu": _glu,
    "pad": pad, "constant_pad_nd": lambda e, x, amounts, value=0: pad(e, x, amounts, "constant", value),
    "repeat": _repeat, "repeat_interleave.self_int": _repeat_interleave, "roll": roll, "flip": _flip,
    "tril": lambda e, x, k=0: e(R.tril(x, k)), "triu": lambda e, x, k=0: e(R.triu(x, k)),
}  # fmt: skip
