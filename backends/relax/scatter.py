"""Writing at computed places: index_put and scatter in relax."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import relax, te, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm_ffi import structural_equal

from mcc.backends.relax.emitter import (
    Emitter,
    Expression,
    axis,
    broadcast,
    dtype,
    from_start,
    is_one,
    is_tensor,
    rank,
    read_broadcast,
    shape,
    size,
    static,
)  # fmt: skip
from mcc.backends.relax.index import indexed_dims
from mcc.errors import BackendError

R = relax.op
Rule = Callable[..., Any]


def index_put(
    e: Emitter, x: Expression, indices: list[Expression | None], values: Expression, accumulate: bool = False
) -> Expression:
    """A tensor with x[i, :, j, …] = values, or += values; of several values for one place the last one stays."""
    places, tensors = indexed_dims(indices)
    if any(dtype(t) == "bool" for t in tensors):
        return _masked_put(e, x, tensors if places == [0] else [], values, accumulate=accumulate)
    rest = [k for k in range(rank(x)) if k not in places]
    order = [*places, *rest]
    turned = x if order == sorted(order) else e(R.permute_dims(x, order))
    others = shape(turned)[len(places) :]
    joint = broadcast(*[list(shape(t)) for t in tensors])
    written = _values(e, values, (places, rest), (joint, others), dtype(x))
    extents = [size(s) for s in shape(turned)[: len(places)]]
    rows = e.compute(
        lambda *given: _row_numbers(given[: len(tensors)], given[len(tensors) :]),
        *tensors,
        *extents,
        name="row_numbers",
    )
    flat = _scatter_rows(e, turned, rows, written, rest=len(others), accumulate=accumulate)
    if turned is x:
        return flat
    return e(R.permute_dims(flat, [order.index(k) for k in range(rank(x))]))


def _values(
    e: Emitter, values: Expression, dims: tuple[list[int], list[int]], shapes: tuple[list[Any], list[Any]], kind: str
) -> Expression:
    """The values with a dim for each of the indices' and each of the others; PyTorch may put the others first."""
    (places, rest), (joint, others) = dims, shapes
    adjacent = places == list(range(places[0], places[-1] + 1))
    before = [k for k in rest if adjacent and k < places[0]]
    lead = len(before)
    sizes = [*others[:lead], *joint, *others[lead:]]
    whole = e(R.broadcast_to(e.cast(values, kind), sizes))
    if not lead:
        return whole
    inner = list(range(lead, lead + len(joint)))
    return e(R.permute_dims(whole, [*inner, *range(lead), *range(lead + len(joint), len(sizes))]))


def _row_numbers(given: Sequence[Expression], extents: Sequence[Expression]) -> Expression:
    joint = broadcast(*[list(t.shape) for t in given])

    def row(*at: Expression) -> Expression:
        read = zip(given, extents, strict=True)
        return _number([from_start(read_broadcast(t, at), n, str(t.dtype)) for t, n in read], extents)

    return te.compute(joint, row)


def _number(places: Sequence[Expression], extents: Sequence[Expression]) -> Expression:
    """The number of an element among all of these dims; -1 where a place lies outside, which PyTorch refuses."""
    number, inside = tirx.const(0, "int64"), tirx.const(True, "bool")
    for place, extent in zip(places, extents, strict=True):
        number, inside = number * extent + place, tirx.all(inside, place >= 0, place < extent)
    return tirx.Select(inside, number, tirx.const(-1, "int64"))


def _masked_put(
    e: Emitter, x: Expression, tensors: list[Expression], values: Expression, *, accumulate: bool
) -> Expression:
    (mask,) = tensors if len(tensors) == 1 else (None,)
    if mask is None or rank(mask) > rank(x) or not all(map(is_one, shape(values))) or accumulate:
        raise BackendError(
            "a boolean index is read that is not the first of several, adds, or has a value for each of its elements",
            remedy="use torch.where",
        )
    spread = e(R.reshape(mask, [*shape(mask), *[1] * (rank(x) - rank(mask))]))
    return e(R.where(spread, e(R.reshape(e.cast(values, dtype(x)), [1] * rank(x))), x))


def scatter(*, accumulate: bool) -> Rule:
    """A tensor with, along a dim, a value (or the elements of a tensor) written or added where an index says."""

    def rule(e: Emitter, x: Expression, dim: int, index: Expression, source: Any) -> Expression:
        if not rank(x):
            x, index, source = (e(R.reshape(t, [1])) if is_tensor(t) else t for t in (x, index, source))
            return e(R.reshape(rule(e, x, 0, index, source), []))
        d = axis(x, dim)
        if any(static(n) == 0 for n in shape(index)):
            return x
        values = source if is_tensor(source) else e(R.full_like(e.cast(index, dtype(x)), e.scalar(source, dtype(x))))
        for k in range(rank(index)):
            if not structural_equal(shape(values)[k], shape(index)[k]):  # more values than indices
                values = e.cut(values, k, 0, shape(index)[k])

        def body(where: Expression, *extents: Expression) -> Expression:
            def element(*at: Expression) -> Expression:
                written = from_start(where(*at), extents[d], str(where.dtype))
                return _number([written if k == d else i for k, i in enumerate(at)], extents)

            return te.compute(where.shape, element)

        rows = e.compute(body, index, *[size(s) for s in shape(x)], name="row_numbers")
        return _scatter_rows(e, x, rows, e.cast(values, dtype(x)), rest=0, accumulate=accumulate)

    return rule


def _scatter_rows(
    e: Emitter, x: Expression, rows: Expression, values: Expression, *, rest: int, accumulate: bool
) -> Expression:
    """A tensor with rows of its last `rest` dims written or added one after another where `rows` says."""

    def body(data: Expression, where: Expression, written: Expression) -> Expression:
        width = math.prod(data.shape[len(data.shape) - rest :])

        def generate(ins: list[Any], outs: list[Any]) -> Any:
            source, places, given, out = (T.buffer_proxy(b) for b in (*ins, *outs))
            with IRBuilder() as builder, T.serial(0, 1):
                with T.serial(0, math.prod(data.shape)) as i:
                    out[i] = source[i]
                with T.serial(0, math.prod(where.shape)) as k, T.If(places[k] >= 0), T.Then():  # noqa: SIM117
                    with T.serial(0, width) as j:
                        place = places[k] * width + j
                        value = given[k * width + j]
                        out[place] = out[place] + value if accumulate else value
            return builder.get()

        return te.extern([data.shape], [data, where, written], generate, dtype=[str(data.dtype)], name="scatter_rows")

    return e.compute(body, x, rows, values, name="scatter_rows")


RULES: dict[str, Rule] = {
    "index_put": index_put, "scatter.src": scatter(accumulate=False), "scatter.value": scatter(accumulate=False),
    "scatter_add": scatter(accumulate=True),
}  # fmt: skip
