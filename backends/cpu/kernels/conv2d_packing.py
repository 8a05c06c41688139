"""Which outputs a convolution with channels last computes together, and its weights in that order; see conv2d.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mcc.backends.cpu.epilogue import channel_vectors
from mcc.backends.cpu.kernels.convolution_body import ConvolutionBody

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mcc.backends.cpu.kernels.conv_shape import ConvShape
    from mcc.backends.cpu.kernels.tiles import TileShape
    from mcc.backends.cpu.microkernel import Expression, Vectors
    from mcc.backends.kernel import Region


class PackedConvolution(ConvolutionBody):
    """What is known when the kernel is built.

    Attributes:
        passes: the groups that are computed together.
        outputs: of a pass.
        vectors: that they fill; `tile.vectors` of them are a block, of which `full` are whole and `blocks` there are.
        depth: words of the source that a lane of sums adds up, for each tap of the window.
        rows, columns: of output pixels in a tile.
    """

    word: ClassVar[int]  # source channels that one broadcast holds

    def __init__(self, region: Region, vectors: Vectors, tile: TileShape) -> None:
        super().__init__(region, vectors)
        self.shape = self.as_computed()
        self.tile = tile
        self.passes = self.shape.passes(vectors.lanes)
        self.outputs = self.passes.joined * self.shape.group_outputs
        self.vectors = -(-self.outputs // vectors.lanes)
        self.full, self.tail = divmod(self.vectors, tile.vectors)
        self.blocks = self.full + (1 if self.tail else 0)
        self.depth = self.words_of_a_lane()
        self.columns, self.rows = self.tile_size()
        self.packed: dict[str, NDArray[Any]] = self.pack_weight() | self._pack_vectors()

    def as_computed(self) -> ConvShape:
        """The sizes of the same convolution as its loops see it."""
        return self.whole.upright()

    def tile_size(self) -> tuple[int, int]:
        """Columns and rows of output pixels in a tile."""
        height, width = self.shape.result
        if not isinstance(width, int):
            return self.tile.rows, 1
        rows = max(self.tile.rows // width, 1)
        return min(self.tile.rows, width), min(rows, height) if isinstance(height, int) else rows

    def words_of_a_lane(self) -> int:
        """Words of the source that a lane of sums adds up, for each tap of the window."""
        return -(-self.passes.joined * self.shape.group_inputs // self.word)

    @property
    def whole_words(self) -> bool:
        """Whether every pass begins and ends with a word of the source."""
        inputs = self.shape.group_inputs
        begins = (self.passes.first(p) * inputs for p in range(self.passes.count))
        return not any(n % self.word for n in (self.passes.joined * inputs, *begins))

    @property
    def pixel_words(self) -> int:
        """Words of a pixel: where groups are copied to begin with one, of all passes."""
        return self.shape.inputs // self.word if self.whole_words else self.passes.count * self.depth

    def first_word(self, number: Expression) -> Expression:
        """Where a pass begins in a pixel."""
        if not self.whole_words:
            return number * self.depth
        return self.passes.first(number) * self.shape.group_inputs // self.word

    def _lanes(self) -> NDArray[np.int64]:
        """Which output of a pass each lane is, [vectors, lanes]; beyond a pass smaller than a vector, the last."""
        starts = np.minimum(np.arange(self.vectors) * self.v.lanes, max(self.outputs - self.v.lanes, 0))
        return np.minimum(starts[:, None] + np.arange(self.v.lanes), self.outputs - 1)

    def lane_words(self) -> NDArray[Any]:
        """The weights that every lane multiplies, [pass, vector, lane, depth, word, kernel row, kernel column]."""
        weight = self.passes.joined_weight(self.plain_weight())
        room = np.zeros((*weight.shape[:2], self.depth * self.word, *self.shape.kernel), weight.dtype)
        room[:, :, : weight.shape[2]] = weight
        return room.reshape(*weight.shape[:2], self.depth, self.word, *self.shape.kernel)[:, self._lanes()]

    def plain_weight(self) -> NDArray[Any]:
        """[out, in / groups, kernel row, kernel column]."""
        weight = self.region.weight.decoded()
        return weight.reshape(*weight.shape[:2], *self.shape.kernel)

    def pack_weight(self) -> dict[str, NDArray[Any]]:
        """The array "weight", [pass][block][kernel row][kernel column][depth][vector][lane][word]."""
        ordered = self.lane_words().transpose(0, 1, 5, 6, 3, 2, 4)  # [pass, vector, row, column, depth, lane, word]
        step = self.tile.vectors
        parts = [
            np.moveaxis(ordered[p, start : start + step], 0, 3).reshape(-1)
            for p in range(self.passes.count)
            for start in range(0, self.vectors, step)
        ]
        return {"weight": np.concatenate(parts)}

    def _pack_vectors(self) -> dict[str, NDArray[Any]]:
        """Per-channel arrays, one value a lane."""
        channels = self.shape.group_outputs
        firsts = np.array([self.passes.first(p) * channels for p in range(self.passes.count)])
        outputs = (firsts[:, None, None] + self._lanes()).reshape(-1)
        return {key: values[outputs] for key, values in self.channel_arrays().items()}

    def channel_arrays(self) -> dict[str, NDArray[Any]]:
        """The same, one value a channel."""
        return dict(channel_vectors(self.region))
