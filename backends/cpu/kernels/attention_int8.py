"""Scaled dot-product attention over codes: both products sum integers, the softmax between them is float32.

Queries, keys and values are unsigned codes with one scale and zero point each. The probabilities of a row become codes
too: e to its scores less the largest is no more than one, so that the largest probability of every row has the largest
code, and what the values are summed by loses no more of a row of many small probabilities than of one large one.
Zhang, Wei, Huang, Zhang, Zhu, Chen: SageAttention: accurate 8-bit attention for plug-and-play inference acceleration.
ICLR 2025 (there with scales for blocks of rows, and values in float16).
"""

from __future__ import annotations

import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.kernels.attention import AttentionBody, AttentionShape, Rows, batch_and_head
from mcc.backends.cpu.kernels.quads import QUAD
from mcc.backends.cpu.microkernel import Expression, Parameter, Vectors, flat, parallel, serial
from mcc.backends.cpu.vector_math import exp_to_codes

SIGN = -0x7F7F7F80  # the highest bit of each byte of a word: what makes unsigned codes signed, 128 less
MIDDLE = 128


def _word(byte: int) -> int:
    """Four times a byte, as int32."""
    return int.from_bytes(bytes([byte] * QUAD), "little", signed=True)


class IntegerBody(AttentionBody):
    """Emits the kernel for one attention over codes."""

    name = "attention_int8"
    kind = "int32"
    exponential = staticmethod(exp_to_codes)

    def __init__(self, shape: AttentionShape, vectors: Vectors) -> None:
        super().__init__(shape, vectors)
        self.steps = shape.depth // QUAD  # a word of codes each
        self.row_words = self.padded // QUAD  # codes of a row of probabilities
        width, lanes = shape.width, vectors.lanes
        # bytes that count one each
        self.ones = vectors.constant(_word(vectors.target.code_offset + 1), "int32")
        # the last vector of a width that is no multiple overlaps the one before
        self.starts = [min(j * lanes, width - lanes) for j in range(-(-width // lanes))]

    def parameters(self) -> list[Parameter]:
        """Query, key, value."""
        s = self.shape
        sizes = (s.heads, s.rows, s.depth), (s.key_heads, s.keys, s.depth), (s.key_heads, s.keys, s.width)
        found = []
        for which, (name, size) in enumerate(zip("QKV", sizes, strict=True)):
            found.append(Parameter(name, self.dims(which, *size), "uint8"))
            found += [Parameter(f"{name}S", (), "float32"), Parameter(f"{name}Z", (), "int32")]
        return found

    def bind(self, *buffers: Expression) -> None:
        """Queries and keys are read as words of four codes."""
        s = self.shape
        query, key, value = buffers[::3]
        self.scales = [flat(scale, 1) for scale in buffers[1::3]]
        self.zeros = [flat(zero, 1) for zero in buffers[2::3]]

        def words(data: Expression, which: int, heads: int, tokens: Expression) -> Rows:
            read = flat(data, s.batch * (heads * self.steps) * tokens, "int32")
            return Rows(self.v, read, None, None, heads, tokens, self.steps, s.tokens_first[which])

        self.query, self.keys = words(query, 0, s.heads, s.rows), words(key, 1, s.key_heads, s.keys)
        data = flat(value, s.batch * (s.key_heads * s.width) * s.keys)
        self.values = Rows(self.v, data, None, None, s.key_heads, s.keys, s.width, s.tokens_first[2])

    def emit(self) -> None:
        """Emit the loops."""
        s = self.shape

        def head(i: Expression) -> None:
            b, h = batch_and_head(i, s.heads)
            self.prepare_head(b, h)
            self.blocks(lambda first, rows: self._codes_block((b, h, first), rows))

        parallel(s.batch * s.heads, head)

    def prepare_head(self, b: Expression, h: Expression) -> None:
        """Rooms for all blocks of a head, and its keys and values packed."""
        s = self.shape
        self.zero = [B.Bind(zero[0]) for zero in self.zeros]
        self.factor = B.Bind(self.v.splat(T.float32(s.scale) * self.scales[0][0] * self.scales[1][0]))
        shared = tirx.floordiv(h, s.heads // s.key_heads)
        self.panels_room = B.alloc_buffer((self.padded * self.steps,), "int32", layout=None)
        self.starts_room = B.alloc_buffer((self.padded,), "int32", layout=None)
        values = self.row_words * (len(self.starts) * self.v.lanes)
        self.values_room = B.alloc_buffer((values,), "int32", layout=None)
        self.scores = B.alloc_buffer((self.padded * self.block,), "float32", layout=None)
        self.codes = B.alloc_buffer((self.row_words * QUAD * self.block,), "uint8", layout=None)
        self._pack_keys(self.keys.place(b, shared))
        self._pack_values(self.values.place(b, shared))

    def _pack_keys(self, key: tuple[Expression, int]) -> None:
        """[keys, depth] to signed [panel][quad][lane]; past the last key, it again. And what each key's sum begins at.

        sum (q - zq) (k - zk) = sum (q - offset) k' - (zq - offset) sum k' - zk' sum q + depth zq zk', k' = k - 128.
        """
        v, s = self.v, self.shape
        start, apart = key
        offset = v.target.code_offset
        factor = B.Bind(v.splat(T.int32(offset) - self.zero[0]))
        constant = B.Bind(v.splat(T.int32(s.depth) * self.zero[0] * (self.zero[1] - T.int32(MIDDLE))))

        def panel(p: Expression) -> None:
            tokens = [B.Bind(start + tirx.min(p * v.lanes + lane, s.keys - 1) * apart) for lane in range(v.lanes)]
            self._squares(p, tokens)
            ((total,),) = v.registers(1, 1, "int32")
            total.set(v.constant(0, "int32"))

            def add(d: Expression) -> None:
                keys = v.load(self.panels_room, (p * self.steps + d) * v.lanes)
                total.set(v.dot4(total.get(), self.ones, keys, bounded=False))

            serial(self.steps, add)
            v.store(self.starts_room, p * v.lanes, total.get() * factor + constant)

        serial(self.panels, panel)

    def _squares(self, p: Expression, tokens: list[Expression]) -> None:
        """Transpose a panel, squares of words at a time, as large as what is left of the depth allows."""
        v, words = self.v, self.keys.data
        at, sizes = 0, [n for n in (v.lanes, 8, 4) if n <= v.lanes]
        while at < self.steps:
            size = next((n for n in sizes if n <= self.steps - at), 0)
            if not size:
                for lane, token in enumerate(tokens):
                    signed = tirx.bitwise_xor(words[token + at], T.int32(SIGN))
                    B.buffer_store(self.panels_room, signed, [(p * self.steps + at) * v.lanes + lane])
                at += 1
                continue
            for first in range(0, v.lanes, size):
                rows = [B.Bind(v.load(words, t + at, size)) for t in tokens[first : first + size]]
                for d, column in enumerate(Vectors(v.target, size).transpose(rows)):
                    signed = tirx.bitwise_xor(column, T.broadcast(T.int32(SIGN), size))
                    v.store(self.panels_room, (p * self.steps + at + d) * v.lanes + first, signed, size)
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
        start, less = B.Bind(query[0] + first * query[1]), T.int32(MIDDLE) - self.zero[1]
        self.terms = [B.Bind(self.v.splat(self.sum_of_query(start + i * query[1]) * less)) for i in range(rows)]
        self._scores(rows, start, query[1], (self.panels_room, self.scores, count))
        for i in range(rows):
            self.mask_row((b, h, first + i), self.scores, i, seen, count)
        factors = [self.to_codes(i, count) for i in range(rows)]
        self._integer_weigh(rows, seen, (B.Bind(out[0] + first * out[1]), out[1]), factors)

    def start(self, row: int, panel: Expression) -> Expression:
        """What the zero points add to a sum."""
        return self.v.load(self.starts_room, panel * self.v.lanes) + self.terms[row]

    def multiply(self, element: Expression, key: Expression, total: Expression) -> Expression:
        """Of words of four codes."""
        return self.v.dot4(total, element, key, bounded=False)

    def score(self, total: Expression) -> Expression:
        """What a sum of codes stands for."""
        return self.v.to_float(total) * self.factor

    def sum_of_query(self, start: Expression) -> Expression:
        """The sum of a query's codes."""
        v, vectors = self.v, self.steps // self.v.lanes
        ((summed,),) = v.registers(1, 1, "int32")
        summed.set(v.constant(0, "int32"))
        for c in range(vectors):
            words = v.load(self.query.data, start + c * v.lanes)
            summed.set(v.dot4(summed.get(), words, v.constant(_word(1), "int32"), bounded=False))
        total = v.across([summed.get()], lambda x, y: x + y) + T.int32(v.target.code_offset * QUAD * v.lanes * vectors)
        for d in range(vectors * v.lanes, self.steps):
            word = B.Bind(self.query.data[start + d])
            for i in range(QUAD):
                total = total + T.bitwise_and(T.shift_right(word, T.int32(8 * i)), T.int32(255))
        return B.Bind(total)

    def to_codes(self, i: int, count: Expression) -> tuple[Expression, Expression]:
        """Codes of a row's probabilities; returns what one stands for, and their sum."""
        v = self.v
        ((summed,),) = v.registers(1, 1, "int32")
        summed.set(v.constant(0, "int32"))

        def code(p: Expression, value: Expression) -> None:
            rounded = B.Bind(v.to_nearest_integer(value * v.constant(float(self.shape.limit))))
            summed.set(summed.get() + rounded)
            v.store(self.codes, i * (self.row_words * QUAD) + p * v.lanes, T.cast(rounded, f"uint8x{v.lanes}"))

        inverse = self.exponentials(self.scores, i, count, code)
        total = v.across([summed.get()], lambda x, y: x + y)
        return B.Bind(inverse * (self.scales[2][0] / T.float32(self.shape.limit))), total

    def _integer_weigh(
        self, rows: int, seen: Expression, out: tuple[Expression, int], factors: list[tuple[Expression, Expression]]
    ) -> None:
        """Sums of values by codes, less what their zero points add."""
        v = self.v
        words = flat(self.codes, self.row_words * self.block, "int32")
        quads = tirx.floordiv(seen + QUAD - 1, QUAD)
        zero, offset = self.zero[2] - T.int32(MIDDLE), v.target.code_offset
        for at in range(0, len(self.starts), self.columns):
            part = self.starts[at : at + self.columns]
            sums = v.registers(rows + bool(offset), len(part), "int32")
            for register in (r for row in sums for r in row):
                register.set(v.constant(0, "int32"))
            with B.serial(0, quads) as t:
                place = (t * len(self.starts) + at) * v.lanes
                loaded = [B.Bind(v.load(self.values_room, place + j * v.lanes)) for j in range(len(part))]
                splats = [B.Bind(v.splat(words[i * self.row_words + t])) for i in range(rows)]
                for row, splat in zip(sums, [*splats, self.ones], strict=False):
                    for register, value in zip(row, loaded, strict=True):
                        register.set(v.dot4(register.get(), splat, value, bounded=False))
            for i, (factor, total) in enumerate(factors):
                for j, start in enumerate(part):
                    value = sums[i][j].get() - v.splat(total * zero)
                    if offset:
                        value = value + sums[rows][j].get() * v.constant(offset, "int32")
                    v.store(self.out.data, out[0] + i * out[1] + start, v.to_float(value) * v.splat(factor))
