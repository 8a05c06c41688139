"""Layers with weights, contractions, norms, reductions and ops along one dim, in relax."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from tvm import relax, te, tirx, topi

from mcc.attention import LARGEST_CODE
from mcc.backends.relax.emitter import (
    DTYPES,
    Emitter,
    Expression,
    axis,
    dtype,
    is_float,
    rank,
    shape,
    static,
    tuple_of,
)  # fmt: skip
from mcc.backends.relax.index import fake_quantize_per_token
from mcc.errors import BackendError

R, NN = relax.op, relax.op.nn
Rule = Callable[..., Any]


def linear(e: Emitter, x: Expression, weight: Expression, bias: Expression | None = None) -> Expression:
    """X W^T + b."""
    y = e(R.matmul(x, e(R.permute_dims(weight, [1, 0]))))
    return y if bias is None else e(R.add(y, bias))


def addmm(e: Emitter, c: Expression, a: Expression, b: Expression, beta: float = 1, alpha: float = 1) -> Expression:
    """Beta * c + alpha * a b."""
    y = e(R.matmul(a, b))
    if alpha != 1:
        y = e(R.multiply(y, e.constant(float(alpha), dtype(y))))
    if beta != 1:
        c = e(R.multiply(c, e.constant(float(beta), dtype(y))))
    return e(R.add(y, c))


def paddings(padding: Any, kernel: list[int], dilation: list[int]) -> list[int]:
    """Padding before each dim, then after each; "same" puts the odd one after."""
    if isinstance(padding, str):
        totals = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        return [t // 2 for t in totals] + [t - t // 2 for t in totals]
    each = tuple_of(padding, len(kernel))
    return each + each


def _channel_bias(e: Emitter, y: Expression, bias: Expression | None) -> Expression:
    if bias is None:
        return y
    return e(R.add(y, e(R.reshape(bias, [1, shape(bias)[0], *[1] * (rank(y) - 2)]))))


def _convolution(dims: int, function: Rule) -> Rule:
    def rule(
        e: Emitter, x: Expression, weight: Expression, bias: Expression | None = None, stride: Any = 1,
        padding: Any = 0, dilation: Any = 1, groups: int = 1,
    ) -> Expression:  # fmt: skip
        dilations = tuple_of(dilation, dims)
        kernel = [int(s) for s in shape(weight)[2:]]
        unbatched = rank(x) == dims + 1
        x = e(R.expand_dims(x, 0)) if unbatched else x
        y = e(
            function(
                x, weight, strides=tuple_of(stride, dims), padding=paddings(padding, kernel, dilations),
                dilation=dilations, groups=groups,
            )
        )  # fmt: skip
        y = _channel_bias(e, y, bias)
        return e(R.squeeze(y, [0])) if unbatched else y

    return rule


def conv2d_nhwc(
    e: Emitter, x: Expression, weight: Expression, bias: Expression | None, stride: Any, padding: Any, dilation: Any,
    groups: int,
) -> Expression:  # fmt: skip
    """As NCHW between two transposes: for what no own kernel takes."""
    first = e(R.permute_dims(x, [0, 3, 1, 2]))
    options = {"strides": list(stride), "padding": list(padding), "dilation": list(dilation), "groups": groups}
    y = _channel_bias(e, e(NN.conv2d(first, weight, **options)), bias)
    return e(R.permute_dims(y, [0, 2, 3, 1]))


def conv3d(
    e: Emitter, x: Expression, weight: Expression, bias: Expression | None = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Expression:  # fmt: skip
    """Grouped ones by hand: relax's values for them are unchecked."""
    if groups == 1:
        return _convolution(3, NN.conv3d)(e, x, weight, bias, stride, padding, dilation)
    s, d = tuple_of(stride, 3), tuple_of(dilation, 3)
    before = paddings(padding, [int(v) for v in shape(weight)[2:]], d)

    def body(source: Expression, w: Expression) -> Expression:
        padded = topi.nn.pad(source, [0, 0, *before[:3]], [0, 0, *before[3:]]) if any(before) else source
        extents = [(padded.shape[2 + i] - d[i] * (w.shape[2 + i] - 1) - 1) // s[i] + 1 for i in range(3)]
        inner, outer = w.shape[1], w.shape[0] // groups
        c = te.reduce_axis((0, inner))
        k = [te.reduce_axis((0, w.shape[2 + i])) for i in range(3)]

        def element(n: Expression, o: Expression, *place: Expression) -> Expression:
            at = [p * s[i] + k[i] * d[i] for i, p in enumerate(place)]
            return te.sum(padded(n, o // outer * inner + c, *at) * w(o, c, *k), axis=[c, *k])

        return te.compute([source.shape[0], w.shape[0], *extents], element)

    return _channel_bias(e, e.compute(body, x, weight, name="grouped_conv3d"), bias)


def conv_transpose2d(
    e: Emitter, x: Expression, weight: Expression, bias: Expression | None = None, stride: Any = 1,
    padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Expression:  # fmt: skip
    """Weight [in, out / groups, kh, kw]."""
    p = tuple_of(padding, 2)
    y = e(
        NN.conv2d_transpose(
            x, weight, strides=tuple_of(stride, 2), padding=p + p, output_padding=tuple_of(output_padding, 2),
            dilation=tuple_of(dilation, 2), groups=groups,
        )
    )  # fmt: skip
    return _channel_bias(e, y, bias)


def _known(x: Expression, dim: int) -> int:
    size = static(shape(x)[dim])
    if size is None:
        raise BackendError(
            f"attention with dim {dim} of unknown size", remedy="make only the batch and the sequence length dynamic"
        )
    return int(size)


def attention(
    e: Emitter, query: Expression, key: Expression, value: Expression, mask: Expression | None = None,
    dropout: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    limit: int = 0,
) -> Expression:  # fmt: skip
    """softmax(q k^T * scale + mask) v; dropout is a training matter. With a `limit` probabilities are rounded."""
    del dropout
    if enable_gqa:
        repeats = _known(query, -3) // _known(key, -3)
        key, value = (e(R.repeat(t, repeats, axis=rank(t) - 3)) for t in (key, value))
    factor = scale if scale is not None else 1 / math.sqrt(_known(query, -1))
    kind = dtype(query)
    order = [*range(rank(key) - 2), rank(key) - 1, rank(key) - 2]
    scores = e(R.matmul(e(R.multiply(query, e.constant(float(factor), kind))), e(R.permute_dims(key, order))))
    if is_causal:
        scores = e.compute(_causal, scores, name="causal")
    elif mask is not None and dtype(mask) == "bool":
        lowest = float(torch.finfo(getattr(torch, kind)).min)
        scores = e(R.where(mask, scores, e.constant(lowest, kind)))
    elif mask is not None:
        scores = e(R.add(scores, e.cast(mask, kind)))
    probabilities = softmax(e, scores, -1)
    if mask is not None and dtype(mask) == "bool" and not is_causal:
        # a query that sees no key gives zeros
        probabilities = e(R.where(mask, probabilities, e.constant(0.0, kind)))
    return e(R.matmul(fake_quantize_per_token(e, probabilities, limit) if limit else probabilities, value))


def _causal(scores: Expression) -> Expression:
    return te.compute(
        scores.shape, lambda *i: tirx.if_then_else(i[-1] <= i[-2], scores(*i), tirx.min_value(scores.dtype))
    )


def softmax(e: Emitter, x: Expression, dim: int, kind: torch.dtype | None = None) -> Expression:
    """exp(x - max) / sum, with TVM's polynomial exp."""
    x = e.floating(x) if kind is None else e.cast(x, DTYPES[kind])
    dim = axis(x, dim)
    shifted = e(R.subtract(x, e(R.max(x, [dim], keepdims=True))))
    exp = e.compute(topi.fast_exp, shifted, name="exp")
    return e(R.divide(exp, e(R.sum(exp, [dim], keepdims=True))))


def _log_softmax(e: Emitter, x: Expression, dim: int, kind: torch.dtype | None = None) -> Expression:
    return e(NN.log_softmax(x if kind is None else e.cast(x, DTYPES[kind]), axis(x, dim)))


def _normalize(e: Emitter, x: Expression, dims: list[int], eps: float) -> Expression:
    """(x - mean) / sqrt(var + eps), in two passes."""
    centered = e(R.subtract(x, e(R.mean(x, dims, keepdims=True))))
    variance = e(R.mean(e(R.multiply(centered, centered)), dims, keepdims=True))
    return e(R.multiply(centered, e(R.rsqrt(e(R.add(variance, e.constant(eps, dtype(x))))))))


def layer_norm(
    e: Emitter, x: Expression, normalized: list[int], weight: Expression | None = None, bias: Expression | None = None,
    eps: float = 1e-5, *rest: object,
) -> Expression:  # fmt: skip
    """Over the last dims."""
    del rest
    sizes = [int(s) for s in normalized]
    weight = e.constant(np.ones(sizes, dtype(x)), dtype(x)) if weight is None else weight
    bias = e.constant(np.zeros(sizes, dtype(x)), dtype(x)) if bias is None else bias
    return e(NN.layer_norm(x, weight, bias, axes=list(range(-len(sizes), 0)), epsilon=eps))


def rms_norm(
    e: Emitter, x: Expression, normalized: list[int], weight: Expression | None = None, eps: float | None = None
) -> Expression:
    """X / sqrt(mean(x^2) + eps) * weight."""
    kind = dtype(x)
    eps = torch.finfo(getattr(torch, kind)).eps if eps is None else eps
    mean = e(R.mean(e(R.multiply(x, x)), list(range(-len(normalized), 0)), keepdims=True))
    y = e(R.multiply(x, e(R.rsqrt(e(R.add(mean, e.constant(eps, kind)))))))
    return y if weight is None else e(R.multiply(y, weight))


def _per_channel(e: Emitter, vector: Expression, like: Expression) -> Expression:
    return e(R.reshape(vector, [1, shape(vector)[0], *[1] * (rank(like) - 2)]))


def batch_norm(
    e: Emitter, x: Expression, weight: Expression | None, bias: Expression | None, mean: Expression,
    variance: Expression,
    training: object, momentum: object, eps: float, cudnn: object = None,
) -> Expression:  # fmt: skip
    """Evaluation: one multiply and one add a channel, folded at build time."""
    del training, momentum, cudnn
    if mean is None:
        y = _normalize(e, x, [i for i in range(rank(x)) if i != 1], eps)
        y = y if weight is None else e(R.multiply(y, _per_channel(e, weight, x)))
        return y if bias is None else e(R.add(y, _per_channel(e, bias, x)))
    gain = e(R.rsqrt(e(R.add(variance, e.constant(eps, dtype(x))))))
    gain = gain if weight is None else e(R.multiply(weight, gain))
    shift = e(R.negative(e(R.multiply(mean, gain))))
    shift = shift if bias is None else e(R.add(shift, bias))
    return e(R.add(e(R.multiply(x, _per_channel(e, gain, x))), _per_channel(e, shift, x)))


def group_norm(
    e: Emitter, x: Expression, groups: int, weight: Expression | None = None, bias: Expression | None = None,
    eps: float = 1e-5, cudnn: object = None,
) -> Expression:  # fmt: skip
    """Channels in groups, each normalized with its space."""
    del cudnn
    dims = shape(x)
    y = e(R.reshape(x, [dims[0], groups, dims[1] // groups, *dims[2:]]))
    y = e(R.reshape(_normalize(e, y, list(range(-(len(dims) - 1), 0)), eps), dims))
    y = y if weight is None else e(R.multiply(y, _per_channel(e, weight, x)))
    return y if bias is None else e(R.add(y, _per_channel(e, bias, x)))


def group_norm_nhwc(
    e: Emitter, x: Expression, groups: int, weight: Expression | None, bias: Expression | None, eps: float
) -> Expression:
    """The same with channels last."""
    dims = shape(x)
    y = e(R.reshape(x, [*dims[:-1], groups, dims[-1] // groups]))
    y = e(R.reshape(_normalize(e, y, [1, 2, 4], eps), dims))
    y = y if weight is None else e(R.multiply(y, weight))
    return y if bias is None else e(R.add(y, bias))


def _instance_norm(
    e: Emitter, x: Expression, weight: Expression | None = None, bias: Expression | None = None, mean: Any = None,
    variance: Any = None, use_input_stats: bool = True, momentum: object = None, eps: float = 1e-5,
    cudnn: object = None,
) -> Expression:  # fmt: skip
    del momentum, cudnn
    if not use_input_stats:
        return batch_norm(e, x, weight, bias, mean, variance, training=False, momentum=0.0, eps=eps)
    return group_norm(e, x, int(shape(x)[1]), weight, bias, eps)


def vector_norm(
    e: Emitter, x: Expression, order: float = 2, dim: Any = None, keepdim: bool = False, dtype_: object = None
) -> Expression:
    """The norms of torch.linalg.vector_norm."""
    del dtype_
    dims = _dims(dim)
    if order == 2:
        return e(R.sqrt(e(R.sum(e(R.multiply(x, x)), dims, keepdim))))
    magnitude = e(R.abs(x))
    if order == 1:
        return e(R.sum(magnitude, dims, keepdim))
    if math.isinf(order):
        return e((R.max if order > 0 else R.min)(magnitude, dims, keepdim))
    total = e(R.sum(e(R.power(magnitude, e.constant(float(order), dtype(x)))), dims, keepdim))
    return e(R.power(total, e.constant(1.0 / order, dtype(x))))


def _weight_norm(e: Emitter, v: Expression, g: Expression, dim: int = 0) -> Expression:
    others = [i for i in range(rank(v)) if i != axis(v, dim)]
    return e(R.multiply(v, e(R.divide(g, vector_norm(e, v, 2, others, True)))))


def _dims(dim: Any) -> list[int] | None:
    if dim is None or (isinstance(dim, list | tuple) and not len(dim)):
        return None
    return [dim] if isinstance(dim, int) else list(dim)


def _summable(e: Emitter, x: Expression, kind: torch.dtype | None) -> Expression:
    wanted = DTYPES[kind] if kind is not None else dtype(x) if is_float(dtype(x)) else "int64"
    return e.cast(x, wanted)


def mean(
    e: Emitter, x: Expression, dim: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None
) -> Expression:
    """Of the dims, or of all."""
    return e(R.mean(x if dtype is None else e.cast(x, DTYPES[dtype]), _dims(dim), keepdim))


def total(
    e: Emitter, x: Expression, dim: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None
) -> Expression:
    """The sum; integers and booleans sum as int64."""
    return e(R.sum(_summable(e, x, dtype), _dims(dim), keepdim))


def _extreme(function: Rule) -> Rule:
    return lambda e, x, dim=(), keepdim=False: e(function(x, _dims(dim), keepdim))


def _max_with_index(e: Emitter, x: Expression, dim: int, keepdim: bool = False) -> list[Expression]:
    """The largest values and their places; where one is not a number, that is the largest."""
    places = argmax(e, x, dim, True)
    found = [e(R.gather_elements(x, places, axis(x, dim))), places]
    return found if keepdim else [e(R.squeeze(value, [axis(x, dim)])) for value in found]


def argmax(e: Emitter, x: Expression, dim: int | None = None, keepdim: bool = False) -> Expression:
    """The place of the largest value, the first of equal ones; what is not a number is larger than any."""
    if dim is None:
        flat = argmax(e, e(R.reshape(x, [-1])), 0)
        return e(R.reshape(flat, [1] * rank(x))) if keepdim else flat
    if dtype(x) == "bool":
        x = e.cast(x, "int8")
    d, kind = axis(x, dim), dtype(x)

    def larger(a: tuple[Expression, Expression], b: tuple[Expression, Expression]) -> tuple[Expression, Expression]:
        (i, v), (j, w) = a, b
        wins = tirx.any(v > w, tirx.all(v == w, i < j))
        if is_float(kind):
            earlier = tirx.all(tirx.isnan(v), tirx.any(tirx.Not(tirx.isnan(w)), i < j))
            wins = tirx.any(earlier, tirx.all(tirx.Not(tirx.isnan(w)), wins))
        return tirx.Select(wins, i, j), tirx.Select(wins, v, w)

    least = -tirx.infinity(kind) if is_float(kind) else tirx.min_value(kind)
    reducer = te.comm_reducer(larger, lambda place, _: (tirx.max_value(place), least), name="argmax")

    def body(values: Expression) -> Expression:
        along = te.reduce_axis((0, values.shape[d]), name="k")
        outer = [s for i, s in enumerate(values.shape) if i != d]

        def element(*at: Expression) -> Expression:
            where = [*at[:d], along, *at[d:]]
            return reducer((tirx.Cast("int64", along), values(*where)), axis=along)

        places, _ = te.compute(outer, element, name="places")
        return places

    found = e.compute(body, x, name="argmax")
    return e(R.expand_dims(found, d)) if keepdim else found


def variance(e: Emitter, x: Expression, dim: Any = None, *, correction: float = 1, keepdim: bool = False) -> Expression:
    """In two passes."""
    dims = _dims(dim)
    centered = e(R.subtract(x, e(R.mean(x, dims, True))))
    count: Any = 1
    for a in range(rank(x)) if dims is None else dims:
        count = count * shape(x)[a]
    squares = e(R.sum(e(R.multiply(centered, centered)), dims, keepdim))
    return e(R.divide(squares, e.scalar(count - int(correction), dtype(x))))


def _cumsum(e: Emitter, x: Expression, dim: int, dtype: torch.dtype | None = None) -> Expression:
    return e(R.cumsum(_summable(e, x, dtype), axis(x, dim)))


def _cumprod(e: Emitter, x: Expression, dim: int, dtype: torch.dtype | None = None) -> Expression:
    return e(R.cumprod(_summable(e, x, dtype), axis(x, dim)))


def _product(
    e: Emitter, x: Expression, dim: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None
) -> Expression:
    return e(R.prod(_summable(e, x, dtype), _dims(dim), keepdim))


def _topk(
    e: Emitter, x: Expression, k: int, dim: int = -1, largest: bool = True, ordered: object = None
) -> list[Expression]:
    del ordered
    both = e(R.topk(x, k, axis(x, dim), "both", largest, "int64"))
    return [e.item(both, 0), e.item(both, 1)]


def _sort(e: Emitter, x: Expression, dim: int = -1, descending: bool = False) -> list[Expression]:
    order = e(R.argsort(x, axis(x, dim), descending, "int64"))
    return [e(R.gather_elements(x, order, axis(x, dim))), order]


RULES: dict[str, Rule] = {
    "linear": linear, "addmm": addmm, "baddbmm": addmm,
    "matmul": lambda e, a, b: e(R.matmul(a, b)), "bmm": lambda e, a, b: e(R.matmul(a, b)),
    "conv1d": _convolution(1, NN.conv1d), "conv2d": _convolution(2, NN.conv2d),
    "conv3d": conv3d, "conv_transpose2d.input": conv_transpose2d,
    "embedding": lambda e, weight, index, *rest: e(R.take(weight, index, axis=0, mode="clip")),
    "scaled_dot_product_attention": attention, "mcc.rounded_attention": partial(attention, limit=LARGEST_CODE),
    "mcc.conv2d_nhwc": conv2d_nhwc,
    "batch_norm": batch_norm, "layer_norm": layer_norm, "group_norm": group_norm, "instance_norm": _instance_norm,
    "mcc.group_norm_nhwc": group_norm_nhwc,
    "rms_norm": rms_norm, "linalg_vector_norm": vector_norm, "_weight_norm": _weight_norm,
    "mean.dim": mean, "mean": lambda e, x, dtype=None: mean(e, x, None, False, dtype),
    "sum.dim_IntList": total, "sum": lambda e, x, dtype=None: total(e, x, None, False, dtype),
    "amax": _extreme(R.max), "amin": _extreme(R.min), "max.dim": _max_with_index,
    "argmax": argmax, "var.correction": variance,
    "softmax.int": softmax, "log_softmax.int": _log_softmax, "cumsum": _cumsum, "cumprod": _cumprod,
    "prod.dim_int": _product, "prod": lambda e, x, dtype=None: _product(e, x, None, False, dtype),
    "topk": _topk, "sort": _sort,
}  # fmt: skip
