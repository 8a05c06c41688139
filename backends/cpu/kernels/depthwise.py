"""Depthwise convolutions with channels last: every channel is convolved alone.

Lanes are channels. A tile of pixels of one output row keeps its sums in registers; each input vector is loaded once a
kernel row and meets all taps that read it. Nothing is padded: rows of the window beyond the image are left out at run
time, columns when the code of the first and last tiles is made, or read as zeros where the width varies. The last
vector of channels overlaps the one before.
Codes are summed in float32, which holds their products exactly up to 2^24; that is checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc import ops
from mcc.backends.cpu.epilogue import channel_vectors
from mcc.backends.cpu.integer_sums import float_codes_refusal
from mcc.backends.cpu.kernels.conv2d import conv_reference
from mcc.backends.cpu.kernels.conv_shape import ConvShape, conv_shape
from mcc.backends.cpu.kernels.convolution_body import ConvolutionBody
from mcc.backends.cpu.kernels.tiles import balanced, loop_for
from mcc.backends.cpu.microkernel import Expression, Vectors, branch, serial
from mcc.backends.kernel import Lowered, Region

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mcc.target import Target

FEWEST_MACS = 250_000  # for two threads: about 7 us of one


@dataclass(frozen=True)
class Depthwise:
    """float32 activations and weights, int8 weights alone, or int8 weights and activations."""

    name: str = "depthwise"
    anchor: ClassVar[ops.Op] = ops.CONV2D_NHWC

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes convolutions with one channel a group and at least a vector of channels."""
        shape = conv_shape(region)
        if isinstance(shape, str):
            return shape
        if region.weight.sparse is not None:
            return "the weight is sparse"
        if not shape.depthwise or shape.inputs < target.vector_lanes:
            return "it is not depthwise, or has fewer channels than a vector"
        if region.rescale is not None:
            return "its sums begin with no integers"
        return float_codes_refusal(region)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """Pixels of a row that a tile holds."""
        shape = conv_shape(region)
        assert isinstance(shape, ConvShape)
        wanted = (7, 14, 4) if target.vector_registers == 32 else (4, 7, 5)
        return tuple(dict.fromkeys(str(min(w, shape.result[1])) for w in wanted))

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        body = _Body(region, Vectors(target), int(tile))
        return Lowered(body.function(self.name), body.packed)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """As of any convolution."""
        return conv_reference(region, source, operands)


