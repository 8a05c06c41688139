"""Dense layers whose weights are codes of a few bits, with scales for groups of inputs: y = epilogue(x W^T + b).

A 32-bit lane holds the codes of one output for consecutive inputs, so that shifting the word brings up one code of
every output at a time. Where a register holds a table as large as the codes have values, the lookup takes the code from
the lowest bits and gives the float; elsewhere two shifts extend the code's sign. Three bits are stored as two and one.
A group's scale and zero point turn codes into weights in registers, once for all rows of a tile: weights are read from
memory as few bits and never written out.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc import ops
from mcc.backends.cpu.kernels.grouped import PLANES, GroupedBody, not_grouped
from mcc.backends.cpu.kernels.panels import PanelPlan
from mcc.backends.cpu.kernels.tiles import PanelWidth, TileShape, parse_tile
from mcc.backends.cpu.microkernel import Expression, Register, Vectors, serial
from mcc.backends.kernel import Lowered, Region, apply_epilogue
from mcc.ops import extent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from mcc.target import Target

CODES = {1: 32, 2: 16, 3: 32, 4: 8, 8: 4}  # of a block, by bits: what a whole number of words holds
FEW_ROWS = 4
PART = 8  # inputs of a block whose codes are written out; more take minutes to compile


@dataclass(frozen=True)
class LowBitDense:
    """float32 activations; weights of 1 to 4 or 8 bits with a scale, and perhaps a zero point, for each group."""

    name: str = "low_bit_dense"
    anchor: ClassVar[ops.Op] = ops.LINEAR

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes linear with a grouped weight."""
        if (reason := not_grouped(region.weight, CODES)) is not None:
            return reason
        if region.weight.table is not None and target.isa == "neon":
            return "its table is in no register"
        return "the activations are quantized" if region.activation is not None else None

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """Rows x vectors that leave registers for a group's scales; tall where many rows share the work of decoding."""
        many = math.prod(extent(s) for s in region.source.shape[:-1]) > FEW_ROWS
        if target.vector_registers == 32:
            wanted = ((24, 1), (12, 2)) if many else ((4, 4), (2, 8))
        else:
            wanted = ((8, 1), (4, 2)) if many else ((2, 4), (4, 2))
        vectors = -(-region.weight.shape[0] // target.vector_lanes)
        return tuple(dict.fromkeys(str(TileShape(rows, min(wide, vectors))) for rows, wide in wanted))

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        plan = PanelPlan(region, Vectors(target), parse_tile(tile))
        body = _Body(plan)
        element = body.element if region.weight.table is None else None
        return Lowered(plan.function(self.name, body.packed, body.emit), body.packed, element)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """Float64 sums over dequantized weights."""
        weight = region.weight
        assert weight.scale is not None
        values = weight.in_scales * weight.scale.astype(np.float64).repeat(weight.group_size, 1)
        bias = np.float32(0) if region.bias is None else region.bias
        return apply_epilogue((source @ values.T + bias).astype(np.float32), region.epilogue, operands)


@dataclass(frozen=True)
class _Tile:
    """A tile of outputs.

    Attributes:
        panel: its number.
        vectors: of outputs.
        first: row.
        sums: by row and vector.
    """

    panel: Expression
    vectors: int
    first: Expression
    sums: list[list[Register]]


class _Body(GroupedBody):
    """The loops of one kernel, and the arrays they read."""

    def __init__(self, plan: PanelPlan) -> None:
        weight = plan.region.weight
        assert weight.dense is not None
        super().__init__(plan, _words(weight.dense, weight.bits, weight.group_size // weight.span), CODES[weight.bits])

    def emit(self, x: Expression, *arrays: Expression) -> None:
        """Emit the whole kernel."""
        self.x, self.arrays = x, dict(zip(self.packed, arrays, strict=True))
        self.tables, self.part = self._tables(), PART // self.span
        self.plan.loops(self._tile)

    def signed_code(self, word: Callable[[Expression], Expression], c: Expression) -> Expression:
        """See `GroupedBody`."""
        low, *high = PLANES[self.bits]
        held = 32 // low
        raised = T.shift_right(word(tirx.floordiv(c, held)), T.cast(tirx.floormod(c, held) * low, "int32"))
        for plane in high:
            top = T.shift_right(word(self.words - 1), T.cast(c * plane, "int32"))
            raised = T.bitwise_or(T.bitwise_and(raised, (1 << low) - 1), T.shift_left(top, T.int32(low)))
        unused = T.int32(32 - self.bits)
        return T.shift_right(T.shift_left(raised, unused), unused)

    def _tables(self) -> list[list[Expression]]:
        """The values of codes in registers, by input of a code; over and over, so that bits beyond it do not matter.

        A table that is larger than a register is in two; one of numbers is left out then, and codes are converted.
        """
        v, codes, table = self.v, 1 << self.bits, self.plan.region.weight.table
        if table is None and (v.neon or codes > v.lanes):
            return []
        values = np.arange(-codes // 2, codes // 2)[:, None] if table is None else table
        by_bits = np.roll(values, codes // 2, 0)  # codes are signed: 0 comes first
        held = max(codes, v.lanes)
        columns = np.resize(by_bits.T, (by_bits.shape[1], held)) if codes >= held else np.tile(by_bits.T, held // codes)
        return [[self._held(column[i : i + v.lanes]) for i in range(0, held, v.lanes)] for column in columns]

    def _held(self, values: NDArray[Any]) -> Expression:
        lanes = [tirx.const(float(value), "float32") for value in values]
        return self.v.hold(tirx.Shuffle([*lanes], list(range(self.v.lanes))))

    def _tile(self, panel: Expression, width: PanelWidth, first: Expression, count: int) -> None:
        plan, v, vectors = self.plan, self.v, width.vectors
        sums, bias = v.registers(count, vectors, "float32"), self.arrays.get("bias")
        for j in range(vectors):
            column = panel * plan.width + j * v.lanes
            start = v.constant(0.0) if bias is None else B.Bind(v.load(bias, column))
            for row in sums:
                row[j].set(start)
        serial(self.groups, lambda g: self._group(_Tile(panel, vectors, first, sums), g))
        for j in range(vectors):
            column = panel * plan.width + j * v.lanes
            for i, row in enumerate(sums):
                plan.store(first + i, column, row[j].get(), width.used_lanes(j, v.lanes))

    def _group(self, tile: _Tile, g: Expression) -> None:
        """Add group `g` of inputs to the tile's sums."""
        scales, offsets = self.group_vectors(self.arrays, tile.panel, tile.vectors, g)
        offsets = offsets or [self.v.constant(0.0)] * tile.vectors
        size = min(self.part, self.block_codes)
        whole, left = divmod(self.group // self.span, self.block_codes)

        def part(b: Expression, p: Expression, codes: int = size) -> None:
            words = self._part_words(tile, g * self.blocks + b, p)
            for c, one in itertools.product(range(codes), range(self.span)):
                values = (self._value(w, c, one) for w in words)
                weights = [B.Bind(self.v.fma(*part)) for part in zip(values, scales, offsets, strict=True)]
                for i, row in enumerate(tile.sums):
                    code = b * self.block_codes + p * size + c
                    index = (tile.first + i) * self.plan.inputs + g * self.group + code * self.span + one
                    x = B.Bind(self.v.splat(self.x[index]))
                    for weight, register in zip(weights, row, strict=True):
                        register.set(self.v.fma(x, weight, register.get()))

        serial(whole, lambda b: serial(self.block_codes // size, lambda p: part(b, p)))
        for first in range(0, left, size):
            part(whole, first // size, min(size, left - first))

    def _part_words(self, tile: _Tile, number: Expression, part: Expression) -> list[list[Expression]]:
        """Of each vector, the words of a part of block `number` of the panel, its first code in the lowest bits.

        Of three bits the first word holds two of a code, and the second the third.
        """
        v, vectors = self.v, tile.vectors
        base = tile.panel * (self.plan.width * self.groups * self.blocks * self.words)
        base = base + number * (self.words * vectors * v.lanes)
        low, *high = PLANES[self.bits]
        a_word = max(32 // (self.part * low), 1)  # parts

        def word(n: Expression, j: int, shift: Expression) -> Expression:
            loaded = v.load(self.arrays["weight"], base + (n * vectors + j) * v.lanes)
            return B.Bind(T.shift_right(loaded, v.splat(T.int32(0) + shift)))

        def words(j: int) -> list[Expression]:
            n, p = tirx.floordiv(part, a_word), tirx.floormod(part, a_word)
            codes = self.part
            return [word(n, j, p * (codes * low)), *(word(self.words - 1, j, part * (codes * h)) for h in high)]

        return [words(j) for j in range(vectors)]

    def _value(self, words: list[Expression], code: int, one: int) -> Expression:
        """What code number `code` of a part stands for, for one of the inputs that share it, as float."""
        v = self.v
        index = self._raised(words, code)
        if self.tables:
            name = "llvm.x86.avx512.permvar.sf.512" if v.lanes == 16 else "llvm.x86.avx2.permps"
            kind = f"float32x{v.lanes}"
            found = [tirx.call_llvm_pure_intrin(kind, name, part, index) for part in self.tables[one]]
            if len(found) == 1:
                return found[0]
            high = T.bitwise_and(index, v.constant(v.lanes, "int32"))
            return v.select(T.NE(high, v.constant(0, "int32")), found[1], found[0])
        unused = v.constant(32 - self.bits, "int32")
        return v.to_float(T.shift_right(T.shift_left(index, unused), unused))

    def _raised(self, words: list[Expression], code: int) -> Expression:
        """The code in the lowest bits, others above it."""
        low, *high = PLANES[self.bits]
        index = self._moved(words[0], -low * code)
        if not high:
            return index
        mask = self.v.constant((1 << low) - 1, "int32")
        top = self._moved(words[1], low - code)
        return T.bitwise_or(T.bitwise_and(index, mask), T.bitwise_and(top, T.bitwise_not(mask)))

    def _moved(self, word: Expression, left: int) -> Expression:
        if left == 0:
            return word
        by = self.v.constant(abs(left), "int32")
        return T.shift_left(word, by) if left > 0 else T.shift_right(word, by)


def _words(codes: NDArray[np.int8], bits: int, group: int) -> NDArray[np.int32]:
    """Signed codes [out, in] as words [out, groups, blocks of a group * words of a block]."""
    outputs, inputs = codes.shape
    grouped = codes.reshape(outputs, inputs // group, group)
    padded = np.pad(grouped, ((0, 0), (0, 0), (0, -group % CODES[bits])))
    blocks = padded.reshape(*padded.shape[:2], -1, CODES[bits]).astype(np.uint32)
    parts, below = [], 0
    for plane in PLANES[bits]:
        held = 32 // plane
        cut = ((blocks >> below) & ((1 << plane) - 1)).reshape(*blocks.shape[:3], -1, held)
        parts.append((cut << (np.arange(held, dtype=np.uint32) * plane)).sum(-1, dtype=np.uint32))
        below += plane
    words: NDArray[np.int32] = np.concatenate(parts, -1).reshape(*blocks.shape[:2], -1).view(np.int32)
    return words
