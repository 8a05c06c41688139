"""Sparse weights in parts of outputs by slabs of inputs, and how to come by them from steps through pairs of blocks.

A kernel for many rows reads slabs, one for few rows reads pairs. An artifact for any number of rows has both: its file
holds the pairs alone, slabs are made when it is loaded. So this file is part of what deployed programs load: it imports
numpy alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

BLOCK = 16
"""Inputs of a block of a row, and outputs of a vector."""
TOGETHER, PLACE_BITS = 4, 8
"""Steps whose places share a word, and bits of each."""
BLOCK_BITS, BLOCK_SHIFTS = 16, (0, 16, 48)
"""Bits of where a block begins, and where those of three stand: the last at the end, one shift brings them down."""
MOST_INPUTS = 1 << BLOCK_BITS
"""Of a row whose blocks have such beginnings."""
PAIR_ARRAYS = ("weight", "places", "blocks", "first_steps", "outputs")
SLAB_ARRAYS = ("slab_values", "slab_columns", "slab_counts", "slab_order", "slab_begins")


@dataclass(frozen=True)
class Cuts:
    """How a weight is cut; the last part and the last slab may be smaller.

    Attributes:
        outputs, inputs: of the weight.
        part: outputs of a part, a multiple of the lanes where there is more than one.
        slab: inputs of a slab.
    """

    outputs: int
    inputs: int
    part: int
    slab: int

    @property
    def parts(self) -> int:
        """How many there are."""
        return -(-self.outputs // self.part)

    @property
    def slabs(self) -> int:
        """How many there are."""
        return -(-self.inputs // self.slab)


@dataclass(frozen=True)
class Elements:
    """The stored elements of a weight, output after output, in any order of these, and in each input by input.

    Attributes:
        values: [elements], of the weight's dtype.
        outputs, inputs: integers [elements], where they stand.
    """

    values: NDArray[Any]
    outputs: NDArray[Any]
    inputs: NDArray[Any]


@dataclass(frozen=True)
class DerivedSlabs:
    """Slabs that are made from pairs; names of arrays by `PAIR_ARRAYS` and `SLAB_ARRAYS`.

    Attributes:
        pairs: of the arrays they are made from.
        slabs: of the arrays that are made.
        cuts: outputs, inputs, part, slab.
        apart: whether the inputs of a block of the pairs lie as far apart as there are blocks.
    """

    pairs: tuple[str, ...]
    slabs: tuple[str, ...]
    cuts: tuple[int, int, int, int]
    apart: bool

    def named(self, names: Mapping[str, str]) -> DerivedSlabs:
        """The same of arrays that have other names."""
        pairs, slabs = (tuple(names[n] for n in own) for own in (self.pairs, self.slabs))
        return replace(self, pairs=pairs, slabs=slabs)

    def made(self, weights: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The arrays, by name.

        Raises:
            ValueError, KeyError, TypeError, IndexError: the pairs are none of such a weight.
        """
        cuts = Cuts(*self.cuts)
        pairs = dict(zip(PAIR_ARRAYS, (weights[name] for name in self.pairs), strict=True))
        sizes = (
            (cuts.outputs, pairs["outputs"].size),
            (cuts.inputs, MOST_INPUTS),
            (cuts.part, np.inf),
            (cuts.slab, np.inf),
        )
        if not all(type(size) is int and 0 < size <= most for size, most in sizes):
            raise ValueError(f"pairs of {pairs['outputs'].size} outputs make no slabs by {cuts}")
        slabs = pack_slabs(elements_of_pairs(pairs, cuts.inputs, apart=self.apart), cuts)
        return dict(zip(self.slabs, (slabs[key] for key in SLAB_ARRAYS), strict=True))


def elements_of_pairs(pairs: Mapping[str, NDArray[Any]], inputs: int, *, apart: bool) -> Elements:
    """The elements of a weight, [outputs, inputs], in steps through pairs of blocks; see kernels/block_pairs.py."""
    weight = pairs["weight"].reshape(-1, BLOCK)
    places = pairs["places"].view(np.uint8).reshape(-1, BLOCK, TOGETHER).swapaxes(1, 2).reshape(-1, BLOCK)
    begins = (pairs["blocks"][:, None] >> np.array(BLOCK_SHIFTS) & (1 << BLOCK_BITS) - 1).astype(np.int32)
    blocks = np.stack([begins[:, :2], begins[:, 1:]], 1).reshape(-1, 2)
    found = []
    steps = pairs["first_steps"].astype(np.int64) * TOGETHER
    for outputs, first, end in zip(pairs["outputs"].reshape(-1, BLOCK), steps, steps[1:], strict=False):
        lane, step = np.nonzero(weight[first:end].T)
        step += first
        second, within = np.divmod(places[step, lane], BLOCK)
        block = blocks[step, second]
        column = within * np.int32(inputs // BLOCK) + block // BLOCK if apart else block + within
        along = np.argsort(lane * inputs + column)
        found.append((weight[step, lane][along], outputs[lane], column[along]))
    return Elements(*map(np.concatenate, zip(*found, strict=True)))


def pack_slabs(elements: Elements, cuts: Cuts) -> dict[str, NDArray[Any]]:
    """A weight's elements part by part, in these slab by slab, in these output by output, those with few first.

    Outputs with equally many stand together, so that a CPU foresees when an output ends.

    Returns:
        slab_values: [elements], of the weight's dtype; slab_columns: [elements], inputs of their slab; slab_counts:
        [parts, slabs, outputs of the part], how many elements an output has there; slab_order: the same, which output
        of its part it is; slab_begins: int32 [parts * slabs], of their elements.
    """
    slab, column = np.divmod(elements.inputs, cuts.slab)
    run = elements.outputs.astype(np.int64) * cuts.slabs + slab
    lengths = np.bincount(run, minlength=cuts.outputs * cuts.slabs)
    heads, found = np.flatnonzero(np.diff(run, prepend=-1)), np.zeros(lengths.size, np.int64)
    found[run[heads]] = heads
    starts, counts = (a.reshape(cuts.outputs, cuts.slabs) for a in (found, lengths))
    parts = [slice(first, first + cuts.part) for first in range(0, cuts.outputs, cuts.part)]
    orders = [np.argsort(counts[part].T, axis=1, kind="stable") for part in parts]

    def ordered(array: NDArray[np.int64]) -> NDArray[np.int64]:
        taken = [np.take_along_axis(array[p].T, o, 1).reshape(-1) for p, o in zip(parts, orders, strict=True)]
        return np.concatenate(taken)

    taken = ordered(counts)
    begins = np.cumsum(taken) - taken
    along = np.repeat(ordered(starts) - begins, taken) + np.arange(len(slab))
    firsts = np.cumsum([0, *(order.shape[1] for order in orders for _ in range(cuts.slabs))])[:-1]
    values, columns = elements.values[along], column[along]
    if not len(along):  # an all-zero layer: kernels take no empty arrays
        values, columns = (np.zeros(1, np.int64) for _ in range(2))
    return {
        "slab_values": values.astype(elements.values.dtype), "slab_columns": columns.astype(_numbering(cuts.slab)),
        "slab_counts": taken.astype(_numbering(cuts.slab + 1)),
        "slab_order": np.concatenate([o.reshape(-1) for o in orders]).astype(_numbering(cuts.part)),
        "slab_begins": begins[firsts].astype(np.int32),
    }  # fmt: skip


def _numbering(count: int) -> Any:
    """The type of the least unsigned integers that number so many things, or int32."""
    return np.min_scalar_type(max(count - 1, 1)) if count <= 1 << 16 else np.int32
