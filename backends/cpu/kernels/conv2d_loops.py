"""The loops of a convolution with channels last, for float32 values and for codes; see conv2d.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.epilogue import channel_vectors
from mcc.backends.cpu.integer_sums import pairs_fit, zero_sum_factor
from mcc.backends.cpu.kernels.conv_shape import ConvShape, merge_groups
from mcc.backends.cpu.kernels.convolution_body import ConvolutionBody
from mcc.backends.cpu.kernels.tiles import TileShape, balanced, loop_for
from mcc.backends.cpu.microkernel import Expression, Vectors, branch, flat, parallel, serial

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from mcc.backends.kernel import Region

MANY_IMAGES = 4  # from here on threads take images, not parts of one
CACHE_BYTES = 192 << 10  # of the source that one pass over a block of channels reads: half of a small L2 cache
FEWEST_PARTS = 4
FEWEST_COPIED = 8  # parts of an image that each copy what they read, while it is in cache
FEWEST_MACS = 600_000  # of an image for two threads: about 12 us of one in float


class _Convolution(ConvolutionBody):
    """Loops of a convolution; subclasses say how input values are read, multiplied and finished."""

    sum_dtype: str
    word: int  # source channels that one broadcast holds

    def __init__(self, region: Region, vectors: Vectors, tile: TileShape) -> None:
        super().__init__(region, vectors)
        self.tile, groups = tile, self.shape.groups
        self.shape = self.shape.merged(vectors.lanes)
        self.weight = merge_groups(region.weight.decoded(), groups, self.shape.groups)
        self.group_vectors = -(-self.shape.group_outputs // vectors.lanes)
        self.full, self.tail = divmod(self.group_vectors, tile.vectors)
        self.blocks = self.full + (1 if self.tail else 0)
        self.depth = -(-self.shape.group_inputs // self.word)
        height, width = self.shape.result
        self.columns = min(tile.rows, width)
        self.rows = min(max(tile.rows // width, 1), height)
        self.packed: dict[str, NDArray[Any]] = {"weight": self._pack_weight(), **self._pack_vectors()}

    def _lanes(self) -> NDArray[np.int64]:
        """Which output of a group each lane is, [vectors, lanes]; beyond a group smaller than a vector, the last."""
        outputs, lanes = self.shape.group_outputs, self.v.lanes
        starts = np.minimum(np.arange(self.group_vectors) * lanes, max(outputs - lanes, 0))
        return np.minimum(starts[:, None] + np.arange(lanes), outputs - 1)

    def _pack_weight(self) -> NDArray[Any]:
        """[group][block][kernel row][kernel column][depth][vector][lane][word]."""
        shape, lanes = self.shape, self._lanes()
        grouped = self.weight.reshape(shape.groups, shape.group_outputs, *self.weight.shape[1:])
        room = np.zeros((*grouped.shape[:2], self.depth * self.word, *shape.kernel), grouped.dtype)
        room[:, :, : shape.group_inputs] = grouped
        words = room.reshape(*grouped.shape[:2], self.depth, self.word, *shape.kernel)
        by_lane = words[:, lanes]  # [group, vector, lane, depth, word, row, column]
        ordered = by_lane.transpose(0, 1, 5, 6, 3, 2, 4)  # [group, vector, row, column, depth, lane, word]
        step = self.tile.vectors
        parts = [
            np.moveaxis(ordered[g, start : start + step], 0, 3).reshape(-1)
            for g in range(shape.groups)
            for start in range(0, self.group_vectors, step)
        ]
        return np.concatenate(parts)

    def _pack_vectors(self) -> dict[str, NDArray[Any]]:
        """Per-channel arrays, one value a lane."""
        region, shape = self.region, self.shape

        def by_lane(values: NDArray[Any]) -> NDArray[Any]:
            return values.reshape(shape.groups, -1)[:, self._lanes()].reshape(-1)

        vectors: dict[str, NDArray[Any]] = {key: by_lane(a) for key, a in channel_vectors(region).items()}
        if region.activation is not None:
            sums = self.weight.reshape(shape.outputs, -1).astype(np.int64).sum(1)
            vectors["start"] = by_lane((zero_sum_factor(region, self.v.target) * sums).astype(np.int32))
        return vectors

    def loops(self) -> None:
        """See `ConvolutionBody`."""

        def images_in_parallel() -> None:
            parallel(self.batch, lambda n: self._image(n, serial))

        def parts_in_parallel() -> None:
            loop = loop_for(self.shape.macs, FEWEST_MACS)
            serial(self.batch, lambda n: self._image(n, loop))

        branch(self.batch >= MANY_IMAGES, images_in_parallel, parts_in_parallel)

    def _image(self, n: Expression, loop: Callable[..., None]) -> None:
        n = T.cast(n, "int64")
        shape = self.shape
        bands = -(-shape.result[0] // self.rows)
        chunk = self._chunk(bands)
        chunks = -(-bands // chunk)
        blocks = shape.groups * self.blocks

        def part(source: tuple[Expression, Expression], c: Expression, b: Expression) -> None:
            group, block = tirx.floordiv(b, self.blocks), tirx.floormod(b, self.blocks)
            count = chunk if bands % chunk == 0 else tirx.min(chunk, bands - c * chunk)

            def panel(vectors: int) -> None:
                serial(count, lambda r: self._band(n, source, (group, block, vectors), c * chunk + r))

            if not self.tail or not self.full:
                panel(self.tail or self.tile.vectors)
            else:
                branch(block < self.full, lambda: panel(self.tile.vectors), lambda: panel(self.tail))

        def copied_part(c: Expression) -> None:
            first = B.Bind(T.cast(c, "int64") * (chunk * self.rows * shape.stride[0]))
            source = self.copied(n, (first, shape.rows_read(chunk * self.rows)), serial)
            serial(blocks, lambda b: part(source, c, b))

        if self.reads_copy and chunks >= FEWEST_COPIED:
            loop(chunks, copied_part)
            return
        zero = tirx.const(0, "int64")
        source = self.copied(n, (zero, shape.padded[0]), loop) if self.reads_copy else self.direct(n)
        loop(chunks * blocks, lambda i: part(source, tirx.floordiv(i, blocks), tirx.floormod(i, blocks)))

    def _chunk(self, bands: int) -> int:
        """Bands of rows that one part goes over: its source should stay in cache, and the threads need parts alike."""
        shape = self.shape
        row_bytes = shape.padded[1] * shape.inputs * (1 if self.word > 1 else 4) * shape.stride[0]
        most = max(1, CACHE_BYTES // (row_bytes * self.rows))
        chunks = -(-bands // most)
        blocks = shape.groups * self.blocks
        while chunks < bands and (chunks * blocks < FEWEST_PARTS or chunks * blocks % 2):
            chunks += 1
        return -(-bands // chunks)

    def _first(self, n: Expression) -> Expression:
        """The index of an image's first element."""
        return n * (self.shape.inputs * self.shape.image[0] * self.shape.image[1])

    @property
    def reads_copy(self) -> bool:
        """Whether tiles read a padded copy of the image and not the image itself."""
        return self.shape.pads

    def direct(self, n: Expression) -> tuple[Expression, Expression]:
        """The image as the tile reads it, in words: a buffer and the index of its first element."""
        raise NotImplementedError

    def copied(
        self, n: Expression, rows: tuple[Expression, int], loop: Callable[..., None]
    ) -> tuple[Expression, Expression]:
        """The same of a copy of some rows of the padded image, first and number; the index is still that of row 0."""
        raise NotImplementedError

    def _band(
        self, n: Expression, source: tuple[Expression, Expression], block: tuple[Expression, Expression, int], r: Any
    ) -> None:
        """A few rows of output for one block of channels."""
        height, width = self.shape.result
        whole, left = divmod(height, self.rows)

        def rows(count: int) -> None:
            for first, number, columns in balanced(width, self.columns):
                serial(
                    number,
                    lambda t, f=first, c=columns: self._tile(n, source, block, (r * self.rows, f + t * c, count, c)),  # type: ignore[misc]
                )

        if not left or not whole:
            rows(self.rows if whole else left)
        else:
            branch(r < whole, lambda: rows(self.rows), lambda: rows(left))

    def _tile(
        self,
        n: Expression,
        source: tuple[Expression, Expression],
        block: tuple[Expression, Expression, int],
        place: tuple[Expression, Expression, int, int],
    ) -> None:
        v, shape = self.v, self.shape
        group, within, vectors = block
        row, column, height, width = place
        pixels = [(i, j) for i in range(height) for j in range(width)]
        sums = v.registers(len(pixels), vectors, self.sum_dtype)
        vector = group * self.group_vectors + within * self.tile.vectors
        for j in range(vectors):
            start = B.Bind(self.start((vector + j) * v.lanes))
            for pixel in sums:
                pixel[j].set(start)
        channels = shape.groups * self.depth
        line = shape.padded[1] * channels
        corner = B.Bind(
            source[1] + row * (shape.stride[0] * line) + column * (shape.stride[1] * channels) + group * self.depth
        )
        taps = self.depth * shape.kernel[0] * shape.kernel[1]
        weight = B.Bind(vector * (taps * v.lanes))
        # with one group the taps of a row lie side by side
        joined = shape.groups == 1 and shape.dilation[1] == 1
        inner, steps = (self.depth * shape.kernel[1], 1) if joined else (self.depth, shape.kernel[1])

        def step(kh: Expression, kw: Expression, c: Expression) -> None:
            at = weight + ((kh * steps + kw) * inner + c) * (vectors * v.lanes)
            w = [B.Bind(self.load_weight(at + j * v.lanes)) for j in range(vectors)]
            start = corner + kh * (shape.dilation[0] * line) + kw * (shape.dilation[1] * channels) + c
            for (i, j), pixel in zip(pixels, sums, strict=True):
                offset = i * shape.stride[0] * line + j * shape.stride[1] * channels
                value = B.Bind(v.splat(source[0][start + offset]))
                for register, part in zip(pixel, w, strict=True):
                    register.set(self.multiply(register.get(), value, part))

        serial(shape.kernel[0], lambda kh: serial(steps, lambda kw: serial(inner, lambda c: step(kh, kw, c))))
        first = B.Bind(((n * shape.result[0] + row) * shape.result[1] + column) * shape.outputs)
        for j in range(vectors):
            channel = self._channel(group, within, j)
            for (y, x), pixel in zip(pixels, sums, strict=True):
                total = self.finish(pixel[j].get(), (vector + j) * v.lanes)
                index = first + (y * shape.result[1] + x) * shape.outputs + channel
                self.epilogue.store(total, index, min(v.lanes, shape.group_outputs))

    def _channel(self, group: Expression, block: Expression, j: int) -> Expression:
        """The first output channel of a vector."""
        outputs, lanes = self.shape.group_outputs, self.v.lanes
        start = (block * self.tile.vectors + j) * lanes
        if outputs % lanes and outputs > lanes:
            start = tirx.min(start, outputs - lanes)
        return group * outputs + start

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


