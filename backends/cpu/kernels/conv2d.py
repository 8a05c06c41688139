"""Convolutions: any kernel size, stride, dilation, padding and groups, NCHW in and out, fixed height and width.

Lanes are output channels: a tile holds a few neighbouring pixels times a few vectors of channels, and each input value
is broadcast, so NCHW needs no repacking on the way in beyond one padded copy of the image. Results are transposed to
NCHW from a small block of rows. int8 codes are copied four channels a word, so that one word meets `dot4`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tvm.tirx.script.builder.ir as B  # noqa: N812
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T  # noqa: N812

from mcc import ops
from mcc.backends.cpu.epilogue import emit_epilogue
from mcc.backends.cpu.kernels.tiles import TileShape, leading_dims, parse_tile
from mcc.backends.cpu.microkernel import (
    Expression, Parameter, Vectors, branch, flat, kernel_function, parallel, serial,
)  # fmt: skip
from mcc.backends.kernel import Lowered, Region, apply_epilogue
from mcc.backends.relax.emitter import tuple_of
from mcc.target import Target

FEWEST_CHANNELS = 8  # below that most lanes of a vector would idle: depthwise needs another kernel


@dataclass(frozen=True)
class ConvShape:
    """The sizes of one convolution; pairs are height, width."""

    inputs: int
    outputs: int
    groups: int
    image: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def group_inputs(self) -> int:
        """Input channels of a group."""
        return self.inputs // self.groups

    @property
    def group_outputs(self) -> int:
        """Output channels of a group."""
        return self.outputs // self.groups

    @property
    def padded(self) -> tuple[int, int]:
        """The image with its padding."""
        return self.image[0] + 2 * self.padding[0], self.image[1] + 2 * self.padding[1]

    @property
    def result(self) -> tuple[int, int]:
        """The output image."""
        height, width = (
            (p - d * (k - 1) - 1) // s + 1
            for p, d, k, s in zip(self.padded, self.dilation, self.kernel, self.stride, strict=True)
        )
        return height, width


def conv_shape(region: Region) -> ConvShape | str:
    """The sizes of a region's convolution, or why it has none."""
    dims = region.source.shape
    if len(dims) != 4 or not all(isinstance(s, int) for s in dims[1:]):
        return "its height, width or channels vary, or it has no batch dim"
    anchor, weight = region.anchor, region.weight.shape
    stride, padding, dilation = (
        tuple(tuple_of(anchor.argument(i, default), 2)) for i, default in ((3, 1), (4, 0), (5, 1))
    )
    return ConvShape(
        int(dims[1]), weight[0], int(anchor.argument(6, 1)), (int(dims[2]), int(dims[3])), (weight[2], weight[3]),
        stride, padding, dilation,
    )  # fmt: skip


def _refusal(region: Region) -> str | None:
    if region.anchor.op is not ops.CONV2D:
        return "not a conv2d"
    if region.weight.sparse is not None:
        return "there is no kernel for sparse convolution weights yet"
    shape = conv_shape(region)
    if isinstance(shape, str):
        return shape
    if shape.group_outputs < FEWEST_CHANNELS:
        return f"{shape.group_outputs} output channels a group would leave lanes idle"
    return None


