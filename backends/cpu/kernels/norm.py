"""Layer norm and RMS norm over the last dim, with a quantizer behind them taken in.

A row is read three times while it is in cache: for its mean, for its variance about that mean, and to be written. Sums
have one partial result a lane. Ba, Kiros, Hinton: Layer normalization. arXiv 1607.06450, 2016. Zhang, Sennrich:
Root mean square layer normalization. NeurIPS 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.epilogue import emit_epilogue
from mcc.backends.cpu.kernels.tiles import leading_dims, shared_rows
from mcc.backends.cpu.microkernel import (
    Expression,
    Parameter,
    Vectors,
    flat,
    kernel_function,
    product,
    serial,
)
from mcc.backends.kernel import output_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcc.backends.kernel import EpilogueStep
    from mcc.target import Target

BLOCK_ELEMENTS = 16384  # that one thread takes at a time
CHAINS = 4  # sums in flight hide the latency of an addition


@dataclass(frozen=True)
class NormShape:
    """One norm.

    Attributes:
        dims: of the value; the last is normalized and fixed.
        eps: added to the variance, or to the mean of squares.
        centered: whether the mean is taken off: layer norm; else RMS norm.
        weight, bias: whether there are such vectors of the last dim.
        epilogue: what follows: activations, then a Requantize or none.
    """

    dims: tuple[Any, ...]
    eps: float
    centered: bool
    weight: bool
    bias: bool
    epilogue: tuple[EpilogueStep, ...]


def norm_function(shape: NormShape, target: Target) -> tirx.PrimFunc:
    """A kernel over the value, the weight and the bias where there are such, and the output."""
    body = _Body(shape, Vectors(target))
    width = (int(shape.dims[-1]),)
    parameters = [
        Parameter("X", body.dims, "float32"),
        *([Parameter("W", width, "float32")] if shape.weight else []),
        *([Parameter("B", width, "float32")] if shape.bias else []),
        Parameter("Y", body.dims, output_dtype(shape.epilogue)),
    ]
    return kernel_function("norm", parameters, body.emit).without_attr("global_symbol")


class _Body:
    def __init__(self, shape: NormShape, vectors: Vectors) -> None:
        self.shape, self.v = shape, vectors
        self.dims = leading_dims(shape.dims)
        self.width = int(shape.dims[-1])

    def emit(self, x: Expression, *rest: Expression) -> None:
        """Emit the whole kernel."""
        rows, s = product(self.dims[:-1]), self.shape
        self.x, self.y = flat(x, rows * self.width), flat(rest[-1], rows * self.width)
        self.weight = rest[0] if s.weight else None
        self.bias = rest[-2] if s.bias else None
        block = max(1, BLOCK_ELEMENTS // self.width)
        shared_rows(rows, block, lambda r: self._row(r * self.width))

    def _row(self, base: Expression) -> None:
        v, s = self.v, self.shape
        start = B.Bind(T.cast(base, "int64"))
        mean: Expression = tirx.const(0.0, "float32")
        if s.centered:
            mean = B.Bind(self._mean(lambda i, n: self._load(start + i, n)))
        squares = self._mean(lambda i, n: self._square(start + i, n, mean))
        inverse = B.Bind(T.float32(1) / T.sqrt(squares + T.float32(s.eps)))

        def write(i: Expression) -> None:
            value = (v.load(self.x, start + i) - v.splat(mean)) * v.splat(inverse)
            if self.weight is not None:
                value = value * v.load(self.weight, i)
            if self.bias is not None:
                value = value + v.load(self.bias, i)
            v.store(self.y, start + i, emit_epilogue(v, B.Bind(value), s.epilogue))

        serial(self.width // v.lanes, lambda i: write(i * v.lanes))
        if self.width % v.lanes:
            write(self.width - v.lanes)  # overlaps the vector before it

    def _load(self, index: Expression, lanes: int) -> Expression:
        return self.v.load(self.x, index, lanes) if lanes > 1 else self.x[index]

    def _square(self, index: Expression, lanes: int, mean: Expression) -> Expression:
        value = B.Bind(self._load(index, lanes) - (self.v.splat(mean) if lanes > 1 else mean))
        return value * value

    def _mean(self, term: Callable[[Expression, int], Expression]) -> Expression:
        """The mean over a row of terms at an index, given for a vector or for one element."""
        v, step = self.v, self.v.lanes * CHAINS
        (sums,) = v.registers(1, CHAINS, "float32")
        for register in sums:
            register.set(v.constant(0.0))
        with B.serial(0, self.width // step) as i:
            for c, register in enumerate(sums):
                register.set(register.get() + term(i * step + c * v.lanes, v.lanes))
        done = self.width // step * step
        for i in range(done, self.width - v.lanes + 1, v.lanes):
            sums[0].set(sums[0].get() + term(i, v.lanes))
            done = i + v.lanes
        total = v.across([register.get() for register in sums], lambda a, b: a + b)
        for i in range(done, self.width):
            total = B.Bind(total + term(i, 1))
        return total * T.float32(1 / self.width)
