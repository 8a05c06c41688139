"""Many rows of a linear layer whose weight is stored in steps through pairs of blocks.

Lanes are rows of x, transposed tile by tile, so that one stored weight meets several vectors of them. Which inputs the
steps of a vector of outputs read is worked out first, for all rows of the tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.kernels.block_pairs import BLOCK, BLOCK_BITS, BLOCK_SHIFTS, PLACE_BITS, TOGETHER
from mcc.backends.cpu.microkernel import serial

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mcc.backends.cpu.kernels.block_pairs import BlockPairs
    from mcc.backends.cpu.microkernel import Expression, Register, Vectors

WIDTH = 64  # rows


class RowTiles:
    """Tiles of rows of one layer.

    Args:
        vectors: of the target, of as many lanes as a block has inputs.
        steps: the weight.
        inputs: of a row of x.
    """

    def __init__(self, vectors: Vectors, steps: BlockPairs, inputs: int) -> None:
        self.v, self.inputs, self.apart = vectors, inputs, steps.apart
        self.blocks, self.outputs = -(-inputs // BLOCK), len(steps.outputs)
        self.most_steps = TOGETHER * int(np.diff(steps.first_steps).max())

    def emit(
        self,
        arrays: Mapping[str, Expression],
        x: Expression,
        row_of: Callable[[Expression], Expression],
        store: Callable[[Expression, Expression, Expression], None],
    ) -> None:
        """Emit the sums of a tile.

        Args:
            arrays: those of the steps.
            x: all rows, one behind the other.
            row_of: which row each one of the tile is.
            store: takes a row, the first of a vector of outputs, and their sums.
        """
        self.arrays = arrays
        source = B.alloc_buffer((self.inputs * WIDTH,), "float32", layout=None)
        result = B.alloc_buffer((self.outputs * WIDTH,), "float32", layout=None)
        begins = B.alloc_buffer((self.most_steps * BLOCK,), "int32", layout=None)
        self.v.transpose_tile(
            (self.inputs, WIDTH),
            lambda k, r, i: self.v.load(x, T.cast(row_of(r + i), "int64") * self.inputs + k),
            lambda k, r, i, column: self.v.store(source, (k + i) * WIDTH + r, column),
        )

        def vector(panel: Expression) -> None:
            first = B.Bind(T.cast(arrays["first_steps"][panel], "int64") * TOGETHER)
            count = B.Bind(T.cast(arrays["first_steps"][panel + 1], "int64") * TOGETHER - first)
            serial(tirx.floordiv(count, TOGETHER), lambda word: self._begins(first, word, begins))
            serial(BLOCK, lambda i: self._output(panel * BLOCK + i, (first, count, i), (source, begins, result)))

        serial(self.outputs // BLOCK, vector)
        self.v.transpose_tile(
            (self.outputs, WIDTH),
            lambda n, r, i: self.v.load(result, (n + i) * WIDTH + r),
            lambda n, r, i, sums: store(T.cast(row_of(r + i), "int64"), n, sums),
        )

    def _begins(self, first: Expression, word: Expression, begins: Expression) -> None:
        """Write down where in the transposed rows the inputs of the steps of one word begin."""
        v = self.v
        at = B.Bind(first + word * TOGETHER)
        words = v.hold(v.load(self.arrays["places"], at * (BLOCK // TOGETHER)))
        for step in range(TOGETHER):
            numbers = self.arrays["blocks"][tirx.shift_right(at + step, 1)]
            low, high = (self._block(numbers, step % 2 + i) for i in range(2))
            place = B.Bind(tirx.shift_right(words, v.constant(PLACE_BITS * step, "int32")))
            within = tirx.bitwise_and(place, v.constant(BLOCK - 1, "int32"))
            second = tirx.bitwise_and(place, v.constant(BLOCK, "int32")) > v.constant(0, "int32")
            block = tirx.Select(second, v.splat(high), v.splat(low))
            column = within * v.constant(self.blocks, "int32") + block if self.apart else block + within
            begin = column * v.constant(WIDTH, "int32")
            # outputs without a weight all read the same rows, which stay in the nearest cache
            kept = v.load(self.arrays["weight"], (at + step) * BLOCK) != v.constant(0, self.arrays["weight"].dtype)
            begin = tirx.Select(kept, begin, v.constant(0, "int32"))
            v.store(begins, (word * TOGETHER + step) * BLOCK, begin)

    def _block(self, numbers: Expression, which: int) -> Expression:
        """Where a block begins or, of inputs apart, its number."""
        mask = (1 << BLOCK_BITS) - 1
        begin = tirx.bitwise_and(tirx.shift_right(numbers, tirx.const(BLOCK_SHIFTS[which], "int64")), mask)
        return B.Bind(T.cast(tirx.shift_right(begin, BLOCK.bit_length() - 1) if self.apart else begin, "int32"))

    def _output(
        self,
        lane: Expression,
        steps: tuple[Expression, Expression, Expression],
        buffers: tuple[Expression, Expression, Expression],
    ) -> None:
        """All sums of one output.

        Args:
            lane: which, in the order of the steps.
            steps: the first of its vector, their number, and its place in them.
            buffers: the transposed rows, where inputs begin in them, and the transposed sums.
        """
        v, (first, count, i), (source, begins, result) = self.v, steps, buffers
        sums: list[Register] = v.registers(1, WIDTH // BLOCK, "float32")[0]
        for register in sums:
            register.set(v.constant(0.0))

        def step(s: Expression) -> None:
            begin = B.Bind(begins[s * BLOCK + i])
            weight = B.Bind(v.splat(T.cast(self.arrays["weight"][(first + s) * BLOCK + i], "float32")))
            for t, register in enumerate(sums):
                register.set(v.fma(v.load(source, begin + t * BLOCK), weight, register.get()))

        serial(count, step)
        output = B.Bind(self.arrays["outputs"][lane])
        for t, register in enumerate(sums):
            v.store(result, output * WIDTH + t * BLOCK, register.get())