def conv_tiles(region: Region, target: Target) -> tuple[str, ...]:
    """Tiles (pixels x vectors) that fill the registers; no wider than the channels or the row."""
    shape = conv_shape(region)
    assert isinstance(shape, ConvShape)
    room = 28 if target.vector_registers == 32 else 12
    most = -(-shape.group_outputs // target.vector_lanes)
    tiles = []
    for vectors in (4, 3, 2, 1) if target.vector_registers == 32 else (2, 3, 1):
        if vectors <= most:
            pixels = min(room // vectors, 14, shape.result[1])
            tiles.append(str(TileShape(pixels, vectors)))
    return tuple(dict.fromkeys(tiles))


@dataclass(frozen=True)
class Conv2dFloat:
    """float32 activations; weights float32, or int8 with a scale for each output channel."""

    name: str = "conv2d_f32"

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes conv2d with at least 8 output channels a group."""
        del target
        return "the activations are quantized" if region.activation is not None else _refusal(region)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """See `conv_tiles`."""
        return conv_tiles(region, target)

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        body = _FloatConvolution(region, Vectors(target), parse_tile(tile))
        return Lowered(body.function(self.name), body.packed)

    def reference(self, region: Region, source: NDArray[Any]) -> NDArray[Any]:
        """Float64 sums."""
        return conv_reference(region, source)


@dataclass(frozen=True)
class Conv2dInt8:
    """uint8 activation codes times int8 weight codes, exact int32 sums."""

    name: str = "conv2d_int8"

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes what `Conv2dFloat` takes, with int8 weights and activations."""
        del target
        if region.activation is None or region.weight.scale is None:
            return "weight and activations are not both int8"
        return _refusal(region)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """See `conv_tiles`."""
        return conv_tiles(region, target)

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        body = _IntegerConvolution(region, Vectors(target), parse_tile(tile))
        return Lowered(body.function(self.name), body.packed)

    def reference(self, region: Region, source: NDArray[Any]) -> NDArray[Any]:
        """Exact integer sums."""
        return conv_reference(region, source)


def conv_reference(region: Region, source: NDArray[Any]) -> NDArray[Any]:
    """The convolution in float64 (exact for codes)."""
    shape = conv_shape(region)
    assert isinstance(shape, ConvShape)
    zero = 0 if region.activation is None else region.activation.zero_point
    x = torch.from_numpy(source.astype(np.float64) - zero)
    weight = torch.from_numpy(region.weight.decoded().astype(np.float64))
    sums = torch.nn.functional.conv2d(x, weight, None, shape.stride, shape.padding, shape.dilation, shape.groups).numpy()
    scale = np.float32(1) if region.weight.scale is None else region.weight.scale
    if region.activation is not None:
        scale = scale * np.float32(region.activation.scale)
        sums = sums.astype(np.float32)
    bias = np.zeros(shape.outputs, np.float32) if region.bias is None else region.bias
    values = sums * np.reshape(scale, (-1, 1, 1)) + bias.reshape(-1, 1, 1)
    return apply_epilogue(values.astype(np.float32), region.epilogue)


class _Convolution:
    """Loops of a convolution; subclasses say how input values are copied, multiplied and finished."""

    source_dtype: str
    sum_dtype: str

    def __init__(self, region: Region, vectors: Vectors, tile: TileShape) -> None:
        shape = conv_shape(region)
        assert isinstance(shape, ConvShape)
        self.region, self.v, self.tile, self.shape = region, vectors, tile, shape
        self.width = tile.vectors * vectors.lanes
        self.padded_outputs = -(-shape.group_outputs // vectors.lanes) * vectors.lanes
        self.full_blocks = shape.group_outputs // self.width
        self.tail_vectors = -(-(shape.group_outputs - self.full_blocks * self.width) // vectors.lanes)
        self.blocks = self.full_blocks + (1 if self.tail_vectors else 0)
        height, width = shape.result
        # whole blocks of rows that have a vector's worth of pixels, to transpose from
        self.block_rows = next(r for r in range(1, height + 1) if height % r == 0 and (r * width >= vectors.lanes or r == height))
        self.packed: dict[str, NDArray[Any]] = {"weight": self.pack_weight(), **self._vectors()}

    def pack_weight(self) -> NDArray[Any]:
        """Weights in the order the tile reads them."""
        raise NotImplementedError

    def _vectors(self) -> dict[str, NDArray[Any]]:
        """Per-channel arrays, each group padded to whole vectors."""
        region, shape = self.region, self.shape

        def padded(values: NDArray[Any]) -> NDArray[Any]:
            room = np.zeros((shape.groups, self.padded_outputs), values.dtype)
            room[:, : shape.group_outputs] = values.reshape(shape.groups, -1)
            return room.reshape(-1)

        bias = np.zeros(shape.outputs, np.float32) if region.bias is None else region.bias
        vectors = {"bias": padded(bias)}
        if region.weight.scale is not None:
            gain = np.float32(1.0 if region.activation is None else region.activation.scale)
            vectors["scale"] = padded(region.weight.scale * gain)
        if region.activation is not None:
            sums = region.weight.decoded().reshape(shape.outputs, -1).astype(np.int64).sum(1)
            vectors["start"] = padded((-region.activation.zero_point * sums).astype(np.int32))
        return vectors

    def function(self, name: str) -> tirx.PrimFunc:
        """The PrimFunc."""
        (self.batch,) = leading_dims(self.region.source.shape[:1])
        shape = self.shape
        parameters = [
            Parameter("X", (self.batch, shape.inputs, *shape.image), self.source_dtype),
            *(Parameter(key, array.shape, array.dtype.name) for key, array in self.packed.items()),
            Parameter("Y", (self.batch, shape.outputs, *shape.result), self.region.output_dtype),
        ]
        return kernel_function(name, parameters, self._emit)

    def _emit(self, x: Expression, *rest: Expression) -> None:
        shape = self.shape
        self.arrays = dict(zip(self.packed, rest[:-1], strict=True))
        self.x = flat(x, self.batch * (shape.inputs * shape.image[0] * shape.image[1]))
        self.y = flat(rest[-1], self.batch * (shape.outputs * shape.result[0] * shape.result[1]))

        def images_in_parallel() -> None:
            parallel(self.batch, lambda n: self._image(n, serial))

        def parts_in_parallel() -> None:
            serial(self.batch, lambda n: self._image(n, parallel))

        branch(self.batch >= 2, images_in_parallel, parts_in_parallel)

    def _image(self, n: Expression, loop: Callable[..., None]) -> None:
        source, base = self.copy_image(T.cast(n, "int64"), loop)
        chunks = self.shape.result[0] // self.block_rows

        def part(i: Expression) -> None:
            block, chunk = tirx.floordiv(i, chunks), tirx.floormod(i, chunks)
            group, within = tirx.floordiv(block, self.blocks), tirx.floormod(block, self.blocks)

            def rows(vectors: int) -> None:
                self._rows(n, (source, base), (group, within, vectors), chunk)

            if self.full_blocks and self.tail_vectors:
                branch(within < self.full_blocks, lambda: rows(self.tile.vectors), lambda: rows(self.tail_vectors))
            else:
                rows(self.tile.vectors if self.full_blocks else self.tail_vectors)

        loop(self.shape.groups * self.blocks * chunks, part)

    def copy_image(self, n: Expression, loop: Callable[..., None]) -> tuple[Expression, Expression]:
        """The padded image as the tile reads it: a buffer and the index of its first element."""
        raise NotImplementedError

    def _rows(self, n: Expression, source: tuple[Expression, Expression], block: tuple[Expression, Expression, int], chunk: Expression) -> None:
        """A block of output rows for one block of channels: compute into a local block, then transpose it out."""
        v, (_, out_width) = self.v, self.shape.result
        group, within, vectors = block
        pixels = self.block_rows * out_width
        room = B.alloc_buffer((pixels * vectors * v.lanes,), self.region_float(), layout=None)
        count = -(-out_width // self.tile.rows)
        low, high = out_width // count, out_width % count

        def row(r: Expression) -> None:
            def tile(column: Expression, width: int) -> None:
                place = (chunk * self.block_rows + r, column, width)
                self._tile(source, block, place, (room, (r * out_width + column) * (vectors * v.lanes)))

            serial(high, lambda t: tile(t * (low + 1), low + 1))
            serial(count - high, lambda t: tile(high * (low + 1) + t * low, low))

        serial(self.block_rows, row)
        channel = group * self.shape.group_outputs + within * self.width
        image = self.shape.result[0] * out_width
        first = (T.cast(n, "int64") * self.shape.outputs + channel) * image + chunk * pixels
        self._transpose_out(room, (pixels, vectors), first, image)

    def region_float(self) -> str:
        """Element type of the local block: results before the epilogue."""
        return "float32"

    def _tile(self, source: tuple[Expression, Expression], block: tuple[Expression, Expression, int], place: tuple[Expression, Expression, int], room: tuple[Expression, Expression]) -> None:
        v, shape = self.v, self.shape
        group, within, vectors = block
        row, column, width = place
        sums = v.registers(width, vectors, self.sum_dtype)
        vector = group * self.padded_outputs + within * self.width
        for pixel in sums:
            for j, register in enumerate(pixel):
                register.set(self.start(vector + j * v.lanes))
        depth = self.depth()
        padded_height, padded_width = shape.padded
        weight_block = self.weight_offset(group, within)

        def step(c: Expression, kh: Expression, kw: Expression) -> None:
            at = weight_block + ((c * shape.kernel[0] + kh) * shape.kernel[1] + kw) * (vectors * v.lanes)
            w = [B.Bind(self.load_weight(at + j * v.lanes)) for j in range(vectors)]
            plane = (group * depth + c) * (padded_height * padded_width)
            line = (row * shape.stride[0] + kh * shape.dilation[0]) * padded_width
            start = plane + line + column * shape.stride[1] + kw * shape.dilation[1]
            for i in range(width):
                value = B.Bind(v.splat(source[0][source[1] + (start + i * shape.stride[1])]))
                for j in range(vectors):
                    sums[i][j].set(self.multiply(sums[i][j].get(), value, w[j]))

        serial(depth, lambda c: serial(shape.kernel[0], lambda kh: serial(shape.kernel[1], lambda kw: step(c, kh, kw))))
        for i in range(width):
            for j in range(vectors):
                total = self.finish(sums[i][j].get(), vector + j * v.lanes)
                v.store(room[0], room[1] + (i * vectors + j) * v.lanes, total)

    def depth(self) -> int:
        """Steps over input channels."""
        raise NotImplementedError

    def weight_offset(self, group: Expression, within: Expression) -> Expression:
        """Index of a channel block's first weight."""
        taps = self.depth() * self.shape.kernel[0] * self.shape.kernel[1]
        return (group * self.padded_outputs + within * self.width) * taps

    def start(self, index: Expression) -> Expression:
        """What sums begin with."""
        raise NotImplementedError

    def load_weight(self, index: Expression) -> Expression:
        """A vector of weights."""
        raise NotImplementedError

    def multiply(self, total: Expression, value: Expression, weight: Expression) -> Expression:
        """One step."""
        raise NotImplementedError

    def finish(self, total: Expression, index: Expression) -> Expression:
        """Sums as float32 results, before the epilogue."""
        raise NotImplementedError

    def _transpose_out(self, room: Expression, size: tuple[int, int], first: Expression, image: int) -> None:
        """Write [pixels][channels] as [channels][pixels], blocks of lanes x lanes, epilogue on the way."""
        v = self.v
        pixels, vectors = size
        width = vectors * v.lanes
        left = self.shape.group_outputs % v.lanes
        for j in range(vectors):
            partial = vectors == self.tail_vectors and j == vectors - 1 and left
            used = left if partial else v.lanes

            def block(p: Expression, j: int = j, used: int = used) -> None:
                rows = [B.Bind(v.load(room, (p + r) * width + j * v.lanes)) for r in range(v.lanes)]
                for c, column in enumerate(v.transpose(rows)[:used]):
                    value = emit_epilogue(v, column, self.region.epilogue)
                    v.store(self.y, first + (j * v.lanes + c) * image + p, value)

            if pixels >= v.lanes:
                serial(pixels // v.lanes, lambda b, block=block: block(b * v.lanes))  # type: ignore[misc]
                if pixels % v.lanes:
                    block(pixels - v.lanes)
                continue
            for p in range(pixels):
                value = B.Bind(emit_epilogue(v, v.load(room, p * width + j * v.lanes), self.region.epilogue))
                for c in range(used):
                    B.buffer_store(self.y, tirx.Shuffle([value], [c]), [first + (j * v.lanes + c) * image + p])


def _padded_copy(shape: ConvShape, loop: Callable[..., None], channels: int, write: Callable[[Expression, Expression, Expression], None], fill: Callable[[Expression], None]) -> None:
    """Fill borders and copy the inside, channel by channel: `write(channel, row, column)`, `fill(index)`."""
    (height, width), (above, left) = shape.image, shape.padding
    padded_height, padded_width = shape.padded

    def channel(c: Expression) -> None:
        base = c * (padded_height * padded_width)
        serial(above * padded_width, lambda i: fill(base + i))
        serial(above * padded_width, lambda i: fill(base + (above + height) * padded_width + i))

        def row(h: Expression) -> None:
            line = base + (h + above) * padded_width
            serial(left, lambda i: fill(line + i))
            serial(width, lambda w: write(c, h, w))
            serial(left, lambda i: fill(line + left + width + i))

        serial(height, row)

    loop(channels, channel)


class _FloatConvolution(_Convolution):
    """float32 values, weights converted in registers where they are codes."""

    source_dtype = "float32"
    sum_dtype = "float32"

    def pack_weight(self) -> NDArray[Any]:
        shape, weight = self.shape, self.region.weight.decoded()
        room = np.zeros((shape.groups, self.padded_outputs, *weight.shape[1:]), weight.dtype)
        room[:, : shape.group_outputs] = weight.reshape(shape.groups, shape.group_outputs, *weight.shape[1:])
        parts = [
            room[g, start : start + self.width].transpose(1, 2, 3, 0).reshape(-1)
            for g in range(shape.groups)
            for start in range(0, self.padded_outputs, self.width)
        ]
        return np.concatenate(parts)

    def depth(self) -> int:
        return self.shape.group_inputs

    def copy_image(self, n: Expression, loop: Callable[..., None]) -> tuple[Expression, Expression]:
        shape = self.shape
        height, width = shape.image
        first = n * (shape.inputs * height * width)
        if shape.padding == (0, 0):
            return self.x, first
        padded_height, padded_width = shape.padded
        room = B.alloc_buffer((shape.inputs * padded_height * padded_width,), "float32", layout=None)

        def write(c: Expression, h: Expression, w: Expression) -> None:
            at = (c * padded_height + h + shape.padding[0]) * padded_width + shape.padding[1] + w
            B.buffer_store(room, self.x[first + (c * height + h) * width + w], [at])

        _padded_copy(shape, loop, shape.inputs, write, lambda i: B.buffer_store(room, T.float32(0), [i]))
        return room, tirx.const(0, "int64")

    def start(self, index: Expression) -> Expression:
        return self.v.constant(0.0) if "scale" in self.packed else self.v.load(self.arrays["bias"], index)

    def load_weight(self, index: Expression) -> Expression:
        value = self.v.load(self.arrays["weight"], index)
        return self.v.to_float(value) if "scale" in self.packed else value

    def multiply(self, total: Expression, value: Expression, weight: Expression) -> Expression:
        return self.v.fma(value, weight, total)

    def finish(self, total: Expression, index: Expression) -> Expression:
        if "scale" not in self.packed:
            return total
        return self.v.fma(total, self.v.load(self.arrays["scale"], index), self.v.load(self.arrays["bias"], index))


class _IntegerConvolution(_Convolution):
    """uint8 codes, four input channels a word."""

    source_dtype = "uint8"
    sum_dtype = "int32"

    def pack_weight(self) -> NDArray[Any]:
        shape, weight = self.shape, self.region.weight.decoded()
        self.bounded = self._pairs_fit(weight)
        depth, (kh, kw) = self.depth(), shape.kernel
        room = np.zeros((shape.groups, self.padded_outputs, depth * 4, kh, kw), np.int8)
        room[:, : shape.group_outputs, : shape.group_inputs] = weight.reshape(shape.groups, shape.group_outputs, *weight.shape[1:])
        words = room.reshape(shape.groups, self.padded_outputs, depth, 4, kh, kw)
        parts = [
            words[g, start : start + self.width].transpose(1, 3, 4, 0, 2).reshape(-1)
            for g in range(shape.groups)
            for start in range(0, self.padded_outputs, self.width)
        ]
        return np.concatenate(parts)

    def _pairs_fit(self, weight: NDArray[np.int8]) -> bool:
        """Whether neighbouring input channels of every tap can be added in 16 bits."""
        padded = np.pad(weight.astype(np.int32), ((0, 0), (0, weight.shape[1] % 2), (0, 0), (0, 0)))
        pairs = padded.reshape(len(padded), -1, 2, *padded.shape[2:])
        highest, lowest = np.maximum(pairs, 0).sum(2).max(initial=0), np.minimum(pairs, 0).sum(2).min(initial=0)
        return bool(highest * 255 <= 32767 and lowest * 255 >= -32768)

    def depth(self) -> int:
        return -(-self.shape.group_inputs // 4)

    def copy_image(self, n: Expression, loop: Callable[..., None]) -> tuple[Expression, Expression]:
        shape = self.shape
        activation = self.region.activation
        assert activation is not None
        zero = tirx.const(activation.zero_point, "uint8")
        (height, width), (above, left) = shape.image, shape.padding
        padded_height, padded_width = shape.padded
        words = shape.groups * self.depth() * padded_height * padded_width
        room = B.alloc_buffer((words * 4,), "uint8", layout=None)
        first = n * (shape.inputs * height * width)
        last = shape.group_inputs - 1

        def write(c: Expression, h: Expression, w: Expression) -> None:
            at = ((c * padded_height + h + above) * padded_width + left + w) * 4
            group, word = tirx.floordiv(c, self.depth()), tirx.floormod(c, self.depth())
            for byte in range(4):
                # past the last channel any value will do: its weights are zero
                channel = group * shape.group_inputs + tirx.min(word * 4 + byte, last)
                B.buffer_store(room, self.x[first + (channel * height + h) * width + w], [at + byte])

        def fill(i: Expression) -> None:
            for byte in range(4):
                B.buffer_store(room, zero, [i * 4 + byte])

        _padded_copy(shape, loop, shape.groups * self.depth(), write, fill)
        self.weight_words = flat(self.arrays["weight"], self.packed["weight"].size // 4, "int32")
        return flat(room, words, "int32"), tirx.const(0, "int64")

    def start(self, index: Expression) -> Expression:
        return self.v.load(self.arrays["start"], index)

    def load_weight(self, index: Expression) -> Expression:
        return self.v.load(self.weight_words, index)

    def multiply(self, total: Expression, value: Expression, weight: Expression) -> Expression:
        return self.v.dot4(total, value, weight, bounded=self.bounded)

    def finish(self, total: Expression, index: Expression) -> Expression:
        scale, bias = self.v.load(self.arrays["scale"], index), self.v.load(self.arrays["bias"], index)
        return self.v.fma(self.v.to_float(total), scale, bias)
