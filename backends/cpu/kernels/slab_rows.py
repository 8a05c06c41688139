"""All rows of a linear layer by a sparse weight in slabs of inputs.

Lanes are rows of x. Tiles of them are transposed, a few at a time; then threads take parts of outputs of each, see
slab_products.py. Where the number of rows is known at run time only, those beyond whole tiles make narrower ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.kernels.slab_products import PartProducts, cut
from mcc.backends.cpu.kernels.tiles import PanelWidth, balanced, cover
from mcc.backends.cpu.microkernel import Expression, Register, branch, parallel, product, serial

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mcc.backends.cpu.kernels.panels import PanelPlan

VECTORS, SHORT_VECTORS = 4, 8  # of rows of a tile, where a vector has more than four lanes, and where it has four
AT_ONCE = 4  # tiles that are transposed before any is multiplied, or as many as threads need
SERIAL_PRODUCTS = 500_000  # below about 15 us of work two threads cost more than they bring


class SlabRows:
    """The loops of one layer, of panels that are a vector wide.

    Args:
        plan: of the layer.
        kept: elements of its weight.
    """

    def __init__(self, plan: PanelPlan, kept: int) -> None:
        self.plan, self.v, self.kept, self.rows = plan, plan.vectors, kept, product(plan.leading)
        self.vectors, wanted = SHORT_VECTORS if self.v.lanes == VECTORS else VECTORS, AT_ONCE
        if isinstance(self.rows, int):
            pieces = balanced(-(-self.rows // self.v.lanes), self.vectors)
            self.vectors = max(size for _, _, size in pieces)
            wanted = -(-AT_ONCE // sum(number for _, number, _ in pieces))
        self.cuts = cut((plan.outputs, plan.inputs), kept, self.vectors * self.v.lanes, self.v.lanes, wanted)
        self.at_once = max(1, AT_ONCE // self.cuts.parts)

    def emit(self, x: Expression, arrays: Mapping[str, Expression]) -> None:
        """Emit all of it.

        Args:
            x: all rows, one behind the other; float32 or codes.
            arrays: of the slabs and of the plan's channels; "start" where sums begin with something.
        """
        self.x, self.arrays = x, arrays
        self.products = PartProducts(self.v, self.cuts, self.arrays)
        lanes, held = self.v.lanes, self.at_once * self.vectors * self.v.lanes
        self.source = B.alloc_buffer((held * self.plan.inputs,), "float32", layout=None)
        self.sums = B.alloc_buffer((held * self.cuts.parts * self.cuts.part,), "float32", layout=None)
        if isinstance(self.rows, int):
            for first, number, vectors in balanced(-(-self.rows // lanes), self.vectors):
                self._rounds(first * lanes, number, vectors * lanes)
            return
        height = self.vectors * lanes
        tiles = self.v.held_integer(tirx.floordiv(self.rows, height))
        self._rounds(0, tiles, height)
        left = self.v.held_integer(tirx.floordiv(self.rows - tiles * height + lanes - 1, lanes))
        cover(left, self.vectors, lambda first, count: self._round(tiles * height + first * lanes, 1, count * lanes))

    def _rounds(self, row: Expression, tiles: Expression, height: int) -> None:
        """Tiles of as many rows each, a few at a time."""
        if isinstance(tiles, int):
            for first, number, size in balanced(tiles, self.at_once):

                def some(i: Expression, first: int = first, size: int = size) -> None:
                    self._round(row + (first + i * size) * height, size, height)

                serial(number, some)
            return

        def round_of(i: Expression) -> None:
            left = B.Bind(tirx.min(tiles - i * self.at_once, self.at_once))
            self._round(row + i * (self.at_once * height), left, height)

        serial(tirx.floordiv(tiles + self.at_once - 1, self.at_once), round_of)

    def _round(self, row: Expression, tiles: Expression, height: int) -> None:
        """Tiles side by side, of as many rows each: first all are transposed, then all parts multiplied."""
        squares, parts = -(-self.plan.inputs // self.v.lanes), self.cuts.parts
        room = self.plan.inputs * height

        def turn(i: Expression) -> None:
            tile, square = tirx.floordiv(i, squares), tirx.floormod(i, squares)
            self._transpose_in(row + tile * height, square, tile * room, height)

        def multiply(i: Expression) -> None:
            tile, part = tirx.floordiv(i, parts), tirx.floormod(i, parts)
            self._part(row + tile * height, part, (tile * room, i * (self.cuts.part * height)), height)

        known = tiles if isinstance(tiles, int) else 1
        each = serial if known * height * self.kept < SERIAL_PRODUCTS else parallel
        each(tiles * squares, turn)
        each(tiles * parts, multiply)

    def _transpose_in(self, row: Expression, square: Expression, begin: Expression, height: int) -> None:
        """A vector of inputs of all rows of a tile; rows beyond the last one repeat it."""
        v, inputs = self.v, self.plan.inputs
        first = B.Bind(tirx.min(square * v.lanes, inputs - v.lanes))

        def load(at: Expression) -> Expression:
            values = v.load(self.x, T.cast(tirx.min(row + at, self.rows - 1), "int64") * inputs + first)
            return B.Bind(v.to_float(values) if self.x.dtype == "uint8" else values)

        def some_rows(t: Expression) -> None:
            for i, column in enumerate(v.transpose([load(t * v.lanes + i) for i in range(v.lanes)])):
                v.store(self.source, begin + (first + i) * height + t * v.lanes, column)

        serial(height // v.lanes, some_rows)

    def _part(self, row: Expression, part: Expression, begins: tuple[Expression, Expression], height: int) -> None:
        """A part's outputs of a tile of rows.

        Args:
            row: the tile's first.
            part: which.
            begins: of the transposed rows and of the sums.
            height: rows.
        """
        v, plan, (source, sums) = self.v, self.plan, begins
        column = B.Bind(part * self.cuts.part)
        outputs = B.Bind(tirx.min(self.cuts.part, plan.padded_outputs - column))

        def begin(n: Expression) -> None:
            start = B.Bind(v.splat(self.arrays["start"][column + n] if "start" in self.arrays else T.float32(0)))
            for t in range(height // v.lanes):
                v.store(self.sums, sums + n * height + t * v.lanes, start)

        def finish(q: Expression) -> None:
            def squares(panel: Expression, width: PanelWidth) -> None:
                at = B.Bind(sums + q * (v.lanes * height))
                serial(
                    height // v.lanes,
                    lambda t: self._square(row + t * v.lanes, (at + t * v.lanes, height), panel, width),
                )

            plan.in_panel(tirx.floordiv(column, v.lanes) + q, squares)

        serial(outputs, begin)
        self.products.add(part, (self.source, source), (self.sums, sums), height)
        serial(tirx.floordiv(outputs, v.lanes), finish)

    def _square(self, row: Expression, sums: tuple[Expression, int], panel: Expression, width: PanelWidth) -> None:
        """Write a vector of outputs of a vector of rows, as many as there are.

        Args:
            row: the first.
            sums: where those of the first output begin, and how far from there those of the next do.
            panel: the vector of outputs.
            width: how many these are.
        """
        v, (begin, apart) = self.v, sums
        read = [B.Bind(v.load(self.sums, begin + i * apart)) for i in range(v.lanes)]
        (registers,) = v.registers(1, v.lanes, "float32")
        for register, turned in zip(registers, v.transpose(read), strict=True):
            register.set(turned)

        def write(first: Expression, rows: list[Register]) -> None:
            self.plan.finish(self.arrays, first, panel * v.lanes, rows, width.used_lanes(0, v.lanes))

        def some() -> None:
            for i, register in enumerate(registers):
                v.store(self.sums, begin + i * apart, register.get())
            serial(self.rows - row, one)

        def one(i: Expression) -> None:
            ((register,),) = v.registers(1, 1, "float32")
            register.set(v.load(self.sums, begin + i * apart))
            write(row + i, [register])

        whole = isinstance(self.rows, int) and self.rows % v.lanes == 0
        branch(whole or row + v.lanes <= self.rows, lambda: write(row, registers), some)
