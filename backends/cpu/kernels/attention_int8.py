"""Scaled dot-product attention over codes: both products sum integers, the softmax between them is float32.

Queries, keys and values are unsigned codes with one scale and zero point each. The probabilities of a row become codes
too: e to its scores less the largest is no more than one, so that the largest probability of every row has the largest
code, and what the values are summed by loses no more of a row of many small probabilities than of one large one.
Zhang, Wei, Huang, Zhang, Zhu, Chen: SageAttention: accurate 8-bit attention for plug-and-play inference acceleration.
ICLR 2025 (there with scales for blocks of rows, and values in float16).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.kernels.attention import AttentionBody, AttentionShape, Rows, batch_and_head
from mcc.backends.cpu.kernels.quads import QUAD
from mcc.backends.cpu.microkernel import Expression, Parameter, Vectors, flat, parallel, serial
from mcc.backends.cpu.vector_math import exp_to_codes

if TYPE_CHECKING:
    from mcc.backends.kernel import QuantizedInput
    from mcc.target import Target

SIGN = -0x7F7F7F80  # of each byte of a word: what makes unsigned codes signed, 128 less
MIDDLE = 128


@dataclass(frozen=True)
class CodedAttention:
    """An attention whose operands are codes.

    Attributes:
        shape: its sizes; depth is a multiple of four, the largest code of a probability is up to 255.
        query, key, value: what their codes stand for.
    """

    shape: AttentionShape
    query: QuantizedInput
    key: QuantizedInput
    value: QuantizedInput


def attention_int8_function(attention: CodedAttention, target: Target) -> tirx.PrimFunc:
    """A kernel over codes of query, keys and values, the mask if there is one, and the float32 output."""
    return _IntegerBody(attention, Vectors(target)).function()


class _IntegerBody(AttentionBody):
    name = "attention_int8"
    exponential = staticmethod(exp_to_codes)

    def __init__(self, attention: CodedAttention, vectors: Vectors) -> None:
        super().__init__(attention.shape, vectors)
        self.attention = attention
        self.quads = attention.shape.depth // QUAD
        width, lanes = attention.shape.width, vectors.lanes
        # the last vector of a width that is no multiple overlaps the one before
        self.starts = [min(j * lanes, width - lanes) for j in range(-(-width // lanes))]

    def parameters(self) -> list[Parameter]:
        """Query, key, value."""
        s = self.shape
        return [
            Parameter("Q", self.dims(0, s.heads, s.rows, s.depth), "uint8"),
            Parameter("K", self.dims(1, s.key_heads, s.keys, s.depth), "uint8"),
            Parameter("V", self.dims(2, s.key_heads, s.keys, s.width), "uint8"),
        ]

    def bind(self, *buffers: Expression) -> None:
        """Queries and keys are read as words of four codes."""
        s = self.shape
        query, key, value = buffers

        def words(data: Expression, which: int, heads: int, tokens: Expression) -> Rows:
            read = flat(data, s.batch * (heads * self.quads) * tokens, "int32")
            return Rows(self.v, read, None, None, heads, tokens, self.quads, s.tokens_first[which])

        self.query, self.keys = words(query, 0, s.heads, s.rows), words(key, 1, s.key_heads, s.keys)
        data = flat(value, s.batch * (s.key_heads * s.width) * s.keys)
        self.values = Rows(self.v, data, None, None, s.key_heads, s.keys, s.width, s.tokens_first[2])

    def emit(self) -> None:
        """Emit the loops."""
        s, lanes = self.shape, self.v.lanes
        group = s.heads // s.key_heads

        def head(i: Expression) -> None:
            b, h = batch_and_head(i, s.heads)
            shared = tirx.floordiv(h, group)
            self.panels_room = B.alloc_buffer((self.padded * self.quads,), "int32", layout=None)
            self.starts_room = B.alloc_buffer((self.padded,), "int32", layout=None)
            values = self.padded // QUAD * (len(self.starts) * lanes)
            self.values_room = B.alloc_buffer((values,), "int32", layout=None)
            self.scores = B.alloc_buffer((self.padded * self.block,), "float32", layout=None)
            self.codes = B.alloc_buffer((self.padded * self.block,), "uint8", layout=None)
            self._pack_keys(self.keys.place(b, shared))
            self._pack_values(self.values.place(b, shared))
            self.blocks(lambda first, rows: self._codes_block((b, h, first), rows))

        parallel(s.batch * s.heads, head)

    def _pack_keys(self, key: tuple[Expression, int]) -> None:
        """[keys, depth] to signed [panel][quad][lane]; past the last key, it again. And what each key's sum begins at.

        sum (q - zq) (k - zk) = sum (q - offset) k' - (zq - offset) sum k' - zk' sum q + depth zq zk', k' = k - 128.
        """
        v, s, a = self.v, self.shape, self.attention
        start, apart = key
        offset, zero = v.target.code_offset, a.key.zero_point - MIDDLE
        ones = v.constant(0x01010101 * (offset + 1) - (1 << 32 if offset else 0), "int32")

        def panel(p: Expression) -> None:
            tokens = [B.Bind(start + tirx.min(p * v.lanes + lane, s.keys - 1) * apart) for lane in range(v.lanes)]
            self._squares(p, tokens)
            ((total,),) = v.registers(1, 1, "int32")
            total.set(v.constant(0, "int32"))

            def add(d: Expression) -> None:
                total.set(v.dot4(total.get(), ones, v.load(self.panels_room, (p * self.quads + d) * v.lanes),
                                 bounded=False))  # fmt: skip

            serial(self.quads, add)
            factor = v.constant(offset - a.query.zero_point, "int32")
            constant = v.constant(s.depth * a.query.zero_point * zero, "int32")
            v.store(self.starts_room, p * v.lanes, total.get() * factor + constant)

        serial(self.panels, panel)

    def _squares(self, p: Expression, tokens: list[Expression]) -> None:
        """Transpose a panel, squares of words at a time, as large as what is left of the depth allows."""
        v, words = self.v, self.keys.data
        at, sizes = 0, [n for n in (v.lanes, 8, 4) if n <= v.lanes]
        while at < self.quads:
            size = next((n for n in sizes if n <= self.quads - at), 0)
            if not size:
                for lane, token in enumerate(tokens):
                    signed = tirx.bitwise_xor(words[token + at], T.int32(SIGN))
                    B.buffer_store(self.panels_room, signed, [(p * self.quads + at) * v.lanes + lane])
                at += 1
                continue
            for first in range(0, v.lanes, size):
                rows = [B.Bind(v.load(words, t + at, size)) for t in tokens[first : first + size]]
                for d, column in enumerate(Vectors(v.target, size).transpose(rows)):
                    signed = tirx.bitwise_xor(column, T.broadcast(T.int32(SIGN), size))
                    v.store(self.panels_room, (p * self.quads + at + d) * v.lanes + first, signed, size)
            at += size

    def _pack_values(self, value: tuple[Expression, int]) -> None:
        """[keys, width] to signed [quad of keys][vector][lane]; past the last key, it again."""
        v, s = self.v, self.shape
        start, apart = value

        def quad(t: Expression) -> None:
            tokens = [B.Bind(start + tirx.min(t * QUAD + i, s.keys - 1) * apart) for i in range(QUAD)]
            for j, first in enumerate(self.starts):
                word = v.constant(SIGN, "int32")
                for i, token in enumerate(tokens):
                    part = T.cast(v.load(self.values.data, token + first), f"int32x{v.lanes}")
                    word = B.Bind(tirx.bitwise_xor(word, T.shift_left(part, v.constant(8 * i, "int32"))))
                v.store(self.values_room, (t * len(self.starts) + j) * v.lanes, word)

        serial(tirx.floordiv(s.keys + QUAD - 1, QUAD), quad)

    def _codes_block(self, place: tuple[Expression, Expression, Expression], rows: int) -> None:
        b, h, first = place
        query, out = self.query.place(b, h), self.out.place(b, h)
        seen, count = self.seen(first, rows)
        self._integer_scores(rows, B.Bind(query[0] + first * query[1]), query[1], count)
        for i in range(rows):
            self.mask_row((b, h, first + i), self.scores, i, seen, count)
        factors = [self._to_codes(i, count) for i in range(rows)]
        self._integer_weigh(rows, seen, (B.Bind(out[0] + first * out[1]), out[1]), factors)

    def _integer_scores(self, rows: int, query: Expression, apart: int, count: Expression) -> None:
        v, s, a = self.v, self.shape, self.attention
        factor = v.constant(s.scale * a.query.scale * a.key.scale)
        zero = a.key.zero_point - MIDDLE
        terms = [self._sum_of_query(query + i * apart) * T.int32(-zero) if zero else None for i in range(rows)]
        terms = [None if term is None else B.Bind(term) for term in terms]

        def tile(p: Expression, vectors: int) -> None:
            sums = v.registers(rows, vectors, "int32")
            for row, term in zip(sums, terms, strict=True):
                for j, register in enumerate(row):
                    begin = v.load(self.starts_room, (p + j) * v.lanes)
                    register.set(begin if term is None else begin + v.splat(term))

            def step(d: Expression) -> None:
                keys = [B.Bind(v.load(self.panels_room, ((p + j) * self.quads + d) * v.lanes)) for j in range(vectors)]
                for i, row in enumerate(sums):
                    word = B.Bind(v.splat(self.query.data[query + i * apart + d]))
                    for register, key in zip(row, keys, strict=True):
                        register.set(v.dot4(register.get(), word, key, bounded=False))

            serial(self.quads, step)
            for i, row in enumerate(sums):
                for j, register in enumerate(row):
                    v.store(self.scores, i * self.padded + (p + j) * v.lanes, v.to_float(register.get()) * factor)

        self.in_vectors(count, tile)

    def _sum_of_query(self, start: Expression) -> Expression:
        """The sum of a query's codes."""
        total = B.alloc_buffer((1,), "int32", scope="local", layout=None)
        B.buffer_store(total, T.int32(0), [0])

        def word(d: Expression) -> None:
            held = B.Bind(self.query.data[start + d])
            parts = [T.bitwise_and(T.shift_right(held, T.int32(8 * i)), T.int32(255)) for i in range(QUAD)]
            B.buffer_store(total, total[0] + parts[0] + parts[1] + parts[2] + parts[3], [0])

        serial(self.quads, word)
        return total[0]

    def _to_codes(self, i: int, count: Expression) -> tuple[Expression, Expression]:
        """Codes of a row's probabilities; returns what one stands for, and their sum."""
        v, a = self.v, self.attention
        ((summed,),) = v.registers(1, 1, "int32")
        summed.set(v.constant(0, "int32"))

        def code(p: Expression, value: Expression) -> None:
            rounded = B.Bind(v.to_nearest_integer(value * v.constant(float(self.shape.limit))))
            summed.set(summed.get() + rounded)
            v.store(self.codes, i * self.padded + p * v.lanes, T.cast(rounded, f"uint8x{v.lanes}"))

        inverse = self.exponentials(self.scores, i, count, code)
        total = v.across([summed.get()], lambda x, y: x + y)
        return B.Bind(inverse * T.float32(a.value.scale / self.shape.limit)), total

    def _integer_weigh(
        self, rows: int, seen: Expression, out: tuple[Expression, int], factors: list[tuple[Expression, Expression]]
    ) -> None:
        """Sums of values by codes, less what their zero points add."""
        v = self.v
        words = flat(self.codes, self.padded * self.block // QUAD, "int32")
        quads = tirx.floordiv(seen + QUAD - 1, QUAD)
        zero, offset = self.attention.value.zero_point - MIDDLE, v.target.code_offset
        ones = v.constant(0x01010101 * (offset + 1) - (1 << 32 if offset else 0), "int32")
        for at in range(0, len(self.starts), self.columns):
            part = self.starts[at : at + self.columns]
            sums = v.registers(rows + bool(offset), len(part), "int32")
            for register in (r for row in sums for r in row):
                register.set(v.constant(0, "int32"))
            with B.serial(0, quads) as t:
                place = (t * len(self.starts) + at) * v.lanes
                loaded = [B.Bind(v.load(self.values_room, place + j * v.lanes)) for j in range(len(part))]
                splats = [B.Bind(v.splat(words[i * (self.padded // QUAD) + t])) for i in range(rows)]
                for row, splat in zip(sums, [*splats, ones], strict=False):
                    for register, value in zip(row, loaded, strict=True):
                        register.set(v.dot4(register.get(), splat, value, bounded=False))
            for i, (factor, total) in enumerate(factors):
                for j, start in enumerate(part):
                    value = sums[i][j].get() - v.splat(total * T.int32(zero))
                    if offset:
                        value = value + sums[rows][j].get() * v.constant(offset, "int32")
                    v.store(self.out.data, out[0] + i * out[1] + start, v.to_float(value) * v.splat(factor))
