"""Transposed matrices in memory: [outer, rows, columns] to [outer, columns, rows], whatever dims each of them joins.

Where one side has a few elements, as the channels of a photograph, vectors along the other are interleaved, or taken
apart; else square blocks are transposed in registers. The last vector of a side overlaps the one before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.kernels.tiles import leading_dims, shared_rows
from mcc.backends.cpu.microkernel import Expression, Parameter, Vectors, branch, flat, kernel_function, product, serial

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcc.target import Target

_Emit: TypeAlias = Callable[[Expression, Expression], None]
MOST_INTERLEAVED = 4  # vectors
BLOCK_BYTES = 64 << 10  # that one task writes


@dataclass(frozen=True)
class Sides:
    """The dims of a tensor that are its outer ones, its rows and its columns, as numbers of them."""

    outer: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]


def sides(dims: Sequence[Any], order: Sequence[int]) -> Sides | None:
    """How an order of dims is a transpose of matrices, or None where it is none."""
    source = [d for d in range(len(dims)) if not (isinstance(dims[d], int) and dims[d] == 1)]
    runs: list[list[int]] = []
    for d in (d for d in order if d in source):
        if runs and source.index(d) == source.index(runs[-1][-1]) + 1:
            runs[-1].append(d)
        else:
            runs.append([d])
    if len(runs) == 2:
        runs.insert(0, [])
    if len(runs) != 3 or (runs[0] and runs[0][0] != source[0]):
        return None
    outer, columns, rows = map(tuple, runs)
    return Sides(outer, rows, columns)


def takes_transpose(dims: Sequence[Any], order: Sequence[int], dtype: str, target: Target) -> bool:
    """Whether the kernel takes this: a side of few elements, or float32 with a vector and more on each."""
    found = sides(dims, order)
    if found is None or dtype not in ("float32", "uint8"):
        return False
    rows, columns = (product([dims[d] for d in side]) for side in (found.rows, found.columns))
    long = [s for s in (rows, columns) if not isinstance(s, int) or s >= target.vector_lanes]
    few = [s for s in (rows, columns) if _few(s)]
    return (len(long) == 2 and dtype == "float32") or len(long) == len(few) == 1


def transpose_function(dims: Sequence[Any], order: Sequence[int], dtype: str, target: Target) -> tirx.PrimFunc:
    """A kernel over a tensor of these dims (symbolic ones vary), which gives them the order."""
    shape, found = leading_dims(dims), sides(dims, order)
    assert found is not None
    outer, rows, columns = (product([shape[d] for d in side]) for side in (found.outer, found.rows, found.columns))
    size = product(shape)

    def body(x: Expression, y: Expression) -> None:
        matrix = _Matrix(Vectors(target), (flat(x, size), flat(y, size)), rows, columns)
        matrix.each(outer, 4 if dtype == "float32" else 1)

    parameters = [Parameter("X", shape, dtype), Parameter("Y", tuple(shape[d] for d in order), dtype)]
    return kernel_function("transpose", parameters, body).without_attr("global_symbol")


class _Matrix:
    """The loops over one matrix after another."""

    def __init__(
        self, v: Vectors, buffers: tuple[Expression, Expression], rows: Expression, columns: Expression
    ) -> None:
        self.v, (self.x, self.y), self.rows, self.columns = v, buffers, rows, columns

    def each(self, outer: Expression, element_bytes: int) -> None:
        """Emit the loops, over vectors of the long side or of columns, and the elements beside each."""
        lanes = self.v.lanes
        vector: _Emit
        element: _Emit
        if _few(self.rows):
            vector, element, long, beside = self._interleave, self._column, self.columns, self.rows
        elif _few(self.columns):
            vector, element, long, beside = self._part, self._row, self.rows, self.columns
        else:
            vector, element, long, beside = self._strip, self._column, self.columns, self.rows
        count = tirx.floordiv(long + lanes - 1, lanes)

        def strip(i: Expression) -> None:
            matrix = T.cast(tirx.floordiv(i, count), "int64")
            base = B.Bind(matrix * (self.rows * self.columns))
            first = T.cast(tirx.floormod(i, count), "int64") * lanes
            self._within(long, first, lambda at: vector(base, at), lambda at: element(base, at))

        block = tirx.floordiv(BLOCK_BYTES, tirx.max(beside * (lanes * element_bytes), 1))
        shared_rows(outer * count, tirx.max(1, block), strip)

    def _within(
        self, size: Expression, first: Expression, vector: Callable[[Expression], None],
        element: Callable[[Expression], None],
    ) -> None:  # fmt: skip
        """A vector from `first`, or from where it ends with the side; of a side that has none, its elements."""
        lanes = self.v.lanes
        branch(
            size >= lanes,
            lambda: vector(B.Bind(tirx.min(first, size - lanes))),
            lambda: serial(size, element),
        )

    def _interleave(self, base: Expression, first: Expression) -> None:
        """A vector of columns of each of the few rows, side by side."""
        v, rows = self.v, int(self.rows)
        parts = [v.load(self.x, base + a * self.columns + first) for a in range(rows)]
        lanes = [a * v.lanes + i for i in range(v.lanes) for a in range(rows)]
        v.store(self.y, base + first * rows, tirx.Shuffle(parts, lanes), rows * v.lanes)

    def _part(self, base: Expression, first: Expression) -> None:
        """A vector of rows of the few columns, taken apart."""
        v, columns = self.v, int(self.columns)
        read = B.Bind(v.load(self.x, base + first * columns, columns * v.lanes))
        for b in range(columns):
            part = tirx.Shuffle([read], [i * columns + b for i in range(v.lanes)])
            v.store(self.y, base + b * self.rows + first, part)

    def _strip(self, base: Expression, first: Expression) -> None:
        """A vector of columns, block by block of rows."""
        v, rows, columns = self.v, self.rows, self.columns

        def block(row: Expression) -> None:
            read = [B.Bind(v.load(self.x, base + (row + i) * columns + first)) for i in range(v.lanes)]
            for j, column in enumerate(v.transpose(read)):
                v.store(self.y, base + (first + j) * rows + row, column)

        def element(row: Expression) -> None:
            for j in range(v.lanes):
                self._element(base, row, first + j)

        with B.serial(0, tirx.floordiv(rows + v.lanes - 1, v.lanes)) as r:
            self._within(rows, T.cast(r, "int64") * v.lanes, block, element)

    def _column(self, base: Expression, column: Expression) -> None:
        """Element by element."""
        serial(self.rows, lambda row: self._element(base, row, column))

    def _row(self, base: Expression, row: Expression) -> None:
        """The same."""
        serial(self.columns, lambda column: self._element(base, row, column))

    def _element(self, base: Expression, row: Expression, column: Expression) -> None:
        B.buffer_store(self.y, self.x[base + row * self.columns + column], [base + column * self.rows + row])


def _few(size: Any) -> bool:
    return isinstance(size, int) and 0 < size <= MOST_INTERLEAVED
