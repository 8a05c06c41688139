"""Epilogues as vector code: what a kernel does to its sums before it writes them, step by step."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, assert_never

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm.script import tirx as T

from mcc.backends.cpu.integer_sums import LARGEST_CODE, largest_rescaled, largest_sum
from mcc.backends.cpu.microkernel import lane
from mcc.backends.cpu.vector_math import FUNCTIONS
from mcc.backends.kernel import (
    Activation,
    Add,
    Clamp,
    EpilogueStep,
    Multiply,
    Relu,
    Requantize,
    Rescale,
    RescaleSums,
    Scale,
)
from mcc.fixed_point import LARGEST

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mcc.backends.cpu.microkernel import Expression, Vectors
    from mcc.backends.kernel import QuantizedInput, Region


COARSEST_GELU = 16 * 2e-4  # step of codes for which an error of 2e-4 is a sixteenth
LARGEST_CONVERTED = float(1 << 30)
ROUNDER = 1.5 * 2**23  # beside which float32 holds integers
MOST_STEPS_ADDED = 1 << 15  # of which float32 has parts of 1 / 256


@dataclass(frozen=True)
class ToCodes:
    """A requantize of values that are already in steps of the output's scale.

    Attributes:
        zero_point: of the codes.
        low, high: the codes' bounds.
        fits: no value is too large to be an int32, so that bounds may be applied to integers, which is cheaper.
    """

    zero_point: int
    low: int
    high: int
    fits: bool


@dataclass(frozen=True)
class AddInSteps:
    """The addition of another value to one that is in steps of the output's scale.

    Attributes:
        factor: steps of a code, or of one, of the other value; what its zero point takes off is in the bias.
    """

    factor: float


@dataclass(frozen=True)
class Unshift:
    """What takes a number off again that was added so that float32 rounds there."""

    number: float


Step = EpilogueStep | ToCodes | AddInSteps | Unshift


def channel_vectors(region: Region) -> dict[str, NDArray[np.float32]]:
    """What turns sums into values, [out]: "bias", and "scale" where the weight is codes with one for each output.

    Where nothing but additions and a requantize follow, both are in steps of its scale, which saves a multiplication a
    value, and the bias has the zero points of what is added.
    """
    outputs = region.weight.shape[0]
    if region.rescale is not None:  # the bias is in the sums
        return {
            "bias": np.full(outputs, _rounder(region.rescale.fraction_bits), np.float32),
            "scale": region.rescale.factors,
        }
    bias = np.zeros(outputs, np.float32) if region.bias is None else region.bias
    if region.weight.scale is None or region.weight.grouped:
        return {"bias": bias}
    scale = region.weight.scale * np.float32(1.0 if region.activation is None else region.activation.scale)
    summed = _summed_codes(region)
    if summed is not None:
        adds, step = summed
        inverse = np.float32(1 / step.scale)
        zeros = sum(a.activation.zero_point * a.activation.scale for a in adds if a.activation is not None)
        scale, bias = scale * inverse, (bias - np.float32(zeros)) * inverse
    return {"bias": bias.astype(np.float32), "scale": scale.astype(np.float32)}


def steps_after_scale(region: Region) -> tuple[Step, ...]:
    """The epilogue of values that `channel_vectors` gave."""
    if region.rescale is not None:
        return _after_rescale(region, region.rescale)
    summed = _summed_codes(region)
    if summed is None:
        return merged(region.epilogue)
    adds, step = summed
    added = tuple(AddInSteps((1.0 if a.activation is None else a.activation.scale) / step.scale) for a in adds)
    fits = False
    codes = region.activation is not None and not region.activation.per_token
    if codes and all(a.activation is not None for a in adds):
        vectors = channel_vectors(region)
        largest = largest_sum(region) * np.abs(vectors["scale"]).max(initial=0) + np.abs(vectors["bias"]).max(initial=0)
        fits = bool(largest + LARGEST_CODE * sum(a.factor for a in added) < LARGEST_CONVERTED)
    return (*added, ToCodes(step.zero_point, step.low, step.high, fits))


def _rounder(fraction_bits: int | None) -> float:
    """A number beside which float32 has so many bits behind the point: a product added to it is rounded once."""
    return 0.0 if fraction_bits is None else ROUNDER / 2.0**fraction_bits


def _after_rescale(region: Region, rescale: RescaleSums) -> tuple[Step, ...]:
    """The epilogue behind the multiplication of `rescale`, whose result is rounded and has `_rounder` in it."""
    rest: tuple[Step, ...] = merged(region.epilogue[1:])
    if rescale.fraction_bits is None:
        return rest
    held = (Clamp(-LARGEST, LARGEST),) if largest_rescaled(region) >= LARGEST else ()
    last = rest[-1] if rest else None
    if isinstance(last, Requantize) and last.scale == 1:
        rest = (*rest[:-1], ToCodes(last.zero_point, last.low, last.high, fits=all(map(_bounded, rest[:-1]))))
    return (Unshift(_rounder(rescale.fraction_bits)), *held, *rest)


def _bounded(step: Step) -> bool:
    """Whether what a step gives is bounded where what it is given is."""
    return isinstance(step, Relu | Clamp | Rescale) or (isinstance(step, Add) and step.activation is not None)


def _summed_codes(region: Region) -> tuple[list[Add], Requantize] | None:
    """The additions and the requantize that follow sums with one scale for each output, if nothing else does.

    None too where the zero point of what is added is so many steps that a sum in float32 would lose digits, or where
    two floats are added, each of which may be beyond float32 in such steps.
    """
    if region.weight.scale is None or region.weight.grouped:
        return None
    steps = merged(region.epilogue)
    adds = [step for step in steps[:-1] if isinstance(step, Add)]
    last = steps[-1] if steps else None
    if not isinstance(last, Requantize) or len(adds) != len(steps) - 1:
        return None
    scales = [a.activation.scale for a in adds if a.activation is not None]
    fine = LARGEST_CODE * sum(scales) / last.scale <= MOST_STEPS_ADDED and len(adds) - len(scales) <= 1
    return (adds, last) if fine else None


class Epilogue:
    """Finishes and writes vectors of a region's output.

    Args:
        vectors: of the target.
        region: whose epilogue it is.
        operands: the values its `Add` and `Multiply` steps read, flat, laid out as the output is.
        out: the output, flat.
    """

    def __init__(self, vectors: Vectors, region: Region, operands: Sequence[Expression], out: Expression) -> None:
        self.v = vectors
        self.steps = steps_after_scale(region)
        self.operands = operands
        self.out = out

    def narrowed(self, vectors: Vectors) -> Epilogue:
        """The same for vectors of another width."""
        other = copy(self)
        other.v = vectors
        return other

    def ask(self, index: Expression) -> None:
        """Ask for what `store` reads at an index, before its value is computed."""
        for operand in self.operands:
            self.v.prefetch(operand, index)

    def store(self, value: Expression, index: Expression, used: int) -> None:
        """Apply the steps to float32 lanes and write the first `used` of them at `index`."""
        v = self.v
        value = emit_epilogue(v, value, self.steps, self.read(index, used))
        if used == v.lanes:
            v.store(self.out, index, value)
            return
        value = B.Bind(value)
        for i in range(used):
            B.buffer_store(self.out, lane(value, i), [index + i])

    def read(self, index: Expression, used: int) -> list[Expression]:
        """What the steps take of `operands` at an index, of which the first `used` lanes count."""
        return [self._read(operand, index, used) for operand in self.operands]

    def _read(self, operand: Expression, index: Expression, used: int) -> Expression:
        if used == self.v.lanes:
            return self.v.load(operand, index)
        ((room,),) = self.v.registers(1, 1, operand.dtype)
        for i in range(used):
            B.buffer_store(room.pool, operand[index + i], [i])
        return room.get()


def merged(steps: tuple[EpilogueStep, ...]) -> tuple[EpilogueStep, ...]:
    """The same steps for a final requantize: a relu or clamp before it as bounds of its codes, gelu no finer than them.

    Rounding keeps order, so that bounds of values are bounds of codes.
    """
    *before, last = steps or (Relu(),)
    if not isinstance(last, Requantize):
        return steps
    if before and before[-1] == Activation("gelu") and last.scale >= COARSEST_GELU:
        before[-1] = Activation("gelu_to_codes")
    while before and isinstance(step := before[-1], Relu | Clamp):
        before.pop()
        bounds = (0.0, math.inf) if isinstance(step, Relu) else (step.low, step.high)
        # the last bounds hold, as they would if applied one after another
        low, high = (min(max(_code(last, bound), last.low), last.high) for bound in bounds)
        last = replace(last, low=low, high=high)
    return (*before, last)


def _code(step: Requantize, value: float) -> int:
    """The code of a value, before it is held to the range."""
    if math.isinf(value):
        return -(1 << 30) if value < 0 else 1 << 30
    # as the kernels compute it, in float32
    return int(np.rint(np.float32(value) * np.float32(1 / step.scale))) + step.zero_point


def emit_epilogue(
    vectors: Vectors, value: Expression, steps: tuple[Step, ...], operands: Sequence[Expression] = ()
) -> Expression:
    """Apply `steps` to float32 lanes; the result is float32 or uint8 lanes.

    Bounds come first in every min and max: of a NaN and a bound, x86 takes the second operand.
    """
    others = iter(operands)
    for step in steps:
        match step:
            case Add(_, activation):
                value = _added(vectors, value, next(others), activation)
            case Multiply(_, activation):
                value = value * _added(vectors, vectors.constant(0.0), next(others), activation)
            case AddInSteps(factor):
                value = vectors.fma(_as_float(vectors, next(others)), vectors.constant(factor), value)
            case RescaleSums():
                raise AssertionError("it is the scale of sums, and no step behind them")
            case Unshift(number):
                value = value - vectors.constant(number)
            case _:
                value = _of_one_value(vectors, value, step)
    return value


def _of_one_value(
    vectors: Vectors, value: Expression, step: Relu | Clamp | Activation | Scale | Rescale | Requantize | ToCodes
) -> Expression:
    match step:
        case Relu():
            return T.max(vectors.constant(0.0), value)
        case Clamp(low, high):
            return T.min(vectors.constant(high), T.max(vectors.constant(low), value))
        case Activation(name):
            return FUNCTIONS[name](vectors, vectors.hold(value))
        case Scale(factor):
            return value * vectors.constant(factor)
        case Rescale():
            return _rescaled(vectors, value, step)
        case Requantize(scale, zero_point, low, high):
            return _rounded(vectors, value * vectors.constant(1 / scale), zero_point, (low, high))
        case ToCodes(zero_point, low, high, fits):
            to_codes = _rounded_integers if fits else _rounded
            return to_codes(vectors, value, zero_point, (low, high))
        case _:
            assert_never(step)


def _as_float(vectors: Vectors, other: Expression) -> Expression:
    """Another value, or its codes as they count."""
    if not other.ty.dtype.startswith("uint8"):
        return other
    return vectors.to_float(T.cast(other, f"int32x{vectors.lanes}"))


def _added(vectors: Vectors, value: Expression, other: Expression, activation: QuantizedInput | None) -> Expression:
    if activation is None:
        return value + other
    codes = T.cast(other, f"int32x{vectors.lanes}") - vectors.constant(activation.zero_point, "int32")
    if activation.fraction_bits is None:
        return vectors.fma(vectors.to_float(codes), vectors.constant(activation.scale), value)
    return value + _rescaled(vectors, vectors.to_float(codes), Rescale(activation.scale, activation.fraction_bits))


def _rescaled(vectors: Vectors, value: Expression, step: Rescale) -> Expression:
    """A product rounded once, by the addition of a number beside which float32 has no more bits behind the point."""
    number = vectors.constant(_rounder(step.fraction_bits))
    product = vectors.fma(value, vectors.constant(step.factor), number) - number
    return T.min(vectors.constant(LARGEST), T.max(vectors.constant(-LARGEST), product))


def _rounded(vectors: Vectors, value: Expression, zero_point: int, codes: tuple[int, int]) -> Expression:
    # clamped as float: a conversion of what does not fit int32 is undefined
    low, high = (vectors.constant(float(c - zero_point)) for c in codes)
    integer = vectors.to_nearest_integer(T.min(T.max(value, low), high))
    return T.cast(integer + vectors.constant(zero_point, "int32"), f"uint8x{vectors.lanes}")


def _rounded_integers(vectors: Vectors, value: Expression, zero_point: int, codes: tuple[int, int]) -> Expression:
    low, high = (vectors.constant(c, "int32") for c in codes)
    integer = vectors.to_nearest_integer(value) + vectors.constant(zero_point, "int32")
    return T.cast(T.min(T.max(integer, low), high), f"uint8x{vectors.lanes}")
