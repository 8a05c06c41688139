"""Epilogues as vector code."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from tvm.script import tirx as T

from mcc.backends.kernel import Clamp, EpilogueStep, Relu, Requantize

if TYPE_CHECKING:
    from mcc.backends.cpu.microkernel import Expression, Vectors


def emit_epilogue(vectors: Vectors, value: Expression, steps: tuple[EpilogueStep, ...]) -> Expression:
    """Apply `steps` to float32 lanes; the result is float32 or uint8 lanes."""
    for step in steps:
        match step:
            case Relu():
                value = T.max(value, vectors.constant(0.0))
            case Clamp(low, high):
                value = T.min(T.max(value, vectors.constant(low)), vectors.constant(high))
            case Requantize(scale, zero_point, low, high):
                value = _requantize(vectors, value, 1 / scale, zero_point, (low, high))
            case _:
                assert_never(step)
    return value


def _requantize(
    vectors: Vectors, value: Expression, inverse_scale: float, zero_point: int, codes: tuple[int, int]
) -> Expression:
    # clamped as float: a conversion of what does not fit int32 is undefined
    low, high = (vectors.constant(float(c - zero_point)) for c in codes)
    rounded = vectors.round_half_even(value * vectors.constant(inverse_scale))
    integer = T.cast(T.min(T.max(rounded, low), high), f"int32x{vectors.lanes}")
    return T.cast(integer + vectors.constant(zero_point, "int32"), f"uint8x{vectors.lanes}")
