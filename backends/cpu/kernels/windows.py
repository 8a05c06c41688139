"""Steps of sparse weights through windows of a row, for kernels that permute what a register holds.

Lanes are outputs. A step has a window, some neighbouring inputs of a row: each output takes its next weights whose
inputs lie within it, zeros where it has fewer, and windows move to the input that some output waits for. They begin at
multiples of a part of their size, so that most do not straddle a cache line.

Where weights stand in blocks of 16 outputs, a multiple of the lanes, the places of all lanes are the same: a step
stores them once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx

from mcc.backends.kernel import SparseArrays

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from mcc.backends.cpu.microkernel import Expression, Register
    from mcc.backends.kernel import NofMArrays

COLUMN = (16, 1)  # the block that has an output in every lane, of one vector or more
BEYOND = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Steps:
    """What a step is.

    Attributes:
        window: inputs.
        apart: windows begin at multiples of it.
        together: weights that each output takes.
    """

    window: int
    apart: int
    together: int

    def pack(
        self, runs: Sequence[tuple[int, NDArray[Any]]], sparse: SparseArrays | NofMArrays | None
    ) -> dict[str, NDArray[Any]]:
        """The steps of vectors of outputs, one vector's behind the other's.

        Args:
            runs: of inputs that outputs read: where a run begins, from where a row does, and its weights, [vectors,
                lanes, inputs], a window of them at least.
            sparse: how the weight is stored.

        Returns:
            weight: [steps, lanes, together], of the weights' dtype; places: uint8 of that shape, inputs within the
            step's window, or [steps, together] for columns; windows: int32 [steps], the first input of each;
            first_steps: int32 [vectors + 1].
        """
        assert isinstance(sparse, SparseArrays)
        columns = sparse.block == COLUMN
        parts = []
        for begin, weights in runs:
            kept = weights != 0
            kept = np.broadcast_to(kept.any(1, keepdims=True), kept.shape) if columns else kept
            parts += [(vector, first + begin, *step) for vector, first, *step in self._run(weights, kept)]
        vectors, lanes, _ = runs[0][1].shape
        if not parts:  # an all-zero layer has a step of zeros: kernels take no empty arrays
            none, nothing = np.zeros(1, np.int64), np.zeros((1, lanes, self.together))
            parts.append((none, none, nothing.astype(np.uint8), nothing.astype(runs[0][1].dtype)))
        vector, firsts, places, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.argsort(vector, kind="stable")
        ends = np.bincount(vector, minlength=vectors).cumsum()
        places = places[:, :1] if columns else places
        return {
            "weight": values[order].reshape(-1), "places": places[order].reshape(-1),
            "windows": firsts[order].astype(np.int32), "first_steps": np.array([0, *ends], np.int32),
        }  # fmt: skip

    @staticmethod
    def emit(
        arrays: Mapping[str, Expression],
        vector: Expression,
        chains: Sequence[Sequence[Register]],
        step: Callable[[Expression, Sequence[Register]], None],
    ) -> None:
        """Call `step` with the number of each step of a vector of outputs and one of the chains of sums in turn.

        The sums of all chains end up in the first.
        """
        begin = B.Bind(arrays["first_steps"][vector])
        count = B.Bind(arrays["first_steps"][vector + 1] - begin)
        whole = B.Bind(tirx.floordiv(count, len(chains)))
        with B.serial(0, whole) as s:
            for c, chain in enumerate(chains):
                step(begin + s * len(chains) + c, chain)
        if len(chains) > 1:
            with B.serial(0, count - whole * len(chains)) as s:
                step(begin + whole * len(chains) + s, chains[0])
        for total, *others in zip(*chains, strict=True):
            for other in others:
                total.set(total.get() + other.get())

    def _run(
        self, weights: NDArray[Any], kept: NDArray[np.bool_]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8], NDArray[Any]]]:
        """Step after step over a run, of all vectors that have one: which these are, and window, places and weights."""
        _, lanes, inputs = weights.shape
        order = np.argsort(~kept, axis=2, kind="stable")[:, :, : int(kept.sum(2).max(initial=0))]
        room = ((0, 0), (0, 0), (0, self.together))
        columns = np.pad(np.where(np.take_along_axis(kept, order, 2), order, BEYOND), room, constant_values=BEYOND)
        values = np.pad(np.take_along_axis(weights, order, 2), room)
        taken, lane = np.zeros((len(weights), lanes, 1), np.int64), np.arange(lanes)[:, None]
        while True:
            waiting = np.take_along_axis(columns, taken, 2)[:, :, 0].min(1)
            left = np.flatnonzero(waiting < inputs)
            if not len(left):
                return
            first = np.minimum(waiting[left] // self.apart * self.apart, inputs - self.window)
            at = left[:, None, None], lane, taken[left] + np.arange(self.together)
            read = columns[at] - first[:, None, None]
            inside = read < self.window
            places, chosen = np.where(inside, read, 0), np.where(inside, values[at], 0)
            yield left, first, places.astype(np.uint8), chosen.astype(weights.dtype)
            taken[left] += inside.sum(2, keepdims=True)
