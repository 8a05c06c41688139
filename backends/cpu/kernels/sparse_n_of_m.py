"""Linear layers of whose weights N of every M neighbouring inputs are stored: y = epilogue(x W^T + b), any rows.

Lanes are outputs. A group's M inputs lie in one register, over and over; for each stored weight a permutation brings to
every lane the input that its weight has, so that a group takes N multiply-adds where a dense layer takes M. Places of a
few bits stand packed in words, shifted down one after another: a permutation reads the lowest bits only.

Mishra et al.: Accelerating sparse deep neural networks. arXiv 2104.08378, 2021, has the pattern.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc import ops
from mcc.backends.cpu.kernels.dense import dense_reference
from mcc.backends.cpu.kernels.panels import PanelPlan
from mcc.backends.cpu.kernels.tiles import PanelWidth, TileShape, parse_tile
from mcc.backends.cpu.microkernel import Expression, Vectors, serial
from mcc.backends.kernel import Lowered, NofMArrays, Region
from mcc.ops import extent
from mcc.sparse_formats import place_bits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mcc.target import Target

PERMUTE = {16: "llvm.x86.avx512.permvar.sf.512", 8: "llvm.x86.avx2.permps"}  # by lanes


@dataclass(frozen=True)
class SparseNofM:
    """float32 activations; N of M weights stored, float32 or int8 with a scale for each output."""

    name: str = "sparse_n_of_m"
    anchor: ClassVar[ops.Op] = ops.LINEAR

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes linear with such a weight, where a register can be permuted by another."""
        if not isinstance(region.weight.sparse, NofMArrays):
            return "the weight is not stored as N of M"
        if target.vector_lanes not in PERMUTE:
            return "its registers are permuted by bytes only"
        if region.weight.grouped:
            return "groups of the weight's inputs have scales of their own"
        return "the activations are quantized" if region.activation is not None else None

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """Rows x vectors; one row leaves registers for many outputs."""
        many = math.prod(extent(s) for s in region.source.shape[:-1]) > 1
        if target.vector_registers == 32:
            wanted = ((4, 4), (6, 3), (8, 2)) if many else ((1, 4), (1, 8), (2, 8))
        else:
            wanted = ((6, 1), (3, 2), (4, 2)) if many else ((1, 4), (2, 4), (1, 8))
        vectors = -(-region.weight.shape[0] // target.vector_lanes)
        return tuple(dict.fromkeys(str(TileShape(rows, min(wide, vectors))) for rows, wide in wanted))

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        plan = PanelPlan(region, Vectors(target), parse_tile(tile))
        body = _Body(plan)
        return Lowered(plan.function(self.name, body.packed, body.emit), body.packed)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """As for a dense layer."""
        return dense_reference(region, source, operands)


class _Body:
    """The loops of one kernel, and the arrays they read."""

    def __init__(self, plan: PanelPlan) -> None:
        sparse = plan.region.weight.sparse
        assert isinstance(sparse, NofMArrays)
        self.plan, self.v = plan, plan.vectors
        self.among, self.kept = sparse.among, sparse.kept
        self.groups = sparse.values.shape[1]
        self.bits = place_bits(sparse.among)
        self.together = max(1, 32 // (self.bits * self.kept))  # groups whose places share words
        self.words = -(-self.together * self.kept * self.bits // 32)
        self.packed = self._pack(sparse)

    def _pack(self, sparse: NofMArrays) -> dict[str, NDArray[Any]]:
        """Arrays by panel of outputs, lanes innermost.

        Returns:
            values: [groups, kept, outputs of the panel]; places: int32 [sets of groups, words, outputs of the panel];
            scale, bias: float32 [outputs, filled up].
        """
        outputs, padded = self.plan.outputs, self.plan.padded_outputs
        missing = padded - outputs
        values = np.pad(sparse.values, ((0, missing), (0, 0), (0, 0)))
        sets = -(-self.groups // self.together)
        room = ((0, missing), (0, sets * self.together - self.groups), (0, 0))
        places = np.pad(sparse.places.astype(np.uint32), room).reshape(padded, sets, -1)
        a_word = 32 // self.bits
        places = np.pad(places, ((0, 0), (0, 0), (0, self.words * a_word - places.shape[2])))
        shifts = np.arange(a_word, dtype=np.uint32) * self.bits
        words = (places.reshape(padded, sets, self.words, a_word) << shifts).sum(-1, dtype=np.uint32).view(np.int32)
        return {"values": self._by_panel(values), "places": self._by_panel(words)} | self.plan.channel_arrays()

    def _by_panel(self, array: NDArray[Any]) -> NDArray[Any]:
        """[outputs, a, b] as, panel after panel, [a, b, outputs of the panel]."""
        cuts = range(self.plan.width, len(array), self.plan.width)
        return np.concatenate([part.transpose(1, 2, 0).reshape(-1) for part in np.split(array, cuts)])

    def emit(self, x: Expression, *arrays: Expression) -> None:
        """Emit the whole kernel."""
        self.x, self.arrays = x, dict(zip(self.packed, arrays, strict=True))
        self.plan.loops(self._tile)

    def _tile(self, panel: Expression, width: PanelWidth, first: Expression, count: int) -> None:
        plan, v = self.plan, self.v
        sums = v.registers(count, width.vectors, "float32")
        for register in (r for row in sums for r in row):
            register.set(v.constant(0.0))
        whole, left = divmod(self.groups, self.together)
        serial(whole, lambda s: self._set(panel, first, sums, s, self.together))
        if left:
            self._set(panel, first, sums, whole, left)
        for j in range(width.vectors):
            column, used = panel * plan.width + j * v.lanes, width.used_lanes(j, v.lanes)
            plan.finish(self.arrays, first, column, [row[j] for row in sums], used)

    def _set(
        self, panel: Expression, first: Expression, sums: list[list[Any]], number: Expression, groups: int
    ) -> None:
        """Add the products of groups whose places share words."""
        v, vectors, sets = self.v, len(sums[0]), -(-self.groups // self.together)
        outputs = vectors * v.lanes
        base = panel * (self.plan.width * sets * self.words) + number * (self.words * outputs)
        words = [
            [B.Bind(v.load(self.arrays["places"], base + w * outputs + j * v.lanes)) for j in range(vectors)]
            for w in range(self.words)
        ]
        start = panel * (self.plan.width * self.groups * self.kept)
        for g in range(groups):
            group = number * self.together + g
            rows = [self._inputs(first + i, group) for i in range(len(sums))]
            for k in range(self.kept):
                word, place = divmod(g * self.kept + k, 32 // self.bits)
                for j in range(vectors):
                    at = start + (group * self.kept + k) * outputs + j * v.lanes
                    self._multiply(at, words[word][j], place, rows, [row[j] for row in sums])

    def _multiply(self, at: Expression, word: Expression, place: int, rows: list[Expression], sums: list[Any]) -> None:
        """Add one stored weight of each output times the input it has, for every row."""
        v = self.v
        loaded = v.load(self.arrays["values"], at)
        weight = B.Bind(loaded if self.arrays["values"].dtype == "float32" else v.to_float(loaded))
        index = B.Bind(T.shift_right(word, v.constant(place * self.bits, "int32"))) if place else word
        for x, register in zip(rows, sums, strict=True):
            chosen = tirx.call_llvm_pure_intrin(f"float32x{v.lanes}", PERMUTE[v.lanes], x, index)
            register.set(v.fma(chosen, weight, register.get()))

    def _inputs(self, row: Expression, group: Expression) -> Expression:
        """A group's inputs in one register, over and over."""
        v = self.v
        place = T.cast(row, "int64") * self.plan.inputs + group * self.among
        loaded = v.load(self.x, place, self.among)
        repeats = v.lanes // self.among
        return B.Bind(tirx.Shuffle([loaded] * repeats, list(range(v.lanes))) if repeats > 1 else loaded)
