"""Rows of a stored weight by their numbers: embeddings, which decode what they read element by element."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.kernels.tiles import leading_dims, shared_rows
from mcc.backends.cpu.microkernel import Expression, Parameter, flat, kernel_function, product, serial
from mcc.formats import pack

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from mcc.backends.kernel import StoredWeight

BLOCK = 16  # rows that one thread reads
BYTE = 8


def lookup_function(
    dims: Sequence[Any],
    kind: str,
    table: tuple[int, int],
    arrays: Mapping[str, NDArray[Any]],
    element: Callable[[Mapping[str, Expression], Expression, Expression], Expression],
) -> tirx.PrimFunc:
    """A kernel over row numbers, arrays and the output [*dims, columns]; numbers beyond the ends read the end rows.

    Args:
        dims: of the row numbers.
        kind: their element type.
        table: rows and columns of the weight.
        arrays: that it stands in, by name.
        element: see `Lowered.element`.
    """
    numbers = leading_dims(dims)
    rows, columns = table

    def body(source: Expression, *buffers: Expression) -> None:
        count = product(numbers)
        found, out = flat(source, count), flat(buffers[-1], count * columns)
        stored = dict(zip(arrays, buffers[:-1], strict=True))

        def row(r: Expression) -> None:
            number = B.Bind(tirx.max(tirx.min(T.cast(found[r], "int64"), rows - 1), 0))

            def column(c: Expression) -> None:
                B.buffer_store(out, element(stored, number, c), [T.cast(r, "int64") * columns + c])

            serial(columns, column)

        shared_rows(count, BLOCK, row)

    parameters = [
        Parameter("X", numbers, kind), *(Parameter(n, a.shape, a.dtype.name) for n, a in arrays.items()),
        Parameter("Y", (*numbers, columns), "float32"),
    ]  # fmt: skip
    return kernel_function("lookup", parameters, body).without_attr("global_symbol")


class CodeRows:
    """The codes of a weight that no layer reads, in the bits they have, with scales and zero points."""

    def __init__(self, weight: StoredWeight) -> None:
        assert weight.scale is not None
        assert weight.dense is not None
        self.bits, self.columns = weight.bits, weight.shape[1]
        self.low = -(1 << (self.bits - 1))
        groups = weight.scale.shape[1] if weight.grouped else 1
        self.group = self.columns // groups
        codes = weight.dense.reshape(-1)
        if self.bits < BYTE:
            stream = pack(torch.from_numpy(codes), self.bits, self.low).numpy()
            codes = np.pad(stream, (0, 1))  # a code's second byte may lie behind the last one
        self.arrays: dict[str, NDArray[Any]] = {"codes": codes, "scale": weight.scale.reshape(-1)}
        if weight.zero_point is not None:
            self.arrays["zero_point"] = weight.zero_point.reshape(-1)

    def element(self, arrays: Mapping[str, Expression], row: Expression, column: Expression) -> Expression:
        """See `Lowered.element`."""
        code = T.cast(self._code(arrays["codes"], row * self.columns + column), "float32")
        group = row * (self.columns // self.group) + tirx.floordiv(column, self.group)
        if "zero_point" in arrays:
            code = code - T.cast(arrays["zero_point"][group], "float32")
        return code * T.cast(arrays["scale"][group], "float32")

    def _code(self, codes: Expression, place: Expression) -> Expression:
        if self.bits == BYTE:
            return codes[place]
        byte, bit = tirx.floordiv(place * self.bits, BYTE), tirx.floormod(place * self.bits, BYTE)
        word = T.cast(codes[byte], "int32") + T.cast(codes[byte + 1], "int32") * 256
        return T.bitwise_and(T.shift_right(word, T.cast(bit, "int32")), (1 << self.bits) - 1) + self.low
