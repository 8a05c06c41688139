"""Softmax and its logarithm over the last dim: a row is read for its largest value, its sum, and to be written.

What is left of a row beside whole vectors is copied into a vector whose other lanes are minus infinity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.kernels.tiles import leading_dims, shared_rows
from mcc.backends.cpu.microkernel import (
    Expression,
    Parameter,
    Register,
    Vectors,
    flat,
    kernel_function,
    product,
    serial,
)
from mcc.backends.cpu.vector_math import exp_to_zero

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcc.target import Target

BLOCK_ELEMENTS = 16384  # that one thread takes at a time
LOWEST = float("-inf")


@dataclass(frozen=True)
class SoftmaxShape:
    """One softmax.

    Attributes:
        dims: of the value, each fixed or symbolic.
        logarithm: whether its logarithm is wanted.
    """

    dims: tuple[Any, ...]
    logarithm: bool


def softmax_function(shape: SoftmaxShape, target: Target) -> tirx.PrimFunc:
    """A kernel over the value and the output, float32."""
    body = _Body(shape, Vectors(target))
    parameters = [Parameter(name, body.dims, "float32") for name in ("X", "Y")]
    return kernel_function("softmax", parameters, body.emit).without_attr("global_symbol")


class _Body:
    def __init__(self, shape: SoftmaxShape, vectors: Vectors) -> None:
        self.shape, self.v = shape, vectors
        self.dims = leading_dims(shape.dims)
        self.width = self.dims[-1]

    def emit(self, x: Expression, y: Expression) -> None:
        """Emit the whole kernel."""
        rows = product(self.dims[:-1])
        self.x, self.y = flat(x, rows * self.width), flat(y, rows * self.width)
        self.whole = (
            self.width // self.v.lanes if isinstance(self.width, int) else tirx.floordiv(self.width, self.v.lanes)
        )
        self.left = self.width - self.whole * self.v.lanes
        fixed = isinstance(self.width, int)
        block = (
            max(1, BLOCK_ELEMENTS // max(self.width, 1))
            if fixed
            else tirx.max(1, tirx.floordiv(BLOCK_ELEMENTS, tirx.max(self.width, 1)))
        )
        shared_rows(rows, block, lambda r: self._row(r * self.width))

    def _row(self, base: Expression) -> None:
        v = self.v
        start = B.Bind(T.cast(base, "int64"))
        ((rest, largest, total),) = v.registers(1, 3, "float32")
        self._copy_rest(start, rest)
        largest.set(rest.get())
        serial(self.whole, lambda i: largest.set(T.max(largest.get(), v.load(self.x, start + i * v.lanes))))
        top = B.Bind(v.across([largest.get()], T.max))
        shift = B.Bind(v.splat(top))

        def power(value: Expression) -> Expression:
            return B.Bind(exp_to_zero(v, B.Bind(value - shift)))

        def add(i: Expression) -> None:
            value = power(v.load(self.x, start + i * v.lanes))
            total.set(total.get() + value)
            if not self.shape.logarithm:
                v.store(self.y, start + i * v.lanes, value)

        total.set(power(rest.get()))
        if not self.shape.logarithm:
            rest.set(total.get())
        serial(self.whole, add)
        summed = v.across([total.get()], lambda a, b: a + b)
        if self.shape.logarithm:
            below = B.Bind(v.splat(T.log(summed)))
            self._write(start, rest, self.x, lambda value: value - shift - below)
        else:
            inverse = B.Bind(v.splat(T.float32(1) / summed))
            self._write(start, rest, self.y, lambda value: value * inverse)

    def _copy_rest(self, start: Expression, rest: Register) -> None:
        rest.set(self.v.constant(LOWEST))
        first = self.whole * self.v.lanes
        with B.serial(0, self.left) as i:
            B.buffer_store(rest.pool, self.x[start + first + i], [rest.offset + i])

    def _write(
        self, start: Expression, rest: Register, source: Expression, finish: Callable[[Expression], Expression]
    ) -> None:
        v, first = self.v, self.whole * self.v.lanes

        def vector(i: Expression) -> None:
            v.store(self.y, start + i * v.lanes, finish(v.load(source, start + i * v.lanes)))

        serial(self.whole, vector)
        rest.set(finish(rest.get()))
        with B.serial(0, self.left) as i:
            B.buffer_store(self.y, rest.pool[rest.offset + i], [start + first + i])
