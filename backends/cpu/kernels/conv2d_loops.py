"""The loops of a convolution, for float32 values and for codes; see conv2d.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.epilogue import emit_epilogue
from mcc.backends.cpu.kernels.conv_shape import ConvShape, conv_shape
from mcc.backends.cpu.kernels.integer_sums import pairs_fit
from mcc.backends.cpu.kernels.tiles import PanelWidth, TileShape, leading_dims, panel_widths
from mcc.backends.cpu.microkernel import Expression, Parameter, Vectors, branch, flat, kernel_function, parallel, serial

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from mcc.backends.kernel import Region


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
        self.full_blocks, self.full, self.tail = panel_widths(shape.group_outputs, tile, vectors.lanes)
        self.blocks = self.full_blocks + (1 if self.tail else 0)
        height, width = shape.result
        # whole blocks of rows that have a vector's worth of pixels, to transpose from
        self.block_rows = next(
            r for r in range(1, height + 1) if height % r == 0 and (r * width >= vectors.lanes or r == height)
        )
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

            def rows(panel: PanelWidth) -> None:
                self._rows(n, (source, base), (group, within, panel), chunk)

            tail = self.tail
            if tail is None or not self.full_blocks:
                rows(tail or self.full)
            else:
                branch(within < self.full_blocks, lambda: rows(self.full), lambda: rows(tail))

        loop(self.shape.groups * self.blocks * chunks, part)

    def copy_image(self, n: Expression, loop: Callable[..., None]) -> tuple[Expression, Expression]:
        """The padded image as the tile reads it: a buffer and the index of its first element."""
        raise NotImplementedError

    def _rows(
        self,
        n: Expression,
        source: tuple[Expression, Expression],
        block: tuple[Expression, Expression, PanelWidth],
        chunk: Expression,
    ) -> None:
        """A block of output rows for one block of channels: compute into a local block, then transpose it out."""
        v, (_, out_width) = self.v, self.shape.result
        group, within, panel = block
        vectors = panel.vectors
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
        self._transpose_out(room, (pixels, panel), first, image)

    def region_float(self) -> str:
        """Element type of the local block: results before the epilogue."""
        return "float32"

    def _tile(
        self,
        source: tuple[Expression, Expression],
        block: tuple[Expression, Expression, PanelWidth],
        place: tuple[Expression, Expression, int],
        room: tuple[Expression, Expression],
    ) -> None:
        v, shape = self.v, self.shape
        group, within, vectors = block[0], block[1], block[2].vectors
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

    def _transpose_out(self, room: Expression, size: tuple[int, PanelWidth], first: Expression, image: int) -> None:
        """Write [pixels][channels] as [channels][pixels], blocks of lanes x lanes, epilogue on the way."""
        v = self.v
        pixels, panel = size
        vectors, width = panel.vectors, panel.vectors * v.lanes
        for j in range(vectors):
            used = panel.used_lanes(j, v.lanes)

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


def _padded_copy(
    shape: ConvShape,
    loop: Callable[..., None],
    channels: int,
    write: Callable[[Expression, Expression, Expression], None],
    fill: Callable[[Expression], None],
) -> None:
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


class FloatConvolution(_Convolution):
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


class IntegerConvolution(_Convolution):
    """uint8 codes, four input channels a word."""

    source_dtype = "uint8"
    sum_dtype = "int32"

    def pack_weight(self) -> NDArray[Any]:
        shape, weight = self.shape, self.region.weight.decoded()
        self.bounded = pairs_fit(weight)
        depth, (kh, kw) = self.depth(), shape.kernel
        room = np.zeros((shape.groups, self.padded_outputs, depth * 4, kh, kw), np.int8)
        room[:, : shape.group_outputs, : shape.group_inputs] = weight.reshape(
            shape.groups, shape.group_outputs, *weight.shape[1:]
        )
        words = room.reshape(shape.groups, self.padded_outputs, depth, 4, kh, kw)
        parts = [
            words[g, start : start + self.width].transpose(1, 3, 4, 0, 2).reshape(-1)
            for g in range(shape.groups)
            for start in range(0, self.padded_outputs, self.width)
        ]
        return np.concatenate(parts)

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
