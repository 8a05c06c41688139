"""Scaled dot-product attention: softmax(q k^T * scale + mask) v, one head after another, a few rows at a time.

Keys and values are float32, or codes with scales for each token (`mcc.token_formats`), read as they are stored.

For a block of rows the scores of all keys lie in a small buffer that stays in cache, so that nothing of the size rows x
keys reaches memory. The keys of a head are transposed once into panels of a vector, so that lanes are keys; for the
product with the values lanes are the values' own. Causal blocks leave out the keys none of their rows sees.
Dao, Fu, Ermon, Rudra, Ré: FlashAttention. arXiv 2205.14135, 2022 (there for longer sequences, in blocks of keys too).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.kernels.tiles import alike_dims
from mcc.backends.cpu.microkernel import (
    Expression,
    Parameter,
    Vectors,
    branch,
    flat,
    kernel_function,
    parallel,
    product,
    serial,
)
from mcc.backends.cpu.vector_math import exp_to_zero
from mcc.token_formats import ZERO

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mcc.target import Target

LOWEST = float("-inf")  # the score of a key that is not seen
ROWS_MANY, ROWS_FEW = 6, 4  # rows of a block, with 32 and with 16 vector registers


@dataclass(frozen=True)
class TokenCodes:
    """How keys or values are stored.

    Attributes:
        bits: of a code, 8 or 4.
        groups: of a row, each with a scale.
    """

    bits: int
    groups: int


def _stored(size: int, codes: TokenCodes | None) -> int:
    """Elements of a row as it is stored: codes of 4 bits lie two in a byte."""
    return size // 2 if codes is not None and codes.bits == 4 else size


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one attention; those marked so may be symbolic.

    Attributes:
        batch, rows, keys: symbolic or not.
        heads: of the query; a multiple of `key_heads`.
        key_heads: of keys and values.
        depth: of queries and keys.
        width: of values.
        tokens_first: for query, key, value and output: [batch, tokens, heads, …] instead of [batch, heads, tokens, …].
        mask: dims of the mask, each 1 or that of [batch, heads, rows, keys]; None for no mask.
        mask_dtype: "bool" to leave out where false, "float32" to add.
        causal: row i sees keys up to i.
        scale: of the products.
        codes: of keys and of values, None where they are float32.
        limit: the largest code of a probability, where these are rounded, else 0.
    """

    batch: Any
    heads: int
    key_heads: int
    rows: Any
    keys: Any
    depth: int
    width: int
    tokens_first: tuple[bool, bool, bool, bool]
    mask: tuple[Any, ...] | None
    mask_dtype: str
    causal: bool
    scale: float
    codes: tuple[TokenCodes | None, TokenCodes | None] = (None, None)
    limit: int = 0


def attention_shape(
    operands: Sequence[tuple[Any, ...]],
    mask_dtype: str,
    tokens_first: Sequence[bool],
    *,
    causal: bool,
    scale: float,
    codes: tuple[TokenCodes | None, TokenCodes | None] = (None, None),
) -> AttentionShape:
    """The sizes of an attention whose query, key, value and mask, if any, have these dims; equal symbols stay equal."""
    dims = alike_dims(operands)
    query, key, value = (
        (batch, b, a, size) if first else (batch, a, b, size)
        for (batch, a, b, size), first in zip(dims[:3], tokens_first, strict=False)
    )
    first = (tokens_first[0], tokens_first[1], tokens_first[2], tokens_first[3])
    mask = dims[3] if len(dims) > 3 else None
    return AttentionShape(
        batch=query[0], heads=query[1], key_heads=key[1], rows=query[2], keys=key[2], depth=query[3], width=value[3],
        tokens_first=first, mask=mask, mask_dtype=mask_dtype, causal=causal, scale=scale, codes=codes,
    )  # fmt: skip


def attention_function(shape: AttentionShape, target: Target) -> tirx.PrimFunc:
    """A kernel over query, keys, values, the mask if there is one, and the output; scales follow their codes."""
    return AttentionBody(shape, Vectors(target)).function()


