"""Pointwise ops and casts in relax."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tvm import relax, te, tirx, topi

from mcc.backends.relax.emitter import (
    DTYPES,
    Emitter,
    Expression,
    broadcast,
    dtype,
    is_float,
    rank,
    read_broadcast,
    shape,
)  # fmt: skip

if TYPE_CHECKING:
    import torch

R, NN = relax.op, relax.op.nn
Rule = Callable[..., Any]


def _unary(function: Rule) -> Rule:
    return lambda e, x: e(function(x))


def _float_unary(function: Rule) -> Rule:
    return lambda e, x: e(function(e.floating(x)))


def _fast(function: Rule, name: str) -> Rule:
    """A polynomial by TVM in place of a scalar call of libm; its error is below 4e-7 relative."""

    def rule(e: Emitter, x: Expression) -> Expression:
        return e.compute(function, e.floating(x), name=name)

    return rule


def _binary(function: Rule) -> Rule:
    def rule(e: Emitter, a: Any, b: Any, alpha: float = 1) -> Expression:
        a, b = e.pair(a, b)
        if alpha != 1:
            b = e(R.multiply(b, e.constant(alpha, dtype(b))))
        return e(function(a, b))

    return rule


def _comparison(function: Rule) -> Rule:
    def rule(e: Emitter, a: Any, b: Any) -> Expression:
        a, b = e.pair(a, b)
        if dtype(a) == "bool":  # which LLVM would compare as floats
            a, b = e.cast(a, "int8"), e.cast(b, "int8")
        return e(function(a, b))

    return rule


def _scalar_function(name: str) -> Rule:
    """A function of the C library, one element at a time: rare ones, of which TVM's own forms are less exact."""

    def rule(e: Emitter, *given: Any) -> Expression:
        operands = given if len(given) == 1 else e.pair(*given)
        kind = "float64" if dtype(operands[0]) == "float64" else "float32"
        called = name if kind == "float64" else f"{name}f"

        def body(*tensors: Expression) -> Expression:
            return te.compute(
                broadcast(*(list(t.shape) for t in tensors)),
                lambda *i: tirx.call_pure_extern(kind, called, *(read_broadcast(t, i) for t in tensors)),
            )

        found = e.compute(body, *(e.cast(x, kind) for x in operands), name=name)
        return e.cast(found, dtype(operands[0])) if is_float(dtype(operands[0])) else found

    return rule


def _not_equal(e: Emitter, a: Any, b: Any) -> Expression:
    """What is not a number equals nothing, itself included."""
    a, b = e.pair(a, b)
    return e.not_equal(a, b)


def _logical(boolean: Rule, bitwise: Rule) -> Rule:
    def rule(e: Emitter, a: Any, b: Any) -> Expression:
        a, b = e.pair(a, b)
        return e(boolean(a, b) if dtype(a) == "bool" else bitwise(a, b))

    return rule


def _truth(function: Rule) -> Rule:
    return lambda e, a, b: e(function(e.cast(a, "bool"), e.cast(b, "bool")))


def sigmoid(e: Emitter, x: Expression) -> Expression:
    """1 / (1 + exp(-x))."""
    x = e.floating(x)
    exp = e.compute(topi.fast_exp, e(R.negative(x)), name="exp")
    return e(R.divide(e.constant(1.0, dtype(x)), e(R.add(exp, e.constant(1.0, dtype(x))))))


def silu(e: Emitter, x: Expression) -> Expression:
    """X * sigmoid(x)."""
    return e(R.multiply(x, sigmoid(e, x)))


