"""What both forms of the depthwise kernel for codes share: packing, and what becomes of sums.

Neighbouring pixels of a row are interleaved bytewise, so that each 32-bit lane holds one channel's (x0, x1, x2, x3), a
quad; one `dot4` with weights such as (w0, w1, w2, 0) or (0, w0, w1, w2) does a row of taps of one output pixel. Quads
begin at even pixels of a tile. A block of channels is one register of bytes wide, the last blocks narrower; its sums
are four vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.integer_sums import zero_sum_factor
from mcc.backends.cpu.kernels.convolution_body import ConvolutionBody
from mcc.backends.cpu.kernels.packed_codes import PackedCodes, sum_arrays
from mcc.backends.cpu.kernels.quads import QUAD, interleaved
from mcc.backends.cpu.microkernel import Expression, Register, Vectors, flat, serial

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from mcc.backends.kernel import Region

NARROWEST = 4
FEWEST_MACS = 500_000  # for two threads: about 7 us of one


@dataclass(frozen=True)
class Block:
    """Channels taken together.

    Attributes:
        first: channel.
        vectors: their lanes are a quarter of the block's channels, for all parts.
        slot: of its first channel in the packed arrays.
        parts: of the width of the output that lie side by side in the vectors, which few channels would not fill.
    """

    first: Expression
    vectors: Vectors
    slot: Expression
    parts: int = 1


@dataclass(frozen=True)
class Use:
    """One product of a quad and a vector of weights.

    Attributes:
        row: of the image, from the tile's first.
        quad: its first image column, from the tile's first.
        word: number of the vector of weights.
        pixel: number of the output pixel, row by row of a tile, that it is added to.
    """

    row: int
    quad: int
    word: int
    pixel: int


class DepthwiseBody(ConvolutionBody):
    """Packed weights: [block][kernel row][variant][quad][channel of the block][4].

    Attributes:
        most_parts: of the width, that a form can take side by side.

    Args:
        region: the convolution.
        vectors: of the target.
        tile: rows and columns of output pixels.
    """

    most_parts: ClassVar[int] = 1

    def __init__(self, region: Region, vectors: Vectors, tile: tuple[int, int]) -> None:
        super().__init__(region, vectors)
        shape = self.shape
        assert region.activation is not None
        self.tile = self.rows, self.columns = tile
        self.zero = region.activation.zero_point
        # of each column of a tile: its first tap within its first quad, and how many quads it reads
        firsts = [c * shape.stride[1] % 2 for c in range(self.columns)]
        self.quads = [(f, -(-(f + shape.kernel[1]) // QUAD)) for f in firsts]
        self.variants = sorted(set(self.quads))
        self.variant_words = sum(count for _, count in self.variants)
        self.to_codes = PackedCodes.alone(region)
        wide = not shape.varies and shape.result[1] >= self.most_parts
        parts = self.most_parts if self.to_codes and wide else 1
        self.full, self.rest = _blocks(shape.inputs, vectors.lanes, parts)
        self.packed = self._packed()

    def _packed(self) -> dict[str, NDArray[Any]]:
        weight = self.region.weight.decoded()[:, 0]  # [channel][kernel row][kernel column]
        start = zero_sum_factor(self.region, self.v.target) * weight.sum((1, 2), dtype=np.int64)
        by_channel = sum_arrays(self.region, self.to_codes, start)
        return {"weight": self._pack(weight)} | {
            key: np.concatenate([a[c] for c in self._channels()]) for key, a in by_channel.items()
        }

    def _channels(self) -> list[NDArray[np.int64]]:
        """Of every block, the channel of each slot."""
        wide = self.v.lanes * QUAD
        blocks = [(i * wide, self.v.lanes, 1) for i in range(self.full)] + self.rest
        slots = {n: interleaved(n) if self.to_codes else np.arange(n * QUAD) for _, n, _ in blocks}
        return [first + slots[lanes] % (lanes * QUAD // parts) for first, lanes, parts in blocks]

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

    def each_block(self, emit: Callable[[Block], None]) -> None:
        """All channels."""
        wide = self.v.lanes * QUAD
        serial(self.full, lambda b: emit(Block(b * wide, self.v, b * wide)))
        slot = self.full * wide
        for first, lanes, parts in self.rest:
            emit(Block(first, Vectors(self.v.target, lanes), slot, parts))
            slot += lanes * QUAD

    def uses(self, rows: int, columns: int) -> list[Use]:
        """Every product that a tile adds up."""
        shape, found = self.shape, []
        for p, (i, c) in enumerate((i, c) for i in range(rows) for c in range(columns)):
            offset, count = variant = self.quads[c]
            first = sum(n for _, n in self.variants[: self.variants.index(variant)])
            for k in range(shape.kernel[0]):
                row, quad = i * shape.stride[0] + k * shape.dilation[0], c * shape.stride[1] - offset
                word = k * self.variant_words + first
                found += [Use(row, quad + QUAD * n, word + n, p) for n in range(count)]
        return found

    def zeros(self, v: Vectors) -> Expression:
        """Pixels beyond the border."""
        return T.broadcast(tirx.const(self.zero, "uint8"), v.lanes * QUAD)

    def weight(self, block: Block, word: int, q: int) -> Expression:
        """Vector of weights number `word`, for vector `q` of a block."""
        first = block.slot * (self.shape.kernel[0] * self.variant_words)
        return block.vectors.load(self.words, first + (word * QUAD + q) * block.vectors.lanes)

    def new_sums(self, block: Block, q: int, pixels: int) -> list[Register]:
        """What the sums of vector `q` of a block begin with, for some pixels."""
        v = block.vectors
        (sums,) = v.registers(1, pixels, "int32")
        start = B.Bind(v.load(self.arrays["start"], block.slot + q * v.lanes))
        for total in sums:
            total.set(start)
        return sums

    def finish(self, block: Block, sums: Iterable[list[Register]], targets: list[Expression]) -> None:
        """Write the values that sums give: those of the four vectors of a block in turn, for pixels at `targets`."""
        v = block.vectors
        values: list[list[Expression]] = [[] for _ in targets]
        for q, totals in enumerate(sums):
            scale, bias = (B.Bind(v.load(self.arrays[k], block.slot + q * v.lanes)) for k in ("scale", "bias"))
            for done, total, index in zip(values, totals, targets, strict=True):
                if self.to_codes is None:
                    value = B.Bind(v.fma(v.to_float(total.get()), scale, bias))
                    self.epilogue.narrowed(v).store(value, index + q * v.lanes, v.lanes)
                    continue
                integer = B.Bind(self.to_codes.integer(v, total.get(), scale, bias))
                done.append(B.Bind(self.to_codes.words(v, done.pop(), integer)) if q % 2 else integer)
        if self.to_codes is not None:
            for words, index in zip(values, targets, strict=True):
                self.write(block, index, B.Bind(self.to_codes.codes(v, *words)))

    def write(self, block: Block, index: Expression, codes: Expression) -> None:
        """Write the codes of a block's channels for one pixel."""
        block.vectors.store(self.epilogue.out, index, codes, block.vectors.lanes * QUAD)


def _blocks(channels: int, lanes: int, parts: int) -> tuple[int, list[tuple[int, int, int]]]:
    """Whole blocks of channels, and (first channel, lanes, parts) of the narrower ones; the last may overlap.

    Instructions on 128 bits take no less time than those on 256: such blocks are of two parts where that can be.
    """
    full, left = divmod(channels, lanes * QUAD)
    rest = []
    fitting = [n for n in (NARROWEST, 8, 16) if n <= lanes and n * QUAD <= channels]
    while left > 0:
        width = next((n for n in fitting if n * QUAD >= left), fitting[-1])
        taken = min(parts, lanes // width) if width == NARROWEST else 1
        rest.append((min(channels - left, channels - width * QUAD), width * taken, taken))
        left -= width * QUAD
    return full, rest
