"""Linear layers with an unstructured sparse weight, few rows or any number, inputs permuted: y = epilogue(x W^T + b).

Lanes are outputs. Two registers hold two blocks of a row; one permutation brings to every lane the input that its
weight has. To gather these one by one takes two to five times as long. Blocks are copied first, so that each is a line
of the cache; sums come out in the order that makes steps few, and are put in their own at the end. See block_pairs.py.
Where the number of rows is known at run time only, many read slabs, which are made when an artifact is loaded: see
slab_rows.py.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc import ops
from mcc.backends.cpu.kernels.block_pairs import pack_pairs
from mcc.backends.cpu.kernels.dense import dense_reference
from mcc.backends.cpu.kernels.panels import SERIAL_MACS, PanelPlan
from mcc.backends.cpu.kernels.slab_rows import SlabRows
from mcc.backends.cpu.kernels.tiles import TileShape, balanced, cover, leading_dims, parse_tile
from mcc.backends.cpu.microkernel import Expression, Register, Vectors, branch, flat, lane, parallel, product, serial
from mcc.backends.kernel import Lowered, Region, SparseArrays
from mcc.slabs import (
    BLOCK,
    BLOCK_BITS,
    BLOCK_SHIFTS,
    MOST_INPUTS,
    PAIR_ARRAYS,
    PLACE_BITS,
    TOGETHER,
    Derived,
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from mcc.target import Target

TILE_ROWS = 6
MOST_ROWS = 12  # beyond, transposed tiles of rows are faster (measured on an Emerald Rapids)
CHAINS = 4  # multiply-adds in flight that hide their latency
PERMUTE = "llvm.x86.avx512.vpermi2var.ps.512"


@dataclass(frozen=True)
class SparseRows:
    """float32 activations of few rows; weights without their zeros, float32 or int8 with a scale for each output."""

    name: str = "sparse_rows"
    anchor: ClassVar[ops.Op] = ops.LINEAR

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes linear with such a weight where two registers can be permuted by a third."""
        if not isinstance(region.weight.sparse, SparseArrays) or region.weight.sparse.block != (1, 1):
            return "the weight is not stored by single elements"
        if region.activation is not None or region.weight.grouped:
            return "activations are quantized, or groups of the weight's inputs have scales of their own"
        return unpermuted(region.weight.shape[1], region.source.shape[:-1], target)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """Rows that read places and weights together: as many as there are, or as have registers for their sums."""
        del target
        rows = product(leading_dims(region.source.shape[:-1]))
        return (str(TileShape(min(rows, TILE_ROWS) if isinstance(rows, int) else TILE_ROWS, 1)),)

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        plan = PanelPlan(region, Vectors(target), parse_tile(tile))
        body = _Body(plan)
        return Lowered(plan.function(self.name, body.packed, body.emit), body.packed, derived=body.derived)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """As for a dense layer."""
        return dense_reference(region, source, operands)


def unpermuted(inputs: int, rows: Sequence[Any], target: Target) -> str | None:
    """Why rows of floats are not permuted, or None."""
    if target.vector_lanes != BLOCK:
        return f"{target} permutes no two registers of floats"
    if not 2 * BLOCK <= inputs <= MOST_INPUTS:
        return f"it has fewer than {2 * BLOCK} inputs, or more than {MOST_INPUTS:,}"
    known = product(leading_dims(rows))
    if isinstance(known, int) and not 0 < known <= MOST_ROWS:
        return f"its rows are none, or more than {MOST_ROWS}"
    return None


