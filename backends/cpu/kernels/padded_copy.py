"""Copies of an image with its padding, which a convolution reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.kernels.bfloat16 import PAIR, bits_of, vector_bits_of
from mcc.backends.cpu.microkernel import branch, serial

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcc.backends.cpu.kernels.conv_shape import ConvShape, Passes
    from mcc.backends.cpu.microkernel import Expression, Vectors


def copy_rows(
    v: Vectors,
    shape: ConvShape,
    source: tuple[Expression, Expression],
    target: tuple[Expression, Expression],
    rows: tuple[Expression, Expression],
    loop: Callable[..., None],
) -> None:
    """Copy some rows of an image, padded: `source` is buffer and first index, `target` is buffer and padding value.

    A target of int16 gets the bits of float32 rounded to bfloat16.
    """
    (room, zero), pixel = target, shape.inputs
    height, width = shape.image
    line = shape.padded[1] * pixel
    lanes = v.lanes * (4 if room.dtype == "uint8" else 1)

    def span(pixels: Expression, store: Callable[[Expression, int], None]) -> None:
        size = pixels * pixel
        serial(size // lanes, lambda i: store(i * lanes, lanes))
        if pixel % lanes and not (isinstance(size, int) and size % lanes == 0):
            branch(size > lanes, lambda: store(size - lanes, lanes), lambda: serial(size, lambda i: store(i, 1)))

    def fill(first: Expression, pixels: Expression) -> None:
        span(pixels, lambda i, n: v.store(room, first + i, T.broadcast(zero, n), n) if n > 1
             else B.buffer_store(room, zero, [first + i]))  # fmt: skip

    def copy(from_index: Expression, to_index: Expression, pixels: Expression) -> None:
        def vector(i: Expression, n: int) -> None:
            value = v.load(source[0], from_index + i, n)
            v.store(room, to_index + i, vector_bits_of(v, value) if room.dtype == "int16" else value, n)

        span(pixels, lambda i, n: vector(i, n) if n > 1 else _copy_one(source[0], from_index + i, room, to_index + i))

    def row(i: Expression) -> None:
        h = rows[0] + i
        inside = tirx.all(h >= shape.before[0], h < shape.before[0] + height)

        def image_row() -> None:
            fill(i * line, shape.before[1])
            from_index = source[1] + (h - shape.before[0]) * (width * pixel)
            copy(from_index, i * line + shape.before[1] * pixel, width)
            fill(i * line + (shape.before[1] + width) * pixel, shape.after[1])

        branch(inside, image_row, lambda: fill(i * line, shape.padded[1]))

    loop(rows[1], row)


def copy_words(
    shape: ConvShape,
    passes: Passes,
    source: tuple[Expression, Expression],
    target: tuple[Expression, Expression],
    rows: tuple[Expression, Expression],
    loop: Callable[..., None],
) -> None:
    """As `copy_rows`, but the channels of each pass, filled up to whole words of 32 bits."""
    room, zero = target
    word = 4 if room.dtype == "uint8" else PAIR
    (height, width), padded_width = shape.image, shape.padded[1]
    inputs = passes.joined * shape.group_inputs
    depth = -(-inputs // word) * word
    pixel = passes.count * depth

    def row(i: Expression) -> None:
        def column(w: Expression) -> None:
            y, x = rows[0] + i - shape.before[0], w - shape.before[1]
            inside = tirx.all(y >= 0, y < height, x >= 0, x < width)
            to_index = (i * padded_width + w) * pixel
            from_index = source[1] + (y * width + x) * shape.inputs

            def copy(p: Expression) -> None:
                for c in range(depth):
                    if c >= inputs and room.dtype == "int16":  # an infinity times a weight of zero is none
                        B.buffer_store(room, zero, [to_index + p * depth + c])
                        continue
                    # past the last channel any code will do: its weights are zero
                    channel = passes.first(p) * shape.group_inputs + min(c, inputs - 1)
                    _copy_one(source[0], from_index + channel, room, to_index + p * depth + c)

            def fill(i: Expression) -> None:
                B.buffer_store(room, zero, [to_index + i])

            branch(inside, lambda: serial(passes.count, copy), lambda: serial(pixel, fill))

        serial(padded_width, column)

    loop(rows[1], row)


def _copy_one(source: Expression, from_index: Expression, room: Expression, to_index: Expression) -> None:
    value = source[from_index]
    B.buffer_store(room, bits_of(value) if room.dtype == "int16" else value, [to_index])
