"""Products of two computed float32 matrices, with dims before them that broadcast: what is no layer and no attention.

The right matrix of a product is copied once into panels of a vector of columns, so that lanes are columns and every
load is aligned with them; a matrix whose transpose is multiplied by is read as it is stored. Tiles of rows and panels
are kept in registers over the whole inner dim. Goto, van de Geijn: Anatomy of high-performance matrix multiplication.
ACM TOMS 34(3), 2008 (there with blocks of the inner dim too, which products of activations are seldom long enough for).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tvm.tirx.script.builder.ir as B
from tvm import tirx

from mcc.backends.cpu.kernels.panels import SERIAL_MACS
from mcc.backends.cpu.kernels.tiles import alike_dims, cover, loop_for
from mcc.backends.cpu.microkernel import (
    Expression,
    Parameter,
    Vectors,
    branch,
    flat,
    kernel_function,
    product,
    serial,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcc.target import Target

ROW_BLOCK = 48  # rows that a thread takes of one product


@dataclass(frozen=True)
class MatmulShape:
    """Sizes of a product; each may be symbolic.

    Attributes:
        batch: dims of the result before its rows.
        left, right: those of the operands, as many; 1 where they broadcast.
        rows, inner, columns: of left [rows, inner] and right [inner, columns].
        turned: whether right is stored as [columns, inner].
        ranks: of left and right as they are given, without dims of 1 before them.
    """

    batch: tuple[Any, ...]
    left: tuple[Any, ...]
    right: tuple[Any, ...]
    rows: Any
    inner: Any
    columns: Any
    turned: bool
    ranks: tuple[int, int]


def matmul_shape(left: Sequence[Any], right: Sequence[Any], *, turned: bool) -> MatmulShape:
    """The sizes of a product of operands with these dims, two or more each; equal symbols stay equal."""
    a, b = map(list, alike_dims((left, right)))
    count = max(len(a), len(b)) - 2
    outer_a, outer_b = ([1] * (count + 2 - len(dims)) + dims[:-2] for dims in (a, b))
    batch = tuple(y if isinstance(x, int) and x == 1 else x for x, y in zip(outer_a, outer_b, strict=True))
    columns = b[-2] if turned else b[-1]
    return MatmulShape(batch, tuple(outer_a), tuple(outer_b), a[-2], a[-1], columns, turned, (len(a), len(b)))


def matmul_function(shape: MatmulShape, target: Target) -> tirx.PrimFunc:
    """A kernel over left, right and the result, all float32."""
    s = shape
    a, b = (*s.left, s.rows, s.inner), (*s.right, *((s.columns, s.inner) if s.turned else (s.inner, s.columns)))
    parameters = [
        Parameter("A", a[-s.ranks[0] :], "float32"), Parameter("B", b[-s.ranks[1] :], "float32"),
        Parameter("C", (*s.batch, s.rows, s.columns), "float32"),
    ]  # fmt: skip
    return kernel_function("matmul", parameters, _Body(s, Vectors(target)).emit).without_attr("global_symbol")


class _Body:
    def __init__(self, shape: MatmulShape, vectors: Vectors) -> None:
        self.shape, self.v = shape, vectors
        many = vectors.target.vector_registers == 32
        self.tile_rows, self.tile_panels = (6, 4) if many else (4, 3)
        columns, lanes = shape.columns, vectors.lanes
        whole = isinstance(columns, int)
        self.panels = -(-columns // lanes) if whole else tirx.floordiv(columns + lanes - 1, lanes)

    def emit(self, a: Expression, b: Expression, c: Expression) -> None:
        """Emit the whole kernel: threads share products, or the rows of a single one."""
        s = self.shape
        count = product(s.batch)
        self.a = flat(a, product(s.left) * (s.rows * s.inner))
        self.b = flat(b, product(s.right) * (s.inner * s.columns))
        self.c = flat(c, count * (s.rows * s.columns))
        blocks = (
            -(-s.rows // ROW_BLOCK) if isinstance(s.rows, int) else tirx.floordiv(s.rows + ROW_BLOCK - 1, ROW_BLOCK)
        )
        if isinstance(count, int) and count == 1:
            room, loop = self._room(), loop_for(s.rows * s.inner * s.columns, SERIAL_MACS)
            loop(self.panels, lambda p: self._pack(0, p, room))
            loop(blocks, lambda r: self._rows(0, 0, r, room))
            return

        def one(i: Expression) -> None:
            room = self._room()
            left, right = (B.Bind(self._place(i, dims) * size) for dims, size in (
                (s.left, s.rows * s.inner), (s.right, s.inner * s.columns),
            ))  # fmt: skip
            serial(self.panels, lambda p: self._pack(right, p, room))
            serial(blocks, lambda r: self._rows(left, i * (s.rows * s.columns), r, room))

        loop_for(count * (s.rows * s.inner * s.columns), SERIAL_MACS)(count, one)

    def _room(self) -> Expression:
        return B.alloc_buffer((self.panels * self.v.lanes * self.shape.inner,), "float32", layout=None)

    def _place(self, i: Expression, dims: tuple[Any, ...]) -> Expression:
        """Which matrix of an operand product `i` reads."""
        place, step, rest = 0, 1, i
        for size, own in reversed(list(zip(self.shape.batch, dims, strict=True))):
            at, rest = tirx.floormod(rest, size), tirx.floordiv(rest, size)
            if not (isinstance(own, int) and own == 1):
                place, step = place + at * step, own * step
        return place

    def _pack(self, start: Expression, p: Expression, room: Expression) -> None:
        """Copy a panel: [inner][lane]; past the last column it stands again."""
        s, v = self.shape, self.v
        first = p * v.lanes
        columns = [B.Bind(tirx.min(first + lane, s.columns - 1)) for lane in range(v.lanes)]
        if s.turned:
            self._pack_turned(start, p, columns, room)
            return

        def whole(k: Expression) -> None:
            v.store(room, (p * s.inner + k) * v.lanes, v.load(self.b, start + k * s.columns + first))

        def part(k: Expression) -> None:
            for lane, column in enumerate(columns):
                B.buffer_store(room, self.b[start + k * s.columns + column], [(p * s.inner + k) * v.lanes + lane])

        branch(first + v.lanes <= s.columns, lambda: serial(s.inner, whole), lambda: serial(s.inner, part))

    def _pack_turned(self, start: Expression, p: Expression, columns: list[Expression], room: Expression) -> None:
        """From rows of the inner dim, squares at a time."""
        s, v = self.shape, self.v
        squares = s.inner // v.lanes if isinstance(s.inner, int) else tirx.floordiv(s.inner, v.lanes)

        def square(q: Expression) -> None:
            rows = [B.Bind(v.load(self.b, start + column * s.inner + q * v.lanes)) for column in columns]
            for k, vector in enumerate(v.transpose(rows)):
                v.store(room, (p * s.inner + q * v.lanes + k) * v.lanes, vector)

        def left(k: Expression) -> None:
            for lane, column in enumerate(columns):
                value = self.b[start + column * s.inner + squares * v.lanes + k]
                B.buffer_store(room, value, [(p * s.inner + squares * v.lanes + k) * v.lanes + lane])

        serial(squares, square)
        serial(s.inner - squares * v.lanes, left)

    def _rows(self, left: Expression, out: Expression, block: Expression, room: Expression) -> None:
        """A block of rows: panel by panel, so that these stay in the nearest cache."""
        s, start = self.shape, block * ROW_BLOCK
        whole = isinstance(s.rows, int) and s.rows <= ROW_BLOCK
        rows = s.rows if whole else tirx.min(s.rows - start, ROW_BLOCK)

        def panels(p: Expression, vectors: int) -> None:
            def tile(first: Expression, count: int) -> None:
                row = start + first
                self._tile((left + row * s.inner, out + row * s.columns), (p, vectors), count, room)

            cover(rows, self.tile_rows, tile)

        cover(self.panels, self.tile_panels, panels)

    def _tile(
        self, places: tuple[Expression, Expression], panels: tuple[Expression, int], rows: int, room: Expression
    ) -> None:
        s, v = self.shape, self.v
        p, vectors = panels
        left, out = (B.Bind(place) for place in places)
        sums = v.registers(rows, vectors, "float32")
        for register in (r for row in sums for r in row):
            register.set(v.constant(0.0))

        def step(k: Expression) -> None:
            loaded = [B.Bind(v.load(room, ((p + j) * s.inner + k) * v.lanes)) for j in range(vectors)]
            for i, row in enumerate(sums):
                element = B.Bind(v.splat(self.a[left + i * s.inner + k]))
                for register, value in zip(row, loaded, strict=True):
                    register.set(v.fma(element, value, register.get()))

        serial(s.inner, step)
        for i, row in enumerate(sums):
            for j, register in enumerate(row):
                self._store(out + i * s.columns, (p + j) * v.lanes, register.get(), last=j == vectors - 1)

    def _store(self, row: Expression, column: Expression, value: Expression, *, last: bool) -> None:
        """A vector of the result; of the last panel only what it has of columns."""
        s, v = self.shape, self.v
        if not last or (isinstance(s.columns, int) and s.columns % v.lanes == 0):
            v.store(self.c, row + column, value)
            return

        def part() -> None:
            ((held,),) = v.registers(1, 1, "float32")
            held.set(value)
            with B.serial(0, s.columns - column) as lane:
                B.buffer_store(self.c, held.pool[held.offset + lane], [row + column + lane])

        branch(column + v.lanes <= s.columns, lambda: v.store(self.c, row + column, value), part)