class _Body:
    """The loops of one kernel, and the arrays they read."""

    def __init__(self, plan: PanelPlan) -> None:
        self.plan, self.v = plan, plan.vectors
        weight = np.pad(plan.region.weight.decoded(), ((0, plan.padded_outputs - plan.outputs), (0, 0)))
        steps = pack_pairs(weight)
        self.packed = {key: getattr(steps, key) for key in PAIR_ARRAYS}
        self.apart, self.blocks = steps.apart, -(-plan.inputs // BLOCK)
        self.rows, self.derived = product(plan.leading), None
        if not isinstance(self.rows, int):
            assert isinstance(plan.region.weight.sparse, SparseArrays)
            self.many = SlabRows(plan, plan.region.weight.sparse)
            self.derived = Derived.of("pairs apart" if steps.apart else "pairs", "slabs", self.many.cuts)
            self.packed |= self.derived.made(self.packed)
        self.packed |= plan.channel_arrays()
        self.few = self.rows * steps.weight.size < SERIAL_MACS

    def emit(self, x: Expression, *arrays: Expression) -> None:
        """Emit the whole kernel."""
        self.x, self.arrays = flat(x, self.rows * self.plan.inputs), dict(zip(self.packed, arrays, strict=True))
        if isinstance(self.rows, int):
            self._few_rows(self.rows)
        else:
            branch(self.rows <= MOST_ROWS, partial(self._few_rows, MOST_ROWS), self._many_rows)

    def _many_rows(self) -> None:
        self.many.emit(self.x, self.arrays)

    def _few_rows(self, most: int) -> None:
        """All rows, at most so many, by permuting."""
        self.sums = most * self.blocks * BLOCK  # behind the blocks
        self.room = B.alloc_buffer((self.sums + most * self.plan.padded_outputs,), "float32", layout=None)
        serial(self.rows, self._copy_apart if self.apart else self._copy)
        self._tiles()
        self._each(self.rows, self._finish)

    def _each(self, count: Expression, emit: Callable[[Expression], None]) -> None:
        """A loop that threads share where that pays."""
        branch(self.few, lambda: serial(count, emit), lambda: parallel(count, emit))

    def _tiles(self) -> None:
        """All sums, a few rows and a vector of outputs at a time; the weight is read once for each few rows."""
        most, panels = self.plan.tile.rows, self.plan.panels
        if isinstance(self.rows, int):
            for begin, number, count in balanced(self.rows, most):

                def tile(i: Expression, begin: int = begin, count: int = count) -> None:
                    self._tile(tirx.floormod(i, panels), begin + tirx.floordiv(i, panels) * count, count)

                self._each(number * panels, tile)
            return

        def tiles(i: Expression) -> None:
            begin, panel = tirx.floordiv(i, panels) * most, tirx.floormod(i, panels)
            left = tirx.min(self.rows - begin, most)
            cover(left, most, lambda first, count: self._tile(panel, begin + first, count))

        self._each(tirx.floordiv(self.rows + most - 1, most) * panels, tiles)

    def _copy(self, row: Expression) -> None:
        """Blocks are runs of inputs; the last one may be filled up with zeros."""
        v, inputs, begin = self.v, self.plan.inputs, row * (self.blocks * BLOCK)
        read = row * inputs
        if inputs % BLOCK:
            v.store(self.room, begin + (self.blocks - 1) * BLOCK, v.constant(0.0))
        whole = inputs // BLOCK * BLOCK
        serial(inputs // BLOCK, lambda b: v.store(self.room, begin + b * BLOCK, v.load(self.x, read + b * BLOCK)))
        serial(
            inputs - whole,
            lambda i: B.buffer_store(self.room, self.x[read + whole + i], [begin + whole + i]),
        )

    def _copy_apart(self, row: Expression) -> None:
        """Blocks are columns of the row seen as a matrix, which is transposed."""
        v, blocks, read = self.v, self.blocks, row * self.plan.inputs
        v.transpose_tile(
            (blocks, BLOCK),
            lambda first, start, i: v.load(self.x, read + (start + i) * blocks + first),
            lambda first, start, i, block: v.store(self.room, (row * blocks + first + i) * BLOCK + start, block),
        )

    def _tile(self, panel: Expression, first: Expression, count: int) -> None:
        """All steps of a vector of outputs, four at a time."""
        v, firsts = self.v, self.arrays["first_steps"]
        chains = v.registers(max(1, CHAINS // count), count, "float32")
        for register in (r for chain in chains for r in chain):
            register.set(v.constant(0.0))

        def four(group: Expression) -> None:
            at = B.Bind(T.cast(firsts[panel] + group, "int64") * TOGETHER)
            words = v.hold(v.load(self.arrays["places"], at * (BLOCK // TOGETHER)))
            for step in range(0, TOGETHER, 2):
                self._two_steps(first, at + step, (words, step), chains)

        serial(firsts[panel + 1] - firsts[panel], four)
        for row, sums in enumerate(zip(*chains, strict=True)):
            total = v.hold(reduce(operator.add, [register.get() for register in sums]))
            begin = self.sums + (first + row) * self.plan.padded_outputs
            for i in range(BLOCK):  # one by one, beside the next vector's steps, which store nothing
                output = self.arrays["outputs"][panel * BLOCK + i]
                B.buffer_store(self.room, lane(total, i), [begin + output])

    def _two_steps(
        self, first: Expression, at: Expression, places: tuple[Expression, int], chains: list[list[Register]]
    ) -> None:
        """Add the products of two steps to the sums of all rows: of three blocks the first two, and the last two.

        Args:
            first: row.
            at: which steps.
            places: the word that theirs are in, and how many steps' are below.
            chains: sums of all rows, to be taken in turn.
        """
        v, (words, below), mask = self.v, places, (1 << BLOCK_BITS) - 1
        numbers = B.Bind(self.arrays["blocks"][tirx.shift_right(at, 1)])
        begins = [B.Bind(tirx.shift_right(numbers, tirx.const(bits, "int64")) & mask) for bits in BLOCK_SHIFTS]
        steps = []
        for i in range(2):
            stored = v.load(self.arrays["weight"], (at + i) * BLOCK)
            weight = B.Bind(v.to_float(stored) if self.arrays["weight"].dtype == "int8" else stored)
            shift = v.constant(PLACE_BITS * (below + i), "int32")
            steps.append((B.Bind(tirx.shift_right(words, shift)), weight, chains[(below + i) % len(chains)]))
        for row in range(len(chains[0])):
            own = T.cast(first + row, "int64") * (self.blocks * BLOCK)
            read = [B.Bind(v.load(self.room, own + begin)) for begin in begins]
            for (place, weight, sums), low, high in zip(steps, read, read[1:], strict=False):
                chosen = tirx.call_llvm_pure_intrin(f"float32x{BLOCK}", PERMUTE, low, place, high)
                sums[row].set(v.fma(chosen, weight, sums[row].get()))

    def _finish(self, row: Expression) -> None:
        self.plan.finish_row(self.arrays, row, self.room, self.sums + row * self.plan.padded_outputs)
