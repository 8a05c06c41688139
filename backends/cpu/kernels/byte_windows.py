"""Products of a row's codes and weights of which few are not zero, by permuting bytes.

Lanes are outputs, four weights of each in a register. A step has a window of 64 codes, one register of a row: a
permutation brings to every byte of the register of weights the code that it multiplies, and one `dot4` adds 64
products. What is permuted, by which places and with which weights is the same for many rows. See windows.py.
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

WINDOW = 64  # codes
QUAD = 4  # weights of an output in a step
STEPS = Steps(WINDOW, WINDOW // 2, QUAD)
CHAINS = 4  # sums in flight that hide the latency of `dot4`
BLOCKS = ((1, 1), COLUMN)
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

    STEPS.emit(arrays, vector, chains, step)


def _places(v: Vectors, arrays: Mapping[str, Expression], step: Expression) -> Expression:
    """The places of a step, for every lane."""
    stored, size = arrays["places"], v.lanes * QUAD
    if int(stored.shape[0]) == int(arrays["weight"].shape[0]):
        return v.load(stored, step * size, size)
    return v.splat(flat(stored, stored.shape[0] // QUAD, "int32")[step])
