"""Pooling and resampling in relax."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import relax, te, tirx
from tvm.sym.analyzer import Analyzer

from mcc.backends.relax.emitter import Emitter, Expression, dtype, rank, shape, size, static, tuple_of

R, NN = relax.op, relax.op.nn
LARGEST_FACTOR = 16  # that is looked for
Rule = Callable[..., Any]


def _batched(e: Emitter, x: Expression, dims: int, body: Callable[[Expression], Expression]) -> Expression:
    if rank(x) != dims + 1:
        return body(x)
    return e(R.squeeze(body(e(R.expand_dims(x, 0))), [0]))


def _max_pool(dims: int, function: Rule) -> Rule:
    def rule(
        e: Emitter, x: Expression, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil: bool = False,
    ) -> Expression:  # fmt: skip
        k, p = tuple_of(kernel, dims), tuple_of(padding, dims)
        s = tuple_of(stride, dims) if stride not in (None, [], ()) else k
        d = tuple_of(dilation, dims)
        return _batched(e, x, dims, lambda y: e(function(y, k, s, p + p, d, ceil)))

    return rule


def _avg_pool(dims: int, function: Rule) -> Rule:
    def rule(
        e: Emitter, x: Expression, kernel: Any, stride: Any = None, padding: Any = 0, ceil: bool = False,
        count_include_pad: bool = True, divisor: int | None = None,
    ) -> Expression:  # fmt: skip
        k, p = tuple_of(kernel, dims), tuple_of(padding, dims)
        s = tuple_of(stride, dims) if stride not in (None, [], ()) else k
        counted = count_include_pad or divisor is not None

        def body(y: Expression) -> Expression:
            pooled = e(function(y, k, s, p + p, [1] * dims, ceil, count_include_pad=counted))
            if divisor is None:
                return pooled
            return e(R.multiply(pooled, e.constant(math.prod(k) / divisor, dtype(y))))

        return _batched(e, x, dims, body)

    return rule


def _adaptive_avg_pool(dims: int, average: Rule, function: Rule) -> Rule:
    def rule(e: Emitter, x: Expression, wanted: Any) -> Expression:
        space = shape(x)[-dims:]
        sizes = [s if w is None else w for s, w in zip(space, tuple_of(wanted, dims), strict=True)]
        if all(s == 1 for s in sizes):
            return e(R.mean(x, list(range(rank(x) - dims, rank(x))), keepdims=True))
        known = [static(s) for s in space]
        if all(n is not None and static(w) and n % int(w) == 0 for n, w in zip(known, sizes, strict=True)):
            kernel = [int(n or 0) // int(w) for n, w in zip(known, sizes, strict=True)]
            return average(e, x, kernel, kernel)
        return _batched(e, x, dims, lambda y: e(function(y, sizes)))

    return rule


def _resized(x: Expression, sizes: Any, factors: Any) -> list[Any]:
    if sizes is not None:
        return list(sizes)
    result = []
    for extent, factor in zip(shape(x)[2:], factors, strict=True):
        known = static(extent)
        result.append(extent * int(factor) if known is None else math.floor(known * factor))
    return result


def _nearest(o: Expression, extent: Expression, wanted: Any, factor: float | None) -> Expression:
    """Source index floor(o / factor), in integers where the factor is whole."""
    if factor is not None and float(factor).is_integer():
        return tirx.floordiv(o, int(factor))
    step = tirx.const(1 / factor, "float32") if factor is not None else _as_float(extent) / _as_float(wanted)
    return tirx.min(tirx.Cast("int64", tirx.floor(tirx.Cast("float32", o) * step)), size(extent) - 1)


def _as_float(value: Any) -> Expression:
    return tirx.Cast("float32", size(value))


def _place(o: Expression, extent: Expression, wanted: Any, factor: float | None, align: bool) -> Expression:
    """Where an output index lies in the source: half-pixel centers or aligned corners."""
    if align:
        step = _as_float(size(extent) - 1) / tirx.max(_as_float(size(wanted) - 1), tirx.const(1, "float32"))
        return _as_float(o) * step
    step = tirx.const(1 / factor, "float32") if factor is not None else _as_float(extent) / _as_float(wanted)
    return (_as_float(o) + 0.5) * step - 0.5


def _between(
    o: Expression, extent: Expression, wanted: Any, factor: float | None, align: bool
) -> tuple[Expression, Expression, Expression]:
    """Source indices below and above, and how far between."""
    place = tirx.max(_place(o, extent, wanted, factor, align), tirx.const(0, "float32"))
    low = tirx.min(tirx.Cast("int64", place), size(extent) - 1)
    return low, tirx.min(low + 1, size(extent) - 1), place - _as_float(low)


def _resample(
    e: Emitter, x: Expression, sizes: list[Any], factors: Any, align: bool | None, channels_last: bool
) -> Expression:
    """Nearest where `align` is None, else bilinear."""
    height, width = shape(x)[1:3] if channels_last else shape(x)[2:]
    each = factors or [None, None]

    def body(values: Expression) -> Expression:
        def at(n: Expression, c: Expression, i: Expression, j: Expression) -> Expression:
            return values(n, i, j, c) if channels_last else values(n, c, i, j)

        def element(n: Expression, c: Expression, i: Expression, j: Expression) -> Expression:
            if align is None:
                return at(n, c, _nearest(i, height, sizes[0], each[0]), _nearest(j, width, sizes[1], each[1]))
            top, bottom, down = _between(i, height, sizes[0], each[0], align)
            left, right, across = _between(j, width, sizes[1], each[1], align)
            upper = at(n, c, top, left) * (1 - across) + at(n, c, top, right) * across
            lower = at(n, c, bottom, left) * (1 - across) + at(n, c, bottom, right) * across
            return upper * (1 - down) + lower * down

        if channels_last:
            return te.compute((values.shape[0], *sizes, values.shape[3]), lambda n, i, j, c: element(n, c, i, j))
        return te.compute((values.shape[0], values.shape[1], *sizes), element)

    return e.compute(body, x, name="upsample_nearest" if align is None else "upsample_bilinear")


def upsample_nearest(e: Emitter, x: Expression, sizes: Any, factors: Any) -> Expression:
    """Nearest neighbour."""
    return _resample(e, x, _resized(x, sizes, factors), factors, None, False)


def upsample_bilinear(e: Emitter, x: Expression, sizes: Any, align: bool, factors: Any) -> Expression:
    """Bilinear, half-pixel centers or aligned corners."""
    return _resample(e, x, _resized(x, sizes, factors), factors, align, False)


def upsample_nhwc(e: Emitter, x: Expression, sizes: Any, mode: str, align: bool | None) -> Expression:
    """Either, channels last."""
    factors = [_whole_factor(old, new) for new, old in zip(sizes, shape(x)[1:3], strict=True)]
    whole = factors if None not in factors else None
    return _resample(e, x, list(sizes), whole, None if mode == "nearest" else bool(align), True)


def _cubic(t: Expression) -> list[Expression]:
    """Keys' weights of the four neighbours of a place `t` beyond the second of them, with a = -3/4 as torch has it."""
    a, one = -0.75, tirx.const(1, "float32")

    def near(x: Expression) -> Expression:  # up to 1 away
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: Expression) -> Expression:  # from 1 to 2 away
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    return [far(t + one), near(t), near(one - t), far(one - t + one)]


