"""Linear layers of few rows with an unstructured sparse weight, by permuting inputs: y = epilogue(x W^T + b).

Lanes are outputs. Two registers hold two blocks of a row; one permutation brings to every lane the input that its
weight has. To gather these one by one, as for rows whose number is known at run time only, takes two to five times as
long. Blocks are copied first, so that each is a line of the cache; sums come out in the order that makes steps few, and
are put in their own at the end. See block_pairs.py.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc import ops
from mcc.backends.cpu.kernels.block_pairs import BLOCK, BLOCK_BITS, PLACE_BITS, TOGETHER, pack_pairs
from mcc.backends.cpu.kernels.dense import dense_reference
from mcc.backends.cpu.kernels.panels import PanelPlan
from mcc.backends.cpu.kernels.tiles import PanelWidth, TileShape, parse_tile
from mcc.backends.cpu.microkernel import Expression, Register, Vectors, lane, serial
from mcc.backends.kernel import Lowered, Region, SparseArrays

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mcc.target import Target

MOST_ROWS = 6
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
        """All rows at once, so that places and weights are read once."""
        del target
        return (str(TileShape(math.prod(map(int, region.source.shape[:-1])), 1)),)

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        plan = PanelPlan(region, Vectors(target), parse_tile(tile))
        body = _Body(plan)
        return Lowered(plan.function(self.name, body.packed, body.emit), body.packed)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """As for a dense layer."""
        return dense_reference(region, source, operands)


def unpermuted(inputs: int, rows: Sequence[Any], target: Target) -> str | None:
    """Why rows of floats are not permuted, or None."""
    if target.vector_lanes != BLOCK:
        return f"{target} permutes no two registers of floats"
    if inputs < 2 * BLOCK:
        return f"it has fewer than {2 * BLOCK} inputs"
    if not all(isinstance(size, int) for size in rows) or not 0 < math.prod(rows) <= MOST_ROWS:
        return f"its rows are none, more than {MOST_ROWS}, or known at run time only"
    return None


class _Body:
    """The loops of one kernel, and the arrays they read."""

    def __init__(self, plan: PanelPlan) -> None:
        self.plan, self.v = plan, plan.vectors
        weight = np.pad(plan.region.weight.decoded(), ((0, plan.padded_outputs - plan.outputs), (0, 0)))
        steps = pack_pairs(weight)
        arrays = {key: getattr(steps, key) for key in ("weight", "places", "blocks", "first_steps", "outputs")}
        self.packed = arrays | plan.channel_arrays()
        self.apart, self.blocks = steps.apart, -(-plan.inputs // BLOCK)
        self.rows = math.prod(map(int, plan.leading))
        plan.products = steps.weight.size

    def emit(self, x: Expression, *arrays: Expression) -> None:
        """Emit the whole kernel."""
        self.x, self.arrays = x, dict(zip(self.packed, arrays, strict=True))
        copied = self.rows * self.blocks * BLOCK
        self.room = B.alloc_buffer((copied + self.rows * self.plan.padded_outputs,), "float32", layout=None)
        self.sums = copied  # behind the blocks
        serial(self.rows, self._copy_apart if self.apart else self._copy)
        self.plan.loops(self._tile)
        serial(self.plan.panels, lambda p: self.plan.in_panel(p, self._finish))

    def _copy(self, row: Expression) -> None:
        """Blocks are runs of inputs; the last one may be filled up with zeros."""
        v, inputs, begin = self.v, self.plan.inputs, row * (self.blocks * BLOCK)
        if inputs % BLOCK:
            v.store(self.room, begin + (self.blocks - 1) * BLOCK, v.constant(0.0))
        whole = inputs // BLOCK * BLOCK
        serial(
            inputs // BLOCK, lambda b: v.store(self.room, begin + b * BLOCK, v.load(self.x, row * inputs + b * BLOCK))
        )
        serial(
            inputs - whole,
            lambda i: B.buffer_store(self.room, self.x[row * inputs + whole + i], [begin + whole + i]),
        )

    def _copy_apart(self, row: Expression) -> None:
        """Blocks are columns of the row seen as a matrix: sixteen at a time are transposed, the last ones once more."""
        v, blocks = self.v, self.blocks

        def square(group: Expression) -> None:
            first = B.Bind(tirx.min(group * BLOCK, blocks - BLOCK))
            read = [B.Bind(v.load(self.x, row * self.plan.inputs + first + i * blocks)) for i in range(BLOCK)]
            for i, block in enumerate(v.transpose(read)):
                v.store(self.room, (row * blocks + first + i) * BLOCK, block)

        serial(-(-blocks // BLOCK), square)

    def _tile(self, panel: Expression, width: PanelWidth, first: Expression, count: int) -> None:
        """All steps of a vector of outputs, four at a time."""
        del width
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
        blocks = [B.Bind(tirx.shift_right(numbers, tirx.const(BLOCK_BITS * i, "int64")) & mask) for i in range(3)]
        steps = []
        for i in range(2):
            stored = v.load(self.arrays["weight"], (at + i) * BLOCK)
            weight = B.Bind(v.to_float(stored) if self.arrays["weight"].dtype == "int8" else stored)
            shift = v.constant(PLACE_BITS * (below + i), "int32")
            steps.append((B.Bind(tirx.shift_right(words, shift)), weight, chains[(below + i) % len(chains)]))
        for row in range(len(chains[0])):
            begin = T.cast(first + row, "int64") * self.blocks
            read = [B.Bind(v.load(self.room, (begin + block) * BLOCK)) for block in blocks]
            for (place, weight, sums), low, high in zip(steps, read, read[1:], strict=False):
                chosen = tirx.call_llvm_pure_intrin(f"float32x{BLOCK}", PERMUTE, low, place, high)
                sums[row].set(v.fma(chosen, weight, sums[row].get()))

    def _finish(self, panel: Expression, width: PanelWidth) -> None:
        """Write a vector of outputs."""
        v, plan = self.v, self.plan
        for row in range(self.rows):
            ((register,),) = v.registers(1, 1, "float32")
            register.set(v.load(self.room, self.sums + row * plan.padded_outputs + panel * BLOCK))
            plan.finish(self.arrays, row, panel * BLOCK, [register], width.used_lanes(0, BLOCK))
