"""Sums of convolutions that become codes four vectors at a time: pixels that are no multiple of four, groups, bounds."""

from __future__ import annotations

import numpy as np
import pytest
from regions import (
    NEON,
    TARGETS,
    Symbolic,
    Value,
    assert_kernel_equals_reference,
    make_region,
    make_weight,
    run_function,
)

from mcc import ops
from mcc.backends.cpu.kernels.conv2d import Conv2dInt8
from mcc.backends.cpu.kernels.dense import DenseInt8
from mcc.backends.cpu.kernels.packed_codes import PackedCodes
from mcc.backends.kernel import Add, QuantizedInput, Relu, Requantize


@pytest.mark.parametrize("target", [*TARGETS, NEON], ids=str)
@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(3, 16, 1), (24, 41, 1), (32, 32, 4), (64, 32, 1)])
def test_codes_are_those_of_the_reference(target, inputs, outputs, groups):
    weight = make_weight((outputs, inputs // groups, 1, 1), "int8", 3, target.int8_weight_limit)
    region = make_region(
        ops.CONV2D_NHWC, (Symbolic(), 5, 7, inputs), weight, (Relu(), Requantize(0.3, 7, 9, 250)),
        QuantizedInput(0.02, 11), ([1, 1], [0] * 4, [1, 1], groups), bias=True,
    )  # fmt: skip
    kernel = Conv2dInt8()
    for tile in kernel.tiles(region, target)[:2]:
        assert_kernel_equals_reference(kernel, region, target, tile, [(n, 5, 7, inputs) for n in (1, 2)])


def test_what_is_packed_is_requantized_last_and_nothing_but_added_to():
    weight = make_weight((32, 32, 1, 1), "int8", 3)
    alone, relu = (Requantize(0.3, 7, 0, 255),), (Relu(),)
    codes, floats = Add(Value(), QuantizedInput(0.2, 9)), Add(Value())
    coarse = Add(Value(), QuantizedInput(0.3 * 1000, 9))
    cases = [
        (alone, True), (relu + alone, True), (relu, False), ((), False), ((codes, *alone), True),
        ((codes, floats, *relu, *alone), True), ((floats, floats, *alone), False), ((coarse, *alone), False),
        ((*relu, codes, *alone), False),
    ]  # fmt: skip
    for epilogue, packs in cases:
        region = make_region(ops.CONV2D_NHWC, (1, 5, 7, 32), weight, epilogue, QuantizedInput(0.02, 11),
                             ([1, 1], [0] * 4, [1, 1], 1))  # fmt: skip
        assert (PackedCodes.of(region) is not None) == packs


ADDED = {
    "codes": (Add(Value(), QuantizedInput(0.4, 131)),),
    "floats": (Add(Value()),),
    "both": (Add(Value(), QuantizedInput(0.02, 3)), Add(Value())),
}


@pytest.mark.parametrize("target", [*TARGETS, NEON], ids=str)
@pytest.mark.parametrize("added", ADDED)
def test_additions_before_a_requantize_are_those_of_the_reference(target, added):
    epilogue = (*ADDED[added], Relu(), Requantize(0.05, 7, 0, 255))
    region = make_region(
        ops.LINEAR, (Symbolic(), 24), make_weight((48, 24), "int8", 3, target.int8_weight_limit), epilogue,
        QuantizedInput(0.02, 11),
    )  # fmt: skip
    kernel = DenseInt8()
    assert_kernel_equals_reference(kernel, region, target, kernel.tiles(region, target)[0], [(n, 24) for n in (1, 9)])


def added_codes(epilogue, operands):
    """The codes that a layer gives with so much added, by the first target there is, and those of the reference."""
    region = make_region(ops.LINEAR, (24, 64), make_weight((48, 64), "int8", 3), epilogue, QuantizedInput(0.02, 131))
    source = np.random.default_rng(0).integers(0, 256, (24, 64)).astype(np.uint8)
    kernel, target = DenseInt8(), TARGETS[-1]
    lowered = kernel.lower(region, target, kernel.tiles(region, target)[0])
    arrays = [source, *operands, *lowered.packed.values(), np.zeros((24, 48), np.uint8)]
    (found,) = run_function(lowered.function, target, [arrays])
    return found.astype(int), kernel.reference(region, source, operands).astype(int)


@pytest.mark.parametrize("steps", [10, 100, 1e4, 1e7])
def test_added_codes_much_coarser_than_the_result_leave_its_digits(steps):
    """They all stand for zero here; a zero point of so many steps in the bias would take the sum's own digits."""
    epilogue = (Add(Value(), QuantizedInput(0.05 * steps, 200)), Relu(), Requantize(0.05, 0, 0, 255))
    found, expected = added_codes(epilogue, [np.full((24, 48), 200, np.uint8)])
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() <= 0.01


def test_floats_beyond_all_codes_saturate():
    epilogue = (Add(Value()), Requantize(0.05, 100, 3, 250))
    far = np.zeros((24, 48), np.float32)
    far[0], far[1], far[2], far[3] = 1e36, -1e36, np.inf, -np.inf
    found, expected = added_codes(epilogue, [far])
    assert [set(row) for row in found[:4]] == [{250}, {3}, {250}, {3}]
    assert np.abs(found[4:] - expected[4:]).max() <= 1


def test_floats_that_cancel_each_other_do_not_overflow():
    epilogue = (Add(Value()), Add(Value()), Requantize(0.05, 100, 0, 255))
    found, _ = added_codes(epilogue, [np.full((24, 48), x, np.float32) for x in (3e38, -3e38)])
    assert (found == 100).all()