def upsample_bicubic(e: Emitter, x: Expression, sizes: Any, align: bool, factors: Any) -> Expression:
    """Bicubic, half-pixel centers or aligned corners; beyond the image its border goes on."""
    wanted, each = _resized(x, sizes, factors), factors or [None, None]

    def along(o: Expression, axis: int) -> tuple[list[Expression], list[Expression]]:
        old = shape(x)[2 + axis]
        place = _place(o, old, wanted[axis], each[axis], align)
        below = tirx.floor(place)
        first = tirx.Cast("int64", below) - 1
        zero = tirx.const(0, "int64")
        return [tirx.max(zero, tirx.min(first + i, size(old) - 1)) for i in range(4)], _cubic(place - below)

    def body(values: Expression) -> Expression:
        def element(n: Expression, c: Expression, i: Expression, j: Expression) -> Expression:
            (rows, down), (columns, across) = along(i, 0), along(j, 1)
            lines = [sum(values(n, c, row, at) * w for at, w in zip(columns, across, strict=True)) for row in rows]
            return sum(line * w for line, w in zip(lines, down, strict=True))

        return te.compute((values.shape[0], values.shape[1], *wanted), element)

    return e.compute(body, x, name="upsample_bicubic")


def _whole_factor(old: Any, new: Any) -> int | None:
    """What a size is multiplied by, where that is a whole number, of sizes that vary a small one."""
    first, last = static(old), static(new)
    if first is not None and last is not None:
        return last // first if last % first == 0 else None
    analyzer = Analyzer()
    return next((n for n in range(1, LARGEST_FACTOR + 1) if analyzer.can_prove_equal(new, size(old) * n)), None)


def max_pool2d_nhwc(e: Emitter, x: Expression, kernel: Any, stride: Any, padding: Any) -> Expression:
    """Channels last."""
    return e(NN.max_pool2d(x, kernel, stride, list(padding), layout="NHWC"))


def avg_pool2d_nhwc(
    e: Emitter, x: Expression, kernel: Any, stride: Any, padding: Any, count_include_pad: bool
) -> Expression:
    """Channels last."""
    both = [*padding, *padding]
    return e(NN.avg_pool2d(x, kernel, stride, both, layout="NHWC", count_include_pad=count_include_pad))


def pixel_shuffle(e: Emitter, x: Expression, factor: int) -> Expression:
    """[n, c r r, h, w] -> [n, c, h r, w r]; relax's own op cannot be legalized."""
    n, c, h, w = shape(x)
    c = c // (factor * factor)
    split = e(R.permute_dims(e(R.reshape(x, [n, c, factor, factor, h, w])), [0, 1, 4, 2, 5, 3]))
    return e(R.reshape(split, [n, c, h * factor, w * factor]))


_average = {1: _avg_pool(1, NN.avg_pool1d), 2: _avg_pool(2, NN.avg_pool2d), 3: _avg_pool(3, NN.avg_pool3d)}

RULES: dict[str, Rule] = {
    "max_pool1d": _max_pool(1, NN.max_pool1d), "max_pool2d": _max_pool(2, NN.max_pool2d),
    "max_pool3d": _max_pool(3, NN.max_pool3d),
    "avg_pool1d": _average[1], "avg_pool2d": _average[2], "avg_pool3d": _average[3],
    "adaptive_avg_pool1d": _adaptive_avg_pool(1, _average[1], NN.adaptive_avg_pool1d),
    "adaptive_avg_pool2d": _adaptive_avg_pool(2, _average[2], NN.adaptive_avg_pool2d),
    "adaptive_avg_pool3d": _adaptive_avg_pool(3, _average[3], NN.adaptive_avg_pool3d),
    "upsample_bicubic2d.vec": upsample_bicubic,
    "upsample_nearest2d.vec": upsample_nearest, "upsample_bilinear2d.vec": upsample_bilinear,
    "pixel_shuffle": pixel_shuffle, "mcc.max_pool2d_nhwc": max_pool2d_nhwc, "mcc.avg_pool2d_nhwc": avg_pool2d_nhwc,
    "mcc.upsample_nhwc": upsample_nhwc,
}  # fmt: skip
