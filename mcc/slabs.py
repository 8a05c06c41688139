"""Sparse weights in parts of outputs by slabs of inputs, and the forms that stand beside them.

A kernel for many rows reads slabs; one for few rows reads steps through pairs of blocks, groups of outputs, or blocks
of weights. An artifact for any number of rows has two forms of a weight, of which its file holds one: slabs, which are
the smallest, or pairs, which take long to find. The other is made when it is loaded, so this file is part of what
deployed programs load: it imports numpy alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

BLOCK = 16
"""Inputs of a block of a row, and outputs of a vector."""
TOGETHER, PLACE_BITS = 4, 8
"""Steps whose places share a word, and bits of each."""
BLOCK_BITS, BLOCK_SHIFTS = 16, (0, 16, 48)
"""Bits of where a block begins, and where those of three stand: the last at the end, one shift brings them down."""
MOST_INPUTS = 1 << BLOCK_BITS
"""Of a row whose blocks have such beginnings."""
GROUP = 16
"""Outputs whose elements lie side by side."""
PAIR_ARRAYS = ("weight", "places", "blocks", "first_steps", "outputs")
SLAB_ARRAYS = ("slab_values", "slab_columns", "slab_counts", "slab_order", "slab_begins")
ARRAYS = {
    "pairs": PAIR_ARRAYS, "pairs apart": PAIR_ARRAYS, "slabs": SLAB_ARRAYS,
    "groups": ("values", "columns", "group_starts", "outputs"), "blocks": ("values", "columns", "starts"),
}  # fmt: skip
"""Of each form; of pairs, inputs of a block lie side by side or, apart, as far from each other as there are blocks."""


@dataclass(frozen=True)
class Cuts:
    """How a weight is cut; the last part and the last slab may be smaller. An element is a block of weights, or one.

    Attributes:
        outputs, inputs: of the weight, in elements.
        part: outputs of a part; where there is more than one, a multiple of the lanes in weights.
        slab: inputs of a slab.
        block: outputs and inputs of an element.
    """

    outputs: int
    inputs: int
    part: int
    slab: int
    block: tuple[int, int] = (1, 1)

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
        values: [elements], or [elements, outputs, inputs] of blocks; of the weight's dtype.
        outputs, inputs: integers [elements], where they stand.
    """

    values: NDArray[Any]
    outputs: NDArray[Any]
    inputs: NDArray[Any]


