"""Group norm of images with channels last; with as many groups as channels, instance norm.

Lanes are channels: sums over the pixels of each channel, in blocks of pixels, then over the channels of each group;
once for the mean and once for the variance about it. Wu, He: Group normalization. ECCV 2018.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.epilogue import emit_epilogue
from mcc.backends.cpu.kernels.tiles import leading_dims, shared_rows
from mcc.backends.cpu.microkernel import Expression, Parameter, Vectors, flat, kernel_function, product, serial
from mcc.backends.kernel import output_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcc.backends.kernel import EpilogueStep
    from mcc.target import Target

PIXEL_BLOCK = 128  # whose sum is added to what came before: float32 keeps more of it so
COLUMNS = 4  # vectors of channels that are summed together
BLOCK_ELEMENTS = 16384  # that one thread writes at a time


@dataclass(frozen=True)
class GroupNormShape:
    """One group norm.

    Attributes:
        dims: of the value, [batch, height, width, channels], the channels fixed.
        groups: of channels.
        eps: added to the variance.
        weight, bias: whether there are such vectors of the channels.
        epilogue: what follows: activations, then a Requantize or none.
    """

    dims: tuple[Any, ...]
    groups: int
    eps: float
    weight: bool
    bias: bool
    epilogue: tuple[EpilogueStep, ...]


def group_norm_function(shape: GroupNormShape, target: Target) -> tirx.PrimFunc:
    """A kernel over the value, the weight and the bias where there are such, and the output."""
    body = _Body(shape, Vectors(target))
    vector = (int(shape.dims[-1]),)
    parameters = [
        Parameter("X", body.dims, "float32"),
        *([Parameter("W", vector, "float32")] if shape.weight else []),
        *([Parameter("B", vector, "float32")] if shape.bias else []),
        Parameter("Y", body.dims, output_dtype(shape.epilogue)),
    ]
    return kernel_function("group_norm", parameters, body.emit).without_attr("global_symbol")


class _Body:
    def __init__(self, shape: GroupNormShape, vectors: Vectors) -> None:
        self.shape, self.v = shape, vectors
        self.dims = leading_dims(shape.dims)
        self.channels = int(shape.dims[-1])
        self.pixels = product(self.dims[1:-1])
        lanes = vectors.lanes
        # the last vector overlaps the one before it
        self.starts = [min(c, self.channels - lanes) for c in range(0, self.channels, lanes)]

    def emit(self, x: Expression, *rest: Expression) -> None:
        """Emit the whole kernel."""
        size = product(self.dims[:-1]) * self.channels
        self.x, self.y = flat(x, size), flat(rest[-1], size)
        self.weight = rest[0] if self.shape.weight else None
        self.bias = rest[-2] if self.shape.bias else None
        self.sums, self.means, self.gains, self.shifts = (
            B.alloc_buffer((self.channels,), "float32", layout=None) for _ in range(4)
        )
        block = max(1, BLOCK_ELEMENTS // self.channels)

        def image(n: Expression) -> None:
            start = B.Bind(T.cast(n, "int64") * (self.pixels * self.channels))
            self._measure(start)
            shared_rows(self.pixels, block, lambda p: self._write(start + p * self.channels))

        serial(self.dims[0], image)

    def _measure(self, start: Expression) -> None:
        """The gain and the shift of every channel of an image."""
        v, s = self.v, self.shape
        size = self.channels // s.groups
        share = B.Bind(T.float32(1) / T.cast(self.pixels * size, "float32"))
        self._sum(start, lambda value, _: value)
        with B.serial(0, s.groups) as g:
            mean = B.Bind(self._total(g, size) * share)
            with B.serial(0, size) as c:
                B.buffer_store(self.means, mean, [g * size + c])

        def square(value: Expression, c: int) -> Expression:
            apart = B.Bind(value - v.load(self.means, c))
            return apart * apart

        self._sum(start, square)
        with B.serial(0, s.groups) as g:
            inverse = B.Bind(T.float32(1) / T.sqrt(self._total(g, size) * share + T.float32(s.eps)))
            with B.serial(0, size) as i:
                c = g * size + i
                gain = B.Bind(inverse if self.weight is None else inverse * self.weight[c])
                added = T.float32(0) if self.bias is None else self.bias[c]
                B.buffer_store(self.gains, gain, [c])
                B.buffer_store(self.shifts, added - self.means[c] * gain, [c])

    def _total(self, group: Expression, size: int) -> Expression:
        """The sum over a group's channels."""
        total = B.alloc_buffer((1,), "float32", scope="global", layout=None)
        B.buffer_store(total, T.float32(0), [0])
        with B.serial(0, size) as c:
            B.buffer_store(total, total[0] + self.sums[group * size + c], [0])
        return total[0]

    def _sum(self, start: Expression, term: Callable[[Expression, int], Expression]) -> None:
        """Sum a term of each channel over the pixels of an image, given a vector and its first channel."""
        for at in range(0, len(self.starts), COLUMNS):
            self._sum_columns(start, self.starts[at : at + COLUMNS], term)

    def _sum_columns(
        self, start: Expression, columns: list[int], term: Callable[[Expression, int], Expression]
    ) -> None:
        v = self.v
        totals, parts = v.registers(2, len(columns), "float32")
        for register in totals:
            register.set(v.constant(0.0))

        def block(first: Expression, count: Expression) -> None:
            for register in parts:
                register.set(v.constant(0.0))
            with B.serial(0, count) as p:
                for register, c in zip(parts, columns, strict=True):
                    value = v.load(self.x, start + (first + p) * self.channels + c)
                    register.set(register.get() + term(value, c))
            for total, part in zip(totals, parts, strict=True):
                total.set(total.get() + part.get())

        whole = tirx.floordiv(self.pixels, PIXEL_BLOCK)
        serial(whole, lambda b: block(b * PIXEL_BLOCK, PIXEL_BLOCK))
        block(whole * PIXEL_BLOCK, self.pixels - whole * PIXEL_BLOCK)
        for total, c in zip(totals, columns, strict=True):
            v.store(self.sums, c, total.get())

    def _write(self, pixel: Expression) -> None:
        v = self.v
        for c in self.starts:
            scaled = v.fma(v.load(self.x, pixel + c), v.load(self.gains, c), v.load(self.shifts, c))
            v.store(self.y, pixel + c, emit_epilogue(v, v.hold(scaled), self.shape.epilogue))
