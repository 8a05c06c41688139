"""Attention of a single query, as in a decode step: the heads that share keys are rows that are done together.

A product runs along the depth, so that keys are read once as they lie: lanes of a vector of keys' sums are put in place
by one transpose for each vector of keys and head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import tvm.tirx.script.builder.ir as B
from tvm import tirx

from mcc.backends.cpu.kernels.attention import AttentionBody, AttentionShape, Head, batch_and_head
from mcc.backends.cpu.microkernel import Expression, Vectors, parallel, serial

if TYPE_CHECKING:
    from mcc.target import Target


def attention_step_function(shape: AttentionShape, target: Target) -> tirx.PrimFunc:
    """A kernel with the parameters of `attention_function`, for one query that sees all keys."""
    return _StepBody(shape, Vectors(target)).function()


class _StepBody(AttentionBody):
    name = "attention_step"

    def emit(self) -> None:
        """Emit the loops: over batches and heads of keys, and a few heads of the query at a time."""
        s = self.shape
        group = s.heads // s.key_heads

        def head(i: Expression) -> None:
            b, shared = batch_and_head(i, s.key_heads)
            scores = B.alloc_buffer((self.padded * min(self.block, group),), "float32", layout=None)
            keys, values = self.keys.head(b, shared), self.values.head(b, shared)
            for first in range(0, group, self.block):
                h = B.Bind(shared * group + first)
                self._heads((b, h, min(self.block, group - first)), keys, values, scores)

        parallel(s.batch * s.key_heads, head)

    def _heads(self, place: tuple[Expression, Expression, int], keys: Head, values: Head, scores: Expression) -> None:
        """A few heads of the query, which lie one after another whatever the layout."""
        b, h, rows = place
        s = self.shape
        first = b * s.heads + h
        self._products(rows, first * s.depth, keys, scores)
        for i in range(rows):
            self.mask_row((b, h + i, 0), scores, i, s.keys, self.panels)
        inverse = [self._softmax(scores, i, self.panels) for i in range(rows)]
        self._weigh(rows, (scores, s.keys), values, (first * s.width, s.width), inverse)

    def _products(self, rows: int, query: Expression, keys: Head, scores: Expression) -> None:
        """Products of the heads' queries with all keys, times the scale."""
        v, s = self.v, self.shape
        chunks = range(0, s.depth, v.lanes)
        partial = B.alloc_buffer((rows * v.lanes * v.lanes,), "float32", layout=None)
        asked = v.registers(rows, len(chunks), "float32")
        for i, row in enumerate(asked):
            for register, chunk in zip(row, chunks, strict=True):
                register.set(v.load(self.query.data, query + i * s.depth + chunk) * v.constant(s.scale))

        def panel(p: Expression) -> None:
            def key(lane: Expression) -> None:
                token = B.Bind(tirx.min(p * v.lanes + lane, s.keys - 1))
                loaded = [B.Bind(keys.load(token, chunk)) for chunk in chunks]
                for i, row in enumerate(asked):
                    total = row[0].get() * loaded[0]
                    for register, value in zip(row[1:], loaded[1:], strict=True):
                        total = v.fma(register.get(), value, total)
                    v.store(partial, (i * v.lanes + lane) * v.lanes, total)

            serial(v.lanes, key)
            for i in range(rows):
                lanes = v.transpose([B.Bind(v.load(partial, (i * v.lanes + j) * v.lanes)) for j in range(v.lanes)])
                while len(lanes) > 1:
                    lanes = [B.Bind(a + b) for a, b in zip(lanes[::2], lanes[1::2], strict=True)]
                v.store(scores, i * self.padded + p * v.lanes, lanes[0])

        serial(self.panels, panel)
