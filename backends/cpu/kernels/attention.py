"""Scaled dot-product attention: softmax(q k^T * scale + mask) v, one head after another, a few rows at a time.

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
from mcc.backends.cpu.vector_math import exp

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mcc.target import Target

LOWEST = float("-inf")  # the score of a key that is not seen
SMALLEST = -87.0  # e to less than this is 0
ROWS_MANY, ROWS_FEW = 6, 4  # rows of a block, with 32 and with 16 vector registers


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


def attention_shape(
    operands: Sequence[tuple[Any, ...]], mask_dtype: str, tokens_first: Sequence[bool], *, causal: bool, scale: float
) -> AttentionShape:
    """The sizes of an attention whose query, key, value and mask, if any, have these dims; equal symbols stay equal."""
    variables: dict[str, tirx.Var] = {}

    def known(dim: Any) -> Any:
        return dim if isinstance(dim, int) else variables.setdefault(str(dim), tirx.Var(f"d{len(variables)}", "int64"))

    dims = [tuple(map(known, d)) for d in operands]
    query, key, value = (
        (batch, b, a, size) if first else (batch, a, b, size)
        for (batch, a, b, size), first in zip(dims[:3], tokens_first, strict=False)
    )
    first = (tokens_first[0], tokens_first[1], tokens_first[2], tokens_first[3])
    mask = dims[3] if len(dims) > 3 else None
    return AttentionShape(
        batch=query[0], heads=query[1], key_heads=key[1], rows=query[2], keys=key[2], depth=query[3], width=value[3],
        tokens_first=first, mask=mask, mask_dtype=mask_dtype, causal=causal, scale=scale,
    )  # fmt: skip


def attention_function(shape: AttentionShape, target: Target) -> tirx.PrimFunc:
    """A kernel over query, key, value, the mask if there is one, and the output."""
    body = _Body(shape, Vectors(target))
    parameters = [
        Parameter("Q", body.dims(0, shape.heads, shape.rows, shape.depth), "float32"),
        Parameter("K", body.dims(1, shape.key_heads, shape.keys, shape.depth), "float32"),
        Parameter("V", body.dims(2, shape.key_heads, shape.keys, shape.width), "float32"),
        *([Parameter("M", shape.mask, shape.mask_dtype)] if shape.mask is not None else []),
        Parameter("Y", body.dims(3, shape.heads, shape.rows, shape.width), "float32"),
    ]
    return kernel_function("attention", parameters, body.emit).without_attr("global_symbol")


class _Body:
    def __init__(self, shape: AttentionShape, vectors: Vectors) -> None:
        self.shape, self.v = shape, vectors
        self.block = ROWS_MANY if vectors.target.vector_registers == 32 else ROWS_FEW
        self.columns = 4 if vectors.target.vector_registers == 32 else 2  # vectors of keys or values in a tile
        self.panels = tirx.floordiv(shape.keys + vectors.lanes - 1, vectors.lanes)
        self.padded = self.panels * vectors.lanes

    def dims(self, which: int, heads: int, tokens: Any, size: int) -> tuple[Any, ...]:
        """Dims of one of query, key, value and output."""
        batch = self.shape.batch
        return (batch, tokens, heads, size) if self.shape.tokens_first[which] else (batch, heads, tokens, size)

    def _place(self, which: int, heads: int, tokens: Any, size: int) -> Callable[..., tuple[Expression, int]]:
        """Given batch and head: index of its first element, and how far apart its tokens are."""
        if self.shape.tokens_first[which]:
            return lambda b, h: (b * (tokens * (heads * size)) + h * size, heads * size)
        return lambda b, h: ((b * heads + h) * (tokens * size), size)

    def emit(self, q: Expression, k: Expression, value: Expression, *rest: Expression) -> None:
        """Emit the whole kernel."""
        s = self.shape
        buffers = [
            flat(x, s.batch * (heads * size) * tokens)
            for x, heads, tokens, size in (
                (q, s.heads, s.rows, s.depth), (k, s.key_heads, s.keys, s.depth),
                (value, s.key_heads, s.keys, s.width), (rest[-1], s.heads, s.rows, s.width),
            )
        ]  # fmt: skip
        self.q, self.k, self.values, self.out = buffers
        self.mask = flat(rest[0], product(s.mask)) if s.mask is not None else None
        group = s.heads // s.key_heads

        def head(i: Expression) -> None:
            b, h = (
                B.Bind(T.cast(tirx.floordiv(i, s.heads), "int64")),
                B.Bind(T.cast(tirx.floormod(i, s.heads), "int64")),
            )
            shared = tirx.floordiv(h, group)
            query = self._place(0, s.heads, s.rows, s.depth)(b, h)
            key = self._place(1, s.key_heads, s.keys, s.depth)(b, shared)
            values = self._place(2, s.key_heads, s.keys, s.width)(b, shared)
            out = self._place(3, s.heads, s.rows, s.width)(b, h)
            panels = B.alloc_buffer((self.padded * s.depth,), "float32", layout=None)
            scores = B.alloc_buffer((self.padded * self.block,), "float32", layout=None)
            self._transpose_keys(key, panels)
            whole = tirx.floordiv(s.rows, self.block)

            def block(first: Expression, rows: int) -> None:
                self._block((b, h, first, rows), (query, values, out), (panels, scores))

            serial(whole, lambda r: block(r * self.block, self.block))
            left = s.rows - whole * self.block
            for size in range(1, self.block):
                branch(left == size, lambda n=size: block(whole * self.block, n))  # type: ignore[misc]

        parallel(s.batch * s.heads, head)

    def _transpose_keys(self, key: tuple[Expression, int], panels: Expression) -> None:
        """[keys, depth] to [panel][depth][lane]; past the last key, it again."""
        v, s = self.v, self.shape
        lanes = v.lanes
        first, apart = key

        def panel(p: Expression) -> None:
            rows = [B.Bind(first + tirx.min(p * lanes + lane, s.keys - 1) * apart) for lane in range(lanes)]
            whole = s.depth // lanes

            def square(c: Expression) -> None:
                columns = v.transpose([B.Bind(v.load(self.k, row + c * lanes)) for row in rows])
                for d, column in enumerate(columns):
                    v.store(panels, (p * s.depth + c * lanes + d) * lanes, column)

            serial(whole, square)
            for d in range(whole * lanes, s.depth):
                for lane, row in enumerate(rows):
                    B.buffer_store(panels, self.k[row + d], [(p * s.depth + d) * lanes + lane])

        serial(self.panels, panel)

    def _block(
        self,
        place: tuple[Expression, Expression, Expression, int],
        operands: tuple[tuple[Expression, int], ...],
        rooms: tuple[Expression, Expression],
    ) -> None:
        b, h, first, rows = place
        query, values, out = operands
        panels, scores = rooms
        s, lanes = self.shape, self.v.lanes
        seen: Expression = s.keys
        if s.causal:
            seen = B.Bind(tirx.min(s.keys, first + rows))
        count = B.Bind(tirx.floordiv(seen + lanes - 1, lanes))
        self._scores(rows, query[0] + first * query[1], query[1], (panels, scores, count))
        for i in range(rows):
            self._mask((b, h, first + i), scores, i, seen, count)
        inverse = [self._softmax(scores, i, count) for i in range(rows)]
        self._weigh(rows, (scores, seen), values, (out[0] + first * out[1], out[1]), inverse)

    def _scores(
        self, rows: int, query: Expression, apart: int, room: tuple[Expression, Expression, Expression]
    ) -> None:
        """Products of a few queries with all keys, times the scale."""
        v, s = self.v, self.shape
        panels, scores, count = room

        def tile(p: Expression, vectors: int) -> None:
            sums = v.registers(rows, vectors, "float32")
            for row in sums:
                for register in row:
                    register.set(v.constant(0.0))

            def step(d: Expression) -> None:
                keys = [B.Bind(v.load(panels, ((p + j) * s.depth + d) * v.lanes)) for j in range(vectors)]
                for i, row in enumerate(sums):
                    element = B.Bind(v.splat(self.q[query + i * apart + d]))
                    for register, key in zip(row, keys, strict=True):
                        register.set(v.fma(element, key, register.get()))

            serial(s.depth, step)
            for i, row in enumerate(sums):
                for j, register in enumerate(row):
                    value = register.get() * v.constant(s.scale)
                    v.store(scores, i * self.padded + (p + j) * v.lanes, value)

        self._in_vectors(count, tile)

    def _in_vectors(self, count: Expression, tile: Callable[[Expression, int], None]) -> None:
        """Cover `count` vectors by tiles of `columns` and what is left by single ones."""
        whole = tirx.floordiv(count, self.columns)
        serial(whole, lambda p: tile(p * self.columns, self.columns))
        serial(count - whole * self.columns, lambda p: tile(whole * self.columns + p, 1))

    def _mask(
        self, place: tuple[Expression, Expression, Expression], scores: Expression, i: int, seen: Expression, count: Any
    ) -> None:
        """Leave out what the row does not see: keys past the end, past itself, and masked ones."""
        s, v = self.shape, self.v
        b, h, row = place
        base = i * self.padded
        end = tirx.min(seen, row + 1) if s.causal else seen
        with B.serial(0, count * v.lanes - end) as t:
            B.buffer_store(scores, T.float32(LOWEST), [base + end + t])
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
        """Replace scores by e to them less the largest; returns one over their sum."""
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
            value = B.Bind(tirx.Select(less < v.constant(SMALLEST), v.constant(0.0), exp(v, less)))
            v.store(scores, base + p * v.lanes, value)
            total.set(total.get() + value)
        summed = v.across([total.get()], lambda a, b: a + b)
        return B.Bind(tirx.Select(blind, T.float32(0), T.float32(1) / summed))

    def _weigh(
        self,
        rows: int,
        weights: tuple[Expression, Expression],
        values: tuple[Expression, int],
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
                loaded = [B.Bind(v.load(self.values, values[0] + t * values[1] + start)) for start in part]
                for i, row in enumerate(sums):
                    weight = B.Bind(v.splat(scores[i * self.padded + t]))
                    for register, value in zip(row, loaded, strict=True):
                        register.set(v.fma(weight, value, register.get()))
            for i, row in enumerate(sums):
                for register, start in zip(row, part, strict=True):
                    v.store(self.out, out[0] + i * out[1] + start, register.get() * v.splat(inverse[i]))
