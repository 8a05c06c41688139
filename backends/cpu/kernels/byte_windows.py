"""Products of a row's codes and weights of which few are not zero, by permuting bytes.

Lanes are outputs. A step has a window of a row's codes, 64, which fill a register, or 16, which all parts of one have:
a permutation brings beside every weight in a register the code that it multiplies. Where one instruction adds four
products of bytes exactly these are four weights of each output; elsewhere codes are picked as words, whose upper bytes
are zero, and two weights are multiplied as words. What is permuted, by which places and with which weights is the same
for many rows. See windows.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.kernels.windows import COLUMN, Steps
from mcc.backends.cpu.microkernel import flat
from mcc.backends.kernel import SparseArrays

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mcc.backends.cpu.microkernel import Expression, Register, Vectors
    from mcc.backends.kernel import NofMArrays, StoredWeight
    from mcc.target import Target

LARGE, SMALL, SMALL_OF_WORDS = Steps(64, 32, 4), Steps(16, 4, 4), Steps(16, 4, 2)
NO_PLACE = 0x8000  # as the upper byte of a word
CHAINS = 4  # sums in flight that hide the latency of `dot4`
BLOCKS = ((1, 1), COLUMN)
# the codes are the first operand of all; by codes of a window and lanes of a register
PERMUTES = {
    (64, 16): "llvm.x86.avx512.permvar.qi.512", (16, 16): "llvm.x86.avx512.pshuf.b.512",
    (16, 8): "llvm.x86.avx2.pshuf.b",
}  # fmt: skip


def steps_of(target: Target) -> Steps | None:
    """What a step is on a target, or None where no bytes are permuted."""
    if target.picked_bytes == SMALL.window:
        return SMALL if target.exact_dot4 else SMALL_OF_WORDS
    return LARGE if target.picked_bytes else None


def stored_apart(sparse: SparseArrays | NofMArrays | None) -> bool:
    """Whether a weight stores single elements, or columns of as many as there are lanes, without their zeros."""
    return isinstance(sparse, SparseArrays) and sparse.block in BLOCKS


def refusal(weight: StoredWeight, target: Target, side_by_side: int) -> str | None:
    """Why no codes are permuted for a weight, of which an output reads so many side by side, or None."""
    if not stored_apart(weight.sparse):
        return "the weight is not stored by single elements or columns of 16"
    if weight.scale is None or weight.grouped:
        return "the weight is not int8 with a scale for each output"
    steps = steps_of(target)
    if steps is None:
        return f"{target} permutes no bytes"
    return f"fewer than {steps.window} codes lie side by side" if side_by_side < steps.window else None


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
        arrays: as `Steps.pack` gave them.
        vector: of outputs.
        source: codes, and where each row begins.
        sums: a vector of int32 for each row.
    """
    codes, rows = source
    chains = [list(sums), *v.registers(max(1, CHAINS // len(sums)) - 1, len(sums), "int32")]
    for chain in chains[1:]:
        for register in chain:
            register.set(v.constant(0, "int32"))
    steps = steps_of(v.target)
    assert steps is not None
    size, slots = 4 * v.lanes, steps.together * v.lanes
    permute = PERMUTES[steps.window, v.lanes]

    def step(number: Expression, chain: Sequence[Register]) -> None:
        at = B.Bind(T.cast(number, "int64"))
        window = B.Bind(T.cast(arrays["windows"][at], "int64"))
        stored = B.Bind(v.load(arrays["weight"], at * slots, slots))
        words = steps is SMALL_OF_WORDS
        weights = B.Bind(T.cast(stored, f"int16x{slots}")) if words else T.reinterpret(f"int32x{v.lanes}", stored)
        order = T.reinterpret(f"int8x{size}", B.Bind((_places_of_words if words else _places)(v, arrays, at)))
        for row, register in zip(rows, chain, strict=True):
            read = T.reinterpret(f"int8x{steps.window}", v.load(codes, row + window, steps.window))
            if steps.window < size:
                read = tirx.Shuffle([read] * (size // steps.window), list(range(size)))
            chosen = tirx.call_llvm_pure_intrin(f"int8x{size}", permute, read, order)
            if words:
                products = v.pairs_of_words(T.reinterpret(f"int16x{slots}", chosen), weights)
                register.set(register.get() + products)
            else:
                picked = T.reinterpret(f"int32x{v.lanes}", chosen)
                register.set(v.dot4(register.get(), picked, weights, bounded=True))

    steps.emit(arrays, vector, chains, step)


def _places(v: Vectors, arrays: Mapping[str, Expression], step: Expression) -> Expression:
    """The places of a step, for every lane: four bytes."""
    stored, size = arrays["places"], 4 * v.lanes
    if int(stored.shape[0]) == int(arrays["weight"].shape[0]):
        return v.load(stored, step * size, size)
    return v.splat(flat(stored, stored.shape[0] // 4, "int32")[step])


def _places_of_words(v: Vectors, arrays: Mapping[str, Expression], step: Expression) -> Expression:
    """The same for two words: beside each place stands one above all, of which a zero is picked."""
    stored, slots = arrays["places"], 2 * v.lanes
    if int(stored.shape[0]) == int(arrays["weight"].shape[0]):
        return T.cast(v.load(stored, step * slots, slots), f"uint16x{slots}") | T.broadcast(T.uint16(NO_PLACE), slots)
    first, second = (T.cast(stored[step * 2 + i], "uint32") for i in range(2))
    return v.splat(first | second << T.uint32(16) | T.uint32(NO_PLACE << 16 | NO_PLACE))
