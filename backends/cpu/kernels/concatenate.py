"""Concatenation: runs of elements that lie side by side in every input are copied whole.

An input may be an image that is to be made larger by whole factors on the way, nearest pixels repeated; or of any
length along the joined dim, as the keys and values of a decoder that grow by a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.kernels.tiles import leading_dims, shared_rows
from mcc.backends.cpu.microkernel import (
    Expression,
    Parameter,
    Vectors,
    flat,
    kernel_function,
    product,
    serial,
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcc.target import Target

SHORTEST_RUN = 8
BLOCK_BYTES = 64 << 10  # of output that one task writes


@dataclass(frozen=True)
class Part:
    """One input.

    Attributes:
        dims: of it; those after the concatenated dim do not vary.
        factors: height and width by which its pixels are repeated, of [batch, height, width, channels].
    """

    dims: tuple[Any, ...]
    factors: tuple[int, int] = (1, 1)


def run_of(part: Part, dim: int) -> int | None:
    """Elements of a part that lie side by side in the output, or None where their number varies."""
    sizes = part.dims[dim:]
    return int(product(sizes)) if all(isinstance(s, int) for s in sizes) else None


def concatenate_function(
    result: tuple[Any, ...], parts: Sequence[Part], dim: int, dtype: str, target: Target
) -> tirx.PrimFunc:
    """A kernel over the inputs and the output, whose dims are `result`."""
    v = Vectors(target)
    widest = v.lanes * (1 if dtype == "float32" else 4)
    before = leading_dims(result[:dim])
    joined = leading_dims([p.dims[dim] for p in parts])
    dims = [
        (*(before if p.factors == (1, 1) else (before[0], *p.dims[1:dim])), n, *p.dims[dim + 1 :])
        for p, n in zip(parts, joined, strict=True)
    ]
    runs = [product(d[dim:]) for d in dims]
    total: Expression = sum(runs)
    whole = (*before, sum(joined), *result[dim + 1 :])

    def body(*buffers: Expression) -> None:
        outer = product(before)
        sources = [flat(b, product(d)) for b, d in zip(buffers[:-1], dims, strict=True)]
        out = flat(buffers[-1], outer * total)

        def row(o: Expression) -> None:
            o = B.Bind(T.cast(o, "int64"))
            at: Expression = 0
            for source, part, run in zip(sources, parts, runs, strict=True):
                place = _place(o, part, before) * run
                _copy(v, (source, B.Bind(T.cast(place, "int64"))), (out, B.Bind(o * total + at)), run, widest)
                at += run

        row_bytes = total * (4 if dtype == "float32" else 1)
        shared_rows(outer, tirx.max(1, tirx.floordiv(BLOCK_BYTES, tirx.max(row_bytes, 1))), row)

    parameters = [Parameter(f"X{i}", d, dtype) for i, d in enumerate(dims)]
    return kernel_function("concatenate", [*parameters, Parameter("Y", whole, dtype)], body).without_attr(
        "global_symbol"
    )


def _copy(
    v: Vectors, source: tuple[Expression, Expression], out: tuple[Expression, Expression], run: Any, widest: int
) -> None:
    """Copy a run of elements from one place to another."""
    (read, start), (write, at) = source, out
    lanes = min(widest, 1 << (run.bit_length() - 1)) if isinstance(run, int) and run else widest

    def vector(i: Expression) -> None:
        v.store(write, at + i, v.load(read, start + i, lanes), lanes)

    def element(i: Expression) -> None:
        B.buffer_store(write, read[start + i], [at + i])

    if lanes == 1:
        serial(run, element)
    elif isinstance(run, int):
        serial(run // lanes, lambda i: vector(i * lanes))
        if run % lanes:
            vector(run - lanes)
    else:
        whole = B.Bind(tirx.floordiv(run, lanes))
        serial(whole, lambda i: vector(i * lanes))
        serial(run - whole * lanes, lambda i: element(whole * lanes + i))


def _place(o: Expression, part: Part, before: tuple[Any, ...]) -> Expression:
    """Which run of an input the output's run number `o` is."""
    high, wide = part.factors
    if (high, wide) == (1, 1):
        return o
    _, height, width = before
    image, pixel = tirx.floordiv(o, height * width), tirx.floormod(o, height * width)
    y, x = tirx.floordiv(pixel, width), tirx.floormod(pixel, width)
    return (image * (height // high) + tirx.floordiv(y, high)) * (width // wide) + tirx.floordiv(x, wide)
