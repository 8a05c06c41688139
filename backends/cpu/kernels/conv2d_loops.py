"""The loops of a convolution with channels last, for float32 values and for codes; see conv2d.py."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.integer_sums import pairs_fit, zero_sum_factor
from mcc.backends.cpu.kernels.ahead import NextPanel
from mcc.backends.cpu.kernels.conv2d_packing import PackedConvolution
from mcc.backends.cpu.kernels.packed_codes import PackedCodes, sum_arrays
from mcc.backends.cpu.kernels.padded_copy import copy_rows, copy_words
from mcc.backends.cpu.kernels.tiles import cover, loop_for
from mcc.backends.cpu.microkernel import Expression, Register, branch, flat, parallel, serial

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

MANY_IMAGES = 4  # from here on threads take images, not parts of one
# of the source that one pass over a block of channels reads: half of a small L2 cache; and where the weights, which
# are read again for each part of the source, do not stay in such a cache
CACHE_BYTES, MORE_BYTES = 192 << 10, 448 << 10
MANY_WEIGHTS = 1536 << 10  # bytes
# of the source and of what is written and added besides, where the weights are few enough to stay as well
ALL_BYTES, FEW_WEIGHTS = 256 << 10, 512 << 10
BYTES = 4  # of a word
FEWEST_PARTS = 4
FEWEST_COPIED = 8  # parts of an image that each copy what they read, while it is in cache
FEWEST_MACS = 600_000  # of an image for two threads: about 12 us of one in float


@dataclass(frozen=True)
class Block:
    """Outputs that are computed together, in some rows of an image.

    Attributes:
        number: of the pass.
        within: number of the block in it.
        vectors: that it has.
        first: row of the output.
        pixels: of all these rows; where sizes vary, None.
    """

    number: Expression
    within: Expression
    vectors: int
    first: Expression
    pixels: int | None


@dataclass(frozen=True)
class Tile:
    """Sums that are held in registers.

    Attributes:
        sums: by pixel, then vector.
        pixels: row and column of each, from the tile's first.
        source: the words that it reads.
        corner: index of the first word that the first pixel reads.
        vector: the number of the first vector of outputs.
        weight: index of the first weight.
        ask: what it does at each step, by number, besides: it asks for weights and pixels that are read later.
    """

    sums: list[list[Register]]
    pixels: list[tuple[int, int]]
    source: Expression
    corner: Expression
    vector: Expression
    weight: Expression
    ask: Callable[[Expression], None]


class Convolution(PackedConvolution):
    """Subclasses say how input values are read, multiplied and finished."""

    sum_dtype: str
    fewest_macs = FEWEST_MACS

    def loops(self) -> None:
        """See `ConvolutionBody`."""
        stored = self.arrays["weight"]
        self.weights = stored if self.word == 1 else flat(stored, self.packed["weight"].size // self.word, "int32")
        if self.shape.varies:
            self._parts_of_any_size()
            return

        def images_in_parallel() -> None:
            parallel(self.batch, lambda n: self._image(n, serial))

        def parts_in_parallel() -> None:
            loop = loop_for(self.shape.macs, self.fewest_macs)
            serial(self.batch, lambda n: self._image(n, loop))

        branch(self.batch >= MANY_IMAGES, images_in_parallel, parts_in_parallel)

    def _image(self, n: Expression, loop: Callable[..., None]) -> None:
        n = T.cast(n, "int64")
        shape = self.shape
        bands = -(-shape.result[0] // self.rows)
        chunk = self._chunk(bands)
        chunks = -(-bands // chunk)
        blocks = self.passes.count * self.blocks

        def part(source: tuple[Expression, Expression], c: Expression, b: Expression) -> None:
            count = chunk if bands % chunk == 0 else tirx.min(chunk, bands - c * chunk)
            self._part(n, source, (c * chunk, count), b, chunk * self.rows * shape.result[1])

        if self.reads_copy and chunks >= FEWEST_COPIED:
            self.shared(loop)(chunks, lambda c: self._copied_part(n, (c, chunk), lambda source, b: part(source, c, b)))
            return
        zero = tirx.const(0, "int64")
        source = self.copied(n, (zero, shape.padded[0]), loop) if self.reads_copy else self.direct(n)
        self.shared(loop)(chunks * blocks, lambda i: part(source, tirx.floordiv(i, blocks), tirx.floormod(i, blocks)))

    def shared(self, loop: Callable[..., None]) -> Callable[..., None]:
        """The loop that threads share, given one over their turns."""
        return loop

    def _part(
        self, n: Expression, source: tuple[Expression, Expression], bands: tuple[Expression, Expression], b: Expression,
        pixels: int | None,
    ) -> None:  # fmt: skip
        """Some bands of an image, first and number, for block number `b` of the outputs of all passes."""
        number, block = tirx.floordiv(b, self.blocks), tirx.floormod(b, self.blocks)

        def panel(vectors: int) -> None:
            outputs = Block(number, block, vectors, bands[0] * self.rows, pixels)
            serial(bands[1], lambda r: self.band(n, source, outputs, bands[0] + r))

        if not self.tail or not self.full:
            panel(self.tail or self.tile.vectors)
        else:
            branch(block < self.full, lambda: panel(self.tile.vectors), lambda: panel(self.tail))

    def _copied_part(
        self, n: Expression, place: tuple[Expression, Expression], part: Callable[[Any, Expression], None]
    ) -> None:
        """All outputs of one chunk of bands, its number and size, read from a copy of its own."""
        c, chunk = place
        first = B.Bind(T.cast(c, "int64") * (chunk * self.rows * self.shape.stride[0]))
        source = self.copied(n, (first, self.shape.rows_read(chunk * self.rows)), serial)
        serial(self.passes.count * self.blocks, lambda b: part(source, b))

    def _parts_of_any_size(self) -> None:
        """Chunks of bands of all images; how many is computed at run time."""
        v, shape, blocks = self.v, self.shape, self.passes.count * self.blocks
        bands = B.Bind(-(-shape.result[0] // self.rows))
        fitting = tirx.floordiv(CACHE_BYTES, tirx.max(1, self._band_bytes()))
        spread = -(-bands // FEWEST_PARTS)  # bands of so many parts
        size = tirx.max(1, tirx.min(fitting, spread))
        chunk = v.held_integer(size)
        chunks = v.held_integer(-(-bands // chunk))
        loop = loop_for(shape.macs, self.fewest_macs, self.batch)

        def part(n: Expression, source: tuple[Expression, Expression], c: Expression, b: Expression) -> None:
            self._part(n, source, (c * chunk, tirx.min(chunk, bands - c * chunk)), b, None)

        def copied(i: Expression) -> None:
            n, c = B.Bind(tirx.floordiv(i, chunks)), B.Bind(tirx.floormod(i, chunks))
            # TVM may allocate the copy before anything is held
            self._copied_part(n, (c, size), lambda source, b: part(n, source, c, b))

        def direct(i: Expression) -> None:
            n, c = B.Bind(tirx.floordiv(i, chunks * blocks)), B.Bind(tirx.floormod(tirx.floordiv(i, blocks), chunks))
            part(n, self.direct(n), c, tirx.floormod(i, blocks))

        if self.reads_copy:
            self.shared(loop)(self.batch * chunks, copied)
        else:
            self.shared(loop)(self.batch * chunks * blocks, direct)

    def _band_bytes(self) -> Expression:
        """Bytes of the source that a band moves on by."""
        size = BYTES // self.word
        return self.shape.padded[1] * (self.shape.inputs * size * self.shape.stride[0] * self.rows)

    def _result_bytes(self) -> int:
        """Bytes that a band writes, and reads to add."""
        kinds = (self.region.output_dtype, *self.region.operand_dtypes)
        pixels: int = self.rows * self.shape.result[1]
        return pixels * self.shape.outputs * sum(np.dtype(kind).itemsize for kind in kinds)

    def _chunk(self, bands: int) -> int:
        """Bands of rows that one part goes over: its source should stay in cache, and the threads need parts alike."""
        fitting = CACHE_BYTES if self.packed["weight"].nbytes < MANY_WEIGHTS else MORE_BYTES
        most: int = max(1, fitting // self._band_bytes())
        if self.packed["weight"].nbytes <= FEW_WEIGHTS:
            most = max(1, min(most, ALL_BYTES // (self._band_bytes() + self._result_bytes())))
        chunks = -(-bands // most)
        blocks = self.passes.count * self.blocks
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
        zero = self.padding
        room = B.alloc_buffer((rows[1] * self.line * self.word,), str(zero.ty.dtype), layout=None)
        source = (self.x, self._first(n))
        if self.whole_words:
            copy_rows(self.v, self.shape, source, (room, zero), rows, loop)
        else:
            copy_words(self.shape, self.passes, source, (room, zero), rows, loop)
        words = room if self.word == 1 else flat(room, rows[1] * self.line, "int32")
        return words, -rows[0] * self.line

    @property
    def padding(self) -> Expression:
        """What the copy has beyond the border, and where words are not filled."""
        raise NotImplementedError

    def band(self, n: Expression, source: tuple[Expression, Expression], block: Block, r: Any) -> None:
        """A few rows of output for one block of channels."""
        height, width = self.shape.result
        first = r * self.rows

        def rows(row: Expression, count: int) -> None:
            cover(width, self.columns, lambda x, columns: self._tile(n, source, block, (row, x, count, columns)))

        if isinstance(height, int):
            whole, left = divmod(height, self.rows)  # there are no more rows in a tile than in the image
            branch(r < whole if left else True, lambda: rows(first, self.rows), lambda: rows(first, left))
        elif self.rows == 1:
            rows(first, 1)
        else:
            cover(tirx.min(self.rows, height - first), self.rows, lambda y, count: rows(first + y, count))

    @property
    def taps(self) -> int:
        """Words that a lane of sums multiplies."""
        return self.depth * self.shape.kernel[0] * self.shape.kernel[1]

    def corner(
        self, source: tuple[Expression, Expression], number: Expression, row: Expression, column: Expression
    ) -> Expression:
        """The first word that an output pixel reads in a pass."""
        first = row * (self.shape.stride[0] * self.line) + column * (self.shape.stride[1] * self.pixel_words)
        return source[1] + first + self.first_word(number)

    def first_output(self, n: Expression, row: Expression, column: Expression) -> Expression:
        """Where the outputs of a pixel begin."""
        return ((n * self.shape.result[0] + row) * self.shape.result[1] + column) * self.shape.outputs

    def first_vector(self, block: Block) -> Expression:
        """The number of a block's first vector among those of all passes."""
        return block.number * self.vectors + block.within * self.tile.vectors

    def channel(self, number: Expression, block: Expression, j: int) -> Expression:
        """The first output channel of a vector."""
        outputs, lanes = self.outputs, self.v.lanes
        start = (block * self.tile.vectors + j) * lanes
        if outputs % lanes and outputs > lanes:
            start = tirx.min(start, outputs - lanes)
        return self.passes.first(number) * self.shape.group_outputs + start

    def _tile(
        self,
        n: Expression,
        source: tuple[Expression, Expression],
        block: Block,
        place: tuple[Expression, Expression, int, int],
    ) -> None:
        v, shape = self.v, self.shape
        number, within, vectors = block.number, block.within, block.vectors
        row, column, height, width = place
        pixels = [(i, j) for i in range(height) for j in range(width)]
        sums = v.registers(len(pixels), vectors, self.sum_dtype)
        vector = self.first_vector(block)
        for j in range(vectors):
            start = B.Bind(self.start((vector + j) * v.lanes))
            for pixel in sums:
                pixel[j].set(start)
        corner = B.Bind(self.corner(source, number, row, column))
        weight = B.Bind(vector * (self.taps * v.lanes))
        first = B.Bind(self.first_output(n, row, column))
        channels = [first + self.channel(number, within, j) for j in range(vectors)]
        targets = [[c + (y * shape.result[1] + x) * shape.outputs for y, x in pixels] for c in channels]
        for indices in targets:
            for index in indices:
                self.epilogue.ask(index)
        asks = self.ahead(block, place, weight, self.taps), self._next_pixels(source[0], corner, len(pixels))

        def ask(step: Expression) -> None:
            for one in asks:
                one(step)

        self.accumulate(Tile(sums, pixels, source[0], corner, vector, weight, ask))
        for j, indices in enumerate(targets):
            self.write((vector + j) * v.lanes, [pixel[j] for pixel in sums], indices)

    def write(self, lane: Expression, sums: list[Register], indices: list[Expression]) -> None:
        """Finish the sums of a vector of outputs, whose first lane is `lane`, for pixels to write at `indices`."""
        for total, index in zip(sums, indices, strict=True):
            self.epilogue.store(self.finish(total.get(), lane), index, min(self.v.lanes, self.outputs))

    def ahead(
        self, block: Block, place: tuple[Expression, Expression, int, int], weight: Expression, steps: int
    ) -> Callable[[Expression], None]:
        """What a tile does at each of so many steps for the next block's weights; see ahead.py."""
        words, (row, column, height, width) = block.vectors * self.v.lanes * (self.taps // steps), place
        if block.pixels is None or self.blocks * self.passes.count == 1:
            return lambda _: None
        size = self.passes.count * self.vectors * self.v.lanes * self.taps
        following = NextPanel(self.weights, size, weight + words * steps, words, steps)
        before = (row - block.first) * self.shape.result[1] + column * height
        return following.share(self.v, (before, height * width, block.pixels))

    def _next_pixels(self, source: Expression, corner: Expression, count: int) -> Callable[[Expression], None]:
        """The same for the pixels of the next tile, where they lie behind those of this one."""
        shape = self.shape
        if self.reads_copy or self.passes.count > 1 or shape.kernel != (1, 1) or shape.stride != (1, 1):
            return lambda _: None
        size = self.batch * (shape.image[0] * shape.image[1] * self.pixel_words)
        begin = B.Bind(tirx.max(0, tirx.min(corner + count * self.pixel_words, size - count * self.depth)))
        return lambda step: self.v.prefetch(source, begin + step * count)

    def accumulate(self, tile: Tile) -> None:
        """Add up all that a tile reads."""
        v, vectors = self.v, len(tile.sums[0])

        def step(at: Expression, begin: Expression) -> None:
            tile.ask(at)
            weights = tile.weight + at * (vectors * v.lanes)
            w = [B.Bind(self.load_weight(weights + j * v.lanes)) for j in range(vectors)]
            for pixel, registers in zip(tile.pixels, tile.sums, strict=True):
                value = B.Bind(v.splat(tile.source[begin + self.pixel_offset(pixel)]))
                for register, part in zip(registers, w, strict=True):
                    register.set(self.multiply(register.get(), value, part))

        self.over_window(1, lambda at, begin: step(at, tile.corner + begin))

    def over_window(self, words: int, step: Callable[[Expression, Expression], None]) -> None:
        """Call `step` for every few words that a pixel reads, with its number and the first word's place."""
        *outer, (count, _) = self.runs()
        loops = [*outer, (count // words, words)]

        def nest(level: int, at: Expression, begin: Expression) -> None:
            if level == len(loops):
                step(at, begin)
                return
            count, stride = loops[level]
            serial(count, lambda i: nest(level + 1, at * count + i, begin + i * stride))

        nest(0, 0, 0)

    def runs(self) -> list[tuple[int, Expression]]:
        """Loops over what a pixel reads, number and stride in words; those are joined whose words lie side by side."""
        (rows, columns), (down, across) = self.shape.kernel, self.shape.dilation
        loops: list[tuple[int, Expression]] = [(self.depth, 1)]
        for count, stride in ((columns, across * self.pixel_words), (rows, down * self.line)):
            inner, step = loops[0]
            if isinstance(stride, int) and stride == inner * step:
                loops[0] = (count * inner, step)
            elif count > 1:
                loops.insert(0, (count, stride))
        return loops

    @property
    def line(self) -> Expression:
        """Words of a row of the source."""
        return self.shape.padded[1] * self.pixel_words

    def pixel_offset(self, pixel: tuple[int, int]) -> Expression:
        """Words from the first that a tile reads to the first that one of its pixels does."""
        (row, column), (down, across) = pixel, self.shape.stride
        return row * down * self.line + column * across * self.pixel_words

    def start(self, index: Expression) -> Expression:
        """What sums begin with."""
        raise NotImplementedError

    def load_weight(self, index: Expression) -> Expression:
        """A vector of weights."""
        return self.v.load(self.weights, index)

    def multiply(self, total: Expression, value: Expression, weight: Expression) -> Expression:
        """One step."""
        raise NotImplementedError

    def finish(self, total: Expression, index: Expression) -> Expression:
        """Sums as float32 results, before the epilogue."""
        raise NotImplementedError


class FloatConvolution(Convolution):
    """float32 values, weights converted in registers where they are codes."""

    sum_dtype = "float32"
    word = 1

    def direct(self, n: Expression) -> tuple[Expression, Expression]:
        return self.x, self._first(n)

    @property
    def padding(self) -> Expression:
        return tirx.const(0.0, "float32")

    def start(self, index: Expression) -> Expression:
        return self.v.constant(0.0) if "scale" in self.packed else self.v.load(self.arrays["bias"], index)

    def load_weight(self, index: Expression) -> Expression:
        value = super().load_weight(index)
        return self.v.to_float(value) if "scale" in self.packed else value

    def multiply(self, total: Expression, value: Expression, weight: Expression) -> Expression:
        return self.v.fma(value, weight, total)

    def finish(self, total: Expression, index: Expression) -> Expression:
        if "scale" not in self.packed:
            return total
        return self.v.fma(total, self.v.load(self.arrays["scale"], index), self.v.load(self.arrays["bias"], index))


class IntegerConvolution(Convolution):
    """uint8 codes, four input channels a word."""

    sum_dtype = "int32"
    word = 4

    @cached_property
    def bounded(self) -> bool:
        """See `Vectors.dot4`."""
        return pairs_fit(self.region.weight.decoded())

    @cached_property
    def codes(self) -> PackedCodes | None:
        """What makes codes of sums, a whole vector of outputs and more."""
        return PackedCodes.of(self.region) if self.outputs >= self.v.lanes else None

    def channel_arrays(self) -> dict[str, NDArray[Any]]:
        sums = self.plain_weight().reshape(self.shape.outputs, -1).sum(1, dtype=np.int64)
        start = zero_sum_factor(self.region, self.v.target) * sums
        return sum_arrays(self.region, self.codes, start)

    @property
    def reads_copy(self) -> bool:
        return self.shape.pads or not self.whole_words

    def direct(self, n: Expression) -> tuple[Expression, Expression]:
        words = self.shape.image[0] * self.shape.image[1] * self.pixel_words
        return flat(self.x, self.batch * words, "int32"), n * words

    @property
    def padding(self) -> Expression:
        assert self.region.activation is not None
        return tirx.const(self.region.activation.zero_point, "uint8")

    def start(self, index: Expression) -> Expression:
        return self.v.load(self.arrays["start"], index)

    def multiply(self, total: Expression, value: Expression, weight: Expression) -> Expression:
        return self.v.dot4(total, value, weight, bounded=self.bounded)

    def finish(self, total: Expression, index: Expression) -> Expression:
        scale, bias = self.v.load(self.arrays["scale"], index), self.v.load(self.arrays["bias"], index)
        return self.v.fma(self.v.to_float(total), scale, bias)

    def write(self, lane: Expression, sums: list[Register], indices: list[Expression]) -> None:
        v = self.v
        if self.codes is None:
            super().write(lane, sums, indices)
            return
        scale, bias = (B.Bind(v.load(self.arrays[key], lane)) for key in ("scale", "bias"))
        self.codes.store(self.epilogue, sums, (scale, bias), indices)
