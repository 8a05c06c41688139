"""The depthwise kernel for codes that reads the image where it lies; pixels beyond the border read the zero point.

A tile takes image row by image row, for all four vectors of a block of channels, or for two of them and then the other
two, which needs half the registers and reads pixels twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.kernels.depthwise_body import FEWEST_MACS, Block, DepthwiseBody
from mcc.backends.cpu.kernels.quads import QUAD, interleave, pair, sort_channels
from mcc.backends.cpu.kernels.tiles import loop_for
from mcc.backends.cpu.microkernel import Expression, Register, branch, serial

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


@dataclass(frozen=True)
class _Rows:
    """Where a tile's rows lie.

    Attributes:
        size: output rows and columns of a tile.
        top: the image row that the first tap of the first output row reads; negative above the image.
        image: index of the image's first code.
        target: index of the first output row's first value.
    """

    size: tuple[int, int]
    top: Expression
    image: Expression
    target: Expression


class DirectBody(DepthwiseBody):
    """All vectors of a block at once."""

    parts: ClassVar[tuple[tuple[int, ...], ...]] = ((0, 1, 2, 3),)

    def loops(self) -> None:
        """See `ConvolutionBody`."""
        super().loops()
        (height, width), (rows, columns) = self.shape.result, self.tile
        if not self.shape.varies:
            self._bands(self.tile)
        else:
            large = tirx.all(height >= rows, width >= columns)
            branch(large, lambda: self._bands(self.tile), lambda: self._bands((1, 1)))

    def _bands(self, size: tuple[int, int]) -> None:
        """All tiles of a size."""
        bands = -(-self.shape.result[0] // size[0])
        if not isinstance(bands, int):
            bands = self.v.held_integer(bands)
        loop = loop_for(self.shape.macs, FEWEST_MACS, self.batch)
        loop(self.batch * bands, lambda i: self._band(i, bands, size))

    def _band(self, i: Expression, bands: Expression, size: tuple[int, int]) -> None:
        """A few rows of output."""
        shape = self.shape
        n, band = B.Bind(T.cast(tirx.floordiv(i, bands), "int64")), tirx.floormod(i, bands)
        # the last band overlaps the one before rather than being of other height
        row = B.Bind(tirx.min(T.cast(band, "int64") * size[0], shape.result[0] - size[0]))
        top = B.Bind(row * shape.stride[0] - shape.before[0])
        image = B.Bind(n * (shape.image[0] * shape.image[1] * shape.inputs))
        target = B.Bind((n * shape.result[0] + row) * (shape.result[1] * shape.outputs))
        rows = _Rows(size, top, image, target)
        inside = B.Bind(tirx.all(top >= 0, top + shape.rows_read(size[0]) <= shape.image[0]))
        serial(-(-shape.result[1] // size[1]), lambda t: self._place(t, rows, inside))

    def _place(self, t: Expression, rows: _Rows, rows_inside: Expression) -> None:
        """Tile number `t` of a band, for all channels: that loop is the inner one, or LLVM would spill weights."""
        shape, columns = self.shape, rows.size[1]
        start = B.Bind(tirx.min(T.cast(t, "int64") * columns, shape.result[1] - columns))
        first = self._column(start)
        last = first + (columns - 1) * shape.stride[1] + shape.kernel[1] - 1
        # an image smaller than a tile is nearly all border
        inside = tirx.all(rows_inside, first >= 0, last < shape.image[1]) if rows.size == self.tile else False
        branch(
            inside,
            lambda: self.each_block(lambda block: self._tile(block, rows, start, inside=True)),
            lambda: self.each_block(lambda block: self._tile(block, rows, start, inside=False)),
        )

    def _column(self, start: Expression) -> Expression:
        """The input column that the first tap of output column `start` reads."""
        return start * self.shape.stride[1] - self.shape.before[1]

    def _tile(self, block: Block, rows: _Rows, start: Expression, *, inside: bool) -> None:
        """Compute one tile; `inside`: whether all it reads lies in the image."""
        shape = self.shape
        targets = [
            B.Bind(rows.target + (i * shape.result[1] + start + c) * shape.outputs + block.first)
            for i in range(rows.size[0])
            for c in range(rows.size[1])
        ]
        self.finish(block, self._all_sums(block, rows, start, inside=inside), targets)

    def _all_sums(self, block: Block, rows: _Rows, start: Expression, *, inside: bool) -> Iterator[list[Register]]:
        """The sums of each vector of a block for all pixels of a tile, part by part."""
        v, shared, columns = block.vectors, block.first, rows.size[1]
        uses = sorted(self.uses(*rows.size), key=lambda u: (u.row, u.quad, u.pixel % columns, u.pixel))
        for part in self.parts:
            if part[0]:
                # read anew, or LLVM would keep all pixels of the part before and spill them
                block = replace(block, first=shared + T.cast(self.arrays["zero"][0], "int64"))
            halves = sorted({q // 2 for q in part})
            sums = {q: self.new_sums(block, q, rows.size[0] * columns) for q in part}
            pairs: dict[int, dict[int, list[Expression]]] = {}
            quads: dict[tuple[int, int], list[Expression]] = {}
            for use in uses:
                if use.row not in pairs:
                    pairs[use.row] = self._pairs(block, rows, (use.row, start), halves, inside=inside)
                if (use.row, use.quad) not in quads:
                    first, second = (dict(zip(halves, pairs[use.row][use.quad + p], strict=True)) for p in (0, 2))
                    quads[use.row, use.quad] = [interleave(v, first[q // 2], second[q // 2], q % 2) for q in part]
                for q, words in zip(part, quads[use.row, use.quad], strict=True):
                    total = sums[q][use.pixel]
                    total.set(v.dot4(total.get(), words, self.weight(block, use.word, q), bounded=True))
            yield from sums.values()

    def _pairs(
        self, block: Block, rows: _Rows, place: tuple[int, Expression], halves: list[int], *, inside: bool
    ) -> dict[int, list[Expression]]:
        """Neighbouring pixels of the image row `place[0]` below a tile's first, by the first of them."""
        v, shape, (below, start) = block.vectors, self.shape, place
        (height, width), inputs = shape.image, shape.inputs
        columns = rows.size[1]
        read = {c * shape.stride[1] + k for c in range(columns) for k in range(shape.kernel[1])}
        row, column = rows.top + below, self._column(start)
        if shape.varies and not inside:  # simplifying what is compared with variables takes TVM seconds
            row, column = v.held_integer(row), v.held_integer(column)
        nearest = row if inside else tirx.max(0, tirx.min(row, height - 1))
        line = B.Bind(rows.image + nearest * (width * inputs) + block.first)
        corner = B.Bind(line + column * inputs) if inside else None

        def pixel(offset: int) -> Expression:
            if offset not in read:
                return self.zeros(v)
            if corner is not None:
                codes = v.load(self.x, corner + offset * inputs, v.lanes * QUAD)
            else:
                at = column + offset
                here = tirx.all(row >= 0, row < height, at >= 0, at < width)
                held = v.load(self.x, line + tirx.max(0, tirx.min(at, width - 1)) * inputs, v.lanes * QUAD)
                codes = tirx.Select(here, held, self.zeros(v))
            return B.Bind(codes if self.to_codes else sort_channels(v, codes))

        begins = sorted({p for use in self.uses(1, columns) for p in (use.quad, use.quad + 2)})
        return {p: pair(v, pixel(p), pixel(p + 1), halves) for p in begins}


class HalvesBody(DirectBody):
    """Two vectors of a block, then the other two."""

    parts: ClassVar[tuple[tuple[int, ...], ...]] = ((0, 1), (2, 3))

    def _packed(self) -> dict[str, NDArray[Any]]:
        return super()._packed() | {"zero": np.zeros(1, np.int32)}
