"""Linear layers whose weight is sparse by blocks of outputs by inputs, such as 16x1 and 4x4, any number of rows.

Many rows: as in sparse.py lanes are rows of x, but what is loaded of x for an input meets all outputs of a block while
it is in a register. One row: lanes are the weights of a block, or of a few narrow ones side by side, each times the
input it has; outputs are sums of lanes. Gray, Radford, Kingma: GPU kernels for block-sparse weights. 2017.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc import ops
from mcc.backends.cpu.epilogue import emit_epilogue
from mcc.backends.cpu.kernels.dense import dense_reference
from mcc.backends.cpu.kernels.sparse import GROUP, SparseBody, operand_refusal, sparse_refusal, sparse_tiles
from mcc.backends.cpu.microkernel import Expression, Vectors, lane, serial
from mcc.backends.kernel import Lowered, Region, SparseArrays

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mcc.target import Target

UNROLLED = 4  # steps of one row that are summed apart, for the latency of a multiply-add


@dataclass(frozen=True)
class SparseBlocks:
    """Linear layers with blocks of weights: float32, int8 weights alone, or int8 weights and activations."""

    name: str = "sparse_blocks"
    anchor: ClassVar[ops.Op] = ops.LINEAR

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes linear with a weight in blocks whose codes sum exactly."""
        del target
        if isinstance(region.weight.sparse, SparseArrays) and region.weight.sparse.block == (1, 1):
            return "the weight is not stored in blocks"
        return operand_refusal(region) or sparse_refusal(region)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """See `sparse_tiles`."""
        return sparse_tiles(region, target)

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        body = _Body(region, Vectors(target), int(tile))
        return Lowered(body.function(self.name), body.packed)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """As for a dense layer."""
        return dense_reference(region, source, operands)


