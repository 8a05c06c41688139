"""Linear layers of whose weights N of every M neighbouring inputs are stored: y = epilogue(x W^T + b), any rows.

Lanes are outputs. A group's M inputs lie in one register, over and over; for each stored weight a permutation brings to
every lane the input that its weight has, so that a group takes N multiply-adds where a dense layer takes M. Places of a
few bits stand packed in words, shifted down one after another: a permutation reads the lowest bits only. Codes of four
bits stand in words too, shifted up one after another and down with their sign. Inputs that share scales have sums of
their own, which are scaled when they are complete.

Mishra et al.: Accelerating sparse deep neural networks. arXiv 2104.08378, 2021, has the pattern.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc import ops
from mcc.backends.cpu.kernels.dense import dense_reference
from mcc.backends.cpu.kernels.panels import PanelPlan
from mcc.backends.cpu.kernels.tiles import PanelWidth, TileShape, parse_tile
from mcc.backends.cpu.microkernel import Expression, Register, Vectors, serial
from mcc.backends.kernel import Lowered, NofMArrays, Region
from mcc.ops import extent
from mcc.sparse_formats import place_bits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mcc.target import Target

NIBBLE = 4  # bits of codes that stand in words
NIBBLE_MASK, CODES_OF_A_WORD = (1 << NIBBLE) - 1, 32 // NIBBLE
PERMUTE = {16: "llvm.x86.avx512.permvar.sf.512", 8: "llvm.x86.avx2.permps"}  # by lanes


@dataclass(frozen=True)
class SparseNofM:
    """float32 activations; N of M weights stored: float32, int8, or int8 and less with scales for groups of inputs."""

    name: str = "sparse_n_of_m"
    anchor: ClassVar[ops.Op] = ops.LINEAR

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes linear with such a weight, where a register can be permuted by another."""
        weight = region.weight
        if not isinstance(weight.sparse, NofMArrays):
            return "the weight is not stored as N of M"
        if target.vector_lanes not in PERMUTE:
            return "its registers are permuted by bytes only"
        if weight.grouped and weight.group_size % weight.sparse.among:
            return f"of {weight.sparse.among} inputs a few are stored, {weight.group_size} share a scale"
        return "the activations are quantized" if region.activation is not None else None

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """Rows x vectors; one row leaves registers for many outputs."""
        many = math.prod(extent(s) for s in region.source.shape[:-1]) > 1
        if target.vector_registers == 32:
            wanted = ((4, 4), (6, 3), (8, 2)) if many else ((1, 4), (1, 8), (2, 8))
        else:
            wanted = ((6, 1), (3, 2), (4, 2)) if many else ((1, 4), (2, 4), (1, 8))
        kinds = 2 if region.weight.grouped else 1  # of sums
        vectors = -(-region.weight.shape[0] // target.vector_lanes)
        return tuple(dict.fromkeys(str(TileShape(rows, min(-(-wide // kinds), vectors))) for rows, wide in wanted))

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        plan = PanelPlan(region, Vectors(target), parse_tile(tile))
        body = _Body(plan)
        return Lowered(plan.function(self.name, body.packed, body.emit), body.packed)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """As for a dense layer, of float64 values where groups of inputs have scales."""
        weight = region.weight
        if weight.scale is not None and weight.grouped:
            values = weight.decoded() * weight.scale.astype(np.float64).repeat(weight.group_size, 1)
            region = replace(region, weight=replace(weight, dense=values, sparse=None, scale=None))
        return dense_reference(region, source, operands)


class _Body:
    """The loops of one kernel, and the arrays they read."""

    def __init__(self, plan: PanelPlan) -> None:
        weight, sparse = plan.region.weight, plan.region.weight.sparse
        assert isinstance(sparse, NofMArrays)
        self.plan, self.v = plan, plan.vectors
        self.among, self.kept = sparse.among, sparse.kept
        self.groups = sparse.values.shape[1]
        self.alike = weight.group_size // sparse.among if weight.grouped else self.groups  # groups that share a scale
        self.bits = place_bits(sparse.among)
        most = max(1, 32 // (self.bits * self.kept))
        together = next(n for n in range(most, 0, -1) if self.alike % n == 0) if weight.grouped else most
        self.together = together  # groups whose places share words
        self.words = -(-self.together * self.kept * self.bits // 32)
        self.code_words = -(-self.together * self.kept // CODES_OF_A_WORD) if weight.bits <= NIBBLE else 0
        self.packed = self._pack(sparse)

    def _pack(self, sparse: NofMArrays) -> dict[str, NDArray[Any]]:
        """Arrays by panel of outputs, lanes innermost.

        Returns:
            values: [groups, kept, outputs of the panel] or, of few bits, int32 [sets of groups, words, outputs of the
            panel]; places: the latter; scale, bias: float32 [outputs, filled up]; group_scale: of what shares scales,
            [such groups, outputs of the panel].
        """
        scale, missing = self.plan.region.weight.scale, self.plan.padded_outputs - self.plan.outputs
        if self.code_words:
            values = self._words(sparse.values.astype(np.uint32) & NIBBLE_MASK, NIBBLE, self.code_words)
        else:
            values = np.pad(sparse.values, ((0, missing), (0, 0), (0, 0)))
        places = self._words(sparse.places.astype(np.uint32), self.bits, self.words)
        packed = {"values": self._by_panel(values), "places": self._by_panel(places)}
        if scale is not None and self.plan.region.weight.grouped:
            packed["group_scale"] = self._by_panel(np.pad(scale[:, :, None], ((0, missing), (0, 0), (0, 0))))
        return packed | self.plan.channel_arrays()

    def _words(self, numbers: NDArray[Any], bits: int, words: int) -> NDArray[Any]:
        """Numbers [outputs, groups, kept] of a few bits as [outputs, filled up, sets of groups, words]."""
        sets, a_word = -(-self.groups // self.together), 32 // bits
        missing = self.plan.padded_outputs - self.plan.outputs
        padded = np.pad(numbers, ((0, missing), (0, sets * self.together - self.groups), (0, 0)))
        padded = padded.reshape(len(padded), sets, -1)
        padded = np.pad(padded, ((0, 0), (0, 0), (0, words * a_word - padded.shape[2])))
        shifts = np.arange(a_word, dtype=np.uint32) * bits
        padded = padded.reshape(*padded.shape[:2], words, a_word)
        packed: NDArray[np.uint32] = (padded << shifts).sum(-1, dtype=np.uint32)
        return packed.view(np.int32)

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
        sums = self._zeros(count, width.vectors)
        if "group_scale" in self.arrays:
            serial(self.groups // self.alike, lambda g: self._add_scaled(panel, first, sums, g))
        else:
            whole, left = divmod(self.groups, self.together)
            serial(whole, lambda s: self._set(panel, first, sums, s, self.together))
            if left:
                self._set(panel, first, sums, whole, left)
        for j in range(width.vectors):
            column, used = panel * plan.width + j * v.lanes, width.used_lanes(j, v.lanes)
            plan.finish(self.arrays, first, column, [row[j] for row in sums], used)

    def _zeros(self, rows: int, vectors: int) -> list[list[Register]]:
        sums = self.v.registers(rows, vectors, "float32")
        for register in (r for row in sums for r in row):
            register.set(self.v.constant(0.0))
        return sums

    def _add_scaled(self, panel: Expression, first: Expression, sums: list[list[Register]], number: Expression) -> None:
        """Add the products of groups that share a scale."""
        v, vectors, sets = self.v, len(sums[0]), self.alike // self.together
        own = self._zeros(len(sums), vectors)
        serial(sets, lambda s: self._set(panel, first, own, number * sets + s, self.together))
        base = panel * (self.plan.width * (self.groups // self.alike)) + number * (vectors * v.lanes)
        for j in range(vectors):
            scale = v.hold(T.cast(v.load(self.arrays["group_scale"], base + j * v.lanes), f"float32x{v.lanes}"))
            for row, part in zip(sums, own, strict=True):
                row[j].set(v.fma(part[j].get(), scale, row[j].get()))

    def _set(
        self, panel: Expression, first: Expression, sums: list[list[Any]], number: Expression, groups: int
    ) -> None:
        """Add the products of groups whose places share words."""
        v, vectors, sets = self.v, len(sums[0]), -(-self.groups // self.together)
        outputs = vectors * v.lanes

        def loaded(key: str, count: int) -> list[list[Expression]]:
            base = panel * (self.plan.width * sets * count) + number * (count * outputs)
            at = [[base + w * outputs + j * v.lanes for j in range(vectors)] for w in range(count)]
            return [[v.hold(v.load(self.arrays[key], a)) for a in row] for row in at]

        words, codes = loaded("places", self.words), loaded("values", self.code_words)
        start = panel * (self.plan.width * self.groups * self.kept)
        for g in range(groups):
            group = number * self.together + g
            rows = [self._inputs(first + i, group) for i in range(len(sums))]
            for k in range(self.kept):
                word, place = divmod(g * self.kept + k, 32 // self.bits)
                for j in range(vectors):
                    if codes:
                        held, nibble = divmod(g * self.kept + k, CODES_OF_A_WORD)
                        weight = self._code(codes[held][j], nibble)
                    else:
                        stored = v.load(self.arrays["values"], start + (group * self.kept + k) * outputs + j * v.lanes)
                        weight = stored if self.arrays["values"].dtype == "float32" else v.to_float(stored)
                    self._multiply(B.Bind(weight), words[word][j], place, rows, [row[j] for row in sums])

    def _code(self, word: Expression, nibble: int) -> Expression:
        """One of the signed codes of a word."""
        v, top = self.v, 32 - NIBBLE
        if nibble < CODES_OF_A_WORD - 1:
            word = T.shift_left(word, v.constant(top - nibble * NIBBLE, "int32"))
        return v.to_float(T.shift_right(word, v.constant(top, "int32")))

    def _multiply(
        self, weight: Expression, word: Expression, place: int, rows: list[Expression], sums: list[Register]
    ) -> None:
        """Add one stored weight of each output times the input it has, for every row."""
        v = self.v
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
