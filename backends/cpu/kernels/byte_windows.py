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

from mcc.backends.cpu.kernels.tiles import TileShape
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
CHAINS = 4  # sums in flight that hide the latency of `dot4` on bytes
BLOCKS = ((1, 1), COLUMN)
# the codes are the first operand of all; by codes of a window and lanes of a register
PERMUTES = {
    (64, 16): "llvm.x86.avx512.permvar.qi.512", (16, 16): "llvm.x86.avx512.pshuf.b.512",
    (16, 8): "llvm.x86.avx2.pshuf.b",
}  # fmt: skip


def steps_of(target: Target) -> Steps | None:
    """What a step is on a target, or None where no bytes are permuted."""
    small = SMALL if target.exact_dot4 else SMALL_OF_WORDS
    return {LARGE.window: LARGE, SMALL.window: small}.get(target.picked_bytes)


def row_tiles(target: Target, largest: int) -> tuple[str, ...]:
    """Rows that share what they are permuted by; the largest tile fits 32 registers."""
    last = largest if target.vector_registers == 32 else 6
    return tuple(str(TileShape(rows, 1)) for rows in (12, 8, last))


def stored_apart(sparse: SparseArrays | NofMArrays | None) -> bool:
    """Whether a weight stores single elements, or columns of 16, without their zeros."""
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
    parts, permute = v.lanes * 4 // steps.window, PERMUTES[steps.window, v.lanes]
    kind = (_Words if steps is SMALL_OF_WORDS else _Bytes)(v, steps, arrays)

    def step(number: Expression, chain: Sequence[Register]) -> None:
        at = B.Bind(T.cast(number, "int64"))
        window = B.Bind(T.cast(arrays["windows"][at], "int64"))
        weights = kind.weights(at)
        order = T.reinterpret(f"int8x{v.lanes * 4}", B.Bind(kind.order(at)))
        for row, register in zip(rows, chain, strict=True):
            read = T.reinterpret(f"int8x{steps.window}", v.load(codes, row + window, steps.window))
            if parts > 1:
                read = tirx.Shuffle([read] * parts, list(range(v.lanes * 4)))
            kind.add(register, tirx.call_llvm_pure_intrin(f"int8x{v.lanes * 4}", permute, read, order), weights)

    steps.emit(arrays, vector, chains, step)


class _Bytes:
    """Four weights of each output, multiplied as bytes."""

    def __init__(self, v: Vectors, steps: Steps, arrays: Mapping[str, Expression]) -> None:
        self.v, self.stored, self.places = v, arrays["weight"], arrays["places"]
        self.count = v.lanes * steps.together
        self.apart = int(self.places.shape[0]) == int(self.stored.shape[0])  # not the same in all lanes

    def weights(self, step: Expression) -> Expression:
        """Those of a step."""
        return T.reinterpret(f"int32x{self.v.lanes}", B.Bind(self.v.load(self.stored, step * self.count, self.count)))

    def order(self, step: Expression) -> Expression:
        """What a step's codes are permuted by: the place of each."""
        if self.apart:
            return self.v.load(self.places, step * self.count, self.count)
        return self.v.splat(flat(self.places, self.places.shape[0] // 4, "int32")[step])

    def add(self, sums: Register, chosen: Expression, weights: Expression) -> None:
        """Add the products."""
        picked = T.reinterpret(f"int32x{self.v.lanes}", chosen)
        sums.set(self.v.dot4(sums.get(), picked, weights, bounded=True))


class _Words(_Bytes):
    """Two weights of each output, multiplied as words: beside each place stands one that gives a zero."""

    def weights(self, step: Expression) -> Expression:
        """Those of a step, widened."""
        stored = B.Bind(self.v.load(self.stored, step * self.count, self.count))
        return B.Bind(T.cast(stored, f"int16x{self.count}"))

    def order(self, step: Expression) -> Expression:
        """As for bytes."""
        if self.apart:
            places = T.cast(self.v.load(self.places, step * self.count, self.count), f"uint16x{self.count}")
            return places | T.broadcast(T.uint16(NO_PLACE), self.count)
        first, second = (T.cast(self.places[step * 2 + i], "uint32") for i in range(2))
        return self.v.splat(first | second << T.uint32(16) | T.uint32(NO_PLACE << 16 | NO_PLACE))

    def add(self, sums: Register, chosen: Expression, weights: Expression) -> None:
        """Add the products."""
        sums.set(sums.get() + self.v.pairs_of_words(T.reinterpret(f"int16x{self.count}", chosen), weights))
