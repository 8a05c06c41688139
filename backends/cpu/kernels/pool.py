"""Windows of images with channels last: the largest value of each, or the mean.

Lanes are channels. Of a tile of neighbouring outputs the columns of the image are reduced first, each once, then those
of each window; where windows reach beyond the image's sides, output by output. The last vector of channels overlaps the
one before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.kernels.tiles import cover, leading_dims, shared_rows
from mcc.backends.cpu.microkernel import Expression, Parameter, Vectors, flat, kernel_function, product, serial

if TYPE_CHECKING:
    from mcc.target import Target

FEWEST_CHANNELS = 4
WIDEST_WINDOW = 64  # columns; each has a register, or what LLVM makes of one
MOST_OUTPUTS = 4  # of a tile
BLOCK_BYTES = 64 << 10  # that one task reads


@dataclass(frozen=True)
class PoolShape:
    """One pooling.

    Attributes:
        dims: of the image, [batch, height, width, channels], the channels fixed.
        result: height and width of the output.
        kernel, stride: rows and columns.
        before: rows above the image and columns left of it, at which windows begin.
        largest: the largest value rather than the mean.
        counts_padding: the mean is over the whole window, rather than over what the image has of it.
        dtype: of image and output.
    """

    dims: tuple[Any, ...]
    result: tuple[Any, Any]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    before: tuple[int, int]
    largest: bool
    counts_padding: bool
    dtype: str


def pool_function(shape: PoolShape, target: Target) -> tirx.PrimFunc:
    """A kernel over the image and the output."""
    body = _Body(shape, target)
    parameters = [Parameter("X", body.dims, shape.dtype), Parameter("Y", body.result, shape.dtype)]
    name = "max_pool" if shape.largest else "avg_pool"
    return kernel_function(name, parameters, body.emit).without_attr("global_symbol")


@dataclass(frozen=True)
class _Rows:
    """What all outputs of a row share: where its image begins, the image rows [top, end), its first output value."""

    image: Expression
    top: Expression
    end: Expression
    target: Expression


class _Body:
    def __init__(self, shape: PoolShape, target: Target) -> None:
        self.shape = shape
        self.channels = int(shape.dims[3])
        self.dims = leading_dims(shape.dims)
        result = [d if isinstance(d, int) else tirx.Var(f"r{i}", "int64") for i, d in enumerate(shape.result)]
        self.result = (self.dims[0], *result, self.channels)
        lanes = target.vector_lanes * (4 if shape.dtype == "uint8" else 1)
        while lanes > self.channels:
            lanes //= 2
        self.v = Vectors(target, lanes)
        held = target.vector_registers * 3 // 4
        fitting = [n for n in range(1, MOST_OUTPUTS + 1) if len(self._columns(n)) <= held]
        self.outputs = max(fitting, default=1)

    def _columns(self, outputs: int) -> list[int]:
        """The image columns that neighbouring outputs read, from the first one's first."""
        (_, width), (_, stride) = self.shape.kernel, self.shape.stride
        return sorted({o * stride + k for o in range(outputs) for k in range(width)})

    def emit(self, x: Expression, y: Expression) -> None:
        """Emit the whole kernel."""
        shape = self.shape
        batch, height, width, _ = self.dims
        self.x, self.y = (flat(b, product(d)) for b, d in ((x, self.dims), (y, self.result)))
        read = width * (self.channels * shape.stride[0] * (1 if shape.dtype == "uint8" else 4))
        block = tirx.max(1, tirx.floordiv(BLOCK_BYTES, tirx.max(read, 1)))
        wide = self.result[2]
        # outputs whose windows lie within the image's width are [inner, outer)
        inner = -(-shape.before[1] // shape.stride[1])
        reached = tirx.floordiv(width + (shape.before[1] - shape.kernel[1]), shape.stride[1]) + 1
        inner, outer = tirx.min(inner, wide), tirx.max(inner, tirx.min(wide, reached))
        inner, outer = (int(e) if isinstance(e, tirx.IntImm) else self.v.held_integer(e) for e in (inner, outer))

        def row(r: Expression) -> None:
            n, i = tirx.floordiv(r, self.result[1]), tirx.floormod(r, self.result[1])
            first = B.Bind(T.cast(i, "int64") * shape.stride[0] - shape.before[0])
            rows = _Rows(
                B.Bind(T.cast(n, "int64") * (height * width * self.channels)), B.Bind(tirx.max(first, 0)),
                B.Bind(tirx.min(first + shape.kernel[0], height)), B.Bind(T.cast(r, "int64") * (wide * self.channels)),
            )  # fmt: skip
            cover(outer - inner, self.outputs, lambda o, count: self._inside(rows, inner + o, count))
            skipped = outer - inner
            serial(wide - skipped, lambda o: self._at_side(rows, B.Bind(o + skipped * T.cast(o >= inner, "int64"))))

        shared_rows(batch * self.result[1], block, row)

    def _vectors(self, emit: Any) -> None:
        """Each vector of channels, given its first one."""
        lanes = self.v.lanes
        last = self.channels - lanes
        serial(-(-self.channels // lanes), lambda i: emit(B.Bind(tirx.min(T.cast(i, "int64") * lanes, last))))

    def _start(self) -> Expression:
        """What a reduction begins with."""
        if self.shape.dtype == "uint8":
            return T.broadcast(tirx.const(0, "uint8"), self.v.lanes)
        return self.v.constant(float("-inf") if self.shape.largest else 0.0)

    def _with(self, a: Expression, b: Expression) -> Expression:
        return T.max(a, b) if self.shape.largest else a + b

    def _divided(self, total: Expression, rows: _Rows, columns: Expression) -> Expression:
        """The mean, given how many columns a window has of the image."""
        shape = self.shape
        if shape.largest:
            return total
        if shape.counts_padding:
            return total * self.v.constant(1 / (shape.kernel[0] * shape.kernel[1]))
        share = T.float32(1) / T.cast((rows.end - rows.top) * columns, "float32")
        return total * self.v.splat(share)

    def _inside(self, rows: _Rows, output: Expression, count: int) -> None:
        """Outputs from number `output` of a row on, whose windows lie within the image's width."""
        v, shape, columns = self.v, self.shape, self._columns(count)
        start = B.Bind(T.cast(output, "int64") * shape.stride[1] - shape.before[1])

        def vector(channel: Expression) -> None:
            (held,) = v.registers(1, len(columns), shape.dtype)
            for register in held:
                register.set(self._start())

            def image_row(y: Expression) -> None:
                first = B.Bind(rows.image + ((rows.top + y) * self.dims[2] + start) * self.channels + channel)
                for register, x in zip(held, columns, strict=True):
                    register.set(self._with(register.get(), v.load(self.x, first + x * self.channels)))

            serial(rows.end - rows.top, image_row)
            reduced = {x: B.Bind(register.get()) for x, register in zip(columns, held, strict=True)}
            for o in range(count):
                window = [reduced[o * shape.stride[1] + k] for k in range(shape.kernel[1])]
                value = window[0]
                for other in window[1:]:
                    value = self._with(value, other)
                place = rows.target + (output + o) * self.channels + channel
                v.store(self.y, place, self._divided(value, rows, T.int64(shape.kernel[1])))

        self._vectors(vector)

    def _at_side(self, rows: _Rows, output: Expression) -> None:
        """One output whose window reaches beyond a side."""
        v, shape = self.v, self.shape
        first = B.Bind(T.cast(output, "int64") * shape.stride[1] - shape.before[1])
        left = B.Bind(tirx.max(first, 0))
        columns = B.Bind(tirx.min(first + shape.kernel[1], self.dims[2]) - left)

        def vector(channel: Expression) -> None:
            ((held,),) = v.registers(1, 1, shape.dtype)
            held.set(self._start())
            with B.serial(0, rows.end - rows.top) as y, B.serial(0, columns) as x:
                place = rows.image + ((rows.top + y) * self.dims[2] + left + x) * self.channels + channel
                held.set(self._with(held.get(), v.load(self.x, place)))
            v.store(self.y, rows.target + output * self.channels + channel, self._divided(held.get(), rows, columns))

        self._vectors(vector)
