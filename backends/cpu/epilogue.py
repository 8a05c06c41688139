"""Epilogues as vector code: what a kernel does to its sums before it writes them, step by step."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, assert_never

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm.script import tirx as T

from mcc.backends.cpu.microkernel import lane
from mcc.backends.cpu.vector_math import FUNCTIONS
from mcc.backends.kernel import Activation, Add, Clamp, EpilogueStep, Relu, Requantize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcc.backends.cpu.microkernel import Expression, Vectors
    from mcc.backends.kernel import QuantizedInput, Region


class Epilogue:
    """Finishes and writes vectors of a region's output.

    Args:
        vectors: of the target.
        region: whose epilogue it is.
        operands: the values its `Add` steps read, flat, laid out as the output is.
        out: the output, flat.
    """

    def __init__(self, vectors: Vectors, region: Region, operands: Sequence[Expression], out: Expression) -> None:
        self.v = vectors
        self.steps = merged(region.epilogue)
        self.operands = operands
        self.out = out

    def store(self, value: Expression, index: Expression, used: int) -> None:
        """Apply the steps to float32 lanes and write the first `used` of them at `index`."""
        v = self.v
        read = [self._read(a, index, used) for a in self.operands]
        value = emit_epilogue(v, value, self.steps, read)
        if used == v.lanes:
            v.store(self.out, index, value)
            return
        value = B.Bind(value)
        for i in range(used):
            B.buffer_store(self.out, lane(value, i), [index + i])

    def _read(self, operand: Expression, index: Expression, used: int) -> Expression:
        if used == self.v.lanes:
            return self.v.load(operand, index)
        ((room,),) = self.v.registers(1, 1, operand.dtype)
        for i in range(used):
            B.buffer_store(room.pool, operand[index + i], [i])
        return room.get()


def merged(steps: tuple[EpilogueStep, ...]) -> tuple[EpilogueStep, ...]:
    """The same steps, with a relu or clamp before a final requantize as bounds of its codes: rounding keeps order."""
    *before, last = steps or (Relu(),)
    if not isinstance(last, Requantize):
        return steps
    while before and isinstance(step := before[-1], Relu | Clamp):
        before.pop()
        bounds = (0.0, math.inf) if isinstance(step, Relu) else (step.low, step.high)
        # the last bounds hold, as they would if applied one after another
        low, high = (min(max(_code(last, bound), last.low), last.high) for bound in bounds)
        last = replace(last, low=low, high=high)
    return (*before, last)


def _code(step: Requantize, value: float) -> int:
    """The code of a value, before it is held to the range."""
    if math.isinf(value):
        return -(1 << 30) if value < 0 else 1 << 30
    # as the kernels compute it, in float32
    return int(np.rint(np.float32(value) * np.float32(1 / step.scale))) + step.zero_point


def emit_epilogue(
    vectors: Vectors, value: Expression, steps: tuple[EpilogueStep, ...], operands: Sequence[Expression] = ()
) -> Expression:
    """Apply `steps` to float32 lanes; the result is float32 or uint8 lanes.

    Bounds come first in every min and max: of a NaN and a bound, x86 takes the second operand.
    """
    others = iter(operands)
    for step in steps:
        match step:
            case Relu():
                value = T.max(vectors.constant(0.0), value)
            case Clamp(low, high):
                value = T.min(vectors.constant(high), T.max(vectors.constant(low), value))
            case Activation(name):
                value = FUNCTIONS[name](vectors, B.Bind(value))
            case Add(_, activation):
                value = _added(vectors, value, next(others), activation)
            case Requantize(scale, zero_point, low, high):
                value = _requantize(vectors, value, 1 / scale, zero_point, (low, high))
            case _:
                assert_never(step)
    return value


def _added(vectors: Vectors, value: Expression, other: Expression, activation: QuantizedInput | None) -> Expression:
    if activation is None:
        return value + other
    codes = T.cast(other, f"int32x{vectors.lanes}") - vectors.constant(activation.zero_point, "int32")
    return vectors.fma(vectors.to_float(codes), vectors.constant(activation.scale), value)


def _requantize(
    vectors: Vectors, value: Expression, inverse_scale: float, zero_point: int, codes: tuple[int, int]
) -> Expression:
    # clamped as float: a conversion of what does not fit int32 is undefined
    low, high = (vectors.constant(float(c - zero_point)) for c in codes)
    scaled = value * vectors.constant(inverse_scale)
    integer = vectors.to_nearest_integer(T.min(T.max(scaled, low), high))
    return T.cast(integer + vectors.constant(zero_point, "int32"), f"uint8x{vectors.lanes}")
