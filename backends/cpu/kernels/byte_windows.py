"""Products of a row's codes and weights of which few are not zero, by permuting bytes.

Lanes are outputs, four weights of each in a register. A step has a window of 64 codes, one register of a row: a
permutation brings to every byte of the register of weights the code that it multiplies, and one `dot4` adds 64
products. What is permuted, by which places and with which weights is the same for many rows. An output takes its next
four weights of the window, zeros where it has fewer, and windows move to the code that some output waits for; they
begin at multiples of half their size, so that most do not straddle a cache line.

Where weights stand in blocks of as many outputs as there are lanes, the places of all lanes are the same: a step stores
them once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.microkernel import flat
from mcc.backends.kernel import SparseArrays

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from mcc.backends.cpu.microkernel import Expression, Register, Vectors
    from mcc.backends.kernel import NofMArrays, StoredWeight
    from mcc.target import Target

WINDOW = 64  # codes
APART = 32  # places that windows begin at
QUAD = 4  # weights of an output in a step
CHAINS = 4  # sums in flight that hide the latency of `dot4`
COLUMN = (16, 1)  # the block that has an output in every lane
BLOCKS = ((1, 1), COLUMN)
BEYOND = np.iinfo(np.int32).max
PERMUTE = "llvm.x86.avx512.permvar.qi.512"


def stored_apart(sparse: SparseArrays | NofMArrays | None) -> bool:
    """Whether a weight stores single elements, or columns of as many as there are lanes, without their zeros."""
    return isinstance(sparse, SparseArrays) and sparse.block in BLOCKS


def refusal(weight: StoredWeight, target: Target) -> str | None:
    """Why no codes are permuted for a weight, or None."""
    if not stored_apart(weight.sparse):
        return "the weight is not stored by single elements or columns of 16"
    if weight.scale is None or weight.grouped:
        return "the weight is not int8 with a scale for each output"
    return None if target.permutes_bytes else f"{target} permutes no bytes"


def windows(
    runs: Sequence[tuple[int, NDArray[np.int8]]], sparse: SparseArrays | NofMArrays | None
) -> dict[str, NDArray[Any]]:
    """The steps of vectors of outputs, one vector's behind the other's.

    Args:
        runs: of codes that outputs read: where a run begins, from where a row does, and the weights of its codes,
            [vectors, lanes, codes], at least 64 of them.
        sparse: how the weight is stored.

    Returns:
        weight: int8 [steps, lanes, 4]; places: uint8 of that shape, codes within the step's window, or [steps, 4] for
        columns; windows: int32 [steps], the first code of each; first_steps: int32 [vectors + 1].
    """
    assert isinstance(sparse, SparseArrays)
    columns = sparse.block == COLUMN
    parts = []
    for begin, weights in runs:
        kept = weights != 0
        kept = np.broadcast_to(kept.any(1, keepdims=True), kept.shape) if columns else kept
        parts += [(vector, first + begin, *step) for vector, first, *step in _steps(weights, kept)]
    vectors, lanes, _ = runs[0][1].shape
    if not parts:  # an all-zero layer has a step of zeros: kernels take no empty arrays
        none, nothing = np.zeros(1, np.int64), np.zeros((1, lanes, QUAD))
        parts.append((none, none, nothing.astype(np.uint8), nothing.astype(np.int8)))
    vector, firsts, places, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.argsort(vector, kind="stable")
    ends = np.bincount(vector, minlength=vectors).cumsum()
    places = places[:, :1] if columns else places
    return {
        "weight": values[order].reshape(-1), "places": places[order].reshape(-1),
        "windows": firsts[order].astype(np.int32), "first_steps": np.array([0, *ends], np.int32),
    }  # fmt: skip


def _steps(
    weights: NDArray[np.int8], kept: NDArray[np.bool_]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8], NDArray[np.int8]]]:
    """Step after step over one run, of all vectors that have one: which these are, and window, places and weights."""
    vectors, lanes, codes = weights.shape
    order = np.argsort(~kept, axis=2, kind="stable")[:, :, : int(kept.sum(2).max(initial=0))]
    room = ((0, 0), (0, 0), (0, QUAD))
    columns = np.pad(np.where(np.take_along_axis(kept, order, 2), order, BEYOND), room, constant_values=BEYOND)
    values = np.pad(np.take_along_axis(weights, order, 2), room)
    taken, lane = np.zeros((vectors, lanes, 1), np.int64), np.arange(lanes)[:, None]
    while True:
        waiting = np.take_along_axis(columns, taken, 2)[:, :, 0].min(1)
        left = np.flatnonzero(waiting < codes)
        if not len(left):
            return
        first = np.minimum(waiting[left] // APART * APART, codes - WINDOW)
        at = left[:, None, None], lane, taken[left] + np.arange(QUAD)
        read = columns[at] - first[:, None, None]
        inside = read < WINDOW
        places, chosen = np.where(inside, read, 0), np.where(inside, values[at], 0)
        yield left, first, places.astype(np.uint8), chosen.astype(np.int8)
        taken[left] += inside.sum(2, keepdims=True)


def add_windows(
    v: Vectors,
    arrays: Mapping[str, Expression],
    vector: Expression,
    source: tuple[Expression, Sequence[Expression]],
    sums: Sequence[Register],
) -> None:
    """Add to the sums of a few rows, for vector number `vector` of outputs, the products of all steps.

    Args:
        v: of the target.
        arrays: as `windows` gave them.
        vector: of outputs.
        source: codes, and where each row begins.
        sums: a vector of int32 for each row.
    """
    codes, rows = source
    chains = [list(sums), *v.registers(max(1, CHAINS // len(sums)) - 1, len(sums), "int32")]
    for chain in chains[1:]:
        for register in chain:
            register.set(v.constant(0, "int32"))
    begin = B.Bind(arrays["first_steps"][vector])
    count = B.Bind(arrays["first_steps"][vector + 1] - begin)
    whole = B.Bind(tirx.floordiv(count, len(chains)))
    size = v.lanes * QUAD

    def step(number: Expression, chain: Sequence[Register]) -> None:
        at = B.Bind(T.cast(number, "int64"))
        window = B.Bind(T.cast(arrays["windows"][at], "int64"))
        words = T.reinterpret(f"int32x{v.lanes}", B.Bind(v.load(arrays["weight"], at * size, size)))
        order = T.reinterpret(f"int8x{size}", B.Bind(_places(v, arrays, at)))
        for row, register in zip(rows, chain, strict=True):
            read = T.reinterpret(f"int8x{size}", v.load(codes, row + window, size))
            chosen = tirx.call_llvm_pure_intrin(f"int8x{size}", PERMUTE, read, order)
            register.set(v.dot4(register.get(), T.reinterpret(f"int32x{v.lanes}", chosen), words, bounded=True))

    with B.serial(0, whole) as s:
        for c, chain in enumerate(chains):
            step(begin + s * len(chains) + c, chain)
    if len(chains) > 1:
        with B.serial(0, count - whole * len(chains)) as s:
            step(begin + whole * len(chains) + s, chains[0])
    for total, *others in zip(*chains, strict=True):
        for other in others:
            total.set(total.get() + other.get())


def _places(v: Vectors, arrays: Mapping[str, Expression], step: Expression) -> Expression:
    """The places of a step, for every lane."""
    stored, size = arrays["places"], v.lanes * QUAD
    if int(stored.shape[0]) == int(arrays["weight"].shape[0]):
        return v.load(stored, step * size, size)
    return v.splat(flat(stored, stored.shape[0] // QUAD, "int32")[step])
