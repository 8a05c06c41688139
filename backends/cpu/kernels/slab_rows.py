"""All rows of a linear layer by a sparse weight in slabs of inputs.

Lanes are rows of x, transposed tile by tile; see slab_products.py. Threads take tiles or, of few large ones, parts of
outputs. Where the number of rows is known at run time only, those beyond whole tiles make narrower ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.kernels.slab_products import PartProducts, cut
from mcc.backends.cpu.kernels.tiles import PanelWidth, balanced, cover
from mcc.backends.cpu.microkernel import Expression, Register, branch, parallel, product, serial
from mcc.slabs import Elements

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mcc.backends.cpu.kernels.panels import PanelPlan
    from mcc.backends.kernel import SparseArrays

VECTORS = {4: 8, 8: 4, 16: 4}  # of rows of a tile, by the lanes of each
SERIAL_PRODUCTS = 1_200_000  # below about 30 us of work two threads cost more than they bring
SERIAL_TILE = 4_000_000  # of one tile, which threads would read from each other's caches
MANY_TILES = 8  # enough for threads to take whole ones


@dataclass(frozen=True)
class _Room:
    """Where a tile of rows is computed.

    Attributes:
        source: the rows transposed, [inputs, rows].
        sums: of a part, transposed too.
        source_begin, sums_begin: of the tile and of the part there.
        height: rows.
    """

    source: Expression
    sums: Expression
    source_begin: Expression
    sums_begin: Expression
    height: int

    def of(self, height: int) -> _Room:
        """Of a tile that is no higher."""
        return replace(self, height=height)


def elements_of(weight: SparseArrays) -> Elements:
    """What is stored of a weight, element by element, which are blocks where it has such."""
    outputs = np.repeat(np.arange(len(weight.row_pointers) - 1), np.diff(weight.row_pointers))
    return Elements(weight.values.reshape(-1, *weight.block), outputs, weight.columns)


class SlabRows:
    """The loops of one layer, of panels that are a vector wide.

    Args:
        plan: of the layer.
        weight: what is stored.
    """

    def __init__(self, plan: PanelPlan, weight: SparseArrays) -> None:
        self.plan, self.v, self.kept, self.rows = plan, plan.vectors, weight.values.size, product(plan.leading)
        self.vectors, self.pieces, units = VECTORS[self.v.lanes], [], 1
        if isinstance(self.rows, int):
            self.pieces = balanced(-(-self.rows // self.v.lanes), self.vectors)
            self.vectors = max(size for _, _, size in self.pieces)
            units = sum(number for _, number, _ in self.pieces)
        height = self.vectors * self.v.lanes
        wanted = -(-MANY_TILES // units) if height * self.kept >= SERIAL_TILE else 1
        self.cuts = cut(weight, (plan.outputs, plan.inputs), height, self.v.lanes, wanted)
        self.part = self.cuts.part * weight.block[0]
        self.squares = -(-plan.inputs // self.v.lanes)

    def emit(self, x: Expression, arrays: Mapping[str, Expression], rows: Expression | None = None) -> None:
        """Emit all of it.

        Args:
            x: all rows, one behind the other; float32 or codes.
            rows: how many of them, where that is not all.
            arrays: of the slabs and of the plan's channels; "start" where sums begin with something.
        """
        self.x, self.arrays, lanes = x, arrays, self.v.lanes
        self.rows = self.rows if rows is None else rows
        self.products = PartProducts(self.v, self.cuts, self.arrays)
        # of the highest tiles, once: every buffer costs even the calls that use none
        self.room = self._room(1, 1, self.vectors * lanes)
        if isinstance(self.rows, int):
            self._share([(first * lanes, number, vectors * lanes) for first, number, vectors in self.pieces])
            return
        height = self.vectors * lanes
        # a tile that lacks one vector at most is whole: to cut it into narrower ones takes as long
        tiles = self.v.held_integer(tirx.floordiv(self.rows + 2 * lanes - 1, height))
        self._share([(0, tiles, height)])
        left = self.v.held_integer(tirx.max(tirx.floordiv(self.rows - tiles * height + lanes - 1, lanes), 0))

        def narrower(first: Expression, vectors: int) -> None:
            self._share([(tiles * height + first * lanes, 1, vectors * lanes)])

        cover(left, self.vectors // 2, narrower)

    def _share(self, pieces: list[tuple[Expression, Expression, int]]) -> None:
        """Share tiles among threads, where they are worth it: (the first row, how many tiles, rows of each)."""
        parts, units = self.cuts.parts, sum((number for _, number, _ in pieces[1:]), pieces[0][1])
        work = self.kept * max(height for _, _, height in pieces)

        def unit(t: Expression, room: _Room) -> None:
            (row, number, height), *others = pieces
            if not others:
                self._alone(row + t * height, room.of(height))
                return
            ((second, _, lower),) = others
            branch(
                t < number,
                lambda: self._alone(row + t * height, room.of(height)),
                lambda: self._alone(second + (t - number) * lower, room.of(lower)),
            )

        def of_a_thread(t: Expression) -> None:
            unit(t, self._room(1, 1, max(height for _, _, height in pieces)))

        def shared() -> None:
            for row, tiles, height in pieces:
                self._shared(row, tiles, height)

        most_serial = max(SERIAL_PRODUCTS // max(work, 1), 1 if work < SERIAL_TILE else 0)
        whole = parts == 1 or units >= MANY_TILES
        branch(
            units <= most_serial,
            lambda: serial(units, lambda t: unit(t, self.room)),
            lambda: branch(whole, lambda: parallel(units, of_a_thread), shared),
        )

    def _alone(self, row: Expression, room: _Room) -> None:
        """A tile of rows by one thread."""
        serial(self.squares, lambda s: self._transpose_in(row, s, room))
        serial(self.cuts.parts, lambda p: self._part(row, p, room))

    def _shared(self, row: Expression, tiles: Expression, height: int) -> None:
        """Threads share few tiles: first all transpose them, then each multiplies parts."""
        parts, most = self.cuts.parts, tiles if isinstance(tiles, int) else MANY_TILES
        room = self._room(most, most * parts, height)

        def turn(i: Expression) -> None:
            tile, square = tirx.floordiv(i, self.squares), tirx.floormod(i, self.squares)
            self._transpose_in(row + tile * height, square, self._in(room, tile, 0))

        def multiply(i: Expression) -> None:
            tile, part = tirx.floordiv(i, parts), tirx.floormod(i, parts)
            self._part(row + tile * height, part, self._in(room, tile, i))

        parallel(tiles * self.squares, turn)  # cut as below: most that a thread multiplies lies in its own cache
        parallel(tiles * parts, multiply)

    def _room(self, tiles: int, parts: int, height: int) -> _Room:
        sizes = tiles * self.plan.inputs * height, parts * self.part * height
        source, sums = (B.alloc_buffer((size,), "float32", layout=None) for size in sizes)
        return _Room(source, sums, 0, 0, height)

    def _in(self, room: _Room, tile: Expression, part: Expression) -> _Room:
        """A room's tile and part of all tiles' parts."""
        begins = tile * (self.plan.inputs * room.height), part * (self.part * room.height)
        return replace(room, source_begin=begins[0], sums_begin=begins[1])

    def _transpose_in(self, row: Expression, square: Expression, room: _Room) -> None:
        """A vector of inputs of all rows of a tile; rows beyond the last one repeat it."""
        v, inputs, height = self.v, self.plan.inputs, room.height
        first = B.Bind(tirx.min(square * v.lanes, inputs - v.lanes))

        def load(at: Expression) -> Expression:
            values = v.load(self.x, T.cast(tirx.min(row + at, self.rows - 1), "int64") * inputs + first)
            return B.Bind(v.to_float(values) if self.x.dtype == "uint8" else values)

        def some_rows(t: Expression) -> None:
            for i, column in enumerate(v.transpose([load(t * v.lanes + i) for i in range(v.lanes)])):
                v.store(room.source, room.source_begin + (first + i) * height + t * v.lanes, column)

        serial(height // v.lanes, some_rows)

    def _part(self, row: Expression, part: Expression, room: _Room) -> None:
        """A part's outputs of a tile of rows from `row` on."""
        v, plan, height = self.v, self.plan, room.height
        column = B.Bind(part * self.part)
        outputs = B.Bind(tirx.min(self.part, plan.padded_outputs - column))

        def begin(n: Expression) -> None:
            start = B.Bind(v.splat(self.arrays["start"][column + n] if "start" in self.arrays else T.float32(0)))
            for t in range(height // v.lanes):
                v.store(room.sums, room.sums_begin + n * height + t * v.lanes, start)

        def finish(q: Expression) -> None:
            def squares(panel: Expression, width: PanelWidth) -> None:
                serial(
                    height // v.lanes,
                    lambda t: self._square(
                        row + t * v.lanes, q * (v.lanes * height) + t * v.lanes, room, (panel, width)
                    ),
                )

            plan.in_panel(tirx.floordiv(column, v.lanes) + q, squares)

        serial(outputs, begin)
        self.products.add(part, (room.source, room.source_begin), (room.sums, room.sums_begin), height)
        serial(tirx.floordiv(outputs, v.lanes), finish)

    def _square(self, row: Expression, begin: Expression, room: _Room, panel: tuple[Expression, PanelWidth]) -> None:
        """Write a vector of outputs of a vector of rows, as many as there are.

        Args:
            row: the first.
            begin: of the first output's sums, from those of its part on.
            room: that has them.
            panel: the vector of outputs, and its width.
        """
        v, (number, width) = self.v, panel
        places = [room.sums_begin + begin + i * room.height for i in range(v.lanes)]
        read = [B.Bind(v.load(room.sums, place)) for place in places]
        (registers,) = v.registers(1, v.lanes, "float32")
        for register, turned in zip(registers, v.transpose(read), strict=True):
            register.set(turned)

        def write(first: Expression, rows: list[Register]) -> None:
            self.plan.finish(self.arrays, T.cast(first, "int64"), number * v.lanes, rows, width.used_lanes(0, v.lanes))

        def some() -> None:
            for place, register in zip(places, registers, strict=True):
                v.store(room.sums, place, register.get())
            serial(self.rows - row, one)

        def one(i: Expression) -> None:
            ((register,),) = v.registers(1, 1, "float32")
            register.set(v.load(room.sums, places[0] + i * room.height))
            write(row + i, [register])

        whole = isinstance(self.rows, int) and self.rows % v.lanes == 0
        branch(whole or row + v.lanes <= self.rows, lambda: write(row, registers), some)
