"""Functions of float32 vectors: polynomials after range reduction, with the largest error measured over their range.

Coefficients of exp and tanh are those of Moshier's Cephes library; erf is Abramowitz and Stegun, formula 7.1.26.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script import tirx as T

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcc.backends.cpu.microkernel import Expression, Vectors

_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
_ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
_GELU = (
    2.25882625e-8, -1.58883077e-6, 4.77639797e-5, -8.12188615e-4, 8.76369791e-3, -6.45544315e-2, 0.397870287,
)  # fmt: skip
_EXP2 = (0.00957008612, 0.055917851, 0.240247451, 0.693121816, 0.999999261)
_LEAST = -87.0  # e to which is the least number that is normal, nearly
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4


def polynomial(v: Vectors, x: Expression, coefficients: Sequence[float]) -> Expression:
    """The polynomial whose coefficients are given from the highest power on."""
    total = v.constant(coefficients[0])
    for c in coefficients[1:]:
        total = v.fma(total, x, v.constant(c))
    return total


def exp(v: Vectors, x: Expression) -> Expression:
    """e^x within 2e-7 relative for x in [-87, 88], held to that range outside."""
    # in this order of operands a NaN passes both
    x = v.hold(T.max(v.constant(_LEAST), T.min(v.constant(88.0), x)))
    n = v.hold(v.round_half_even(x * v.constant(1 / math.log(2))))
    r = v.hold(v.fma(n, v.constant(-_LN2_LOW), v.fma(n, v.constant(-_LN2_HIGH), x)))
    y = v.fma(polynomial(v, r, _EXP), r * r, r + v.constant(1.0))
    exponent = T.shift_left(T.cast(n, f"int32x{v.lanes}") + v.constant(127, "int32"), v.constant(23, "int32"))
    return v.hold(y * T.reinterpret(f"float32x{v.lanes}", exponent))


def exp_to_zero(v: Vectors, x: Expression) -> Expression:
    """e^x of what is no more than zero, as softmax has it: 0 where `exp` would hold it to the end of its range."""
    return tirx.Select(x < v.constant(_LEAST), v.constant(0.0), exp(v, x))


def exp_to_codes(v: Vectors, x: Expression) -> Expression:
    """`exp_to_zero` within 1e-5: a polynomial with the least largest error, and never less than 2^-126."""
    # in this order of operands a NaN passes; the polynomial is less than one at zero, and 2^-126 times that no normal
    # number, which takes a CPU a hundred cycles
    t = v.hold(T.max(v.constant(-125.0), x * v.constant(1 / math.log(2))))
    n = v.hold(v.round_half_even(t))
    y = v.hold(polynomial(v, v.hold(t - n), _EXP2))
    exponent = T.shift_left(T.cast(n, f"int32x{v.lanes}"), v.constant(23, "int32"))
    return v.hold(T.reinterpret(f"float32x{v.lanes}", T.reinterpret(f"int32x{v.lanes}", y) + exponent))


def sigmoid(v: Vectors, x: Expression) -> Expression:
    """1 / (1 + e^-x) within 3e-7 relative."""
    return v.reciprocal(v.constant(1.0) + exp(v, v.constant(0.0) - x))


def silu(v: Vectors, x: Expression) -> Expression:
    """Swish: x * sigmoid(x)."""
    return x * v.reciprocal(v.constant(1.0) + exp(v, v.constant(0.0) - x))


def tanh(v: Vectors, x: Expression) -> Expression:
    """Within 3e-7 relative."""
    large = v.constant(1.0) - v.constant(2.0) * v.reciprocal(exp(v, x + x) + v.constant(1.0))
    z = v.hold(x * x)
    small = v.fma(polynomial(v, z, _TANH) * z, x, x)
    return v.select(z < v.constant(0.625**2), small, large)


def gelu(v: Vectors, x: Expression) -> Expression:
    """Multiply x by the normal distribution's integral up to x, within 2e-7 |x|."""
    scaled = v.hold(x * v.constant(math.sqrt(0.5)))
    # in this order of operands a NaN passes; nothing is beyond 1e3
    size = v.hold(T.min(v.constant(1e3), T.max(scaled, v.constant(0.0) - scaled)))
    t = v.reciprocal(v.fma(size, v.constant(0.3275911), v.constant(1.0)))
    beyond = v.hold(polynomial(v, t, _ERF) * t * exp(v, v.constant(0.0) - size * size))
    # erf of |x| is 1 - beyond: for negative x the sum 1 + erf is `beyond` itself, which keeps its digits
    half = v.constant(0.5) * x
    return v.select(x < v.constant(0.0), half * beyond, half * (v.constant(2.0) - beyond))


def gelu_to_codes(v: Vectors, x: Expression) -> Expression:
    """`gelu` within 2e-4: a polynomial with the least largest error on [-4, 4], 0 or x outside, for coarse results."""
    near = v.hold(T.max(v.constant(-4.0), T.min(v.constant(4.0), x)))
    odd = polynomial(v, v.hold(near * near), _GELU)
    # of what is near 0 below -4 no more than four times is taken
    return T.max(v.constant(-4.0), x) * v.fma(near, odd, v.constant(0.5))


def gelu_tanh(v: Vectors, x: Expression) -> Expression:
    """Approximate `gelu` as x * sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3): the approximation GPT-2 uses."""
    factor = 2 * math.sqrt(2 / math.pi)
    u = v.fma(x * x, v.constant(0.044715 * factor), v.constant(factor)) * x
    return x * v.reciprocal(v.constant(1.0) + exp(v, v.constant(0.0) - u))


def hardsigmoid(v: Vectors, x: Expression) -> Expression:
    """clamp(x / 6 + 1 / 2, 0, 1)."""
    return T.max(v.constant(0.0), T.min(v.constant(1.0), v.fma(x, v.constant(1 / 6), v.constant(0.5))))


def hardswish(v: Vectors, x: Expression) -> Expression:
    """Multiply x by hardsigmoid(x)."""
    return x * hardsigmoid(v, x)


FUNCTIONS = {
    "sigmoid": sigmoid, "silu": silu, "tanh": tanh, "gelu": gelu, "gelu_to_codes": gelu_to_codes,
    "gelu_tanh": gelu_tanh, "hardsigmoid": hardsigmoid,
    "hardswish": hardswish,
}  # fmt: skip
"""By the name an `Activation` step has."""