class FloatConvolution(_Convolution):
    """float32 values, weights converted in registers where they are codes."""

    sum_dtype = "float32"
    word = 1

    def direct(self, n: Expression) -> tuple[Expression, Expression]:
        return self.x, self._first(n)

    def copied(
        self, n: Expression, rows: tuple[Expression, int], loop: Callable[..., None]
    ) -> tuple[Expression, Expression]:
        line = self.shape.padded[1] * self.shape.inputs
        room = B.alloc_buffer((rows[1] * line,), "float32", layout=None)
        copy_rows(self.v, self.shape, (self.x, self._first(n)), (room, T.float32(0)), rows, loop)
        return room, -rows[0] * line

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

    sum_dtype = "int32"
    word = 4

    def __init__(self, region: Region, vectors: Vectors, tile: TileShape) -> None:
        super().__init__(region, vectors, tile)
        self.bounded = pairs_fit(self.weight)

    def loops(self) -> None:
        """See `ConvolutionBody`."""
        self.weight_words = flat(self.arrays["weight"], self.packed["weight"].size // self.word, "int32")
        super().loops()

    @property
    def reads_copy(self) -> bool:
        return self.shape.pads or self.shape.group_inputs % 4 != 0

    def direct(self, n: Expression) -> tuple[Expression, Expression]:
        words = self.shape.inputs * self.shape.image[0] * self.shape.image[1] // 4
        return flat(self.x, self.batch * words, "int32"), n * words

    def copied(
        self, n: Expression, rows: tuple[Expression, int], loop: Callable[..., None]
    ) -> tuple[Expression, Expression]:
        shape = self.shape
        assert self.region.activation is not None
        zero = tirx.const(self.region.activation.zero_point, "uint8")
        line = shape.padded[1] * shape.groups * self.depth
        room = B.alloc_buffer((rows[1] * line * 4,), "uint8", layout=None)
        copy = copy_rows if shape.group_inputs % 4 == 0 else _copy_words
        copy(self.v, shape, (self.x, self._first(n)), (room, zero), rows, loop)
        return flat(room, rows[1] * line, "int32"), -rows[0] * line

    def start(self, index: Expression) -> Expression:
        return self.v.load(self.arrays["start"], index)

    def load_weight(self, index: Expression) -> Expression:
        return self.v.load(self.weight_words, index)

    def multiply(self, total: Expression, value: Expression, weight: Expression) -> Expression:
        return self.v.dot4(total, value, weight, bounded=self.bounded)

    def finish(self, total: Expression, index: Expression) -> Expression:
        scale, bias = self.v.load(self.arrays["scale"], index), self.v.load(self.arrays["bias"], index)
        return self.v.fma(self.v.to_float(total), scale, bias)


def copy_rows(
    v: Vectors,
    shape: ConvShape,
    source: tuple[Expression, Expression],
    target: tuple[Expression, Expression],
    rows: tuple[Expression, int],
    loop: Callable[..., None],
) -> None:
    """Copy some rows of an image, padded: `source` is buffer and first index, `target` is buffer and padding value."""
    (room, zero), pixel = target, shape.inputs
    height, width = shape.image
    line = shape.padded[1] * pixel
    lanes = v.lanes * (4 if room.dtype == "uint8" else 1)

    def span(size: int, store: Callable[[Expression, int], None]) -> None:
        serial(size // lanes, lambda i: store(i * lanes, lanes))
        if size % lanes and size > lanes:
            store(size - lanes, lanes)
        elif size % lanes:
            serial(size, lambda i: store(i, 1))

    def fill(first: Expression, size: int) -> None:
        span(size, lambda i, n: v.store(room, first + i, T.broadcast(zero, n), n) if n > 1
             else B.buffer_store(room, zero, [first + i]))  # fmt: skip

    def copy(from_index: Expression, to_index: Expression, size: int) -> None:
        span(size, lambda i, n: v.store(room, to_index + i, v.load(source[0], from_index + i, n), n) if n > 1
             else B.buffer_store(room, source[0][from_index + i], [to_index + i]))  # fmt: skip

    def row(i: Expression) -> None:
        h = rows[0] + i
        inside = tirx.all(h >= shape.before[0], h < shape.before[0] + height)

        def image_row() -> None:
            fill(i * line, shape.before[1] * pixel)
            from_index = source[1] + (h - shape.before[0]) * (width * pixel)
            copy(from_index, i * line + shape.before[1] * pixel, width * pixel)
            fill(i * line + (shape.before[1] + width) * pixel, shape.after[1] * pixel)

        branch(inside, image_row, lambda: fill(i * line, line))

    loop(rows[1], row)


def _copy_words(
    v: Vectors,
    shape: ConvShape,
    source: tuple[Expression, Expression],
    target: tuple[Expression, Expression],
    rows: tuple[Expression, int],
    loop: Callable[..., None],
) -> None:
    """As `copy_rows`, each group's channels filled up to whole words of four."""
    del v
    room, zero = target
    (height, width), padded_width = shape.image, shape.padded[1]
    depth = -(-shape.group_inputs // 4) * 4
    pixel = shape.groups * depth

    def row(i: Expression) -> None:
        def column(w: Expression) -> None:
            y, x = rows[0] + i - shape.before[0], w - shape.before[1]
            inside = tirx.all(y >= 0, y < height, x >= 0, x < width)
            to_index = (i * padded_width + w) * pixel
            from_index = source[1] + (y * width + x) * shape.inputs

            def copy(g: Expression) -> None:
                for c in range(depth):
                    # past the last channel any value will do: its weights are zero
                    channel = g * shape.group_inputs + min(c, shape.group_inputs - 1)
                    B.buffer_store(room, source[0][from_index + channel], [to_index + g * depth + c])

            def fill(i: Expression) -> None:
                B.buffer_store(room, zero, [to_index + i])

            branch(inside, lambda: serial(shape.groups, copy), lambda: serial(pixel, fill))

        serial(padded_width, column)

    loop(rows[1], row)
