"""Sparse layers of a single row, or of any number: y = epilogue(x W^T + b) with an unstructured sparse W.

W is packed as SELL-16, `mcc.slabs.pack_groups`: lanes are the 16 outputs of a group, x is gathered by column.
Several rows read slabs: see few_rows.py.
Monakov, Lokhmotov, Avetisyan: Automatically tuning sparse matrix-vector multiplication for GPU architectures. HiPEAC
2010.

Integer codes go through the same loops: products of 8-bit codes sum exactly in float32 up to 2^24, which is checked.
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
from mcc.backends.cpu.microkernel import Expression, Vectors, lane
from mcc.backends.kernel import Lowered, Region, SparseArrays
from mcc.slabs import GROUP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mcc.backends.cpu.microkernel import Register
    from mcc.target import Target


@dataclass(frozen=True)
class SparseDense:
    """Linear layers with a sparse weight: float32, int8 weights alone, or int8 weights and activations."""

    name: str = "sparse_dense"
    anchor: ClassVar[ops.Op] = ops.LINEAR

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes linear with a sparse weight whose codes sum exactly."""
        if isinstance(region.weight.sparse, SparseArrays) and region.weight.sparse.block != (1, 1):
            return "the weight is stored in blocks"
        return several_rows(region, target) or sparse_refusal(region)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """One: rows come alone or in tiles of slabs."""
        del region, target
        return (ONE_VECTOR,)

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        plan = PanelPlan(region, Vectors(target), parse_tile(tile))
        return _Body(plan, "groups").lowered(self.name)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """As for a dense layer."""
        return dense_reference(region, source, operands)


class _Body(FewRows):
    def multiply(self) -> None:
        columns = self.arrays["columns"]
        self.words = None
        if columns.dtype != "int32":
            size = self.packed["columns"].size // 4
            self.words = B.decl_buffer((size,), "uint64", data=columns.data, layout=None)
        self.shared(self.packed["group_starts"].size - 1, self._group)

    def _group(self, g: Expression) -> None:
        """Lanes are the outputs of a group; x is gathered."""
        arrays = self.arrays
        sums = self.v.registers(1, 2, "float32", GROUP)[0]
        for register in sums:
            register.set(T.broadcast(T.float32(0), GROUP))

        def step(at: Expression, register: Register) -> None:
            x = tirx.Shuffle([self.source[self.start + c] for c in self._columns(at)], list(range(GROUP)))
            self.products_added(at * GROUP, x, register)

        first = B.Bind(arrays["group_starts"][g])
        count = B.Bind(arrays["group_starts"][g + 1] - first)
        with B.serial(0, tirx.floordiv(count, 2)) as i:
            for u in range(2):
                step(B.Bind(first + i * 2 + u), sums[u])
        with B.serial(0, tirx.floormod(count, 2)) as _:
            step(B.Bind(first + count - 1), sums[0])
        total = B.Bind(sums[0].get() + sums[1].get())
        for i in range(GROUP):
            B.buffer_store(self.sums, lane(total, i), [arrays["outputs"][g * GROUP + i]])

    def _columns(self, at: Expression) -> list[Expression]:
        """The 16 columns of a step, cut out of four 64-bit loads where they have 16 bits."""
        if self.words is None:
            return [T.cast(self.arrays["columns"][at * GROUP + i], "int64") for i in range(GROUP)]
        columns = []
        for q in range(GROUP // 4):
            word = B.Bind(self.words[at * (GROUP // 4) + q])
            for j in range(4):
                shifted = T.shift_right(word, T.uint64(16 * j)) if j else word
                part = shifted if j == 3 else T.bitwise_and(shifted, T.uint64(0xFFFF))
                columns.append(B.Bind(T.cast(T.cast(part, "int32"), "int64")))
        return columns
