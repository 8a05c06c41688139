"""Sparse layers of a single row, or of any number: y = epilogue(x W^T + b) with an unstructured sparse W.

W is packed as SELL-16: outputs sorted by their number of non-zeros, in groups of 16; step s of a group holds the s-th
non-zero of each of its outputs, zeros where an output has fewer. Lanes are the 16 outputs, x is gathered by column.
Several rows read slabs: see few_rows.py.
Monakov, Lokhmotov, Avetisyan: Automatically tuning sparse matrix-vector multiplication for GPU architectures. HiPEAC
2010.

Integer codes go through the same loops: products of 8-bit codes sum exactly in float32 up to 2^24, which is checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
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


def pack_groups(weight: SparseArrays) -> dict[str, NDArray[Any]]:
    """SELL-16 arrays.

    Returns:
        values: [steps, 16] float32 or int8; columns: [steps, 16] uint16 or int32; group_starts: int32 [groups + 1], in
        steps; outputs: int32 [groups * 16], which output each lane is, beyond the end of all outputs in some lanes.
    """
    counts = np.diff(weight.row_pointers)
    counts = np.pad(counts, (0, -len(counts) % GROUP))
    order = np.argsort(-counts, kind="stable").astype(np.int32)
    starts = [0]
    values, columns = [], []
    for first in range(0, len(order), GROUP):
        lanes = order[first : first + GROUP]
        steps = int(counts[lanes].max(initial=0))
        group_values = np.zeros((steps, GROUP), weight.values.dtype)
        group_columns = np.zeros((steps, GROUP), weight.columns.dtype)
        for i, output in enumerate(lanes):
            if counts[output]:
                kept = slice(weight.row_pointers[output], weight.row_pointers[output + 1])
                group_values[: counts[output], i] = weight.values[kept]
                group_columns[: counts[output], i] = weight.columns[kept]
        values.append(group_values)
        columns.append(group_columns)
        starts.append(starts[-1] + steps)
    if starts[-1] == 0:  # an all-zero layer: kernels take no empty arrays
        values, columns = [np.zeros((1, GROUP), weight.values.dtype)], [np.zeros((1, GROUP), weight.columns.dtype)]
    return {
        "values": np.concatenate(values).reshape(-1), "columns": np.concatenate(columns).reshape(-1),
        "group_starts": np.array(starts, np.int32), "outputs": order,
    }  # fmt: skip


class _Body(FewRows):
    def pack(self, weight: SparseArrays) -> dict[str, NDArray[Any]]:
        return pack_groups(weight)

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