@dataclass(frozen=True)
class Rows:
    """Rows of one of query, keys, values and output.

    Attributes:
        v: the vectors.
        data: float32, or codes.
        scales: float32; None where there are no codes.
        codes: how they are stored; None where there are none.
        heads, tokens, size: dims besides the batch; `size` elements, however many bytes they have.
        tokens_first: [batch, tokens, heads, …].
    """

    v: Vectors
    data: Expression
    scales: Expression | None
    codes: TokenCodes | None
    heads: int
    tokens: Any
    size: int
    tokens_first: bool

    def place(self, b: Expression, h: Expression, size: int | None = None) -> tuple[Expression, int]:
        """Index of the first element of a batch and head, where rows have `size`, and how far apart tokens are."""
        size = self.size if size is None else size
        if self.tokens_first:
            return b * (self.tokens * (self.heads * size)) + h * size, self.heads * size
        return (b * self.heads + h) * (self.tokens * size), size

    def head(self, b: Expression, h: Expression) -> Head:
        """The rows of a batch and head."""
        groups = 1 if self.codes is None else self.codes.groups
        return Head(self, self.place(b, h, _stored(self.size, self.codes)), self.place(b, h, groups))


@dataclass(frozen=True)
class Head:
    """Rows of one head.

    Attributes:
        rows: all of them.
        start: index of the first row's data, and how far apart rows are.
        scale_start: the same of the scales.
    """

    rows: Rows
    start: tuple[Expression, int]
    scale_start: tuple[Expression, int]

    def load(self, token: Expression, at: Expression, lanes: int | None = None) -> Expression:
        """`lanes` elements from `at` of a row, float32; a group holds all of them."""
        rows, v = self.rows, self.rows.v
        n, first = lanes or v.lanes, self.start[0] + token * self.start[1]
        if rows.codes is None or rows.scales is None:
            return _read(rows.data, first + at, n)
        size = rows.size // rows.codes.groups
        group = at // size if isinstance(at, int) else tirx.floordiv(at, size)
        scale = rows.scales[self.scale_start[0] + token * self.scale_start[1] + group]
        if rows.codes.bits == 4:
            half = rows.size // 2
            high = int(at >= half) if isinstance(at, int) else T.cast(at >= half, "int32")
            packed = T.cast(_read(rows.data, first + at - high * half, n), _vector("int32", n))
            shifted = T.shift_right(packed, _splat(T.cast(high * 4, "int32"), n))
            codes = T.bitwise_and(shifted, _splat(T.int32(15), n)) - _splat(T.int32(ZERO), n)
        else:
            codes = T.cast(_read(rows.data, first + at, n), _vector("int32", n))
        return T.cast(codes, _vector("float32", n)) * _splat(scale, n)


def _read(data: Expression, index: Expression, lanes: int) -> Expression:
    return data[index] if lanes == 1 else tirx.BufferLoad(data, [T.ramp(index, 1, lanes)])


def _vector(kind: str, lanes: int) -> str:
    return kind if lanes == 1 else f"{kind}x{lanes}"


def _splat(value: Expression, lanes: int) -> Expression:
    return value if lanes == 1 else T.broadcast(value, lanes)


def batch_and_head(i: Expression, heads: int) -> tuple[Expression, Expression]:
    """Which batch and head number `i` of all heads of all batches is."""
    batch, head = tirx.floordiv(i, heads), tirx.floormod(i, heads)
    return B.Bind(T.cast(batch, "int64")), B.Bind(T.cast(head, "int64"))


