"""Steps of sparse weights through pairs of blocks of a row, for a kernel that permutes what two registers hold.

Lanes are outputs, a block is as many inputs as there are lanes. A step reads two blocks of a row, any two: each output
takes one of its weights there, zero where it has none left. A vector of outputs needs for every block at least as many
steps as the output with the most weights in it, so outputs with alike many weights share a vector, steps go first to
the blocks that some output has much left in, and blocks are runs of inputs or, where neighbours are kept or dropped
together as the pixels of an image are, inputs far apart.

The order of steps is free: two that share a block stand together, and read three blocks in place of four. Seen as edges
between blocks, steps go in twos with one left over at most, where all blocks hang together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mcc.slabs import BLOCK, BLOCK_SHIFTS, TOGETHER

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, TypeAlias

    from numpy.typing import NDArray

    Step: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[Any]]

NOTHING = -1  # in place of a step's number
TWO_CYCLES, RUN_CYCLES, TURNED_CYCLES = 7, 1, 6  # of two steps, and of making a block (measured on a Zen 4)


@dataclass(frozen=True)
class BlockPairs:
    """A weight in steps.

    Attributes:
        weight: [steps * BLOCK], of the weight's dtype.
        places: int32 [steps / TOGETHER * BLOCK], where the inputs of so many steps lie, in PLACE_BITS bits each, the
            first step's lowest: in the first block of the step or, from BLOCK on, in its second.
        blocks: int64 [steps / 2], where three blocks begin in a row of blocks, in BLOCK_BITS bits from BLOCK_SHIFTS on:
            the first two are those of one step, the last two of the next.
        first_steps: int32 [vectors + 1], of each vector of outputs, in units of TOGETHER.
        outputs: int32 [outputs], which one each lane of each vector has.
        apart: whether the inputs of a block lie as far apart as there are blocks.
    """

    weight: NDArray[Any]
    places: NDArray[np.int32]
    blocks: NDArray[np.int64]
    first_steps: NDArray[np.int32]
    outputs: NDArray[np.int32]
    apart: bool


def pack_pairs(weight: NDArray[Any]) -> BlockPairs:
    """The steps of a weight, [outputs, inputs], outputs a multiple of BLOCK, inputs at most MOST_INPUTS."""
    runs = _packed(weight, apart=False)
    blocks, left = divmod(weight.shape[1], BLOCK)
    if left or blocks < BLOCK:
        return runs
    turned = _packed(weight, apart=True)
    gained = (len(runs.blocks) - len(turned.blocks)) * TWO_CYCLES
    return turned if gained > blocks * (TURNED_CYCLES - RUN_CYCLES) else runs


def _packed(weight: NDArray[Any], *, apart: bool) -> BlockPairs:
    outputs, inputs = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -inputs % BLOCK)))
    if apart:
        padded = padded.reshape(outputs, BLOCK, -1).swapaxes(1, 2).reshape(outputs, -1)
    order = np.argsort((weight != 0).sum(1), kind="stable")
    steps = list(_steps(padded[order].reshape(-1, BLOCK, padded.shape[1])))
    if not steps:  # an all-zero layer has steps of zeros: kernels take no empty arrays
        none, nothing = np.zeros(1, np.int64), np.zeros((1, BLOCK), np.int64)
        steps = [(none, np.zeros((1, 2), np.int64), nothing, nothing.astype(weight.dtype))]
    vector, pairs, places, values = (np.concatenate(arrays) for arrays in zip(*steps, strict=True))
    taken = [_in_twos(np.flatnonzero(vector == v), pairs) for v in range(outputs // BLOCK)]
    which, blocks = (np.concatenate(arrays) for arrays in zip(*taken, strict=True))
    # the shared block is the second of the first step and the first of the second
    shared, second = np.repeat(blocks[:, 1], 2), np.tile([1, 0], len(blocks))
    turned = pairs[which, second] != shared
    kept = which[:, None] != NOTHING
    places = np.where(kept, places[which] ^ BLOCK * turned[:, None], 0).astype(np.uint8)
    words = np.ascontiguousarray(places.reshape(-1, TOGETHER, BLOCK).swapaxes(1, 2)).view("<i4")
    return BlockPairs(
        np.where(kept, values[which], 0).astype(weight.dtype).reshape(-1), words.reshape(-1),
        (blocks * BLOCK << np.array(BLOCK_SHIFTS)).sum(1),
        np.cumsum([0, *(len(numbers) // TOGETHER for numbers, _ in taken)], dtype=np.int32), order.astype(np.int32),
        apart,
    )  # fmt: skip


def _steps(weight: NDArray[Any]) -> Iterator[Step]:
    """Step after step of the vectors, [vectors, lanes, inputs], that have one: numbers, pairs, places and weights."""
    vectors, lanes, _ = weight.shape
    kept = weight != 0
    left = kept.reshape(vectors, lanes, -1, BLOCK).sum(3)
    order = np.argsort(~kept, axis=2, kind="stable")[:, :, : max(1, int(kept.sum(2).max(initial=0)))]
    values = np.take_along_axis(weight, order, 2)
    following = left.cumsum(2) - left  # where in these an output's next weight in a block stands
    lane = np.arange(lanes)
    while len(active := np.flatnonzero(left.any((1, 2)))):
        row = np.arange(len(active))[:, None]
        gain = left[active].astype(np.float32) ** 2
        first = gain.sum(1).argmax(1)
        of_first = gain[row, lane, first[:, None]]
        second = np.maximum(gain - of_first[:, :, None], 0).sum(1).argmax(1)
        in_second = gain[row, lane, second[:, None]] > of_first
        block = np.where(in_second, second[:, None], first[:, None])
        at = active[:, None], lane, block
        taken = left[at] > 0
        which = active[:, None], lane, np.where(taken, following[at], 0)
        places = np.where(taken, order[which] % BLOCK + BLOCK * in_second, 0)
        yield active, np.stack([first, second], 1), places, np.where(taken, values[which], 0).astype(weight.dtype)
        left[at] -= taken
        following[at] += taken


def _in_twos(steps: NDArray[np.int64], pairs: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The steps of a vector in twos that share a block, and of each two the three blocks, the shared one between.

    Along a tree through the blocks, from its leaves on, a block puts the steps that it was given in twos; one left over
    takes the step to the block's parent, which else is the parent's.
    """
    touching: dict[int, list[int]] = {}
    for step in steps.tolist():
        for block in set(pairs[step].tolist()):
            touching.setdefault(block, []).append(step)
    order, to_parent = _tree(touching, pairs)
    own: dict[int, list[int]] = {block: [] for block in order}
    for step in set(steps.tolist()).difference(to_parent.values()):
        own[int(pairs[step, 0])].append(step)
    twos: list[tuple[int, int]] = []
    blocks: list[tuple[int, int, int]] = []
    for block in reversed(order):
        if block in to_parent:
            step = to_parent[block]
            own[block if len(own[block]) % 2 else _other(pairs, step, block)].append(step)
        given = own[block] + [NOTHING] * (len(own[block]) % 2)
        for first, last in zip(given[::2], given[1::2], strict=True):
            twos.append((first, last))
            blocks.append((_other(pairs, first, block), block, _other(pairs, last, block)))
    while len(twos) % (TOGETHER // 2):
        twos.append((NOTHING, NOTHING))
        blocks.append((0, 0, 0))
    between = np.array(blocks, np.int64).reshape(-1, 3)
    along = np.argsort(between[:, 1], kind="stable")  # as memory lies: many rows of x are not in the nearest cache
    return np.array(twos, np.int64).reshape(-1, 2)[along].reshape(-1), between[along]


def _tree(touching: dict[int, list[int]], pairs: NDArray[np.int64]) -> tuple[list[int], dict[int, int]]:
    """All blocks, each behind the one it was reached from, and by which step it was, but for roots."""
    order: list[int] = []
    to_parent: dict[int, int] = {}
    for root in touching:
        reached = [] if root in to_parent else [root]
        for block in reached:
            for step in touching[block]:
                other = _other(pairs, step, block)
                if other != root and other not in to_parent:
                    to_parent[other] = step
                    reached.append(other)
        order += reached
    return order, to_parent


def _other(pairs: NDArray[np.int64], step: int, block: int) -> int:
    return block if step == NOTHING else int(pairs[step].sum()) - block