class _Body(ConvolutionBody):
    def __init__(self, region: Region, vectors: Vectors, pixels: int) -> None:
        super().__init__(region, vectors)
        self.pixels = pixels
        weight = region.weight.decoded().astype(np.float32)
        rows = np.ascontiguousarray(weight[:, 0].transpose(1, 2, 0))  # [kernel row][kernel column][channel]
        self.packed: dict[str, NDArray[Any]] = {"weight": self._stored(rows).reshape(-1), **channel_vectors(region)}

    def _stored(self, rows: NDArray[np.float32]) -> NDArray[Any]:
        return rows if self.region.weight.scale is None else rows.astype(np.int8)

    def loops(self) -> None:
        """See `ConvolutionBody`."""
        loop = loop_for(self.shape.macs, FEWEST_MACS, self.batch)
        loop(self.batch * self.shape.result[0], self._row)

    def _row(self, i: Expression) -> None:
        """One row of output, tile by tile."""
        shape = self.shape
        height = shape.result[0]
        n, row = B.Bind(T.cast(tirx.floordiv(i, height), "int64")), B.Bind(tirx.floormod(i, height))
        top, reach = shape.before[0] - row * shape.stride[0], shape.dilation[0]
        first = B.Bind(tirx.max(0, tirx.floordiv(top + reach - 1, reach)))
        last = B.Bind(tirx.min(shape.kernel[0], tirx.floordiv(top + shape.image[0] + reach - 1, reach)))
        source = B.Bind((n * shape.image[0] - top) * (shape.image[1] * shape.inputs))
        target = B.Bind(i * (shape.result[1] * shape.outputs))
        self._tiles((first, last), (source, target))

    def _tiles(self, rows: tuple[Expression, Expression], bases: tuple[Expression, Expression]) -> None:
        """The tiles of a row of output, given the rows of the window inside the image, and where both images' begin."""
        width = self.shape.result[1]
        if not isinstance(width, int):
            self._tiles_of_any_width(rows, bases)
            return
        for start, number, pixels in balanced(width, self.pixels):
            inside = [t for t in range(number) if self._all_inside(start + t * pixels, pixels)]
            for t in [t for t in range(number) if t not in inside]:
                self._tile((start + t * pixels, pixels, True), rows, bases)
            if inside:
                base = start + inside[0] * pixels
                serial(
                    len(inside),
                    lambda t, b=base, n=pixels: self._tile((b + t * n, n, False), rows, bases),  # type: ignore[misc]
                )

    def _tiles_of_any_width(self, rows: tuple[Expression, Expression], bases: tuple[Expression, Expression]) -> None:
        """As many tiles as there are; the last one overlaps the one before, and a narrow row goes pixel by pixel."""
        width = self.shape.result[1]

        def tile(start: Expression, pixels: int) -> None:
            first = B.Bind(start)
            branch(
                self._all_inside(first, pixels),
                lambda: self._tile((first, pixels, False), rows, bases),
                lambda: self._tile((first, pixels, True), rows, bases),
            )

        def tiles() -> None:
            count = tirx.floordiv(width + self.pixels - 1, self.pixels)
            serial(count, lambda t: tile(tirx.min(t * self.pixels, width - self.pixels), self.pixels))

        branch(width >= self.pixels, tiles, lambda: serial(width, lambda t: tile(t, 1)))

    def _column(self, pixel: Expression, tap: int) -> Expression:
        """The input column that a tap of an output pixel reads."""
        return pixel * self.shape.stride[1] + tap * self.shape.dilation[1] - self.shape.before[1]

    def _all_inside(self, start: Expression, width: int) -> Expression:
        first, last = self._column(start, 0), self._column(start + width - 1, self.shape.kernel[1] - 1)
        if isinstance(first, int) and isinstance(self.shape.image[1], int):
            return first >= 0 and last < self.shape.image[1]
        return tirx.all(first >= 0, last < self.shape.image[1])

    def _tile(
        self,
        place: tuple[Expression, int, bool],
        rows: tuple[Expression, Expression],
        bases: tuple[Expression, Expression],
    ) -> None:
        """All channels of a few pixels; `place` is the first pixel, their number, and whether the border is near."""
        v, channels = self.v, self.shape.inputs
        vectors = -(-channels // v.lanes)

        def block(b: Expression) -> None:
            channel = b * v.lanes
            if channels % v.lanes:
                channel = B.Bind(tirx.min(channel, channels - v.lanes))
            self._block(place, rows, bases, channel)

        serial(vectors, block)

    def _block(
        self,
        place: tuple[Expression, int, bool],
        rows: tuple[Expression, Expression],
        bases: tuple[Expression, Expression],
        channel: Expression,
    ) -> None:
        v, shape, (start, width, border) = self.v, self.shape, place
        taps, channels = range(shape.kernel[1]), shape.inputs
        (sums,) = v.registers(1, width, "float32")
        scaled = "scale" in self.packed
        bias = B.Bind(v.constant(0.0) if scaled else v.load(self.arrays["bias"], channel))
        for total in sums:
            total.set(bias)
        readers: dict[int, list[tuple[int, int]]] = {}  # by input column from that of the first pixel's first tap
        for j in range(width):
            for k in taps:
                if not border or self._may_be_inside(start + j, k):
                    readers.setdefault(j * shape.stride[1] + k * shape.dilation[1], []).append((j, k))

        def kernel_row(r: Expression) -> None:
            kh = rows[0] + r
            weight = [
                B.Bind(v.to_float(v.load(self.arrays["weight"], (kh * shape.kernel[1] + k) * channels + channel)))
                for k in taps
            ]
            line = bases[0] + kh * (shape.dilation[0] * shape.image[1] * channels) + channel
            corner = B.Bind(line + self._column(start, 0) * channels)
            for offset, uses in sorted(readers.items()):
                column = start * shape.stride[1] - shape.before[1] + offset
                checked = border and not isinstance(start, int)
                value = B.Bind(self._load_inside(line, column) if checked else self._load(corner + offset * channels))
                for j, k in uses:
                    sums[j].set(v.fma(value, weight[k], sums[j].get()))

        serial(rows[1] - rows[0], kernel_row)
        for j, total in enumerate(sums):
            value = total.get()
            if scaled:
                scale, offset = (v.load(self.arrays[key], channel) for key in ("scale", "bias"))
                value = v.fma(value, scale, offset)
            self.epilogue.store(value, bases[1] + (start + j) * shape.outputs + channel, v.lanes)

    def _may_be_inside(self, pixel: Expression, tap: int) -> bool:
        """Whether a tap of an output pixel may read the image; not if it is known to read its padding."""
        column = self._column(pixel, tap)
        return not isinstance(column, int) or 0 <= column < self.shape.image[1]

    def _load_inside(self, line: Expression, column: Expression) -> Expression:
        """Input lanes of a column, zeros beyond the image."""
        width = self.shape.image[1]
        nearest = tirx.max(0, tirx.min(column, width - 1))
        value = self._load(line + nearest * self.shape.inputs)
        return tirx.Select(tirx.all(column >= 0, column < width), value, self.v.constant(0.0))

    def _load(self, index: Expression) -> Expression:
        """Input lanes as float, codes less their zero point."""
        value = self.v.load(self.x, index)
        if self.region.activation is None:
            return value
        codes = T.cast(value, f"int32x{self.v.lanes}")
        return self.v.to_float(codes - self.v.constant(self.region.activation.zero_point, "int32"))
