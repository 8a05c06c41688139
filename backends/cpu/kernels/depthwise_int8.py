"""Depthwise convolutions of codes with channels last: `dot4` takes four pixels of a channel at once.

Neighbouring pixels of a row are interleaved bytewise, so that each 32-bit lane holds one channel's (x0, x1, x2, x3), a
quad; one `dot4` with weights such as (w0, w1, w2, 0) or (0, w0, w1, w2) does a row of taps of one output pixel. Quads
begin at even pixels; two of them share the pairs they are made of, and all output rows and columns of a tile share the
quads. A block of channels is one register of bytes wide, the last blocks narrower. Interleaving works in parts of 128
bits and leaves channels out of order: packing sums to codes undoes it, and where the results are not just codes, the
pixels are sorted beforehand. Nothing is padded: pixels beyond the border read the zero point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc import ops
from mcc.backends.cpu.epilogue import ToCodes, channel_vectors, steps_after_scale
from mcc.backends.cpu.integer_sums import LARGEST_CODE, pairs_fit, sums_overflow, zero_sum_factor
from mcc.backends.cpu.kernels.conv2d import conv_reference
from mcc.backends.cpu.kernels.conv_shape import ConvShape, conv_shape
from mcc.backends.cpu.kernels.convolution_body import ConvolutionBody
from mcc.backends.cpu.kernels.tiles import loop_for
from mcc.backends.cpu.microkernel import Expression, Register, Vectors, branch, flat, serial
from mcc.backends.kernel import Lowered, Region

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mcc.target import Target

WIDEST_KERNEL = 9
QUAD = 4
FEWEST_CHANNELS = 16
FEWEST_MACS = 500_000  # for two threads: about 7 us of one


@dataclass(frozen=True)
class DepthwiseInt8:
    """uint8 activation codes times int8 weight codes, exact int32 sums."""

    name: str = "depthwise_int8"
    anchor: ClassVar[ops.Op] = ops.CONV2D_NHWC

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes depthwise convolutions whose taps lie side by side."""
        shape = conv_shape(region)
        if isinstance(shape, str):
            return shape
        if region.weight.sparse is not None or region.activation is None or region.weight.scale is None:
            return "weight and activations are not both dense int8"
        if not shape.depthwise or shape.inputs < FEWEST_CHANNELS:
            return f"it is not depthwise, or has fewer channels than {FEWEST_CHANNELS}"
        if shape.dilation[1] != 1 or shape.kernel[1] > WIDEST_KERNEL:
            return f"its taps are apart, or more than {WIDEST_KERNEL} in a row"
        if not target.exact_dot4 and not _pairs_fit(region.weight.decoded()):
            return "neighbouring weights are too large for the CPU's 16-bit sums"
        return sums_overflow(region)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """Rows times columns of output that a tile holds."""
        shape = conv_shape(region)
        assert isinstance(shape, ConvShape)
        wide = ((1, 4), (1, 2), (2, 2)) if shape.kernel[1] >= QUAD else ((2, 2), (1, 4), (1, 2))
        wanted = wide if target.vector_registers == 32 else ((2, 2), (1, 2), (2, 1))
        height, width = shape.result
        return tuple(dict.fromkeys(f"{min(r, height)}x{min(c, width)}" for r, c in wanted))

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        rows, _, columns = tile.partition("x")
        body = _Body(region, Vectors(target), (int(rows), int(columns)))
        return Lowered(body.function(self.name), body.packed)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """As of any convolution."""
        return conv_reference(region, source, operands)


@dataclass(frozen=True)
class _Block:
    """Channels taken together.

    Attributes:
        first: channel.
        vectors: their lanes are a quarter of the block's channels.
        slot: of its first channel in the packed arrays.
    """

    first: Expression
    vectors: Vectors
    slot: Expression

    @property
    def lanes(self) -> int:
        return self.vectors.lanes


@dataclass(frozen=True)
class _Rows:
    """Where a tile's rows lie.

    Attributes:
        top: the image row that the first tap of the first output row reads; negative above the image.
        image: index of the image's first code.
        target: index of the first output row's first value.
    """

    top: Expression
    image: Expression
    target: Expression


