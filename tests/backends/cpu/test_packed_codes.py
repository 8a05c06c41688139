"""Sums of convolutions that become codes four vectors at a time: pixels that are no multiple of four, groups, bounds."""

from __future__ import annotations

import pytest
from regions import NEON, TARGETS, Symbolic, assert_kernel_equals_reference, make_region, make_weight

from mcc import ops
from mcc.backends.cpu.kernels.conv2d import Conv2dInt8
from mcc.backends.cpu.kernels.packed_codes import PackedCodes
from mcc.backends.kernel import QuantizedInput, Relu, Requantize


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


def test_what_adds_something_is_finished_vector_by_vector():
    weight = make_weight((32, 32, 1, 1), "int8", 3)
    alone, relu = (Requantize(0.3, 7, 0, 255),), (Relu(),)
    for epilogue, packs in ((alone, True), (relu + alone, True), (relu, False), ((), False)):
        region = make_region(ops.CONV2D_NHWC, (1, 5, 7, 32), weight, epilogue, QuantizedInput(0.02, 11),
                             ([1, 1], [0] * 4, [1, 1], 1))  # fmt: skip
        assert (PackedCodes.of(region) is not None) == packs
