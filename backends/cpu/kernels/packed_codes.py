"""Codes of sums that are requantized, something added to them or not, four vectors at a time.

Integers are packed to words and these to bytes, which holds them to the range of codes, in a third of the instructions
that vectors take one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm import tirx
from tvm.script import tirx as T

from mcc.backends.cpu.epilogue import (
    LARGEST_CONVERTED,
    ToCodes,
    Unshift,
    channel_vectors,
    emit_epilogue,
    steps_after_scale,
)
from mcc.backends.cpu.integer_sums import LARGEST_CODE, integer_bias
from mcc.backends.cpu.requantize import direct_requantize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mcc.backends.cpu.epilogue import Epilogue, Step
    from mcc.backends.cpu.microkernel import Expression, Register, Vectors
    from mcc.backends.kernel import Region

PACKED = 4  # vectors


class PackedCodes:
    """How the sums of a region become codes.

    Args:
        region: whose activations are codes with one scale.
        adds: what is added.
        step: what follows, and ends the region's epilogue.
    """

    def __init__(self, region: Region, adds: tuple[Step, ...], step: ToCodes) -> None:
        self.adds = adds
        self.step = step
        self.direct = direct_requantize(region, step) if step.fits and not any(map(_adds, adds)) else None

    @classmethod
    def of(cls, region: Region) -> PackedCodes | None:
        """Of a region, or None where its sums become something else."""
        steps = steps_after_scale(region)
        step = steps[-1] if steps else None
        if not isinstance(step, ToCodes) or region.activation is None or region.activation.per_token:
            return None
        return cls(region, steps[:-1], step)

    @classmethod
    def alone(cls, region: Region) -> PackedCodes | None:
        """The same where nothing is added."""
        made = cls.of(region)
        return None if made is None or (made.adds and made.direct is None) else made

    def integer(
        self, v: Vectors, total: Expression, scale: Expression, bias: Expression, added: Sequence[Expression] = ()
    ) -> Expression:
        """A sum, with what is added to it, as an integer for `words`: a code, or its low half is one, of any range."""
        if self.direct is not None:
            number = v.to_float(total) if self.direct.converts else T.reinterpret(f"float32x{v.lanes}", total)
            made = v.fma(number, scale, bias)
            return T.reinterpret(f"int32x{v.lanes}", made) + v.constant(self.direct.odd, "int32")
        value = emit_epilogue(v, v.fma(v.to_float(total), scale, bias), self.adds, added)
        if not self.step.fits:
            # what is far too small converts to the least integer, and so does what is far too large
            value = T.min(v.constant(LARGEST_CONVERTED), value)
        return v.to_nearest_integer(value) + v.constant(self.step.zero_point, "int32")

    def words(self, v: Vectors, low: Expression, high: Expression) -> Expression:
        """Two vectors of integers as words; of each 128 bits the two parts follow one another."""
        return v.pack_to_words(low, high) if self.direct is None else v.pack_low_words(low, high)

    def codes(self, v: Vectors, low: Expression, high: Expression) -> Expression:
        """Two vectors of words as codes; of each 128 bits the two parts follow one another."""
        codes = v.pack_to_codes(low, high)
        if self.step.low > 0:
            codes = T.max(codes, T.broadcast(tirx.const(self.step.low, "uint8"), v.lanes * PACKED))
        if self.step.high < LARGEST_CODE:
            codes = T.min(codes, T.broadcast(tirx.const(self.step.high, "uint8"), v.lanes * PACKED))
        return codes

    def in_turn(self, v: Vectors, integers: list[Expression]) -> Expression:
        """The codes of four vectors of integers, one vector's behind the other's."""
        low, high = (self.words(v, *integers[i : i + 2]) for i in (0, 2))
        order = np.arange(v.lanes).reshape(-1, PACKED).T.reshape(-1)
        words = T.reinterpret(f"int32x{v.lanes}", self.codes(v, low, high))
        return T.reinterpret(f"uint8x{v.lanes * PACKED}", tirx.Shuffle([words], order.tolist()))

    def store(
        self,
        epilogue: Epilogue,
        sums: Sequence[Register],
        factors: tuple[Expression, Expression],
        indices: Sequence[Expression],
    ) -> None:
        """Write the codes of sums that have the same scale and bias at the index of each."""
        v = epilogue.v
        for first in range(0, len(sums), PACKED):
            places = indices[first : first + PACKED]
            integers = [
                B.Bind(self.integer(v, total.get(), *factors, epilogue.read(index, v.lanes)))
                for total, index in zip(sums[first : first + PACKED], places, strict=True)
            ]
            integers += integers[-1:] * (PACKED - len(integers))
            codes = B.Bind(self.in_turn(v, integers))
            for n, index in enumerate(places):
                v.store(epilogue.out, index, tirx.Shuffle([codes], list(range(n * v.lanes, (n + 1) * v.lanes))))


def _adds(step: Step) -> bool:
    """Whether a step does more than to take off what a rescaled sum has too much."""
    return not isinstance(step, Unshift)


def sum_arrays(region: Region, codes: PackedCodes | None, start: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """The scale, the bias, and what sums begin with, of each channel, given what they would begin with."""
    start = start + integer_bias(region)
    if codes is None or codes.direct is None:
        return {**channel_vectors(region), "start": start.astype(np.int32)}
    direct = codes.direct
    return {"bias": direct.shift, "scale": direct.scale, "start": (start + direct.start).astype(np.int32)}
