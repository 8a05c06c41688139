"""The products of a tile of rows with a part of a sparse weight, slab by slab; see mcc/slabs.py.

Rows of x lie transposed, so that one stored weight meets a few vectors of them. Every output reads all of the rows'
inputs at random places; a slab is as many inputs as stay in the nearest cache while all outputs of a part read them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.microkernel import branch, serial
from mcc.slabs import Cuts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mcc.backends.cpu.microkernel import Expression, Vectors

    Place: TypeAlias = tuple[Expression, Expression]
    """A buffer, and where in it something begins."""

SLAB_BYTES = 1 << 15  # of a tile of rows
FEWEST_WEIGHTS = 8  # of an output in a slab, on average: for fewer its sums are not worth bringing in
MOST_OUTPUTS = 512  # of a part, whose sums stay in the second cache
FEWEST_OUTPUTS = 128
CHAINS = 2  # multiply-adds of a sum in flight


def cut(shape: tuple[int, int], kept: int, rows: int, lanes: int, wanted: int) -> Cuts:
    """Cuts for a weight, [outputs, inputs], that meets so many rows at a time and has at least so many parts if it can.

    Args:
        shape: of the weight.
        kept: its elements.
        rows: of a tile.
        lanes: of a vector.
        wanted: parts, for threads.
    """
    outputs, inputs = shape
    slab = max(SLAB_BYTES // (4 * rows), FEWEST_WEIGHTS * inputs * outputs // max(kept, 1))
    slabs = max(1, round(inputs / slab))
    parts = max(-(-outputs // MOST_OUTPUTS), min(-(-outputs // FEWEST_OUTPUTS), wanted))
    return Cuts(outputs, inputs, -(-outputs // (parts * lanes)) * lanes, -(-inputs // slabs))


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
        cuts, arrays = self.cuts, self.arrays
        outputs = B.Bind(tirx.min(cuts.outputs - part * cuts.part, cuts.part))
        at = B.alloc_buffer((1,), "int64", scope="global", layout=None)

        def slab(s: Expression) -> None:
            B.buffer_store(at, T.cast(arrays["slab_begins"][part * cuts.slabs + s], "int64"), [0])
            first = B.Bind(part * (cuts.part * cuts.slabs) + s * outputs)
            begin = B.Bind(source[1] + s * (cuts.slab * height))
            serial(outputs, lambda i: self._output(first + i, (source[0], begin), sums, (at, height)))

        serial(cuts.slabs, slab)

    def _output(
        self,
        number: Expression,
        source: Place,
        result: Place,
        where: tuple[Expression, int],
    ) -> None:
        """Add the products of an output's elements in a slab, of two elements at a time to sums of their own."""
        v, (sums, first), (at, height) = self.v, result, where
        vectors = height // v.lanes
        count = B.Bind(T.cast(self.arrays["slab_counts"][number], "int64"))
        place = B.Bind(first + T.cast(self.arrays["slab_order"][number], "int64") * height)
        chains = v.registers(CHAINS, vectors, "float32")
        for t in range(vectors):
            chains[0][t].set(v.load(sums, place + t * v.lanes))
            for chain in chains[1:]:
                chain[t].set(v.constant(0.0))
        begin = v.held_integer(at[0])

        def multiply(element: Expression, chain: int) -> None:
            column = T.cast(self.arrays["slab_columns"][element], "int64")
            row = B.Bind(source[1] + column * height)
            weight = B.Bind(v.splat(T.cast(self.arrays["slab_values"][element], "float32")))
            for t, register in enumerate(chains[chain]):
                register.set(v.fma(v.load(source[0], row + t * v.lanes), weight, register.get()))

        def together(i: Expression) -> None:
            for chain in range(CHAINS):
                multiply(begin + i * CHAINS + chain, chain)

        serial(tirx.shift_right(count, tirx.const(1, "int64")), together)
        odd = tirx.bitwise_and(count, tirx.const(1, "int64"))
        branch(odd == 1, lambda: multiply(begin + count - 1, 0))
        B.buffer_store(at, begin + count, [0])
        for t in range(vectors):
            v.store(sums, place + t * v.lanes, chains[0][t].get() + chains[1][t].get())
