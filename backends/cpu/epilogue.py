"""Epilogues as vector code: what a kernel does to its sums before it writes them, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

import tvm.tirx.script.builder.ir as B
from tvm.script import tirx as T

from mcc.backends.cpu.microkernel import lane
from mcc.backends.cpu.vector_math import FUNCTIONS
from mcc.backends.kernel import Activation, Add, Clamp, EpilogueStep, Relu, Requantize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcc.backends.cpu.microkernel import Expression, Vectors
    from mcc.backends.kernel import Region


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
        self.steps = region.epilogue
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


def emit_epilogue(
    vectors: Vectors, value: Expression, steps: tuple[EpilogueStep, ...], operands: Sequence[Expression] = ()
) -> Expression:
    """Apply `steps` to float32 lanes; the result is float32 or uint8 lanes."""
    others = iter(operands)
    for step in steps:
        match step:
            case Relu():
                value = T.max(value, vectors.constant(0.0))
            case Clamp(low, high):
                value = T.min(T.max(value, vectors.constant(low)), vectors.constant(high))
            case Activation(name):
                value = FUNCTIONS[name](vectors, B.Bind(value))
            case Add():
                value = value + next(others)
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
