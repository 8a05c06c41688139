"""The depthwise kernel for codes that reads the image where it lies; pixels beyond the border read the zero point.

A tile takes image row by image row, for all four vectors of a block of channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.kernels.depthwise_body import FEWEST_MACS, Block, DepthwiseBody
from mcc.backends.cpu.kernels.quads import QUAD, interleave, pair, sort_channels
from mcc.backends.cpu.kernels.tiles import loop_for
from mcc.backends.cpu.microkernel import Expression, branch, serial


@dataclass(frozen=True)
class _Rows:
    """Where a tile's rows lie.

    Attributes:
        top: the image row that the first tap of the first output row reads; negative above the image.
        image: index of the image's first code.
        target: index of the first output row's first value.
    """

    top: Expression
    image: Expression
    target: Expression


class DirectBody(DepthwiseBody):
    """See the module's text."""

    def loops(self) -> None:
        """See `ConvolutionBody`."""
        super().loops()
        self.bands = -(-self.shape.result[0] // self.rows)
        loop = loop_for(self.shape.macs, FEWEST_MACS, self.batch)
        loop(self.batch * self.bands, self._band)

    def _band(self, i: Expression) -> None:
        """A few rows of output."""
        shape = self.shape
        n, band = B.Bind(T.cast(tirx.floordiv(i, self.bands), "int64")), tirx.floormod(i, self.bands)
        # the last band overlaps the one before rather than being of other height
        row = B.Bind(tirx.min(T.cast(band, "int64") * self.rows, shape.result[0] - self.rows))
        top = B.Bind(row * shape.stride[0] - shape.before[0])
        image = B.Bind(n * (shape.image[0] * shape.image[1] * shape.inputs))
        target = B.Bind((n * shape.result[0] + row) * (shape.result[1] * shape.outputs))
        rows = _Rows(top, image, target)
        inside = B.Bind(tirx.all(top >= 0, top + shape.rows_read(self.rows) <= shape.image[0]))
        serial(-(-shape.result[1] // self.columns), lambda t: self._place(t, rows, inside))

    def _place(self, t: Expression, rows: _Rows, rows_inside: Expression) -> None:
        """Tile number `t` of a band, for all channels: that loop is the inner one, or LLVM would spill weights."""
        shape = self.shape
        start = B.Bind(tirx.min(T.cast(t, "int64") * self.columns, shape.result[1] - self.columns))
        first = self._column(start)
        last = first + (self.columns - 1) * shape.stride[1] + shape.kernel[1] - 1
        inside = tirx.all(rows_inside, first >= 0, last < shape.image[1])
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
        v, shape, size = block.vectors, self.shape, (self.rows, self.columns)
        targets = [
            B.Bind(rows.target + (i * shape.result[1] + start + c) * shape.outputs + block.first)
            for i in range(self.rows)
            for c in range(self.columns)
        ]
        sums = [self.new_sums(block, q, len(targets)) for q in range(QUAD)]
        pairs: dict[int, dict[int, list[Expression]]] = {}
        quads: dict[tuple[int, int], list[Expression]] = {}
        for use in sorted(self.uses(*size), key=lambda u: (u.row, u.quad, u.pixel % self.columns, u.pixel)):
            if use.row not in pairs:
                pairs[use.row] = self._pairs(block, rows, (use.row, start), inside=inside)
            if (use.row, use.quad) not in quads:
                first, second = pairs[use.row][use.quad], pairs[use.row][use.quad + 2]
                quads[use.row, use.quad] = [interleave(v, first[q // 2], second[q // 2], q % 2) for q in range(QUAD)]
            for q, words in enumerate(quads[use.row, use.quad]):
                total = sums[q][use.pixel]
                total.set(v.dot4(total.get(), words, self.weight(block, use.word, q), bounded=True))
        self.finish(block, sums, targets)

    def _pairs(
        self, block: Block, rows: _Rows, place: tuple[int, Expression], *, inside: bool
    ) -> dict[int, list[Expression]]:
        """Neighbouring pixels of the image row `place[0]` below a tile's first, by the first of them."""
        v, shape, (below, start) = block.vectors, self.shape, place
        (height, width), inputs = shape.image, shape.inputs
        read = {c * shape.stride[1] + k for c in range(self.columns) for k in range(shape.kernel[1])}
        row, column = rows.top + below, self._column(start)
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

        begins = sorted({p for use in self.uses(1, self.columns) for p in (use.quad, use.quad + 2)})
        return {p: pair(v, pixel(p), pixel(p + 1), (0, 1)) for p in begins}
