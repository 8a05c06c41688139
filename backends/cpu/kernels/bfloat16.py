"""What kernels in bfloat16 share: rounding to its bits, and the instruction that multiplies pairs."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mcc.backends.cpu.microkernel import Expression, Vectors

PAIR = 2  # bfloat16 of a 32-bit word
# TVM has no vectors of bfloat16: words of pairs are their bits until they reach the instruction
_DOT2 = """
define linkonce_odr <16 x float> @mcc_dot2(<16 x float> %sum, <16 x i32> %a, <16 x i32> %b) alwaysinline nounwind {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sum, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
"""


@contextmanager
def multiplying() -> Iterator[None]:
    """Where `Vectors.dot2` may be used."""
    with B.attr(tirx.const(0, "int32"), "pragma_import_llvm", _DOT2):
        yield


def bits_of(value: Expression) -> Expression:
    """A float32 rounded to bfloat16, half to even, as the bits of that, int16."""
    return T.cast(_rounded(T.reinterpret("int32", value), tirx.const(1, "int32")), "int16")


def vector_bits_of(v: Vectors, value: Expression) -> Expression:
    """The same of a vector."""
    bits = B.Bind(T.reinterpret(f"int32x{v.lanes}", value))
    return T.cast(_rounded(bits, v.constant(1, "int32")), f"int16x{v.lanes}")


def _rounded(bits: Expression, one: Expression) -> Expression:
    """The upper halves of rounded float32, from the bits of these."""
    upper = bits >> (one * 16)
    # of a NaN, whose bits without the sign are above infinity's, the sum might be a number
    number = T.bitwise_and(bits, one * 0x7FFFFFFF) <= one * 0x7F800000
    half = one * 0x7FFF + T.bitwise_and(upper, one)
    return tirx.Select(number, (bits + half) >> (one * 16), T.bitwise_or(upper, one * 0x40))


def decoded_element(bits: Expression) -> Expression:
    """The float32 of one bfloat16's bits."""
    return T.reinterpret("float32", T.cast(bits, "int32") << tirx.const(16, "int32"))
