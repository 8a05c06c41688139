"""The loops of a dense layer in tile registers: blocks of two tiles of rows by two of outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import tvm.tirx.script.builder.ir as B
from tvm import tirx

from mcc.backends.cpu.kernels.tile_registers import (
    BLOCK_ROWS,
    PAIR_OF_TILES,
    WORD_BYTES,
    TileRegisters,
    in_pairs,
    words_of_a_step,
)
from mcc.backends.cpu.microkernel import Expression, Register, branch, parallel, product, serial
from mcc.ops import extent

if TYPE_CHECKING:
    from mcc.backends.cpu.kernels.panels import EmitTile, PanelPlan
    from mcc.backends.cpu.kernels.tiles import PanelWidth

Finish: TypeAlias = Callable[[Expression, int, Sequence[Expression], Sequence[Register]], None]
"""Writes sums: given the first output of a vector, how many of its lanes are used, the rows, and the sums of each."""

FEWEST_ROWS = 5  # fewer go one by one
CACHE_BYTES = 384 << 10  # of the rows that one pass over the panels reads
SERIAL_MACS = 10_000_000  # as those of panels.py, several of which take the time of one


class TiledPanels:
    """Loops over blocks.

    Args:
        plan: of the layer, panels of as many vectors as a block has tiles of outputs.
        dtype: of sums.
        words: of a row.
    """

    def __init__(self, plan: PanelPlan, dtype: str, words: int) -> None:
        self.plan, self.dtype, self.words = plan, dtype, words
        step = words_of_a_step(words)
        assert step is not None
        self.step = step
        self.rows = product(plan.leading)
        self.example = math.prod(map(extent, plan.region.source.shape[:-1]))

    def loops(self, operands: tuple[Expression, Expression, Expression], finish: Finish, emit_tile: EmitTile) -> None:
        """Emit them.

        Args:
            operands: the rows and the panels, in words, and what the sums of each output begin with.
            finish: called for rows of a block and a vector of outputs.
            emit_tile: emits a tile in vectors, see `PanelPlan.loops`, for few rows.
        """
        self.operands, self.finish = operands, finish
        branch(self.rows < FEWEST_ROWS, lambda: self.plan.loops(emit_tile), self._all_rows)

    def _all_rows(self) -> None:
        rows, v = self.rows, self.plan.vectors
        self.blocks, height = -(-rows // BLOCK_ROWS), in_pairs(rows)
        if not isinstance(rows, int):
            self.blocks, height = v.held_integer(self.blocks), v.held_integer(height)
        self.registers = TileRegisters(v, self.dtype, height, self.step)
        most = max(1, CACHE_BYTES // (BLOCK_ROWS * WORD_BYTES * self.words))
        chunk = min(most, self.blocks) if isinstance(rows, int) else most
        chunks = -(-self.blocks // chunk)

        def part(i: Expression) -> None:
            c, p = tirx.floordiv(i, self.plan.panels), tirx.floormod(i, self.plan.panels)
            count = tirx.min(chunk, self.blocks - c * chunk)

            def panel(q: Expression, width: PanelWidth) -> None:
                self.registers.blocks(
                    count,
                    lambda b: self._sums(q, width, c * chunk + b),
                    lambda b: self._write(q, width, c * chunk + b),
                )

            self.plan.in_panel(p, panel)

        few = rows * (self.plan.inputs * self.plan.outputs) < SERIAL_MACS
        loops = self.registers.shared(serial), self.registers.shared(parallel)
        total = self.plan.panels * chunks
        branch(few, lambda: loops[0](total, part), lambda: loops[1](total, part))

    def _first_rows(self, block: Expression) -> list[Expression]:
        """Of the tiles of a block; those beyond the last row begin earlier, and compute some rows again."""
        height = self.registers.rows
        before = block * (PAIR_OF_TILES * height)
        return [B.Bind(tirx.min(before + i * height, self.rows - height)) for i in range(PAIR_OF_TILES)]

    def _columns(self, panel: Expression, width: PanelWidth) -> list[Expression]:
        return [panel * self.plan.width + j * self.plan.vectors.lanes for j in range(width.vectors)]

    def _sums(self, panel: Expression, width: PanelWidth, block: Expression) -> None:
        plan, (source, weights, start) = self.plan, self.operands
        words, step, outputs = self.words, self.step, width.vectors * plan.vectors.lanes
        firsts = self._first_rows(block)
        before = block * (PAIR_OF_TILES * self.registers.rows)
        place = panel, width, before, min(BLOCK_ROWS, max(self.example, 1))
        ask = plan.ahead(place, weights, words // step, step)

        def steps(multiply: Callable[..., None]) -> None:
            def one(k: Expression) -> None:
                ask(k)
                rows = [(source, first * words + k * step) for first in firsts]
                multiply(rows, (weights, panel * (plan.width * words) + k * (step * outputs)))

            serial(words // step, one)

        self.registers.multiply([(start, column) for column in self._columns(panel, width)], steps, (words, outputs))

    def _write(self, panel: Expression, width: PanelWidth, block: Expression) -> None:
        firsts, lanes = self._first_rows(block), self.plan.vectors.lanes

        def write(places: list[tuple[int, Expression]], sums: Callable[[int], list[Register]]) -> None:
            rows = [firsts[tile] + row for tile, row in places]
            for j, column in enumerate(self._columns(panel, width)):
                self.finish(column, width.used_lanes(j, lanes), rows, sums(j))

        self.registers.vectors(write)