@dataclass(frozen=True)
class Derived:
    """A form of a sparse weight that is made of another one.

    Attributes:
        source: the other.
        read: names of its arrays, as they follow each other in ARRAYS.
        form: that is made, slabs, groups or blocks.
        makes: names of its arrays.
        cuts: of the weight.
    """

    source: str
    read: tuple[str, ...]
    form: str
    makes: tuple[str, ...]
    cuts: Cuts

    @classmethod
    def of(cls, source: str, form: str, cuts: Cuts) -> Derived:
        """Of arrays that have the names they have in ARRAYS."""
        return cls(source, ARRAYS[source], form, ARRAYS[form], cuts)

    def named(self, names: Mapping[str, str]) -> Derived:
        """The same of arrays that have other names."""
        read, makes = (tuple(names[n] for n in own) for own in (self.read, self.makes))
        return replace(self, read=read, makes=makes)

    def made(self, weights: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The arrays, by name.

        Raises:
            ValueError, KeyError, TypeError, IndexError: there is no such form, or the arrays are none of such a weight.
        """
        source, cuts = dict(zip(ARRAYS[self.source], (weights[n] for n in self.read), strict=True)), self.cuts
        sizes = cuts.outputs, cuts.inputs, cuts.part, cuts.slab, *cuts.block
        if len(cuts.block) != 2 or not all(type(size) is int and size > 0 for size in sizes) or cuts.slab > cuts.inputs:
            raise ValueError(f"no weight has {cuts}")
        elements = _READ[self.source](source, cuts)
        for found, most in ((elements.outputs, cuts.outputs), (elements.inputs, cuts.inputs)):
            if len(found) and int(found.max()) >= most:
                raise ValueError(f"{self.source} have an element {int(found.max())} of {most}")
        made = PACKED[self.form](elements, cuts)
        return dict(zip(self.makes, (made[key] for key in ARRAYS[self.form]), strict=True))


def elements_of_pairs(pairs: Mapping[str, NDArray[Any]], cuts: Cuts, *, apart: bool) -> Elements:
    """The elements of a weight in steps through pairs of blocks; see kernels/block_pairs.py."""
    weight, inputs = pairs["weight"].reshape(-1, BLOCK), cuts.inputs
    if cuts.block != (1, 1) or inputs > MOST_INPUTS or cuts.outputs > pairs["outputs"].size:
        raise ValueError(f"pairs of {pairs['outputs'].size} outputs are none of {cuts}")
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


def elements_of_slabs(slabs: Mapping[str, NDArray[Any]], cuts: Cuts) -> Elements:
    """The elements of a weight that `pack_slabs` packed."""
    counts = slabs["slab_counts"]
    if counts.size != cuts.outputs * cuts.slabs:
        raise ValueError(f"{counts.size} runs of elements are none of {cuts}")
    number = np.arange(cuts.outputs * cuts.slabs)
    part, of_part = np.divmod(number, cuts.part * cuts.slabs)
    slab = of_part // np.minimum(cuts.outputs - part * cuts.part, cuts.part)
    outputs = np.repeat(part * cuts.part + slabs["slab_order"], counts)
    inputs = slabs["slab_columns"][: len(outputs)] + np.repeat(slab * cuts.slab, counts)
    along = np.argsort(outputs.astype(_numbering(cuts.outputs)), kind="stable")  # of 16 bits it takes a tenth as long
    return Elements(slabs["slab_values"].reshape(-1, *cuts.block)[along], outputs[along], inputs[along])


def pack_slabs(elements: Elements, cuts: Cuts) -> dict[str, NDArray[Any]]:
    """A weight's elements part by part, in these slab by slab, in these output by output, those with few first.

    Outputs with equally many stand together, so that a CPU foresees when an output ends.

    Returns:
        slab_values: [elements, weights of each], of the weight's dtype; slab_columns: [elements], inputs of their slab;
        slab_counts: [parts, slabs, outputs of the part], how many elements an output has there; slab_order: the same,
        which output of its part it is; slab_begins: int32 [parts * slabs], of their elements.
    """
    slab, column = np.divmod(elements.inputs.astype(np.int32, copy=False), cuts.slab)
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
    values, columns = elements.values[along], column[along].astype(_numbering(cuts.slab))
    if not len(along):  # an all-zero layer: kernels take no empty arrays
        values, columns = np.zeros((1, *values.shape[1:])), np.zeros(1, columns.dtype)
    return {
        "slab_values": values.astype(elements.values.dtype).reshape(-1), "slab_columns": columns,
        "slab_counts": taken.astype(_numbering(cuts.slab + 1)),
        "slab_order": np.concatenate([o.reshape(-1) for o in orders]).astype(_numbering(cuts.part)),
        "slab_begins": begins[firsts].astype(np.int32),
    }  # fmt: skip


def pack_groups(elements: Elements, cuts: Cuts) -> dict[str, NDArray[Any]]:
    """A weight's elements in groups of outputs that have alike many, those with most first (SELL).

    Returns:
        values: [steps, GROUP], of the weight's dtype: step s of a group has the s-th element of each of its outputs,
        zero where an output has fewer; columns: [steps, GROUP] uint16 or int32; group_starts: int32 [groups + 1], in
        steps; outputs: int32 [groups * GROUP], which output each lane is, beyond the end of all outputs in some lanes.
    """
    counts = np.bincount(elements.outputs, minlength=-(-cuts.outputs // GROUP) * GROUP)
    order = np.argsort(-counts, kind="stable").astype(np.int32)
    starts = np.cumsum([0, *counts[order[::GROUP]]]).astype(np.int32)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    group, lane = np.divmod(rank[elements.outputs], GROUP)
    places = (starts[group] + _before(elements.outputs)) * GROUP + lane
    values, columns = _spread(elements, cuts, places, max(1, int(starts[-1])) * GROUP)
    return {"values": values, "columns": columns, "group_starts": starts, "outputs": order}


def at_once(block: tuple[int, int]) -> int:
    """Blocks whose weights a step of one row reads."""
    return max(1, GROUP // (block[0] * block[1]))


def pack_blocks(elements: Elements, cuts: Cuts) -> dict[str, NDArray[Any]]:
    """A weight's blocks row of blocks by row of blocks, in whole steps: filled up with blocks of zeros.

    Returns:
        values: [blocks, height, width], of the weight's dtype; columns: [blocks] uint16 or int32; starts: int32 [rows
        of blocks + 1], in blocks.
    """
    together = at_once(cuts.block)
    counts = np.bincount(elements.outputs, minlength=cuts.outputs)
    starts = np.cumsum([0, *(-(-counts // together) * together)]).astype(np.int32)
    places = starts[elements.outputs] + _before(elements.outputs)
    values, columns = _spread(elements, cuts, places, max(together, int(starts[-1])))
    return {"values": values, "columns": columns, "starts": starts}


def _before(outputs: NDArray[Any]) -> NDArray[np.int64]:
    """How many elements of its output stand before each element."""
    heads = np.flatnonzero(np.diff(outputs.astype(np.int64), prepend=-1))
    return np.arange(len(outputs)) - np.repeat(heads, np.diff(heads, append=len(outputs)))


def _spread(elements: Elements, cuts: Cuts, places: NDArray[Any], size: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Values and columns at places of arrays for so many elements, zeros elsewhere."""
    values = np.zeros((size, *cuts.block), elements.values.dtype)
    columns: NDArray[Any] = np.zeros(size, np.uint16 if cuts.inputs <= 1 << 16 else np.int32)
    values[places], columns[places] = elements.values.reshape(-1, *cuts.block), elements.inputs
    return values.reshape(-1), columns


def _numbering(count: int) -> Any:
    """The type of the least unsigned integers that number so many things, or int32."""
    return np.min_scalar_type(max(count - 1, 1)) if count <= 1 << 16 else np.int32


_READ: dict[str, Callable[[Mapping[str, NDArray[Any]], Cuts], Elements]] = {
    "pairs": partial(elements_of_pairs, apart=False), "pairs apart": partial(elements_of_pairs, apart=True),
    "slabs": elements_of_slabs,
}  # fmt: skip
PACKED = {"slabs": pack_slabs, "groups": pack_groups, "blocks": pack_blocks}
"""What packs elements in each form that can be made of another."""
