"""Attention over codes whose products run in tile registers; what it computes is that of attention_int8.py.

A block is two tiles of queries, against two panels of keys and then against two vectors of values at a time. Both
products take as many words a step, so that the registers are prepared once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.kernels.attention import AttentionShape, batch_and_head
from mcc.backends.cpu.kernels.attention_int8 import MIDDLE, IntegerBody
from mcc.backends.cpu.kernels.quads import QUAD
from mcc.backends.cpu.kernels.tile_registers import (
    BLOCK_ROWS,
    PAIR_OF_TILES,
    TileRegisters,
    in_pairs,
    words_of_a_step,
)
from mcc.backends.cpu.microkernel import Expression, Register, Vectors, flat, parallel, serial

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcc.target import Target


def attention_int8_function(shape: AttentionShape, target: Target) -> tirx.PrimFunc:
    """A kernel over query, keys and values, the mask if there is one, and the float32 output.

    Scale and zero point follow their codes, so that attention of equal sizes shares a kernel. The depth is a multiple
    of four, the largest code of a probability is up to 255.
    """
    tiled = target.tiles and words_of_a_step(shape.depth // QUAD) is not None
    return (TiledAttention if tiled else IntegerBody)(shape, Vectors(target)).function()


class TiledAttention(IntegerBody):
    """The loops."""

    def __init__(self, shape: AttentionShape, vectors: Vectors) -> None:
        super().__init__(shape, vectors)
        step = words_of_a_step(self.steps)
        assert step is not None
        self.step = step
        self.block = BLOCK_ROWS
        # codes of a row, in whole steps and in whole vectors
        self.row_words = -(-self.padded // (QUAD * step)) * step + vectors.lanes // QUAD

    def emit(self) -> None:
        """Emit the loops."""
        s, rows = self.shape, self.shape.rows
        self.height = in_pairs(rows) if isinstance(rows, int) else self.v.held_integer(in_pairs(rows))
        self.registers = TileRegisters(self.v, "int32", self.height, self.step)

        def head(i: Expression) -> None:
            b, h = batch_and_head(i, s.heads)
            self.prepare_head(b, h)
            self.code_words = flat(self.codes, self.row_words * self.block, "int32")
            self.terms_room, self.totals, self.none = (
                B.alloc_buffer((size,), "int32", layout=None) for size in (self.block, self.block, self.v.lanes)
            )
            self.factors = B.alloc_buffer((self.block,), "float32", layout=None)
            self.v.store(self.none, 0, self.v.constant(0, "int32"))
            serial(-(-rows // self.block), lambda r: self._rows_of_block(b, h, r * (PAIR_OF_TILES * self.height)))

        self.registers.shared(parallel)(s.batch * s.heads, head)

    def _rows_of_block(self, b: Expression, h: Expression, first: Expression) -> None:
        last = self.shape.rows - self.height
        firsts = [B.Bind(tirx.min(first + i * self.height, last)) for i in range(PAIR_OF_TILES)]
        query, out = self.query.place(b, h), self.out.place(b, h)
        seen, count = self.seen(firsts[1], self.height)
        less = T.int32(MIDDLE) - self.zero[1]
        self._products_with_keys([B.Bind(query[0] + f * query[1]) for f in firsts], query[1], less, count)

        def row(tile: int, i: Expression) -> None:
            place = tile * self.height + i
            self.mask_row((b, h, firsts[tile] + i), self.scores, place, seen, count)
            factor, total = self.to_codes(place, count)
            B.buffer_store(self.factors, factor, [place])
            B.buffer_store(self.totals, total, [place])
            # of the last step, what lies beyond the keys that are seen
            with B.serial(0, -(-self._steps_over(count) * (QUAD * self.step) // self.v.lanes) - count) as p:
                at = place * (self.row_words * QUAD) + (count + p) * self.v.lanes
                self.v.store(self.codes, at, T.broadcast(T.uint8(0), self.v.lanes))

        for tile in range(PAIR_OF_TILES):
            serial(self.height, lambda i, t=tile: row(t, i))  # type: ignore[misc]
        self._products_with_values([B.Bind(out[0] + f * out[1]) for f in firsts], out[1], count)

    def _products_with_keys(self, starts: list[Expression], apart: int, less: Expression, count: Expression) -> None:
        """Scores of all rows of a block and the first `count` panels of keys."""
        v, height, panel_words = self.v, self.height, self.steps * self.v.lanes
        for tile, start in enumerate(starts):

            def term(i: Expression, tile: int = tile, start: Expression = start) -> None:
                B.buffer_store(self.terms_room, self.sum_of_query(start + i * apart) * less, [tile * height + i])

            serial(height, term)

        def sums(p: Expression, panels: int) -> None:
            begin = [(self.starts_room, (p + j) * v.lanes) for j in range(panels)]

            def steps(multiply: Callable[..., None]) -> None:
                def one(k: Expression) -> None:
                    rows = [(self.query.data, start + k * self.step) for start in starts]
                    multiply(rows, (self.panels_room, p * panel_words + k * (self.step * v.lanes)))

                serial(self.steps // self.step, one)

            self.registers.multiply(begin, steps, (apart, v.lanes), panel_words)

        def write(p: Expression, panels: int) -> None:
            def four(places: list[tuple[int, Expression]], found: Callable[[int], list[Register]]) -> None:
                for j in range(panels):
                    for (tile, i), total in zip(places, found(j), strict=True):
                        row = tile * height + i
                        score = self.score(total.get() + v.splat(self.terms_room[row]))
                        v.store(self.scores, row * self.padded + (p + j) * v.lanes, score)

            self.registers.vectors(four)

        pairs = tirx.floordiv(count, PAIR_OF_TILES)
        self.registers.blocks(
            pairs, lambda p: sums(p * PAIR_OF_TILES, PAIR_OF_TILES), lambda p: write(p * PAIR_OF_TILES, PAIR_OF_TILES)
        )
        left = count - pairs * PAIR_OF_TILES
        self.registers.blocks(left, lambda p: sums(count - 1 + p, 1), lambda p: write(count - 1 + p, 1))

    def _steps_over(self, count: Expression) -> Expression:
        """Steps that go over so many vectors of keys."""
        return -(-count * self.v.lanes // (QUAD * self.step))

    def _products_with_values(self, outs: list[Expression], apart: int, count: Expression) -> None:
        v, height, vectors = self.v, self.height, len(self.starts)
        zero = B.Bind(self.zero[2] - T.int32(MIDDLE))

        def sums(at: int) -> None:
            tiles = min(PAIR_OF_TILES, vectors - at)

            def steps(multiply: Callable[..., None]) -> None:
                def one(k: Expression) -> None:
                    rows = [
                        (self.code_words, t * height * self.row_words + k * self.step) for t in range(PAIR_OF_TILES)
                    ]
                    multiply(rows, (self.values_room, (k * (self.step * vectors) + at) * v.lanes))

                with B.serial(0, self._steps_over(count)) as k:
                    one(k)

            self.registers.multiply([(self.none, 0)] * tiles, steps, (self.row_words, vectors * v.lanes))

        def write(at: int) -> None:
            def four(places: list[tuple[int, Expression]], found: Callable[[int], list[Register]]) -> None:
                for j, start in enumerate(self.starts[at : at + PAIR_OF_TILES]):
                    for (tile, i), total in zip(places, found(j), strict=True):
                        row = tile * height + i
                        value = v.to_float(total.get() - v.splat(self.totals[row] * zero)) * v.splat(self.factors[row])
                        v.store(self.out.data, outs[tile] + i * apart + start, value)

            self.registers.vectors(four)

        for at in range(0, vectors, PAIR_OF_TILES):
            self.registers.blocks(1, lambda _, at=at: sums(at), lambda _, at=at: write(at))  # type: ignore[misc]
