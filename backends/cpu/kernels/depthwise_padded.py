"""The depthwise kernel for codes that reads a padded copy of the image: the faster one where borders are much of it.

Row by row of tiles, the image rows that are new to them are written as pairs into a buffer: 16-bit words (x0, x1) of
one channel for each even pixel, zero points beyond the border, so that tiles know none. Two pairs are interleaved as
quads. A tile finishes one vector of channels after the other: all its rows and columns share the quads and the weights,
since a CPU loads but one 64-byte vector a cycle.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.kernels.depthwise_body import FEWEST_MACS, Block, DepthwiseBody
from mcc.backends.cpu.kernels.quads import QUAD, interleave, pair, sort_channels
from mcc.backends.cpu.kernels.tiles import balanced, loop_for
from mcc.backends.cpu.microkernel import Expression, Register, Vectors, branch, serial

if TYPE_CHECKING:
    from mcc.backends.kernel import Region

BANDS = 8  # that an image is cut into for threads, at most
FEWEST_KERNELS = 4  # heights of the kernel that a band has


@dataclass(frozen=True)
class _Band:
    """Rows of output that are computed from one buffer of pairs.

    Attributes:
        top: the image row that the first tap of the first output row reads; negative above the image.
        image: index of the image's first code.
        target: index of the first output row's first value.
        room: the pairs, [image row][even pixel][half of every 128 bits][lane].
    """

    top: Expression
    image: Expression
    target: Expression
    room: Expression


class PaddedBody(DepthwiseBody):
    """See the module's text."""

    most_parts: ClassVar[int] = 2

    def __init__(self, region: Region, vectors: Vectors, tile: tuple[int, int]) -> None:
        super().__init__(region, vectors, tile)
        shape = self.shape
        self.reread = max(shape.rows_read(1) - shape.stride[0], 0)  # image rows that the output row before reads too
        self.band_rows = self._rows_of_a_band()
        # LLVM would take what all tiles read out of their loop and spill it: where that stands is read tile by tile
        self.packed["zeros"] = np.zeros(-(-shape.result[1] // self.columns), np.int32)

    def _width(self, parts: int) -> int:
        """Output columns of each of so many parts; the last part may overlap the one before."""
        columns: int = -(-self.shape.result[1] // parts)
        return columns

    def _apart(self, parts: int) -> int:
        """Output columns from one part to the next."""
        columns: int = self.shape.result[1] - self._width(parts)
        return columns

    def _line(self, parts: int) -> int:
        """Pairs of an image row that the output columns of a part read."""
        last = (self._width(parts) - 1) * self.shape.stride[1]
        pairs: int = last // 2 + 2 * -(-(last % 2 + self.shape.kernel[1]) // QUAD)
        return pairs

    def _rows_of_a_band(self) -> int:
        """All rows, or a part for threads to share: not so few that rows read by two bands count much."""
        shape = self.shape
        height, fewest = shape.result[0], max(1, FEWEST_KERNELS * shape.rows_read(1) // shape.stride[0])
        bands = min(BANDS, max(2, height // fewest)) if shape.macs >= FEWEST_MACS and height > 1 else 1
        rows: int = -(-height // max(bands, 1))
        return rows

    def loops(self) -> None:
        """See `ConvolutionBody`."""
        super().loops()
        self.bands = -(-self.shape.result[0] // self.band_rows)
        loop = loop_for(self.shape.macs, FEWEST_MACS, self.batch)
        loop(self.batch * self.bands, self._band)

    def _band(self, i: Expression) -> None:
        """A few rows of output, for all channels."""
        shape = self.shape
        n, band = B.Bind(T.cast(tirx.floordiv(i, self.bands), "int64")), tirx.floormod(i, self.bands)
        # the last band overlaps the one before rather than being of other height
        row = B.Bind(tirx.min(T.cast(band, "int64") * self.band_rows, shape.result[0] - self.band_rows))
        image = B.Bind(n * (shape.image[0] * shape.image[1] * shape.inputs))
        target = B.Bind((n * shape.result[0] + row) * (shape.result[1] * shape.outputs))
        size = (self.reread + self.band_rows * shape.stride[0]) * self._line(1) * 2 * self.v.lanes
        room = B.alloc_buffer((size,), "int32", layout=None)
        place = _Band(row * shape.stride[0] - shape.before[0], image, target, room)
        self.each_block(lambda block: self._block(block, place))

    def _block(self, block: Block, band: _Band) -> None:
        """Row by row of tiles: first the image rows that are new to them, which then are in the fastest cache."""
        stride, (whole, left) = self.shape.stride[0], divmod(self._width(block.parts), self.columns)
        serial(self.reread, lambda y: self._image_row(block, band, y))

        def tiles(row: Expression, rows: int) -> None:
            new = B.Bind(row * stride + self.reread)
            serial(rows * stride, lambda y: self._image_row(block, band, new + y))
            serial(whole, lambda t: self._tile(block, band, (row, t), (rows, self.columns)))
            if left:
                self._tile(block, band, (row, whole), (rows, left))

        for first, number, rows in balanced(self.band_rows, self.rows):
            serial(number, lambda r, f=first, n=rows: tiles(B.Bind(T.cast(r, "int64") * n + f), n))  # type: ignore[misc]

    def _image_row(self, block: Block, band: _Band, y: Expression) -> None:
        """Write image row `y` of a band as pairs."""
        v, shape = block.vectors, self.shape
        row = B.Bind(band.top + y)
        line = self._line(block.parts)
        target = B.Bind(T.cast(y, "int64") * (line * 2 * v.lanes))
        zeros = T.reinterpret(f"int32x{v.lanes}", self.zeros(v))

        def outside() -> None:
            serial(line * 2, lambda k: v.store(band.room, target + k * v.lanes, zeros))

        def inside() -> None:
            start = B.Bind(band.image + row * (shape.image[1] * shape.inputs) + block.first)
            self._pairs(block, start, target, band.room)

        branch(tirx.all(row >= 0, row < shape.image[0]), inside, outside)

    def _pairs(self, block: Block, start: Expression, target: Expression, room: Expression) -> None:
        """Write the pairs of the image row whose first code for the block stands at `start`."""
        v, (_, width), left = block.vectors, self.shape.image, self.shape.before[1]
        narrow, apart = Vectors(v.target, v.lanes // block.parts), self._apart(block.parts) * self.shape.stride[1]
        line = self._line(block.parts)

        def pixel(x: Expression) -> Expression:
            places = [x + n * apart for n in range(block.parts)]
            parts = [
                self.zeros(narrow)
                if isinstance(x, int) and not 0 <= x < width
                else v.load(self.x, start + x * self.shape.inputs, narrow.lanes * QUAD)
                for x in places
            ]
            codes = parts[0] if block.parts == 1 else tirx.Shuffle(parts, list(range(v.lanes * QUAD)))
            return B.Bind(codes if self.to_codes else sort_channels(v, codes))

        def write(p: Expression) -> None:
            made = pair(v, pixel(p * 2 - left), pixel(p * 2 - left + 1), (0, 1))
            for half, words in enumerate(made):
                v.store(room, target + (p * 2 + half) * v.lanes, T.reinterpret(f"int32x{v.lanes}", words))

        begin = min(-(-left // 2), line)
        end = max(begin, min((width - (block.parts - 1) * apart + left) // 2, line))
        for p in (*range(begin), *range(end, line)):
            write(p)
        serial(end - begin, lambda p: write(T.cast(p, "int64") + begin))

    def _tile(self, block: Block, band: _Band, place: tuple[Expression, Expression], size: tuple[int, int]) -> None:
        """Compute rows times columns of output: from row `place[0]` of the band on, tile number `place[1]` there."""
        v, shape, (row, t) = block.vectors, self.shape, place
        column = T.cast(t, "int64") * self.columns
        line = self._line(block.parts)
        first = row * (shape.stride[0] * line) + tirx.floordiv(column * shape.stride[1], 2)
        corner = B.Bind(first * (2 * v.lanes))
        block = replace(block, slot=B.Bind(block.slot + T.cast(self.arrays["zeros"][t], "int64")))
        targets = [
            B.Bind(band.target + ((row + i) * shape.result[1] + column + c) * shape.outputs + block.first)
            for i in range(size[0])
            for c in range(size[1])
        ]
        self.finish(block, (self._sums(block, band.room, (corner, q), size) for q in range(QUAD)), targets)

    def write(self, block: Block, index: Expression, codes: Expression) -> None:
        """As the base does it, part by part."""
        if block.parts == 1:
            super().write(block, index, codes)
            return
        count = block.vectors.lanes * QUAD // block.parts
        for n in range(block.parts):
            part = tirx.Shuffle([codes], list(range(n * count, (n + 1) * count)))
            place = index + n * self._apart(block.parts) * self.shape.outputs
            block.vectors.store(self.epilogue.out, place, part, count)

    def _sums(
        self, block: Block, room: Expression, place: tuple[Expression, int], size: tuple[int, int]
    ) -> list[Register]:
        """The sums of vector number `place[1]` of a block, for each pixel of a tile whose pairs begin at `place[0]`."""
        v, (corner, q), line = block.vectors, place, self._line(block.parts)
        sums = self.new_sums(block, q, size[0] * size[1])
        quads: dict[tuple[int, int], Expression] = {}
        weights: dict[int, Expression] = {}
        for use in sorted(self.uses(*size), key=lambda u: (u.word, u.pixel)):
            if use.word not in weights:
                weights[use.word] = B.Bind(self.weight(block, use.word, q))
            if (use.row, use.quad) not in quads:
                index = corner + ((use.row * line + use.quad // 2) * 2 + q // 2) * v.lanes
                first, second = (v.load(room, index + i * 2 * v.lanes) for i in range(2))
                quads[use.row, use.quad] = interleave(v, first, second, q % 2)
            total = sums[use.pixel]
            total.set(v.dot4(total.get(), quads[use.row, use.quad], weights[use.word], bounded=True))
        return sums