class _Body(ConvolutionBody):
    def __init__(self, region: Region, vectors: Vectors, tile: tuple[int, int]) -> None:
        super().__init__(region, vectors)
        shape = self.shape
        assert region.activation is not None
        self.rows, self.columns = tile
        self.zero = region.activation.zero_point
        self.quads = [_quads(c * shape.stride[1], shape.kernel[1]) for c in range(self.columns)]
        self.variants = sorted({(c * shape.stride[1] - q[0], len(q)) for c, q in enumerate(self.quads)})
        self.variant_words = sum(count for _, count in self.variants)
        self.full, self.rest = _blocks(shape.inputs, vectors.lanes)
        weight = region.weight.decoded()[:, 0]  # [channel][kernel row][kernel column]
        steps = steps_after_scale(region)
        last = steps[0] if len(steps) == 1 else None
        self.to_codes = last if isinstance(last, ToCodes) and last.fits else None
        totals = zero_sum_factor(region, vectors.target) * weight.sum((1, 2), dtype=np.int64)
        by_channel: dict[str, NDArray[Any]] = {"start": totals.astype(np.int32), **channel_vectors(region)}
        self.packed: dict[str, NDArray[Any]] = {"weight": self._pack(weight)}
        self.packed |= {key: np.concatenate([a[c] for c in self._channels()]) for key, a in by_channel.items()}

    def _channels(self) -> list[NDArray[np.int64]]:
        """Of every block, the channel of each slot."""
        wide = self.v.lanes * QUAD
        blocks = [(i * wide, self.v.lanes) for i in range(self.full)] + self.rest
        return [first + (_interleaved(lanes) if self.to_codes else np.arange(lanes * QUAD)) for first, lanes in blocks]

    def _pack(self, weight: NDArray[np.int8]) -> NDArray[np.int8]:
        """[block][kernel row][variant][quad][channel of the block][4]."""
        parts = []
        for channels in self._channels():
            for row in weight[channels].transpose(1, 0, 2):  # [kernel row][channel][kernel column]
                for offset, count in self.variants:
                    room = np.zeros((len(channels), count * QUAD), np.int8)
                    room[:, offset : offset + row.shape[1]] = row
                    parts.append(room.reshape(-1, count, QUAD).transpose(1, 0, 2).reshape(-1))
        return np.concatenate(parts)

    def loops(self) -> None:
        """See `ConvolutionBody`."""
        self.words = flat(self.arrays["weight"], self.packed["weight"].size // 4, "int32")
        self.bands = -(-self.shape.result[0] // self.rows)
        loop = loop_for(self.shape.macs, FEWEST_MACS, self.batch)
        loop(self.batch * self.bands, self._band)

    def _band(self, i: Expression) -> None:
        """A few rows of output."""
        shape = self.shape
        n, band = B.Bind(T.cast(tirx.floordiv(i, self.bands), "int64")), tirx.floormod(i, self.bands)
        # the last band overlaps the one before rather than being of other height
        row = B.Bind(tirx.min(T.cast(band, "int64") * self.rows, shape.result[0] - self.rows))
        top = B.Bind(row * shape.stride[0] - shape.before[0])
        image = B.Bind(n * (shape.image[0] * shape.image[1] * shape.inputs))
        target = B.Bind((n * shape.result[0] + row) * (shape.result[1] * shape.outputs))
        rows = _Rows(top, image, target)
        inside = B.Bind(tirx.all(top >= 0, top + shape.rows_read(self.rows) <= shape.image[0]))
        serial(-(-shape.result[1] // self.columns), lambda t: self._place(t, rows, inside))

    def _place(self, t: Expression, rows: _Rows, rows_inside: Expression) -> None:
        """Tile number `t` of a band, for all channels."""
        shape = self.shape
        start = B.Bind(tirx.min(T.cast(t, "int64") * self.columns, shape.result[1] - self.columns))
        first = self._column(start)
        last = first + (self.columns - 1) * shape.stride[1] + shape.kernel[1] - 1
        inside = tirx.all(rows_inside, first >= 0, last < shape.image[1])
        branch(
            inside,
            lambda: self._blocks(rows, start, inside=True),
            lambda: self._blocks(rows, start, inside=False),
        )

    def _blocks(self, rows: _Rows, start: Expression, *, inside: bool) -> None:
        """All channels: this loop is the inner one, as LLVM would spill weights that do not change."""
        wide = self.v.lanes * QUAD
        serial(self.full, lambda b: self._tile(_Block(b * wide, self.v, b * wide), rows, start, inside))
        slot = self.full * wide
        for first, lanes in self.rest:
            self._tile(_Block(first, Vectors(self.v.target, lanes), slot), rows, start, inside)
            slot += lanes * QUAD

    def _column(self, start: Expression) -> Expression:
        """The input column that the first tap of output column `start` reads."""
        return start * self.shape.stride[1] - self.shape.before[1]

    def _tile(self, block: _Block, rows: _Rows, start: Expression, inside: bool) -> None:  # noqa: FBT001
        """Compute one tile; `inside`: whether all it reads lies in the image."""
        v, shape = block.vectors, self.shape
        pixels = v.registers(self.rows * self.columns, QUAD, "int32")
        sums = [pixels[i * self.columns : (i + 1) * self.columns] for i in range(self.rows)]
        for q in range(QUAD):
            first = B.Bind(v.load(self.arrays["start"], block.slot + q * v.lanes))
            for row in sums:
                for pixel in row:
                    pixel[q].set(first)
        for y in range(shape.rows_read(self.rows)):
            taps = [(i, k) for i in range(self.rows) for k in [self._tap(y - i * shape.stride[0])] if k is not None]
            if taps:
                self._image_row((block, rows, start, inside), y, taps, sums)
        for i, row in enumerate(sums):
            for j, pixel in enumerate(row):
                index = rows.target + (i * shape.result[1] + start + j) * shape.outputs + block.first
                self._store(block, pixel, index)

    def _store(self, block: _Block, pixel: list[Register], index: Expression) -> None:
        v = block.vectors
        values = []
        for q, register in enumerate(pixel):
            scale, bias = (v.load(self.arrays[key], block.slot + q * v.lanes) for key in ("scale", "bias"))
            values.append(v.fma(v.to_float(register.get()), scale, bias))
        step = self.to_codes
        if step is None:
            epilogue = self.epilogue.narrowed(v)
            for q, value in enumerate(values):
                epilogue.store(value, index + q * v.lanes, v.lanes)
            return
        zero = v.constant(step.zero_point, "int32")
        codes = v.pack_to_codes([v.to_nearest_integer(value) + zero for value in values])
        low, high = (T.broadcast(tirx.const(c, "uint8"), v.lanes * QUAD) for c in (step.low, step.high))
        if step.low > 0:
            codes = T.max(codes, low)
        if step.high < LARGEST_CODE:
            codes = T.min(codes, high)
        v.store(self.epilogue.out, index, codes, v.lanes * QUAD)

    def _tap(self, distance: int) -> int | None:
        """The kernel row that reads the image row so far below an output row's first one."""
        row, rest = divmod(distance, self.shape.dilation[0])
        return row if not rest and 0 <= row < self.shape.kernel[0] else None

    def _image_row(
        self,
        place: tuple[_Block, _Rows, Expression, bool],
        y: int,
        taps: list[tuple[int, int]],
        sums: list[list[list[Register]]],
    ) -> None:
        """Add the image row `y` below the tile's first to the output rows whose kernel rows read it, `taps`."""
        block, rows, start, inside = place
        v, shape = block.vectors, self.shape
        (height, width), inputs = shape.image, shape.inputs
        zero = T.broadcast(tirx.const(self.zero, "uint8"), v.lanes * QUAD)
        read = {c * shape.stride[1] + k for c in range(self.columns) for k in range(shape.kernel[1])}
        row, column = rows.top + y, self._column(start)
        nearest = row if inside else tirx.max(0, tirx.min(row, height - 1))
        line = B.Bind(rows.image + nearest * (width * inputs) + block.first)
        corner = B.Bind(line + column * inputs) if inside else None

        def pixel(offset: int) -> Expression:
            if offset not in read:
                return zero
            if corner is not None:
                codes = v.load(self.x, corner + offset * inputs, v.lanes * QUAD)
            else:
                at = column + offset
                here = tirx.all(row >= 0, row < height, at >= 0, at < width)
                held = v.load(self.x, line + tirx.max(0, tirx.min(at, width - 1)) * inputs, v.lanes * QUAD)
                codes = tirx.Select(here, held, zero)
            return B.Bind(codes if self.to_codes else _sorted(v, codes))

        words_before = block.slot * (shape.kernel[0] * self.variant_words)
        needed = sorted({q for quads in self.quads for q in quads})
        pairs = {p: _pair(v, pixel(p), pixel(p + 1)) for p in sorted({p for q in needed for p in (q, q + 2)})}
        for quad in needed:
            words = _quad(v, pairs[quad], pairs[quad + 2])
            for c, quads in enumerate(self.quads):
                if quad not in quads:
                    continue
                at = self._variant(c, quads.index(quad))
                for i, k in taps:
                    for q, word in enumerate(words):
                        index = words_before + ((k * self.variant_words + at) * QUAD + q) * v.lanes
                        total = sums[i][c][q]
                        total.set(v.dot4(total.get(), word, v.load(self.words, index), bounded=True))

    def _variant(self, column: int, quad: int) -> int:
        """Which of a kernel row's weight vectors an output column multiplies its quad number `quad` with."""
        quads = self.quads[column]
        place = self.variants.index((column * self.shape.stride[1] - quads[0], len(quads)))
        return sum(count for _, count in self.variants[:place]) + quad


def _pairs_fit(weight: NDArray[np.int8]) -> bool:
    """Whether products of neighbouring taps fit, from whichever tap a quad begins."""
    rows = weight.reshape(-1, weight.shape[-1])
    return pairs_fit(rows) and pairs_fit(np.pad(rows, [(0, 0), (1, 0)]))


def _quads(first: int, taps: int) -> tuple[int, ...]:
    """The pixels at which the quads begin that cover `taps` pixels from `first`: as few as can be, best shared ones."""
    start = min((first // 4 * 4, first // 2 * 2), key=lambda s: -(-(first - s + taps) // QUAD))
    return tuple(range(start, first + taps, QUAD))


def _blocks(channels: int, lanes: int) -> tuple[int, list[tuple[int, int]]]:
    """Whole blocks of channels, and (first channel, lanes) of the narrower ones; the last may overlap."""
    full, left = divmod(channels, lanes * QUAD)
    rest = []
    fitting = [n for n in (4, 8, 16) if n <= lanes and n * QUAD <= channels]
    while left > 0:
        width = next((n for n in fitting if n * QUAD >= left), fitting[-1])
        rest.append((min(channels - left, channels - width * QUAD), width))
        left -= width * QUAD
    return full, rest


def _interleaved(lanes: int) -> NDArray[np.int64]:
    """The channel that each lane of a quad's four vectors holds, of a block that was not sorted."""
    channels = np.arange(lanes * QUAD).reshape(lanes // 4, QUAD, 4)  # [128 bits][vector][lane]
    return channels.transpose(1, 0, 2).reshape(-1)


def _sorted(v: Vectors, codes: Expression) -> Expression:
    """Words of four channels in such order that their quads' lanes are in order."""
    words = np.arange(v.lanes).reshape(QUAD, v.lanes // 4).T.reshape(-1)
    shuffled = tirx.Shuffle([T.reinterpret(f"int32x{v.lanes}", codes)], words.tolist())
    return T.reinterpret(f"uint8x{v.lanes * QUAD}", shuffled)


def _unpack(a: Expression, b: Expression, count: int, part: int, *, high: bool) -> Expression:
    """Interleave the low or high halves of every 128 bits of two vectors of `count` elements, `part` in 128 bits."""
    half = part // 2 if high else 0
    picked = [e for start in range(0, count, part) for i in range(part // 2) for e in (start + half + i,) * 2]
    return tirx.Shuffle([a, b], [e + count * (i % 2) for i, e in enumerate(picked)])


def _pair(v: Vectors, a: Expression, b: Expression) -> tuple[Expression, Expression]:
    """Two pixels as 16-bit words (a, b) of each channel: the low and the high halves of every 128 bits."""
    count = v.lanes * QUAD
    low, high = (B.Bind(T.reinterpret(f"int16x{count // 2}", _unpack(a, b, count, 16, high=h))) for h in (False, True))
    return low, high


def _quad(v: Vectors, first: tuple[Expression, ...], second: tuple[Expression, ...]) -> list[Expression]:
    """Two pairs as four vectors of 32-bit lanes, one channel a lane."""
    count = v.lanes * 2
    return [
        B.Bind(T.reinterpret(f"int32x{v.lanes}", _unpack(a, b, count, 8, high=h)))
        for a, b in zip(first, second, strict=True)
        for h in (False, True)
    ]
