"""Linear layers whose weight is sparse by blocks of outputs by inputs, such as 16x1 and 4x4: few rows, or any number.

Lanes are the weights of a block, or of a few narrow ones side by side, each times the input it has; outputs are sums of
lanes. Several rows read slabs: see few_rows.py. Gray, Radford, Kingma: GPU kernels for block-sparse weights. 2017.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc import ops
from mcc.backends.cpu.kernels.dense import dense_reference
from mcc.backends.cpu.kernels.few_rows import ONE_VECTOR, FewRows, several_rows, sparse_refusal
from mcc.backends.cpu.kernels.panels import PanelPlan
from mcc.backends.cpu.kernels.tiles import parse_tile
from mcc.backends.cpu.microkernel import Expression, Vectors
from mcc.backends.kernel import Lowered, Region, SparseArrays
from mcc.slabs import GROUP, at_once

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mcc.backends.cpu.microkernel import Register
    from mcc.target import Target

UNROLLED = 4  # steps of one row that are summed apart, for the latency of a multiply-add


@dataclass(frozen=True)
class SparseBlocks:
    """Linear layers with blocks of weights: float32, int8 weights alone, or int8 weights and activations."""

    name: str = "sparse_blocks"
    anchor: ClassVar[ops.Op] = ops.LINEAR

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes linear with a weight in blocks whose codes sum exactly."""
        if isinstance(region.weight.sparse, SparseArrays) and region.weight.sparse.block == (1, 1):
            return "the weight is not stored in blocks"
        return several_rows(region, target) or sparse_refusal(region)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """One: rows come alone or in tiles of slabs."""
        del region, target
        return (ONE_VECTOR,)

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        plan = PanelPlan(region, Vectors(target), parse_tile(tile))
        return _Body(plan, "blocks").lowered(self.name)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """As for a dense layer."""
        return dense_reference(region, source, operands)


class _Body(FewRows):
    def multiply(self) -> None:
        """Lanes are the weights of a step."""
        (self.height, self.block_width), self.at_once = self.block, at_once(self.block)
        vectors = max(1, self.height * self.block_width // GROUP)

        def row_of_blocks(g: Expression) -> None:
            sums = self.v.registers(UNROLLED, vectors, "float32", GROUP)
            for register in (r for row in sums for r in row):
                register.set(T.broadcast(T.float32(0), GROUP))
            first = B.Bind(self.arrays["starts"][g])
            steps = B.Bind(tirx.floordiv(self.arrays["starts"][g + 1] - first, self.at_once))
            with B.serial(0, tirx.floordiv(steps, UNROLLED)) as i:
                for u in range(UNROLLED):
                    self._step(B.Bind(first + (i * UNROLLED + u) * self.at_once), sums[u])
            with B.serial(0, tirx.floormod(steps, UNROLLED)) as i:
                self._step(B.Bind(first + (steps - 1 - i) * self.at_once), sums[0])
            for t in range(vectors):
                a, b, c, d = (s[t].get() for s in sums)
                self._write(B.Bind(g * self.height + t * (GROUP // self.block_width)), B.Bind(a + b + (c + d)))

        self.shared(self.plan.outputs // self.height, row_of_blocks)

    def _step(self, at: Expression, sums: list[Register]) -> None:
        """Blocks from `at` on: weights times the inputs they have, lane by lane."""
        wide, size = self.block_width, self.height * self.block_width
        loaded = []
        for j in range(self.at_once):
            k = B.Bind(self.start + T.cast(self.arrays["columns"][at + j], "int64") * wide)
            loaded.append(self.source[k] if wide == 1 else self.v.load(self.source, k, wide))
        lanes = [i // size % self.at_once * wide + i % wide for i in range(GROUP)]
        x = B.Bind(T.broadcast(loaded[0], GROUP) if lanes == [0] * GROUP else _chosen(loaded, wide, lanes))
        for t, register in enumerate(sums):
            self.products_added(at * size + t * GROUP, x, register)

    def _write(self, n: Expression, total: Expression) -> None:
        """Add up the lanes of one output, of blocks side by side and of a block's width, and write the sums."""
        lanes = GROUP
        while lanes > self.height * self.block_width:
            lanes //= 2
            total = B.Bind(_lanes(total, range(lanes)) + _lanes(total, range(lanes, 2 * lanes)))
        width = min(self.block_width, lanes)
        while width > 1:
            width, lanes = width // 2, lanes // 2
            total = B.Bind(_lanes(total, range(0, 2 * lanes, 2)) + _lanes(total, range(1, 2 * lanes, 2)))
        B.buffer_store(self.sums, total, [T.ramp(n, 1, lanes)] if lanes > 1 else [n])


def _chosen(vectors: list[Expression], lanes: int, chosen: list[int]) -> Expression:
    """Lanes of vectors of `lanes`, of which a shuffle wants as many as it gives."""
    repeats = -(-len(chosen) // (lanes * len(vectors)))
    return tirx.Shuffle(vectors * repeats, chosen)


def _lanes(vector: Expression, chosen: range) -> Expression:
    return tirx.Shuffle([vector], list(chosen))
