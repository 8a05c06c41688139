"""Sparse weights in parts of outputs by slabs of inputs, and how to come by them from what kernels for few rows read.

A kernel for many rows reads slabs; one for few rows reads steps through pairs of blocks, groups of outputs, or blocks
of weights. An artifact for any number of rows has two forms of a weight: its file holds the one for few rows alone,
slabs are made when it is loaded. So this file is part of what deployed programs load: it imports numpy alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

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
GROUP_ARRAYS = ("values", "columns", "group_starts", "outputs")
BLOCK_ARRAYS = ("values", "columns", "starts")
SLAB_ARRAYS = ("slab_values", "slab_columns", "slab_counts", "slab_order", "slab_begins")


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
class DerivedSlabs:
    """Slabs that are made from another form of their weight.

    Attributes:
        form: the other, a key of FORMS.
        read: names of its arrays, as they follow each other there.
        slabs: names of the arrays that are made, as those of SLAB_ARRAYS.
        cuts: of the weight.
    """

    form: str
    read: tuple[str, ...]
    slabs: tuple[str, ...]
    cuts: Cuts

    def named(self, names: Mapping[str, str]) -> DerivedSlabs:
        """The same of arrays that have other names."""
        read, slabs = (tuple(names[n] for n in own) for own in (self.read, self.slabs))
        return replace(self, read=read, slabs=slabs)

    def made(self, weights: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The arrays, by name.

        Raises:
            ValueError, KeyError, TypeError, IndexError: there is no such form, or the arrays are none of such a weight.
        """
        form, cuts = FORMS[self.form], self.cuts
        arrays = dict(zip(form.arrays, (weights[name] for name in self.read), strict=True))
        outputs = form.outputs(arrays)
        sizes = (cuts.outputs, outputs), (cuts.inputs, form.most_inputs), (cuts.slab, cuts.inputs)
        free = ((size, np.inf) for size in (cuts.part, *cuts.block))
        whole = len(cuts.block) == 2 and all(type(size) is int and 0 < size <= most for size, most in (*sizes, *free))
        if not whole or (self.form != "blocks" and cuts.block != (1, 1)):
            raise ValueError(f"{self.form} of {outputs} outputs make no slabs by {cuts}")
        elements = form.elements(arrays, cuts)
        if len(elements.inputs) and int(elements.inputs.max()) >= cuts.inputs:
            raise ValueError(f"{self.form} with input {int(elements.inputs.max())} make no slabs by {cuts}")
        slabs = pack_slabs(elements, cuts)
        return dict(zip(self.slabs, (slabs[key] for key in SLAB_ARRAYS), strict=True))


def elements_of_pairs(pairs: Mapping[str, NDArray[Any]], cuts: Cuts, *, apart: bool) -> Elements:
    """The elements of a weight in steps through pairs of blocks; see kernels/block_pairs.py."""
    weight, inputs = pairs["weight"].reshape(-1, BLOCK), cuts.inputs
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


def elements_of_groups(groups: Mapping[str, NDArray[Any]], cuts: Cuts) -> Elements:
    """The elements of a weight in groups of outputs; see kernels/sparse.py."""
    del cuts
    values, columns = (groups[key].reshape(-1, GROUP) for key in ("values", "columns"))
    found = []
    starts = groups["group_starts"]
    for outputs, first, end in zip(groups["outputs"].reshape(-1, GROUP), starts, starts[1:], strict=False):
        lane, step = np.nonzero(values[first:end].T)
        found.append((values[first:end][step, lane], outputs[lane], columns[first:end][step, lane]))
    return Elements(*map(np.concatenate, zip(*found, strict=True)))


def elements_of_blocks(blocks: Mapping[str, NDArray[Any]], cuts: Cuts) -> Elements:
    """The blocks of a weight in rows of these, some filled up with blocks of zeros; see kernels/sparse_blocks.py."""
    values, counts = blocks["values"].reshape(-1, *cuts.block), np.diff(blocks["starts"])
    kept = np.flatnonzero(values[: counts.sum()].any((1, 2)))
    return Elements(values[kept], np.repeat(np.arange(len(counts)), counts)[kept], blocks["columns"][kept])


class _Form(NamedTuple):
    """A form of a sparse weight that slabs are made from: its arrays, most inputs, number of outputs, and elements."""

    arrays: tuple[str, ...]
    most_inputs: int
    outputs: Callable[[Mapping[str, NDArray[Any]]], int]
    elements: Callable[[Mapping[str, NDArray[Any]], Cuts], Elements]


def _ordered(arrays: Mapping[str, NDArray[Any]]) -> int:
    return arrays["outputs"].size


FORMS = {
    "pairs": _Form(PAIR_ARRAYS, MOST_INPUTS, _ordered, partial(elements_of_pairs, apart=False)),
    "pairs apart": _Form(PAIR_ARRAYS, MOST_INPUTS, _ordered, partial(elements_of_pairs, apart=True)),
    "groups": _Form(GROUP_ARRAYS, 1 << 31, _ordered, elements_of_groups),
    "blocks": _Form(BLOCK_ARRAYS, 1 << 31, lambda arrays: arrays["starts"].size - 1, elements_of_blocks),
}
"""Of pairs, inputs of a block lie side by side or, apart, as far from each other as there are blocks."""


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


def _numbering(count: int) -> Any:
    """The type of the least unsigned integers that number so many things, or int32."""
    return np.min_scalar_type(max(count - 1, 1)) if count <= 1 << 16 else np.int32