class _Body(SparseBody):
    """One kernel."""

    def pack(self, weight: SparseArrays) -> dict[str, NDArray[Any]]:
        """Blocks in whole steps of 16 weights at least: narrow ones are filled up with zeros.

        Returns:
            values: [blocks, height, width]; columns: [blocks]; starts: int32 [rows of blocks + 1], in blocks.
        """
        self.height, self.block_width = weight.block
        self.at_once = max(1, GROUP // (self.height * self.block_width))
        counts = np.diff(weight.row_pointers)
        filled = -(-counts // self.at_once) * self.at_once
        starts = np.concatenate([[0], filled.cumsum()])
        rows = np.repeat(np.arange(len(counts)), counts)
        places = np.arange(len(rows)) + (starts[:-1] - weight.row_pointers[:-1])[rows]
        blocks = max(int(starts[-1]), self.at_once)  # kernels take no empty arrays
        values = np.zeros((blocks, self.height, self.block_width), weight.values.dtype)
        columns = np.zeros(blocks, weight.columns.dtype)
        values[places], columns[places] = weight.values.reshape(-1, *values.shape[1:]), weight.columns
        return {"values": values.reshape(-1), "columns": columns, "starts": starts.astype(np.int32)}

    def multiply(self, source: Expression, result: Expression) -> None:
        """A part of a block's outputs at a time, as many as registers hold."""
        v, vectors = self.vectors, self.width // self.vectors.lanes
        most = v.target.vector_registers * 3 // 4 // vectors
        part = next(p for p in range(min(self.height, most), 0, -1) if self.height % p == 0)

        def outputs(g: Expression, first: int) -> None:
            sums = v.registers(part, vectors, "float32")
            for row in sums:
                for register in row:
                    register.set(v.constant(0.0))
            start = B.Bind(self.arrays["starts"][g])
            with B.serial(0, self.arrays["starts"][g + 1] - start) as s:
                self._block(source, B.Bind(start + s), first, sums)
            for i, row in enumerate(sums):
                n = B.Bind(g * self.height + first + i)
                for t, register in enumerate(row):
                    total = self.finish(register.get(), partial(self._splat, n))
                    v.store(result, n * self.width + t * v.lanes, total)

        def row_of_blocks(g: Expression) -> None:
            for first in range(0, self.height, part):
                outputs(g, first)

        serial(self.outputs // self.height, row_of_blocks)

    def _splat(self, n: Expression, array: Expression) -> Expression:
        return self.vectors.splat(array[n])

    def _block(self, source: Expression, at: Expression, first: int, sums: list[list[Any]]) -> None:
        """Add the products of one block's outputs from `first` on."""
        v, wide = self.vectors, self.block_width
        k = B.Bind(T.cast(self.arrays["columns"][at], "int32") * (wide * self.width))
        for c in range(wide):
            held = [B.Bind(v.load(source, k + c * self.width + t * v.lanes)) for t in range(len(sums[0]))]
            for i, row in enumerate(sums):
                value = self.arrays["values"][at * (self.height * wide) + ((first + i) * wide + c)]
                w = B.Bind(v.splat(T.cast(value, "float32")))
                for x, register in zip(held, row, strict=True):
                    register.set(v.fma(x, w, register.get()))

    def one_row(self, row: Expression) -> None:
        """Lanes are the weights of a step."""
        base = T.cast(row, "int64") * self.inputs
        source, start = (self.float_row(base), tirx.const(0, "int64")) if self.codes else (self.x, base)
        size = self.height * self.block_width
        vectors = max(1, size // GROUP)

        def row_of_blocks(g: Expression) -> None:
            sums = self.vectors.registers(UNROLLED, vectors, "float32", GROUP)
            for register in (r for row in sums for r in row):
                register.set(T.broadcast(T.float32(0), GROUP))
            first = B.Bind(self.arrays["starts"][g])
            steps = B.Bind(tirx.floordiv(self.arrays["starts"][g + 1] - first, self.at_once))
            with B.serial(0, tirx.floordiv(steps, UNROLLED)) as i:
                for u in range(UNROLLED):
                    self._step(source, start, B.Bind(first + (i * UNROLLED + u) * self.at_once), sums[u])
            with B.serial(0, tirx.floormod(steps, UNROLLED)) as i:
                self._step(source, start, B.Bind(first + (steps - 1 - i) * self.at_once), sums[0])
            for t in range(vectors):
                a, b, c, d = (s[t].get() for s in sums)
                self._write(row, B.Bind(g * self.height + t * (GROUP // self.block_width)), B.Bind(a + b + (c + d)))

        serial(self.outputs // self.height, row_of_blocks)

    def _step(self, source: Expression, start: Expression, at: Expression, sums: list[Any]) -> None:
        """Blocks from `at` on: weights times the inputs they have, lane by lane."""
        wide, size = self.block_width, self.height * self.block_width
        loaded = []
        for j in range(self.at_once):
            k = B.Bind(start + T.cast(self.arrays["columns"][at + j], "int64") * wide)
            loaded.append(source[k] if wide == 1 else self.vectors.load(source, k, wide))
        lanes = [i // size % self.at_once * wide + i % wide for i in range(GROUP)]
        x = B.Bind(T.broadcast(loaded[0], GROUP) if lanes == [0] * GROUP else _chosen(loaded, wide, lanes))
        for t, register in enumerate(sums):
            self.add_products(at * size + t * GROUP, x, register)

    def _write(self, row: Expression, n: Expression, total: Expression) -> None:
        """Add up the lanes of one output, of blocks side by side and of a block's width, and write."""
        v, lanes = self.vectors, GROUP
        while lanes > max(self.height * self.block_width, 1) and lanes > 1:
            lanes //= 2
            total = B.Bind(_lanes(total, range(lanes)) + _lanes(total, range(lanes, 2 * lanes)))
        width = min(self.block_width, lanes)
        while width > 1:
            width, lanes = width // 2, lanes // 2
            total = B.Bind(_lanes(total, range(0, 2 * lanes, 2)) + _lanes(total, range(1, 2 * lanes, 2)))
        for first in range(0, lanes, v.lanes):
            used = min(v.lanes, lanes - first)
            chosen = [first + min(i, used - 1) for i in range(v.lanes)]
            value = _chosen([total], lanes, chosen) if lanes > 1 else v.splat(total)
            outputs = [n + i for i in chosen]
            value = self.finish(value, partial(_gathered, outputs))
            value = B.Bind(emit_epilogue(v, value, self.steps))
            place = B.Bind(T.cast(row, "int64") * self.outputs + n + first)
            if used == v.lanes:
                v.store(self.y, place, value)
                continue
            for i in range(used):
                B.buffer_store(self.y, lane(value, i), [place + i])


def _chosen(vectors: list[Expression], lanes: int, chosen: list[int]) -> Expression:
    """Lanes of vectors of `lanes`, of which a shuffle wants as many as it gives."""
    repeats = -(-len(chosen) // (lanes * len(vectors)))
    return tirx.Shuffle(vectors * repeats, chosen)


def _gathered(indices: list[Expression], array: Expression) -> Expression:
    return tirx.Shuffle([array[i] for i in indices], list(range(len(indices))))


def _lanes(vector: Expression, chosen: range) -> Expression:
    return tirx.Shuffle([vector], list(chosen))
