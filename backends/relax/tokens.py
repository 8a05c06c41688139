"""Formats of what comes at run time, in relax: see `mcc.token_formats` and `mcc.bfloat16`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import relax, te, tirx

from mcc.backends.relax.emitter import Emitter, Expression, shape
from mcc.formats import SMALLEST_ROW
from mcc.token_formats import LIMITS, ZERO

if TYPE_CHECKING:
    from collections.abc import Callable

R = relax.op


def _token_scales(e: Emitter, x: Expression, bits: int, groups: int) -> Expression:
    *outer, size = shape(x)
    by_group = e(R.reshape(x, [*outer, groups, int(size) // groups]))
    largest = e(R.max(e(R.abs(by_group)), axis=-1))
    positive = e(R.maximum(largest, e.scalar(SMALLEST_ROW, "float32")))
    return e(R.divide(positive, e.scalar(LIMITS[bits], "float32")))


def _quantize_tokens(e: Emitter, x: Expression, scale: Expression, bits: int) -> Expression:
    limit, size = tirx.const(LIMITS[bits], "float32"), int(shape(x)[-1])
    group = size // int(shape(scale)[-1])

    def body(values: Expression, scales: Expression) -> Expression:
        def code(outer: tuple[Expression, ...], i: Expression) -> Expression:
            in_steps = tirx.round(values(*outer, i) / scales(*outer, tirx.floordiv(i, group)))
            return tirx.max(tirx.min(in_steps, limit), -limit)

        def byte(*place: Expression) -> Expression:
            *outer, i = place
            if bits == 8:
                return code(tuple(outer), i).astype("int8")
            low, high = (code(tuple(outer), at) + tirx.const(ZERO, "float32") for at in (i, i + size // 2))
            return (low + high * tirx.const(16, "float32")).astype("uint8")

        return te.compute([*values.shape[:-1], size * bits // 8], byte)

    return e.compute(body, x, scale, name="quantize_tokens")


def _dequantize_tokens(e: Emitter, codes: Expression, scale: Expression, bits: int) -> Expression:
    size = int(shape(codes)[-1]) * 8 // bits
    group = size // int(shape(scale)[-1])

    def body(stored: Expression, scales: Expression) -> Expression:
        def value(*place: Expression) -> Expression:
            *outer, i = place
            if bits == 8:
                code = stored(*outer, i).astype("float32")
            else:
                half = size // 2
                byte = stored(*outer, tirx.floormod(i, half)).astype("int32")
                shifted = tirx.shift_right(byte, tirx.floordiv(i, half).astype("int32") * 4)
                code = (tirx.bitwise_and(shifted, tirx.const(15, "int32")) - ZERO).astype("float32")
            return code * scales(*outer, tirx.floordiv(i, group))

        return te.compute([*stored.shape[:-1], size], value)

    return e.compute(body, codes, scale, name="dequantize_tokens")


def _round_bfloat16(e: Emitter, x: Expression) -> Expression:
    def rounded(value: Expression) -> Expression:
        bits = tirx.reinterpret("int32", value)
        half = tirx.const(0x7FFF, "int32") + tirx.bitwise_and(bits >> 16, 1)
        # of a NaN, whose bits without the sign are above infinity's, the sum might be a number
        number = tirx.bitwise_and(bits, 0x7FFFFFFF) <= tirx.const(0x7F800000, "int32")
        kept = tirx.Select(number, bits + half, tirx.bitwise_or(bits, 1 << 22))
        return tirx.reinterpret("float32", tirx.bitwise_and(kept, tirx.const(-1 << 16, "int32")))

    return e.compute(lambda v: te.compute(v.shape, lambda *i: rounded(v(*i))), x, name="round_bfloat16")


def _decode_bfloat16(e: Emitter, stored: Expression) -> Expression:
    def value(bits: Expression) -> Expression:
        return tirx.reinterpret("float32", bits.astype("int32") << 16)

    return e.compute(lambda v: te.compute(v.shape, lambda *i: value(v(*i))), stored, name="decode_bfloat16")


RULES: dict[str, Callable[..., Expression]] = {
    "mcc.token_scales": _token_scales, "mcc.quantize_tokens": _quantize_tokens,
    "mcc.dequantize_tokens": _dequantize_tokens, "mcc.round_bfloat16": _round_bfloat16,
    "mcc.decode_bfloat16": _decode_bfloat16,
}  # fmt: skip
