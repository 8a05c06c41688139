"""Blocks of sums in AMX's tile registers: two tiles of rows times one or two of columns.

A tile has up to 16 rows of 64 bytes. One instruction multiplies a tile of rows, each up to 16 words of four codes (or
of two bfloat16), with a tile of as many words of 16 columns, which is how panels of weights lie, and adds the products
to a tile of 16 x 16 sums. A block takes four such products for two loads of rows and two of columns. Its sums are
written to memory, which the epilogue reads as vectors.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import tvm
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.microkernel import Expression, Register, Vectors, branch, serial

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

TILE = "amx"  # among the tiles of a kernel, the one in these registers
TILE_ROWS = 16
PAIR_OF_TILES = 2
MOST_WORDS = 16  # of a row of a tile
FEWEST_WORDS = 4  # below which too much of a tile is empty
MOST_CONFIGURED = 8  # times that the threads of one call together prepare the registers, some 100 ns each
WORD_BYTES = 4
BLOCK_ROWS = PAIR_OF_TILES * TILE_ROWS
BLOCK = BLOCK_ROWS**2  # sums

_ROWS, _COLUMNS = (4, 5), (6, 7)  # registers; 0 to 3 hold sums
_MULTIPLY = {"int32": "tdpbusd", "float32": "tdpbf16ps"}

Place: TypeAlias = tuple[Expression, Expression]
"""A buffer of words and an index in it."""


def words_of_a_step(run: int) -> int | None:
    """The most words that a tile may take at once of `run` ones side by side, cut evenly; None where they are few."""
    sizes = [run // count for count in range(max(1, -(-run // MOST_WORDS)), run + 1) if run % count == 0]
    return sizes[0] if sizes and sizes[0] >= FEWEST_WORDS else None


def in_pairs(extent: Expression) -> Expression:
    """Rows of a tile, where an extent, known or not, is cut into pairs of tiles with the least left over."""
    tiles = PAIR_OF_TILES * -(-extent // BLOCK_ROWS)
    return -(-extent // (tiles if isinstance(extent, int) else tirx.max(tiles, 1)))


class TileRegisters:
    """The registers of one kernel.

    Args:
        v: vectors of the target.
        dtype: of sums: "int32" of codes, unsigned rows times signed columns, or "float32" of bfloat16.
        rows: of a tile of rows.
        words: of each of these rows.
    """

    def __init__(self, v: Vectors, dtype: str, rows: Expression, words: int) -> None:
        self.v, self.dtype, self.rows, self.words = v, dtype, rows, words

    def shared(self, loop: Callable[..., None]) -> Callable[..., None]:
        """The same loop, whose body may use the registers: each thread prepares its own, for many turns at once."""

        def shared_loop(extent: Expression, body: Callable[[Expression], None]) -> None:
            groups = 1 if loop is serial else MOST_CONFIGURED
            if isinstance(extent, int):
                groups = max(1, min(groups, extent))
            size = -(-extent // groups)

            def group(g: Expression) -> None:
                with self._prepared():
                    first = g * size
                    serial(tirx.min(size, extent - first) if groups > 1 else extent, lambda i: body(first + i))

            loop(groups, group)

        return shared_loop

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        config = B.alloc_buffer((16,), "int32", scope="global", layout=None)
        rows, columns = tirx.const(WORD_BYTES * self.words, "int32"), 4 * TILE_ROWS
        height = T.cast(self.rows, "int32")
        halves = {4: (columns, columns), 5: (columns, columns), 6: (rows, rows), 7: (columns, columns)}
        for word in range(16):
            value: Expression = tirx.const(int(word == 0), "int32")  # the first byte is the palette's number
            if word in halves:
                low, high = halves[word]
                value = low + high * (1 << 16)
            B.buffer_store(config, T.cast(value, "int32"), [word])
        B.buffer_store(config, height * 0x01010101, [12])
        B.buffer_store(config, height * 0x0101 + self.words * 0x01010000, [13])
        _call("ldtilecfg", T.address_of(config[0]))
        self.room = B.alloc_buffer((PAIR_OF_TILES * BLOCK,), self.dtype, layout=None)
        yield
        _call("tilerelease")

    def blocks(
        self, count: Expression, sums: Callable[[Expression], None], write: Callable[[Expression], None]
    ) -> None:
        """Blocks one after another: `sums` calls `multiply` for one, `write` calls `vectors`, while the next is summed.

        The CPU works on both at once then: a block's own sums take longer to come than its instructions to be read.
        """

        def in_room(block: Expression, emit: Callable[[Expression], None]) -> None:
            self._at_room = tirx.floormod(block, 2) * BLOCK
            emit(block)

        with B.serial(0, count + 1) as t:
            branch(t < count, lambda: in_room(t, sums))
            branch(t > 0, lambda: in_room(t - 1, write))

    def multiply(
        self,
        start: Sequence[Place],
        steps: Callable[[Callable[[Sequence[Place], Place], None]], None],
        strides: tuple[Expression, int],
        apart: int = TILE_ROWS,
    ) -> None:
        """Compute a block and write its sums where `vectors` finds them.

        Args:
            start: what the sums of each tile of columns begin with, by column.
            steps: emits the loops: it calls what it is given with the words that each tile of rows reads, and with
                those of all tiles of columns side by side.
            strides: words from one row to the next, and from one word of a column to the next.
            apart: words from one tile of columns to the next.
        """
        tiles = range(len(start))
        for i in range(PAIR_OF_TILES):
            for j in tiles:
                _load(PAIR_OF_TILES * i + j, start[j], 0)

        def step(rows: Sequence[Place], columns: Place) -> None:
            weights, first = columns
            # loads between multiplications, a tenth faster than all of them first
            for i, place in enumerate(rows):
                _load(_ROWS[i], place, strides[0])
                for j in tiles:
                    if i == 0:
                        _load(_COLUMNS[j], (weights, first + j * apart), strides[1])
                    self._multiply(i, j)

        steps(step)
        for i in range(PAIR_OF_TILES):
            for j in tiles:
                place = T.address_of(self.room[self._at(i, 0, j)])
                _call("tilestored64", T.int8(PAIR_OF_TILES * i + j), place, T.int64(WORD_BYTES * BLOCK_ROWS))

    def multiply_held(self) -> None:
        """Multiply the tiles that the registers hold, two by two."""
        for i in range(PAIR_OF_TILES):
            for j in range(PAIR_OF_TILES):
                self._multiply(i, j)

    def _multiply(self, i: int, j: int) -> None:
        _call(_MULTIPLY[self.dtype], T.int8(PAIR_OF_TILES * i + j), T.int8(_ROWS[i]), T.int8(_COLUMNS[j]))

    def _at(self, tile: int, row: Expression, column: int) -> Expression:
        return self._at_room + (tile * TILE_ROWS + row) * BLOCK_ROWS + column * TILE_ROWS

    def vectors(self, emit: Callable[[list[tuple[int, Expression]], Callable[[int], list[Register]]], None]) -> None:
        """Call `emit` for every four rows of the last block.

        It is given the tile of each row and its number there, and what gives their sums of a tile of columns. Where the
        rows of a tile are odd, the last ones are given twice.
        """

        def four(t: Expression) -> None:
            second = tirx.min(2 * t + 1, self.rows - 1)
            places = [(tile, row) for tile in range(PAIR_OF_TILES) for row in (2 * t, second)]

            def sums(j: int) -> list[Register]:
                return [Register(self.room, self._at(tile, row, j), self.v.lanes) for tile, row in places]

            emit(places, sums)

        serial(-(-self.rows // 2), four)


def _load(register: int, place: Place, stride: Expression) -> None:
    buffer, index = place
    size = tvm.DataType(buffer.dtype).itemsize
    _call("tileloadd64", T.int8(register), T.address_of(buffer[index]), T.cast(stride * size, "int64"))


def _call(name: str, *arguments: Expression) -> None:
    T.evaluate(tirx.call_llvm_intrin("void", f"llvm.x86.{name}", *arguments))