def gelu(e: Emitter, x: Expression, approximate: str = "none") -> Expression:
    """X times the normal distribution's cumulative function, or its tanh form."""
    kind = dtype(x)
    if approximate == "tanh":
        cube = e(R.multiply(e(R.multiply(x, x)), x))
        inner = e(R.add(x, e(R.multiply(cube, e.constant(0.044715, kind)))))
        bent = e.compute(topi.fast_tanh, e(R.multiply(inner, e.constant(math.sqrt(2 / math.pi), kind))), name="tanh")
    else:
        bent = e.compute(topi.fast_erf, e(R.multiply(x, e.constant(math.sqrt(0.5), kind))), name="erf")
    half = e(R.multiply(x, e.constant(0.5, kind)))
    return e(R.multiply(half, e(R.add(bent, e.constant(1.0, kind)))))


def hardsigmoid(e: Emitter, x: Expression) -> Expression:
    """min(max(x + 3, 0), 6) / 6."""
    shifted = clamp(e, e(R.add(x, e.constant(3.0, dtype(x)))), 0.0, 6.0)
    return e(R.divide(shifted, e.constant(6.0, dtype(x))))


def clamp(e: Emitter, x: Expression, low: float | None = None, high: float | None = None) -> Expression:
    """Bounds as scalars."""
    for bound in (low, high):
        if bound is not None:
            x = e.cast(x, e.promote_scalar(bound, dtype(x)))
    if low is not None:
        x = e(R.maximum(x, e.constant(low, dtype(x))))
    return x if high is None else e(R.minimum(x, e.constant(high, dtype(x))))