class AttentionBody:
    """Emits the kernel for one attention."""

    name = "attention"
    kind = "float32"  # of sums
    exponential: Callable[[Vectors, Expression], Expression] = staticmethod(exp_to_zero)

    def __init__(self, shape: AttentionShape, vectors: Vectors) -> None:
        self.shape, self.v = shape, vectors
        self.block = ROWS_MANY if vectors.target.vector_registers == 32 else ROWS_FEW
        self.columns = 4 if vectors.target.vector_registers == 32 else 2  # vectors of keys or values in a tile
        self.panels = tirx.floordiv(shape.keys + vectors.lanes - 1, vectors.lanes)
        self.padded = self.panels * vectors.lanes
        self.steps = shape.depth  # of a product of a query and a key

    def function(self) -> tirx.PrimFunc:
        """The whole function."""
        s = self.shape
        parameters = self.parameters()
        if s.mask is not None:
            parameters.append(Parameter("M", s.mask, s.mask_dtype))
        parameters.append(Parameter("Y", self.dims(3, s.heads, s.rows, s.width), "float32"))
        return kernel_function(self.name, parameters, self._body).without_attr("global_symbol")

    def parameters(self) -> list[Parameter]:
        """Query, keys and values, scales behind their codes."""
        s = self.shape
        parameters = [Parameter("Q", self.dims(0, s.heads, s.rows, s.depth), "float32")]
        for name, which, size in (("K", 1, s.depth), ("V", 2, s.width)):
            codes = s.codes[which - 1]
            kind = "float32" if codes is None else "int8" if codes.bits == 8 else "uint8"
            parameters.append(Parameter(name, self.dims(which, s.key_heads, s.keys, _stored(size, codes)), kind))
            if codes is not None:
                dims = self.dims(which, s.key_heads, s.keys, codes.groups)
                parameters.append(Parameter(f"{name}S", dims, "float32"))
        return parameters

    def dims(self, which: int, heads: int, tokens: Any, size: int) -> tuple[Any, ...]:
        """Dims of one of query, key, value and output."""
        batch = self.shape.batch
        return (batch, tokens, heads, size) if self.shape.tokens_first[which] else (batch, heads, tokens, size)

    def _body(self, *buffers: Expression) -> None:
        s = self.shape
        *operands, out = buffers
        self.mask = flat(operands.pop(), product(s.mask)) if s.mask is not None else None
        data = flat(out, s.batch * (s.heads * s.width) * s.rows)
        self.out = Rows(self.v, data, None, None, s.heads, s.rows, s.width, s.tokens_first[3])
        self.bind(*operands)
        self.emit()

    def bind(self, *buffers: Expression) -> None:
        """Take the buffers of `parameters`."""
        s, given = self.shape, iter(buffers)

        def rows(which: int, heads: int, tokens: Any, size: int, codes: TokenCodes | None = None) -> Rows:
            data = flat(next(given), s.batch * (heads * _stored(size, codes)) * tokens)
            scales = None if codes is None else flat(next(given), s.batch * (heads * codes.groups) * tokens)
            return Rows(self.v, data, scales, codes, heads, tokens, size, s.tokens_first[which])

        self.query = rows(0, s.heads, s.rows, s.depth)
        self.keys = rows(1, s.key_heads, s.keys, s.depth, s.codes[0])
        self.values = rows(2, s.key_heads, s.keys, s.width, s.codes[1])

    def emit(self) -> None:
        """Emit the loops."""
        s = self.shape
        group = s.heads // s.key_heads

        def head(i: Expression) -> None:
            b, h = batch_and_head(i, s.heads)
            shared = tirx.floordiv(h, group)
            panels = B.alloc_buffer((self.padded * s.depth,), "float32", layout=None)
            scores = B.alloc_buffer((self.padded * self.block,), "float32", layout=None)
            self._transpose_keys(self.keys.head(b, shared), panels)
            values = self.values.head(b, shared)
            self.blocks(lambda first, rows: self._block((b, h, first, rows), values, (panels, scores)))

        parallel(s.batch * s.heads, head)

    def blocks(self, block: Callable[[Expression, int], None]) -> None:
        """All rows of a head, a block at a time."""
        whole = tirx.floordiv(self.shape.rows, self.block)
        serial(whole, lambda r: block(r * self.block, self.block))
        left = self.shape.rows - whole * self.block
        for size in range(1, self.block):
            branch(left == size, lambda n=size: block(whole * self.block, n))  # type: ignore[misc]

    def seen(self, first: Expression, rows: int) -> tuple[Expression, Expression]:
        """Keys that a block of rows sees, and their vectors."""
        s, lanes = self.shape, self.v.lanes
        seen: Expression = s.keys
        if s.causal:
            seen = B.Bind(tirx.min(s.keys, first + rows))
        return seen, B.Bind(tirx.floordiv(seen + lanes - 1, lanes))

    def _transpose_keys(self, key: Head, panels: Expression) -> None:
        """[keys, depth] to [panel][depth][lane]; past the last key, it again."""
        v, s = self.v, self.shape
        lanes = v.lanes

        def panel(p: Expression) -> None:
            tokens = [B.Bind(tirx.min(p * lanes + lane, s.keys - 1)) for lane in range(lanes)]
            whole = s.depth // lanes

            def square(c: Expression) -> None:
                columns = v.transpose([B.Bind(key.load(token, c * lanes)) for token in tokens])
                for d, column in enumerate(columns):
                    v.store(panels, (p * s.depth + c * lanes + d) * lanes, column)

            serial(whole, square)
            for d in range(whole * lanes, s.depth):
                for lane, token in enumerate(tokens):
                    B.buffer_store(panels, key.load(token, d, 1), [(p * s.depth + d) * lanes + lane])

        serial(self.panels, panel)

    def _block(
        self,
        place: tuple[Expression, Expression, Expression, int],
        values: Head,
        rooms: tuple[Expression, Expression],
    ) -> None:
        b, h, first, rows = place
        panels, scores = rooms
        query, out = self.query.place(b, h), self.out.place(b, h)
        seen, count = self.seen(first, rows)
        self._scores(rows, query[0] + first * query[1], query[1], (panels, scores, count))
        for i in range(rows):
            self.mask_row((b, h, first + i), scores, i, seen, count)
        inverse = [self._softmax(scores, i, count) for i in range(rows)]
        self._weigh(rows, (scores, seen), values, (out[0] + first * out[1], out[1]), inverse)

    def _scores(
        self, rows: int, query: Expression, apart: int, room: tuple[Expression, Expression, Expression]
    ) -> None:
        """Products of a few queries with all keys, times the scale."""
        v = self.v
        panels, scores, count = room

        def tile(p: Expression, vectors: int) -> None:
            sums = v.registers(rows, vectors, self.kind)
            for i, row in enumerate(sums):
                for j, register in enumerate(row):
                    register.set(self.start(i, p + j))

            def step(d: Expression) -> None:
                keys = [B.Bind(v.load(panels, ((p + j) * self.steps + d) * v.lanes)) for j in range(vectors)]
                for i, row in enumerate(sums):
                    element = B.Bind(v.splat(self.query.data[query + i * apart + d]))
                    for register, key in zip(row, keys, strict=True):
                        register.set(self.multiply(element, key, register.get()))

            serial(self.steps, step)
            for i, row in enumerate(sums):
                for j, register in enumerate(row):
                    v.store(scores, i * self.padded + (p + j) * v.lanes, self.score(register.get()))

        self._in_vectors(count, tile)

    def start(self, row: int, panel: Expression) -> Expression:
        """What the sums of a row and a panel of keys begin at."""
        del row, panel
        return self.v.constant(0.0)

    def multiply(self, element: Expression, key: Expression, total: Expression) -> Expression:
        """A total with the product of an element of a query and those of keys."""
        return self.v.fma(element, key, total)

    def score(self, total: Expression) -> Expression:
        """The scores of a whole sum."""
        return total * self.v.constant(self.shape.scale)

    def _in_vectors(self, count: Expression, tile: Callable[[Expression, int], None]) -> None:
        """Cover `count` vectors by tiles of `columns` and what is left by single ones."""
        whole = tirx.floordiv(count, self.columns)
        serial(whole, lambda p: tile(p * self.columns, self.columns))
        serial(count - whole * self.columns, lambda p: tile(whole * self.columns + p, 1))

    def mask_row(
        self, place: tuple[Expression, Expression, Expression], scores: Expression, i: int, seen: Expression, count: Any
    ) -> None:
        """Leave out what the row does not see: keys past the end, past itself, and masked ones."""
        s, v = self.shape, self.v
        b, h, row = place
        base = i * self.padded
        end = tirx.min(seen, row + 1) if s.causal else seen
        first = tirx.floordiv(end, v.lanes)

        def hide(p: Expression) -> None:
            lanes = T.ramp(T.int32(0), 1, v.lanes) + v.splat(T.cast((first + p) * v.lanes, "int32"))
            kept = v.load(scores, base + (first + p) * v.lanes)
            shown = v.select(lanes < v.splat(T.cast(end, "int32")), kept, v.constant(LOWEST))
            v.store(scores, base + (first + p) * v.lanes, shown)

        with B.serial(0, count - first) as p:
            hide(p)
        if s.mask is None or self.mask is None:
            return
        index: Expression = 0
        for size, at in zip(s.mask[:-1], (b, h, row), strict=True):
            fixed = isinstance(size, int) and size == 1
            index = index * size + (0 if fixed else at)
        same = isinstance(s.mask[-1], int) and s.mask[-1] == 1 and not (isinstance(s.keys, int) and s.keys == 1)
        line = B.Bind(T.cast(index, "int64") * s.mask[-1])
        mask = self.mask
        with B.serial(0, end) as t:
            element = mask[line if same else line + t]
            old = scores[base + t]
            new = tirx.Select(element, old, T.float32(LOWEST)) if s.mask_dtype == "bool" else old + element
            B.buffer_store(scores, new, [base + t])

    def _softmax(self, scores: Expression, i: int, count: Expression) -> Expression:
        """Replace scores by e to them less the largest, rounded where that is asked for; returns one over their sum."""
        v, limit = self.v, float(self.shape.limit)

        def put(p: Expression, value: Expression) -> None:
            code = v.round_half_even(value * v.constant(limit)) if limit else value
            v.store(scores, i * self.padded + p * v.lanes, code)

        inverse = self.exponentials(scores, i, count, put)
        return B.Bind(inverse * T.float32(1 / limit)) if limit else inverse

    def exponentials(
        self, scores: Expression, i: int, count: Expression, put: Callable[[Expression, Expression], None]
    ) -> Expression:
        """Give e to a row's scores less the largest to `put`, a vector at a time; returns one over their sum."""
        v, base = self.v, i * self.padded
        ((largest, total),) = v.registers(1, 2, "float32")
        largest.set(v.constant(LOWEST))
        total.set(v.constant(0.0))
        with B.serial(0, count) as p:
            largest.set(T.max(largest.get(), v.load(scores, base + p * v.lanes)))
        top = B.Bind(v.across([largest.get()], T.max))
        blind = B.Bind(top == T.float32(LOWEST))  # a row that sees no key gives zeros
        shift = B.Bind(v.splat(tirx.Select(blind, T.float32(0), top)))
        with B.serial(0, count) as p:
            less = B.Bind(v.load(scores, base + p * v.lanes) - shift)
            value = B.Bind(self.exponential(v, less))
            put(p, value)
            total.set(total.get() + value)
        summed = v.across([total.get()], lambda a, b: a + b)
        return B.Bind(tirx.Select(blind, T.float32(0), T.float32(1) / summed))

    def _weigh(
        self,
        rows: int,
        weights: tuple[Expression, Expression],
        values: Head,
        out: tuple[Expression, int],
        inverse: list[Expression],
    ) -> None:
        """Sums of values by their weights; the last vector of a width that is no multiple overlaps the one before."""
        v, width = self.v, self.shape.width
        scores, seen = weights
        starts = [min(j * v.lanes, width - v.lanes) for j in range(-(-width // v.lanes))]
        for at in range(0, len(starts), self.columns):
            part = starts[at : at + self.columns]
            sums = v.registers(rows, len(part), "float32")
            for row in sums:
                for register in row:
                    register.set(v.constant(0.0))
            with B.serial(0, seen) as t:
                loaded = [B.Bind(values.load(t, start)) for start in part]
                for i, row in enumerate(sums):
                    weight = B.Bind(v.splat(scores[i * self.padded + t]))
                    for register, value in zip(row, loaded, strict=True):
                        register.set(v.fma(weight, value, register.get()))
            for i, row in enumerate(sums):
                for register, start in zip(row, part, strict=True):
                    v.store(self.out.data, out[0] + i * out[1] + start, register.get() * v.splat(inverse[i]))
