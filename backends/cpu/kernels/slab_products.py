"""The products of a tile of rows with a part of a sparse weight, slab by slab; see mcc/slabs.py.

Rows of x lie transposed, so that one stored weight meets a few vectors of them, and what is loaded of these for an
input meets all outputs of a block that registers have sums for. Every output reads all of the rows' inputs at random
places; a slab is as many inputs as stay in the nearest cache while all outputs of a part read them.
Gray, Radford, Kingma: GPU kernels for block-sparse weights. 2017, has the blocks.
"""

from __future__ import annotations

import math
import operator
from functools import reduce
from itertools import chain
from typing import TYPE_CHECKING, TypeAlias

import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.kernels.tiles import balanced
from mcc.backends.cpu.microkernel import branch, serial
from mcc.slabs import Cuts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mcc.backends.cpu.microkernel import Expression, Register, Vectors
    from mcc.backends.kernel import SparseArrays

    Place: TypeAlias = tuple[Expression, Expression]
    """A buffer, and where in it something begins."""

SLAB_BYTES = 1 << 15  # of a tile of rows
FEWEST_WEIGHTS = 8  # of an output in a slab, on average: for fewer its sums are not worth bringing in
MOST_OUTPUTS = 512  # of a part, whose sums stay in the second cache
FEWEST_OUTPUTS = 128
CHAINS = 2  # multiply-adds of a sum in flight, where a block has one output


def cut(weight: SparseArrays, shape: Sequence[int], rows: int, lanes: int, wanted: int) -> Cuts:
    """Cuts for a weight that meets so many rows at a time and has at least so many parts if it can.

    Args:
        weight: what is stored.
        shape: of the whole weight, [outputs, inputs].
        rows: of a tile.
        lanes: of a vector.
        wanted: parts, for threads.
    """
    (high, wide), (outputs, inputs) = weight.block, shape
    slab = max(SLAB_BYTES // (4 * rows), FEWEST_WEIGHTS * inputs * outputs // max(weight.values.size, 1))
    slabs = max(1, round(inputs / slab))
    parts = max(-(-outputs // MOST_OUTPUTS), min(-(-outputs // FEWEST_OUTPUTS), wanted))
    together = math.lcm(lanes, high)
    part = -(-outputs // (parts * together)) * together
    return Cuts(outputs // high, inputs // wide, part // high, -(-inputs // (slabs * wide)), weight.block)


class PartProducts:
    """What adds the products of a part with a tile of rows.

    Args:
        vectors: of the target.
        cuts: of the weight.
        arrays: those of `pack_slabs`, as a kernel has them.
    """

    def __init__(self, vectors: Vectors, cuts: Cuts, arrays: Mapping[str, Expression]) -> None:
        self.v, self.cuts, self.arrays = vectors, cuts, arrays

    def add(self, part: Expression, source: Place, sums: Place, height: int) -> None:
        """Add the products of all outputs of a part.

        Args:
            part: which.
            source: the transposed rows, [inputs, rows of the tile].
            sums: [outputs of the part, rows of the tile].
            height: rows of the tile.
        """
        cuts, arrays, (high, wide) = self.cuts, self.arrays, self.cuts.block
        outputs = B.Bind(tirx.min(cuts.outputs - part * cuts.part, cuts.part))
        at = B.alloc_buffer((1,), "int64", scope="global", layout=None)
        most = max(1, self.v.target.vector_registers // 2 // (height // self.v.lanes))  # with what they meet
        pieces = balanced(high, most)
        tiles = [range(first + i * size, first + (i + 1) * size) for first, n, size in pieces for i in range(n)]

        def slab(s: Expression) -> None:
            B.buffer_store(at, T.cast(arrays["slab_begins"][part * cuts.slabs + s], "int64"), [0])
            first = B.Bind(part * (cuts.part * cuts.slabs) + s * outputs)
            begin = B.Bind(source[1] + s * (cuts.slab * wide * height))

            def output(i: Expression) -> None:
                run = B.Bind(T.cast(arrays["slab_counts"][first + i], "int64")), self.v.held_integer(at[0])
                place = B.Bind(sums[1] + T.cast(arrays["slab_order"][first + i], "int64") * (high * height))
                for tile in tiles:
                    _Sums(self, (source[0], begin), (sums[0], place), height, tile).add(*run)
                B.buffer_store(at, run[1] + run[0], [0])

            serial(outputs, output)

        serial(cuts.slabs, slab)


class _Sums:
    """Sums of a tile of rows that registers hold: of one output, or of some that a row of blocks has.

    Args:
        products: that they are part of.
        source: a slab of transposed rows.
        sums: where they are from and go to, [outputs, rows of the tile].
        height: rows of the tile.
        outputs: of a block.
    """

    def __init__(self, products: PartProducts, source: Place, sums: Place, height: int, outputs: range) -> None:
        self.v, self.arrays, self.block = products.v, products.arrays, products.cuts.block
        self.source, self.sums, self.height, self.outputs = source, sums, height, outputs
        self.vectors = range(height // self.v.lanes)

    def add(self, count: Expression, first: Expression) -> None:
        """Add the products of so many elements; of one output, two at a time to sums of their own."""
        v, (sums, begun), size = self.v, self.sums, (len(self.outputs), len(self.vectors))
        chains = [v.registers(*size, "float32") for _ in range(CHAINS if size[0] == 1 else 1)]
        places = [(n * self.height, t * v.lanes) for n in self.outputs for t in self.vectors]
        held = [list(chain.from_iterable(registers)) for registers in chains]
        for (row, vector), register, *others in zip(places, *held, strict=True):
            register.set(v.load(sums, begun + row + vector))
            for other in others:
                other.set(v.constant(0.0))

        def together(i: Expression) -> None:
            for number, registers in enumerate(chains):
                self._multiply(first + i * len(chains) + number, registers)

        if len(chains) == 1:
            serial(count, together)
        else:
            serial(tirx.shift_right(count, tirx.const(1, "int64")), together)
            odd = tirx.bitwise_and(count, tirx.const(1, "int64"))
            branch(odd == 1, lambda: self._multiply(first + count - 1, chains[0]))
        for (row, vector), *registers in zip(places, *held, strict=True):
            v.store(sums, begun + row + vector, reduce(operator.add, [register.get() for register in registers]))

    def _multiply(self, element: Expression, sums: list[list[Register]]) -> None:
        """Add an element's products, input by input."""
        v, (high, wide) = self.v, self.block
        row = B.Bind(self.source[1] + T.cast(self.arrays["slab_columns"][element], "int64") * (wide * self.height))
        for c in range(wide):
            held = [B.Bind(v.load(self.source[0], row + c * self.height + t * v.lanes)) for t in self.vectors]
            for n, registers in zip(self.outputs, sums, strict=True):
                value = self.arrays["slab_values"][element * (high * wide) + (n * wide + c)]
                weight = B.Bind(v.splat(T.cast(value, "float32")))
                for x, register in zip(held, registers, strict=True):
                    register.set(v.fma(x, weight, register.get()))
