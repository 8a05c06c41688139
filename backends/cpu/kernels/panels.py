"""Panels of outputs: how the kernels of dense layers cut their weights, and their loops over panels and rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx

from mcc.backends.cpu.epilogue import channel_vectors
from mcc.backends.cpu.integer_sums import float_start
from mcc.backends.cpu.kernels.ahead import NextPanel
from mcc.backends.cpu.kernels.region_function import region_function
from mcc.backends.cpu.kernels.tiles import PanelWidth, TileShape, leading_dims, panel_widths, row_blocks
from mcc.backends.cpu.microkernel import Expression, Register, Vectors, at_least_one, branch, parallel, product, serial
from mcc.ops import extent

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mcc.backends.cpu.epilogue import Epilogue
    from mcc.backends.kernel import Region

EmitTile: TypeAlias = Callable[[Expression, PanelWidth, Expression, int], None]
SERIAL_MACS = 1_500_000  # below about 30 us of work two threads cost more than they bring
ROW_BLOCK = 64


class PanelPlan:
    """Sizes of one dense layer's kernel, and its loops over panels of outputs and rows."""

    def __init__(self, region: Region, vectors: Vectors, tile: TileShape) -> None:
        self.region = region
        self.vectors = vectors
        self.tile = tile
        self.outputs, self.inputs = region.weight.shape[0], region.weight.shape[1]
        self.width = tile.vectors * vectors.lanes
        self.padded_outputs = -(-self.outputs // vectors.lanes) * vectors.lanes
        self.full_panels, self.full, self.tail = panel_widths(self.outputs, tile, vectors.lanes)
        self.leading = leading_dims(region.source.shape[:-1])
        self.products = self.inputs * self.outputs  # of a row, by which threads share the work or do not

    def function(self, name: str, packed: dict[str, NDArray[Any]], body: Any) -> tirx.PrimFunc:
        """The PrimFunc around `body`."""

        def emit(x: Expression, arrays: dict[str, Expression], epilogue: Epilogue) -> None:
            self.epilogue = epilogue
            body(x, *arrays.values())

        dims = (*self.leading, self.inputs), (*self.leading, self.outputs)
        return region_function(name, self.region, self.vectors, dims, packed, emit)

    def place(self, output: Expression) -> tuple[Expression, Expression, Expression]:
        """Of an output the first one of its panel, the width of that panel, and its lane there."""
        first = tirx.floordiv(output, self.width) * self.width
        return first, tirx.min(self.width, self.padded_outputs - first), output - first

    def loops(self, emit_tile: EmitTile, emit_row: EmitTile | None = None) -> None:
        """Call `emit_tile(panel, its width, first row, rows)` for every tile: blocks of rows, or one row alone.

        `emit_row` is called in its place for a layer's only row.
        """
        rows, alone = product(self.leading), emit_row or emit_tile
        if isinstance(rows, int):
            self._single(alone) if rows == 1 else self._blocks(rows, emit_tile)
        else:
            branch(rows == 1, lambda: self._single(alone), lambda: self._blocks(rows, emit_tile))

    @property
    def panels(self) -> int:
        """How many there are."""
        return self.full_panels + (1 if self.tail else 0)

    def in_panel(self, p: Expression, emit: Callable[[Expression, PanelWidth], None]) -> None:
        """Call `emit` with the panel and its width."""
        tail = self.tail
        if tail is None:
            emit(p, self.full)
        elif not self.full_panels:
            emit(p, tail)
        else:
            branch(p < self.full_panels, lambda: emit(p, self.full), lambda: emit(p, tail))

    def _single(self, emit_tile: EmitTile) -> None:
        loop = serial if self.products < SERIAL_MACS else parallel
        loop(self.panels, lambda p: self.in_panel(p, lambda q, v: emit_tile(q, v, 0, 1)))

    def _blocks(self, rows: Expression, emit_tile: EmitTile) -> None:
        count = -(-rows // ROW_BLOCK) if isinstance(rows, int) else tirx.floordiv(rows + ROW_BLOCK - 1, ROW_BLOCK)

        def block(i: Expression) -> None:
            whole = isinstance(count, int) and count == 1
            blocks = at_least_one(count)
            p, b = (i, 0) if whole else (tirx.floordiv(i, blocks), tirx.floormod(i, blocks))

            def tiles(q: Expression, v: PanelWidth) -> None:
                row_blocks(rows, b, ROW_BLOCK, self.tile.rows, lambda first, n: emit_tile(q, v, first, n))

            self.in_panel(p, tiles)

        few = rows * self.products < SERIAL_MACS
        total = self.panels * count
        branch(few, lambda: serial(total, block), lambda: parallel(total, block))

    def ahead(
        self, place: tuple[Expression, PanelWidth, Expression, int], weight: Expression, steps: int, words: int = 1
    ) -> Callable[[Expression], None]:
        """What a tile does for the next panel at each of so many steps; see ahead.py.

        Args:
            place: the panel, its width, the tile's first row and its rows.
            weight: all panels, in words.
            steps: of the tile.
            words: of each output that a step multiplies.
        """
        (panel, width, first, count), v, rows = place, self.vectors, product(self.leading)
        if self.panels == 1:
            return lambda _: None
        begin, size = (panel + 1) * (self.width * steps * words), self.padded_outputs * steps * words
        following = NextPanel(weight, size, begin, width.vectors * v.lanes * words, steps)
        return following.share(v, (first, count, rows), math.prod(map(extent, self.region.source.shape[:-1])))

    def sums_of_words(
        self,
        place: tuple[Expression, PanelWidth, Expression, int],
        start: Expression,
        operands: tuple[Expression, Expression, Expression],
        words: int,
        multiply: Callable[[Expression, Expression, Expression], Expression],
    ) -> list[list[Register]]:
        """The sums of a tile of a panel over words that hold several inputs, from a value for each output on.

        Args:
            place: the panel, its width, the tile's first row and its rows.
            start: what sums begin with, by output.
            operands: the words of weights and of rows, and where the tile's first row begins.
            words: of a row.
            multiply: adds to a sum the products of a word of a row and one of weights.
        """
        (panel, width, _, count), v, (weight, source, base) = place, self.vectors, operands
        sums = v.registers(count, width.vectors, start.dtype)
        for row in sums:
            for j, register in enumerate(row):
                register.set(v.load(start, panel * self.width + j * v.lanes))

        ask = self.ahead(place, weight, words)

        def step(k: Expression) -> None:
            ask(k)
            at = panel * (self.width * words) + k * (width.vectors * v.lanes)
            w = [B.Bind(v.load(weight, at + j * v.lanes)) for j in range(width.vectors)]
            for i in range(count):
                a = B.Bind(v.splat(source[base + i * words + k]))
                for register, part in zip(sums[i], w, strict=True):
                    register.set(multiply(register.get(), a, part))

        serial(words, step)
        return sums

    def channel_arrays(self) -> dict[str, NDArray[Any]]:
        """Bias, and scale where there is one, of every output of all panels."""
        return self._padded(channel_vectors(self.region))

    def float_starts(self) -> dict[str, NDArray[Any]]:
        """See `float_start`: of every output of all panels."""
        return self._padded(float_start(self.region))

    def _padded(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        beyond = self.padded_outputs - self.outputs
        return {key: np.pad(array, (0, beyond)) for key, array in arrays.items()}

    def finish(
        self,
        arrays: Mapping[str, Expression],
        first: Expression,
        column: Expression,
        sums: Sequence[Register],
        used: int,
    ) -> None:
        """Scale the float sums that rows from `first` on have of a vector of outputs, add the bias, and write them.

        Args:
            arrays: with those of `channel_arrays`.
            first: row.
            column: the vector's first output.
            sums: of a row each.
            used: lanes.
        """
        v = self.vectors
        bias = B.Bind(v.load(arrays["bias"], column))
        scale = B.Bind(v.load(arrays["scale"], column)) if "scale" in arrays else None
        for i, register in enumerate(sums):
            total = register.get()
            value = total + bias if scale is None else v.fma(total, scale, bias)
            self.store(first + i, column, value, used)

    def finish_row(
        self, arrays: Mapping[str, Expression], row: Expression, sums: Expression, begin: Expression
    ) -> None:
        """As `finish`, all outputs of a row whose sums stand in a buffer from `begin` on, begun with zero.

        Panels are of one vector.
        """
        v = self.vectors

        def vector(panel: Expression, width: PanelWidth) -> None:
            ((register,),) = v.registers(1, 1, "float32")
            total = v.load(sums, begin + panel * v.lanes)
            register.set(total + v.load(arrays["start"], panel * v.lanes) if "start" in arrays else total)
            self.finish(arrays, row, panel * v.lanes, [register], width.used_lanes(0, v.lanes))

        serial(self.panels, lambda p: self.in_panel(p, vector))

    def store(self, row: Expression, column: Expression, value: Expression, used: int) -> None:
        """Finish an output vector and write its first `used` lanes."""
        self.epilogue.store(value, row * self.outputs + column, used)
