"""Dense layers whose weights are codes of a few bits in groups, and which quantize the float32 they read row by row.

Weights stand as unsigned codes, four of one output in a 32-bit lane; shifting and masking a word gives the operands of
`dot4`, whose other one is a word of a row's signed codes. What unsigned codes count too much is a multiple of the sum
of the row's codes in the group, which is known beforehand. A group's sums are exact integers; its scale, and what its
zero point takes off, are one multiply-add each.
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
from mcc.backends.cpu.integer_sums import LARGEST_INT32
from mcc.backends.cpu.kernels.grouped import PLANES, GroupedBody, not_grouped
from mcc.backends.cpu.kernels.panels import PanelPlan
from mcc.backends.cpu.kernels.tiles import PanelWidth, TileShape, parse_tile
from mcc.backends.cpu.kernels.token_codes import CodeForm, emit_token_codes, token_codes
from mcc.backends.cpu.microkernel import Expression, Register, Vectors, product, serial
from mcc.backends.kernel import PER_TOKEN_LIMIT, Lowered, Region, apply_epilogue
from mcc.ops import extent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from mcc.target import Target

BLOCK = 32  # codes of an output that whole words of every width hold
WORD = 4  # codes of an operand
FEW_ROWS = 4
BYTE = 8


@dataclass(frozen=True)
class LowBitPerToken:
    """float32 activations quantized per token; weights of 1 to 4 or 8 bits with scales for groups."""

    name: str = "low_bit_per_token"
    anchor: ClassVar[ops.Op] = ops.LINEAR

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes linear with a grouped weight and activations quantized per token."""
        del target
        weight = region.weight
        if (reason := not_grouped(weight, dict.fromkeys(PLANES, BLOCK))) is not None:
            return reason
        if region.weight.table is not None:
            return "its codes stand for entries of a table"
        if region.activation is None or not region.activation.per_token:
            return "the activations are not quantized per token"
        if weight.group_size * PER_TOKEN_LIMIT << weight.bits > LARGEST_INT32:
            return f"the integer sums of groups of {weight.group_size} may leave int32"
        return None

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """Rows x vectors that leave registers for two kinds of sums."""
        many = math.prod(extent(s) for s in region.source.shape[:-1]) > FEW_ROWS
        if target.vector_registers == 32:
            wanted = ((6, 2), (12, 1), (4, 3)) if many else ((2, 4), (4, 3))
        else:
            wanted = ((4, 1), (2, 2)) if many else ((2, 2), (1, 4))
        vectors = -(-region.weight.shape[0] // target.vector_lanes)
        return tuple(dict.fromkeys(str(TileShape(rows, min(wide, vectors))) for rows, wide in wanted))

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        plan = PanelPlan(region, Vectors(target), parse_tile(tile))
        body = _Body(plan)
        return Lowered(plan.function(self.name, body.packed, body.emit), body.packed, body.element)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """Exact integers, float64 sums of groups."""
        weight = region.weight
        assert weight.scale is not None
        zeros = 0 if weight.zero_point is None else weight.zero_point.repeat(weight.group_size, 1).astype(np.float64)
        codes, scales = token_codes(source)
        form = weight.scale.shape[1], weight.group_size
        cut = (weight.decoded() - zeros).reshape(weight.shape[0], *form)
        sums = np.einsum("...gk,ogk->...og", codes.reshape(*codes.shape[:-1], *form), cut)
        values = (sums * weight.scale.astype(np.float64)).sum(-1) * scales
        bias = np.float32(0) if region.bias is None else region.bias
        return apply_epilogue((values + bias).astype(np.float32), region.epilogue, operands)


@dataclass(frozen=True)
class _Tile:
    """A tile of outputs.

    Attributes:
        panel: its number.
        vectors: of outputs.
        first: row.
        values: float32 sums over groups, by row and vector.
        totals: integer sums of a group.
    """

    panel: Expression
    vectors: int
    first: Expression
    values: list[list[Register]]
    totals: list[list[Register]]


class _Body(GroupedBody):
    """The loops of one kernel, and the arrays they read."""

    def __init__(self, plan: PanelPlan) -> None:
        weight = plan.region.weight
        assert weight.dense is not None
        super().__init__(plan, _words(weight.dense, weight.bits, weight.group_size), BLOCK)
        self.low = -(1 << (self.bits - 1))

    def emit(self, x: Expression, *arrays: Expression) -> None:
        """Emit the whole kernel."""
        plan = self.plan
        self.arrays = dict(zip(self.packed, arrays, strict=True))
        self.row_words = -(-plan.inputs // WORD)
        made = emit_token_codes(self.v, x, product(plan.leading), CodeForm(plan.inputs, self.groups, 0))
        self.codes, self.row_scales = made.words, made.scales
        self.code_sums: Expression = made.sums
        plan.loops(self._tile)

    def signed_code(self, word: Callable[[Expression], Expression], c: Expression) -> Expression:
        """See `GroupedBody`."""
        low, *high = PLANES[self.bits]
        held, operand, byte = BYTE // low, tirx.floordiv(c, WORD), tirx.floormod(c, WORD) * BYTE
        shift = T.cast(tirx.floormod(operand, held) * low + byte, "int32")
        code = T.bitwise_and(T.shift_right(word(tirx.floordiv(operand, held)), shift), (1 << low) - 1)
        for plane in high:
            top = T.shift_right(word(self.words - 1), T.cast(operand * plane + byte, "int32"))
            code = T.bitwise_or(code, T.shift_left(T.bitwise_and(top, (1 << plane) - 1), T.int32(low)))
        return code + self.low

    def _tile(self, panel: Expression, width: PanelWidth, first: Expression, count: int) -> None:
        plan, v, vectors = self.plan, self.v, width.vectors
        values, bias = v.registers(count, vectors, "float32"), self.arrays.get("bias")
        for row in values:
            for register in row:
                register.set(v.constant(0.0))
        totals = v.registers(count, vectors, "int32")
        serial(self.groups, lambda g: self._group(_Tile(panel, vectors, first, values, totals), g))
        for j in range(vectors):
            column = panel * plan.width + j * v.lanes
            start = v.constant(0.0) if bias is None else B.Bind(v.load(bias, column))
            for i, row in enumerate(values):
                value = v.fma(row[j].get(), v.splat(self.row_scales[first + i]), start)
                plan.store(first + i, column, value, width.used_lanes(j, v.lanes))

    def _group(self, tile: _Tile, g: Expression) -> None:
        """Add group `g` of inputs to the tile's values."""
        v, rows = self.v, len(tile.values)
        totals, counted = tile.totals, self.low + v.target.code_offset
        sums = [B.Bind(self.code_sums[(tile.first + i) * self.groups + g]) for i in range(rows)]
        for total, row in zip(sums, totals, strict=True):
            start = B.Bind(v.splat(total * T.int32(counted)))
            for register in row:
                register.set(start)
        whole, left = divmod(self.group, BLOCK)
        serial(whole, lambda b: self._block(tile, g, b, BLOCK // WORD))
        if left:
            self._block(tile, g, whole, -(-left // WORD))
        scales, zeros = self.group_vectors(self.arrays, tile.panel, tile.vectors, g)
        for i, row in enumerate(totals):
            for j, register in enumerate(row):
                value = v.fma(v.to_float(register.get()), scales[j], tile.values[i][j].get())
                if zeros:
                    value = v.fma(zeros[j], v.splat(T.cast(sums[i], "float32")), value)
                tile.values[i][j].set(value)

    def _block(self, tile: _Tile, g: Expression, b: Expression, operands: int) -> None:
        """Add the products of a block of codes, its first `operands` words of activations."""
        v = self.v
        words = self._weight_words(tile, g * self.blocks + b)
        at = B.Bind(tile.first * self.row_words + g * (self.group // WORD) + b * (BLOCK // WORD))
        for k in range(operands):
            weights = [v.hold(self._operand(w, k)) for w in words]
            for i, row in enumerate(tile.totals):
                code = B.Bind(v.splat(self.codes[at + (i * self.row_words + k)]))
                for weight, register in zip(weights, row, strict=True):
                    # of at most four bits: no pair of products leaves 16 bits
                    register.set(v.dot4(register.get(), weight, code, bounded=self.bits < BYTE))

    def _weight_words(self, tile: _Tile, number: Expression) -> list[list[Expression]]:
        """Of each vector, the words of block `number` of the panel."""
        v, vectors = self.v, tile.vectors
        base = tile.panel * (self.plan.width * self.groups * self.blocks * self.words)
        base = B.Bind(base + number * (self.words * vectors * v.lanes))
        return [
            [v.hold(v.load(self.arrays["weight"], base + (n * vectors + j) * v.lanes)) for n in range(self.words)]
            for j in range(vectors)
        ]

    def _operand(self, words: list[Expression], k: int) -> Expression:
        """Codes 4 k to 4 k + 3 of a block, unsigned, one in each byte."""
        v, (low, *high) = self.v, PLANES[self.bits]
        held = BYTE // low  # operands of a word
        codes = self._moved(words[k // held], low * (k % held))
        if low == BYTE:
            return codes
        codes = T.bitwise_and(codes, v.constant(((1 << low) - 1) * 0x01010101, "int32"))
        if high:
            top = T.bitwise_and(self._moved(words[-1], k - low), v.constant(0x01010101 << low, "int32"))
            codes = T.bitwise_or(codes, top)
        return codes

    def _moved(self, word: Expression, right: int) -> Expression:
        if right == 0:
            return word
        by = self.v.constant(abs(right), "int32")
        return T.shift_right(word, by) if right > 0 else T.shift_left(word, by)


def _words(codes: NDArray[np.int8], bits: int, group: int) -> NDArray[np.int32]:
    """Signed codes [out, in] as words [out, groups, blocks of a group * words of a block], the planes one by one."""
    outputs, inputs = codes.shape
    unsigned = (codes.astype(np.int16) + (1 << (bits - 1))).astype(np.uint32).reshape(outputs, inputs // group, group)
    padded = np.pad(unsigned, ((0, 0), (0, 0), (0, -group % BLOCK)))
    blocks = padded.reshape(*padded.shape[:2], -1, BLOCK)
    parts, below = [], 0
    for plane in PLANES[bits]:
        held = BYTE // plane
        # [word][operand of it][byte]
        cut = ((blocks >> below) & ((1 << plane) - 1)).reshape(*blocks.shape[:3], -1, held, WORD)
        shifts = np.arange(held, dtype=np.uint32)[:, None] * plane + np.arange(WORD, dtype=np.uint32) * BYTE
        parts.append((cut << shifts).sum((-1, -2), dtype=np.uint32))
        below += plane
    words: NDArray[np.int32] = np.concatenate(parts, -1).reshape(*blocks.shape[:2], -1).view(np.int32)
    return words
