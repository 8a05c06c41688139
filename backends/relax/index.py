"""Indexing ops, tensors made from sizes, and mcc's own formats, in relax."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from tvm import relax, te, tirx
from tvm.sym.analyzer import Analyzer

from mcc.backends.relax.emitter import (
    DTYPES,
    Emitter,
    Expression,
    axis,
    broadcast,
    dtype,
    rank,
    read_broadcast,
    shape,
    size,
    wrap_index,
)  # fmt: skip
from mcc.errors import BackendError
from mcc.fixed_point import LARGEST
from mcc.formats import SMALLEST_ROW

R = relax.op
Rule = Callable[..., Any]


def indexed_dims(indices: list[Expression | None]) -> tuple[list[int], list[Expression]]:
    """The dims that an index has a tensor for, and the tensors."""
    places = [k for k, tensor in enumerate(indices) if tensor is not None]
    return places, [indices[k] for k in places]


def index(e: Emitter, x: Expression, indices: list[Expression | None]) -> Expression:
    """x[i, :, j, …] with integer tensors: they broadcast together and stand where PyTorch puts them."""
    places, tensors = indexed_dims(indices)
    if any(dtype(t) == "bool" for t in tensors):
        raise BackendError("a boolean index makes a shape that depends on values", remedy="use torch.where")

    def body(values: Expression, *given: Expression) -> Expression:
        return _gather_many(values, places, given)

    return e.compute(body, x, *tensors, name="index")


def _gather_many(x: Expression, places: list[int], tensors: tuple[Expression, ...]) -> Expression:
    joint = broadcast(*[list(t.shape) for t in tensors])
    adjacent = places == list(range(places[0], places[-1] + 1))
    rest = [k for k in range(len(x.shape)) if k not in places]
    before = [k for k in rest if adjacent and k < places[0]]
    after = [k for k in rest if k not in before]

    def element(*out: Expression) -> Expression:
        inner = out[len(before) : len(before) + len(joint)]
        others = [*out[: len(before)], *out[len(before) + len(joint) :]]
        source = dict(zip([*before, *after], others, strict=True))
        for k, t in zip(places, tensors, strict=True):
            source[k] = wrap_index(read_broadcast(t, inner), x.shape[k], str(t.dtype))
        return x(*[source[k] for k in range(len(x.shape))])

    return te.compute([*(x.shape[k] for k in before), *joint, *(x.shape[k] for k in after)], element)


def _index_select(e: Emitter, x: Expression, dim: int, indices: Expression) -> Expression:
    return index(e, x, [*[None] * axis(x, dim), indices])


def _gather(e: Emitter, x: Expression, dim: int, indices: Expression, sparse_grad: object = None) -> Expression:
    del sparse_grad
    d = axis(x, dim)

    def body(values: Expression, where: Expression) -> Expression:
        def element(*i: Expression) -> Expression:
            found = wrap_index(where(*i), values.shape[d], str(where.dtype))
            return values(*[found if k == d else p for k, p in enumerate(i)])

        return te.compute(where.shape, element)

    return e.compute(body, x, indices, name="gather")


def _slice_scatter(
    e: Emitter, x: Expression, source: Expression, dim: int = 0, start: Any = None, end: object = None, step: int = 1
) -> Expression:
    del end
    d = axis(x, dim)
    first: Any = start or 0
    if isinstance(first, int) and first < 0:
        first = shape(x)[d] + first

    def body(values: Expression, written: Expression) -> Expression:
        def element(*i: Expression) -> Expression:
            p = i[d] - first
            inside = [p >= 0, tirx.floordiv(p, step) < written.shape[d]]
            if step != 1:
                inside.append(tirx.floormod(p, step) == 0)
            read = written(*[tirx.floordiv(p, step) if k == d else q for k, q in enumerate(i)])
            return tirx.if_then_else(tirx.all(*inside), read, values(*i))

        return te.compute(values.shape, element)

    return e.compute(body, x, source, name="slice_scatter")


def _select_scatter(e: Emitter, x: Expression, source: Expression, dim: int, place: Any) -> Expression:
    d = axis(x, dim)
    return _slice_scatter(e, x, e(R.expand_dims(source, d)), d, place)


def full(e: Emitter, sizes: list[Any], value: Any, dtype: torch.dtype | None = None, **options: object) -> Expression:
    """One value everywhere."""
    del options
    kinds = {bool: "bool", int: "int64", float: "float32"}
    kind = DTYPES[dtype] if dtype is not None else kinds.get(type(value), "int64")

    def body(given: Expression) -> Expression:
        if isinstance(value, float) and math.isinf(value):
            filled = tirx.infinity(kind) if value > 0 else -tirx.infinity(kind)
        elif isinstance(value, bool | int | float):
            filled = tirx.const(value, kind)
        else:
            filled = given if kind == "int64" else tirx.Cast(kind, given)
        return te.compute([size(s) for s in sizes], lambda *_: filled)

    return e.compute(body, size(0) if isinstance(value, bool | int | float) else value, name="full")


def arange(
    e: Emitter, start: Any, end: Any, step: Any = 1, dtype: torch.dtype | None = None, **options: object
) -> Expression:
    """Static ones are constants."""
    del options
    if all(isinstance(v, int | float) for v in (start, end, step)):
        values = torch.arange(start, end, step, dtype=dtype)
        return e.constant(values.numpy(), DTYPES[values.dtype])
    kind = DTYPES[dtype] if dtype is not None else "int64"
    span = size(end) - size(start)
    count = Analyzer().simplify(
        span if step == 1 else tirx.floordiv(span + (step - (1 if step > 0 else -1)), size(step))
    )

    def body(first: Expression) -> Expression:
        return te.compute(
            (count,), lambda i: tirx.Cast(kind, first + i * step) if kind != "int64" else first + i * step
        )

    return e.compute(body, size(start), name="arange")


def _like(value: float) -> Rule:
    def rule(e: Emitter, x: Expression, dtype: torch.dtype | None = None, **options: object) -> Expression:
        return full(e, shape(x), value, dtype or _torch_dtype(x), **options)

    return rule


def _new(value: float) -> Rule:
    def rule(
        e: Emitter, x: Expression, sizes: list[Any], dtype: torch.dtype | None = None, **options: object
    ) -> Expression:
        return full(e, sizes, value, dtype or _torch_dtype(x), **options)

    return rule


def _filled(value: float) -> Rule:
    def rule(e: Emitter, sizes: list[Any], dtype: torch.dtype | None = None, **options: object) -> Expression:
        return full(e, sizes, value, dtype or torch.float32, **options)

    return rule


def _torch_dtype(x: Expression) -> torch.dtype:
    return next(t for t, name in DTYPES.items() if name == dtype(x))


def _full_like(
    e: Emitter, x: Expression, value: float, dtype: torch.dtype | None = None, **options: object
) -> Expression:
    return full(e, shape(x), value, dtype or _torch_dtype(x), **options)


def _new_full(
    e: Emitter, x: Expression, sizes: list[Any], value: float, dtype: torch.dtype | None = None, **options: object
) -> Expression:
    return full(e, sizes, value, dtype or _torch_dtype(x), **options)


def _eye(e: Emitter, count: Any, dtype: torch.dtype | None = None, **options: object) -> Expression:
    del options
    kind = DTYPES[dtype or torch.float32]
    return e.compute(lambda: te.compute((size(count), size(count)), lambda i, j: tirx.Cast(kind, i == j)), name="eye")


def _scalar_tensor(e: Emitter, value: Any, dtype: torch.dtype | None = None, **options: object) -> Expression:
    del options
    return e.scalar(value, DTYPES[dtype or torch.float32])


def _along(e: Emitter, vector: Expression, like: Expression, dim: int | None) -> Expression:
    if dim is None:
        return vector
    return e(R.reshape(vector, [-1 if i == dim else 1 for i in range(rank(like))]))


def quantize(
    e: Emitter,
    x: Expression,
    scale: Expression,
    zero_point: Expression,
    dim: int | None,
    low: int,
    high: int,
    kind: torch.dtype,
) -> Expression:
    """clamp(round(x / scale) + zero_point, low, high)."""
    rounded = e(R.round(e(R.divide(x, _along(e, scale, x, dim)))))
    shifted = e(R.add(rounded, e.cast(_along(e, zero_point, x, dim), "float32")))
    return e.cast(e(R.clip(shifted, low, high)), DTYPES[kind])


def dequantize(e: Emitter, codes: Expression, scale: Expression, zero_point: Expression, dim: int | None) -> Expression:
    """(codes - zero_point) * scale."""
    shifted = e(R.subtract(e.cast(codes, "float32"), e.cast(_along(e, zero_point, codes, dim), "float32")))
    return e(R.multiply(shifted, _along(e, scale, codes, dim)))


def _fake_quantize(
    e: Emitter, x: Expression, scale: Expression, zero_point: Expression, dim: int | None, low: int, high: int
) -> Expression:
    # codes may need more than 8 bits here, so they stay float
    zero = e.cast(_along(e, zero_point, x, dim), "float32")
    rounded = e(R.round(e(R.divide(x, _along(e, scale, x, dim)))))
    codes = e(R.clip(e(R.add(rounded, zero)), low, high))
    return e(R.multiply(e(R.subtract(codes, zero)), _along(e, scale, x, dim)))


def rescale(e: Emitter, x: Expression, scale: Expression, dim: int | None, fraction_bits: int) -> Expression:
    """The product in float64, which holds it, rounded to so many bits behind the point and held to its bounds."""
    finest = e.scalar(float(1 << fraction_bits), "float64")
    product = e(R.multiply(e.cast(x, "float64"), e.cast(_along(e, scale, x, dim), "float64")))
    rounded = e(R.divide(e(R.round(e(R.multiply(product, finest)))), finest))
    held = e.cast(e(R.clip(rounded, -LARGEST, LARGEST)), "float32")
    return e(R.add(held, e.scalar(0.0, "float32")))  # of two zeros the positive


def fake_quantize_per_token(e: Emitter, x: Expression, limit: int) -> Expression:
    """Rows rounded to codes with a scale each, as floats."""
    largest = e(R.max(e(R.abs(x)), axis=-1, keepdims=True))
    large = e(R.greater(largest, e.scalar(SMALLEST_ROW, "float32")))
    inverse = e(R.where(large, e(R.divide(e.scalar(limit, "float32"), largest)), e.scalar(0.0, "float32")))
    codes = e(R.round(e(R.multiply(x, inverse))))
    return e(R.multiply(codes, e(R.divide(largest, e.scalar(limit, "float32")))))


RULES: dict[str, Rule] = {
    "index.Tensor": index, "index_select": _index_select, "gather": _gather,
    "slice_scatter": _slice_scatter, "select_scatter": _select_scatter,
    "arange": lambda e, end, **options: arange(e, 0, end, 1, **options),
    "arange.start": lambda e, start, end, **options: arange(e, start, end, 1, **options), "arange.start_step": arange,
    "full": full, "zeros": _filled(0), "ones": _filled(1), "zeros_like": _like(0), "empty_like": _like(0),
    "ones_like": _like(1), "full_like": _full_like, "new_zeros": _new(0), "new_ones": _new(1), "new_full": _new_full,
    "eye": _eye, "scalar_tensor": _scalar_tensor,
    "mcc.quantize": quantize, "mcc.dequantize": dequantize, "mcc.fake_quantize": _fake_quantize,
    "mcc.fake_quantize_per_token": fake_quantize_per_token, "mcc.rescale": rescale,
}  # fmt: skip