def elu(e: Emitter, x: Expression, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Expression:
    """Scale * (x where x > 0, else alpha * (exp(input_scale * x) - 1))."""
    kind = dtype(x)
    scaled = x if input_scale == 1 else e(R.multiply(x, e.constant(float(input_scale), kind)))
    exp = e(R.exp(e(R.minimum(scaled, e.constant(0.0, kind)))))
    below = e(R.multiply(e.constant(float(alpha), kind), e(R.subtract(exp, e.constant(1.0, kind)))))
    result = e(R.where(e(R.greater(x, e.constant(0.0, kind))), x, below))
    return result if scale == 1 else e(R.multiply(result, e.constant(float(scale), kind)))


def power(e: Emitter, x: Expression, exponent: float) -> Expression:
    """X to a scalar; small whole exponents multiply, since relax's power refuses integers."""
    kind = e.promote_scalar(exponent, dtype(x))
    x = e.cast(x, kind)
    if exponent == 0:
        return e(R.ones_like(x))
    if exponent in (1, 2, 3, 4) or not is_float(kind):
        result = x
        for _ in range(int(exponent) - 1):
            result = e(R.multiply(result, x))
        return result
    roots = {0.5: R.sqrt, -0.5: R.rsqrt}
    if exponent in roots:
        return e(roots[exponent](x))
    if exponent == -1:
        return e(R.divide(e.constant(1.0, kind), x))
    return e(R.power(x, e.constant(float(exponent), kind)))


def power_of_tensor(e: Emitter, base: Any, exponent: Any) -> Expression:
    """Either operand a tensor."""
    base, exponent = e.pair(base, exponent)
    return e(R.power(e.floating(base), e.floating(exponent)))


def divide(e: Emitter, a: Any, b: Any) -> Expression:
    """True division: integers become float32."""
    a, b = e.pair(a, b)
    return e(R.divide(e.floating(a), e.floating(b)))


def divide_rounded(e: Emitter, a: Any, b: Any, rounding_mode: str | None = None) -> Expression:
    """Division rounded down or towards zero."""
    if rounding_mode is None:
        return divide(e, a, b)
    a, b = e.pair(a, b)
    if is_float(dtype(a)):
        return e((R.floor if rounding_mode == "floor" else R.trunc)(e(R.divide(a, b))))
    function = tirx.floordiv if rounding_mode == "floor" else tirx.truncdiv

    def body(x: Expression, y: Expression) -> Expression:
        return te.compute(
            broadcast(list(x.shape), list(y.shape)),
            lambda *i: function(read_broadcast(x, i), read_broadcast(y, i)),
        )

    return e.compute(body, a, b, name="integer_divide")


def masked_fill(e: Emitter, x: Expression, mask: Expression, value: float) -> Expression:
    """Value where the mask is true."""
    return e(R.where(mask, e.scalar(value, dtype(x)), x))


def where(e: Emitter, condition: Expression, a: Any, b: Any) -> Expression:
    """Either branch may be a scalar."""
    a, b = e.pair(a, b)
    return e(R.where(e.cast(condition, "bool"), a, b))


def prelu(e: Emitter, x: Expression, weight: Expression) -> Expression:
    """One slope, or one a channel."""
    if rank(weight) == 1 and rank(x) > 1:
        weight = e(R.reshape(weight, [1, shape(weight)[0], *[1] * (rank(x) - 2)]))
    return e(R.where(e(R.greater(x, e.constant(0.0, dtype(x)))), x, e(R.multiply(weight, x))))


def to_dtype(e: Emitter, x: Expression, kind: torch.dtype, *rest: object, **options: object) -> Expression:
    """A cast."""
    del rest, options
    return e.cast(x, DTYPES[kind])


def _to_copy(e: Emitter, x: Expression, **options: Any) -> Expression:
    kind = options.get("dtype")
    return x if kind is None else e.cast(x, DTYPES[kind])


def _same(e: Emitter, x: Expression, *rest: object, **options: object) -> Expression:
    del e, rest, options
    return x


def _not(e: Emitter, x: Expression) -> Expression:
    return e(R.logical_not(x) if dtype(x) == "bool" else R.bitwise_not(x))


def _softplus(e: Emitter, x: Expression, beta: float = 1, threshold: float = 20) -> Expression:
    return e(NN.softplus(x, float(beta), float(threshold)))


def _log_sigmoid(e: Emitter, x: Expression) -> Expression:
    """min(x, 0) - log(1 + exp(-|x|)): neither exponential overflows."""
    zero, one = (e.constant(value, dtype(x)) for value in (0.0, 1.0))
    tail = e(R.log(e(R.add(one, e(R.exp(e(R.negative(e(R.abs(x))))))))))
    return e(R.subtract(e(R.minimum(x, zero)), tail))


def _mish(e: Emitter, x: Expression) -> Expression:
    return e(R.multiply(x, e.compute(topi.fast_tanh, _softplus(e, x), name="tanh")))


def _remainder(e: Emitter, a: Any, b: Any) -> Expression:
    return e(R.floor_mod(*e.pair(a, b)))


def _reverse_subtract(e: Emitter, x: Expression, other: float, alpha: float = 1) -> Expression:
    scaled = x if alpha == 1 else e(R.multiply(x, e.constant(alpha, dtype(x))))
    return e(R.subtract(*e.pair(other, scaled)))


_COMPARISONS = {
    "le": R.less_equal, "ge": R.greater_equal, "gt": R.greater, "lt": R.less, "eq": R.equal
}  # fmt: skip

RULES: dict[str, Rule] = {
    **{n: _unary(f) for n, f in {
        "relu": NN.relu, "neg": R.negative, "abs": R.abs, "ceil": R.ceil, "floor": R.floor, "round": R.round,
        "sign": R.sign, "square": R.square, "isnan": R.isnan, "trunc": R.trunc,
    }.items()},
    **{n: _float_unary(f) for n, f in {
        "cos": R.cos, "sin": R.sin, "rsqrt": R.rsqrt, "exp": R.exp, "log": R.log, "sqrt": R.sqrt,
    }.items()},
    **{n: _scalar_function(n) for n in (
        "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "atan2", "exp2", "log2", "log10",
        "expm1", "erfc",
    )},
    **{f"{n}.{kind}": _comparison(f) for n, f in _COMPARISONS.items() for kind in ("Tensor", "Scalar")},
    "ne.Tensor": _not_equal, "ne.Scalar": _not_equal,
    "add.Tensor": _binary(R.add), "sub.Tensor": _binary(R.subtract), "mul.Tensor": _binary(R.multiply),
    "maximum": _binary(R.maximum), "max.other": _binary(R.maximum),
    "minimum": _binary(R.minimum), "min.other": _binary(R.minimum),
    "rsub.Scalar": _reverse_subtract,
    "div.Tensor": divide, "div.Tensor_mode": divide_rounded,
    "floor_divide": lambda e, a, b: divide_rounded(e, a, b, "floor"),
    "remainder.Scalar": _remainder, "remainder.Tensor": _remainder,
    "erf": _fast(topi.fast_erf, "erf"), "tanh": _fast(topi.fast_tanh, "tanh"),
    "log1p": lambda e, x: e(R.log(e(R.add(x, e.constant(1.0, dtype(x)))))),
    "reciprocal": lambda e, x: e(R.divide(e.constant(1.0, dtype(x)), x)),
    "bitwise_not": _not, "logical_not": lambda e, x: e(R.logical_not(e.cast(x, "bool"))),
    "sigmoid": sigmoid, "silu": silu, "gelu": gelu, "mish": _mish,
    "log_sigmoid": _log_sigmoid,
    "hardsigmoid": hardsigmoid, "hardswish": lambda e, x: e(R.multiply(x, hardsigmoid(e, x))),
    "clamp": clamp, "clamp_min": clamp, "clamp_max": lambda e, x, high: clamp(e, x, None, high),
    "hardtanh": lambda e, x, low=-1.0, high=1.0: clamp(e, x, low, high), "relu6": lambda e, x: clamp(e, x, 0.0, 6.0),
    "leaky_relu": lambda e, x, slope=0.01: e(NN.leakyrelu(x, float(slope))),
    "elu": elu, "celu": lambda e, x, alpha=1.0: elu(e, x, alpha, 1, 1 / alpha),
    "selu": lambda e, x: elu(e, x, 1.6732632423543772, 1.0507009873554805),
    "softplus": _softplus, "prelu": prelu,
    "pow.Tensor_Scalar": power, "pow.Scalar": power_of_tensor, "pow.Tensor_Tensor": power_of_tensor,
    "bitwise_and.Scalar": _logical(R.logical_and, R.bitwise_and),
    "bitwise_or.Scalar": _logical(R.logical_or, R.bitwise_or), "__and__.Tensor": _logical(R.logical_and, R.bitwise_and),
    "bitwise_and.Tensor": _logical(R.logical_and, R.bitwise_and),
    "__or__.Tensor": _logical(R.logical_or, R.bitwise_or), "bitwise_or.Tensor": _logical(R.logical_or, R.bitwise_or),
    "bitwise_xor.Tensor": _logical(R.logical_xor, R.bitwise_xor),
    "bitwise_xor.Scalar": _logical(R.logical_xor, R.bitwise_xor), "logical_xor": _truth(R.logical_xor),
    **{f"bitwise_{side}_shift.{kind}": _binary(f) for side, f in (("left", R.left_shift), ("right", R.right_shift))
       for kind in ("Tensor", "Tensor_Scalar")},
    "fmod.Tensor": _binary(R.mod), "fmod.Scalar": _binary(R.mod),
    "logical_and": _truth(R.logical_and), "logical_or": _truth(R.logical_or),
    "copy": lambda e, x, source, *rest: e(R.broadcast_to(e.cast(source, dtype(x)), shape(x))),
    "masked_fill.Scalar": masked_fill, "where.self": where, "where.ScalarOther": where, "where.ScalarSelf": where,
    "to.dtype": to_dtype, "_to_copy": _to_copy, "to.dtype_layout": _to_copy, "to.device": lambda e, x, device, kind,
    *rest: e.cast(x, DTYPES[kind]),
    "type_as": lambda e, x, other: e.cast(x, dtype(other)),
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"), _same),
}  # fmt: skip
