"""Quantizing a whole tensor: float32 to unsigned 8-bit codes with one scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.epilogue import emit_epilogue
from mcc.backends.cpu.kernels.tiles import leading_dims
from mcc.backends.cpu.microkernel import (
    Expression,
    Parameter,
    Vectors,
    branch,
    flat,
    kernel_function,
    parallel,
    product,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcc.backends.kernel import EpilogueStep
    from mcc.target import Target

BLOCK = 8192


def quantize_function(dims: Sequence[Any], steps: tuple[EpilogueStep, ...], target: Target) -> tirx.PrimFunc:
    """A kernel over a tensor of these dims (symbolic ones vary), in blocks that threads share; steps end in codes."""
    v = Vectors(target)
    shape = leading_dims(dims)
    size = product(shape)

    def body(x: Expression, y: Expression) -> None:
        source, codes = flat(x, size), flat(y, size)

        def vector(start: Expression) -> None:
            v.store(codes, start, emit_epilogue(v, v.load(source, start), steps))

        def block(b: Expression) -> None:
            inside = tirx.min(size - b * BLOCK, BLOCK)
            with B.serial(0, tirx.floordiv(inside, v.lanes)) as i:
                vector(b * BLOCK + i * v.lanes)
            left = tirx.floormod(inside, v.lanes)

            def tail() -> None:
                # the last vector overlaps the one before it, except in a tensor smaller than a vector
                branch(size >= v.lanes, lambda: vector(size - v.lanes), lambda: _scalars(v, source, codes, size, steps))

            branch(left > 0, tail)

        blocks = tirx.floordiv(size + BLOCK - 1, BLOCK)
        branch(blocks > 1, lambda: parallel(blocks, block), lambda: block(0))

    parameters = [Parameter("X", shape, "float32"), Parameter("Y", shape, "uint8")]
    return kernel_function("quantize", parameters, body).without_attr("global_symbol")


def _scalars(
    v: Vectors, source: Expression, codes: Expression, size: Expression, steps: tuple[EpilogueStep, ...]
) -> None:
    with B.serial(0, size) as i:
        value = emit_epilogue(v, v.splat(source[i]), steps)
        B.buffer_store(codes, T.cast(tirx.Shuffle([value], [0]), "uint8"), [i])
