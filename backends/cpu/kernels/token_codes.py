"""Activations as codes with a scale for each row, made by the kernel that reads them: the largest |x| gets code 127."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.kernels.tiles import shared_rows
from mcc.backends.cpu.microkernel import Expression, Vectors, flat, lane, serial
from mcc.backends.kernel import PER_TOKEN_LIMIT
from mcc.formats import SMALLEST_ROW

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK_ELEMENTS = 16384  # that one thread takes at a time
WORD = 4


@dataclass(frozen=True)
class CodeForm:
    """What codes look like in memory.

    Attributes:
        inputs: of a row.
        groups: parts of a row, of one size, whose codes are summed; 0 for none.
        offset: added to each code: 128 makes them unsigned, 0 leaves them signed.
    """

    inputs: int
    groups: int
    offset: int

    @property
    def words(self) -> int:
        """32-bit words of a row."""
        return -(-self.inputs // WORD)


@dataclass(frozen=True)
class TokenCodes:
    """The codes of all rows.

    Attributes:
        words: four codes each, [rows * form.words]; codes beyond a row's inputs are `offset`, zero.
        scales: [rows].
        sums: of the codes of each group, without the offset, int32 [rows * groups]; None without groups.
    """

    words: Expression
    scales: Expression
    sums: Expression | None


def emit_token_codes(v: Vectors, source: Expression, rows: Expression, form: CodeForm) -> TokenCodes:
    """Emit the loop that makes the codes of `source`, float32 [rows * form.inputs]."""
    kind = "uint8" if form.offset else "int8"
    width = form.words * WORD
    if isinstance(rows, int) and rows == 0:
        return TokenCodes(None, None, None)  # nothing reads them, and TVM has no buffer of nothing
    codes = B.alloc_buffer((rows * width,), kind, layout=None)
    scales = B.alloc_buffer((rows,), "float32", layout=None)
    sums = B.alloc_buffer((rows * form.groups,), "int32", layout=None) if form.groups else None
    writer = _Writer(v, source, form, (codes, scales, sums))
    shared_rows(rows, max(1, BLOCK_ELEMENTS // form.inputs), writer.row)
    return TokenCodes(flat(codes, rows * form.words, "int32"), scales, sums)


class _Writer:
    def __init__(self, v: Vectors, source: Expression, form: CodeForm, buffers: tuple[Any, Any, Any]) -> None:
        self.v, self.source, self.form = v, source, form
        self.codes, self.scales, self.sums = buffers

    def row(self, r: Expression) -> None:
        """Write one row."""
        v, form = self.v, self.form
        row = B.Bind(T.cast(r, "int64"))
        start, target = B.Bind(row * form.inputs), B.Bind(row * (form.words * WORD))
        largest = self._largest(start)
        # of a row that holds an infinity or a NaN every result is a NaN, as in the graph
        scale = tirx.Select(largest < T.float32(np.inf), largest / T.float32(PER_TOKEN_LIMIT), T.float32(np.nan))
        B.buffer_store(self.scales, scale, [row])
        # what is smaller gives codes of zero with any inverse that is not huge
        positive = tirx.Select(largest > T.float32(SMALLEST_ROW), largest, T.float32(1))
        inverse = B.Bind(v.splat(T.float32(PER_TOKEN_LIMIT) / positive))
        groups = max(form.groups, 1)
        size = form.inputs // groups

        def group(g: Expression) -> None:
            (total,) = v.registers(1, 1, "int32")[0]
            total.set(v.constant(0, "int32"))

            def vector(i: Expression) -> None:
                at = g * size + i * v.lanes
                code = B.Bind(v.to_nearest_integer(v.load(self.source, start + at) * inverse))
                total.set(total.get() + code)
                self._store(target + at, code, v.lanes)

            serial(size // v.lanes, vector)
            for i in range(size // v.lanes * v.lanes, size):
                at = g * size + i
                code = B.Bind(v.to_nearest_integer(v.splat(self.source[start + at]) * inverse))
                alone = tirx.Shuffle([code, v.constant(0, "int32")], [0, *[v.lanes] * (v.lanes - 1)])
                total.set(total.get() + alone)
                self._store(target + at, code, 1)
            if self.sums is not None:
                added = v.across([total.get()], lambda a, b: a + b)
                B.buffer_store(self.sums, added, [row * groups + g])

        serial(groups, group)
        for beyond in range(form.inputs, form.words * WORD):
            B.buffer_store(self.codes, tirx.const(form.offset, self.codes.dtype), [target + beyond])

    def _largest(self, start: Expression) -> Expression:
        v, inputs = self.v, self.form.inputs
        (most,) = v.registers(1, 1, "int32")[0]
        most.set(v.constant(0, "int32"))

        def take(x: Expression) -> None:
            # without its sign a float32 has the order of its bits, a NaN above all
            bits = T.bitwise_and(T.reinterpret(f"int32x{v.lanes}", x), v.constant(0x7FFFFFFF, "int32"))
            most.set(T.max(most.get(), bits))

        def vector(i: Expression) -> None:
            take(v.load(self.source, start + i))

        serial(inputs // v.lanes, lambda i: vector(i * v.lanes))
        left = inputs % v.lanes
        if left and inputs >= v.lanes:
            vector(inputs - v.lanes)  # overlaps the vector before it
        elif left:
            for i in range(inputs):
                take(v.splat(self.source[start + i]))
        return B.Bind(T.reinterpret("float32", v.across([most.get()], T.max)))

    def _store(self, index: Expression, code: Expression, used: int) -> None:
        v, kind = self.v, self.codes.dtype
        shifted = T.cast(
            code + v.constant(self.form.offset, "int32") if self.form.offset else code, f"{kind}x{v.lanes}"
        )
        if used == v.lanes:
            v.store(self.codes, index, shifted)
        else:
            B.buffer_store(self.codes, lane(B.Bind(shifted), 0), [index])


def token_codes(source: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The same in NumPy: codes and scales [..., 1] of rows."""
    largest = np.abs(source).max(-1, keepdims=True, initial=0)
    inverse = np.float32(PER_TOKEN_LIMIT) / np.where(largest > SMALLEST_ROW, largest, np.float32(1))
    return np.rint(source * inverse).astype(np.int64), largest / np.float32(PER_TOKEN_LIMIT)
