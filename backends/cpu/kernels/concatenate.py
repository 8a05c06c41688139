"""Concatenation: runs of elements that lie side by side in every input are copied whole.

An input may be an image that is to be made larger by whole factors on the way, nearest pixels repeated.
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
        dims: of it; before the concatenated dim they may vary.
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
    widest = target.vector_lanes * (4 if dtype == "uint8" else 1)
    v = Vectors(target)
    runs = [run_of(part, dim) or 0 for part in parts]
    before = leading_dims(result[:dim])
    whole = (*before, *result[dim:])
    dims = [(*(before if p.factors == (1, 1) else (before[0], *p.dims[1:dim])), *p.dims[dim:]) for p in parts]
    total = sum(runs)
    block = max(1, BLOCK_BYTES // (total * (1 if dtype == "uint8" else 4)))

    def body(*buffers: Expression) -> None:
        outer = product(before)
        sources = [flat(b, product(d)) for b, d in zip(buffers[:-1], dims, strict=True)]
        out = flat(buffers[-1], outer * total)

        def copy(source: Expression, start: Expression, at: Expression, run: int) -> None:
            lanes = min(widest, 1 << (run.bit_length() - 1))
            serial(
                run // lanes, lambda i: v.store(out, at + i * lanes, v.load(source, start + i * lanes, lanes), lanes)
            )
            if run % lanes:
                last = run - lanes
                v.store(out, at + last, v.load(source, start + last, lanes), lanes)

        def row(o: Expression) -> None:
            o = B.Bind(T.cast(o, "int64"))
            at = 0
            for source, part, run in zip(sources, parts, runs, strict=True):
                copy(source, B.Bind(_place(o, part, before) * run), B.Bind(o * total + at), run)
                at += run

        shared_rows(outer, block, row)

    parameters = [Parameter(f"X{i}", d, dtype) for i, d in enumerate(dims)]
    return kernel_function("concatenate", [*parameters, Parameter("Y", whole, dtype)], body).without_attr(
        "global_symbol"
    )


def _place(o: Expression, part: Part, before: tuple[Any, ...]) -> Expression:
    """Which run of an input the output's run number `o` is."""
    high, wide = part.factors
    if (high, wide) == (1, 1):
        return o
    _, height, width = before
    image, pixel = tirx.floordiv(o, height * width), tirx.floormod(o, height * width)
    y, x = tirx.floordiv(pixel, width), tirx.floormod(pixel, width)
    return (image * (height // high) + tirx.floordiv(y, high)) * (width // wide) + tirx.floordiv(x, wide)
