"""Depthwise convolutions of codes: blocks of few channels, which take two parts of the width side by side."""

from __future__ import annotations

import pytest
from regions import NEON, TARGETS, Symbolic, assert_kernel_equals_reference, make_region, make_weight

from mcc import ops
from mcc.backends.cpu.kernels.conv_shape import conv_shape
from mcc.backends.cpu.kernels.depthwise_body import _blocks
from mcc.backends.cpu.kernels.depthwise_int8 import DepthwiseInt8
from mcc.backends.kernel import QuantizedInput, Requantize


def test_the_narrowest_blocks_are_of_two_parts_where_vectors_have_room():
    assert _blocks(144, 16, 2) == (2, [(128, 8, 2)])
    assert _blocks(144, 16, 1) == (2, [(128, 4, 1)])
    assert _blocks(24, 8, 2) == (0, [(0, 8, 2), (8, 8, 2)])
    assert _blocks(32, 16, 2) == (0, [(0, 8, 1)])
    assert _blocks(20, NEON.vector_lanes, 2) == (1, [(4, 4, 1)])


@pytest.mark.parametrize("target", dict.fromkeys([TARGETS[0], TARGETS[-1]]), ids=str)
@pytest.mark.parametrize(("size", "stride", "padding"), [
    ((3, 3), [1, 1], [1, 1, 1, 1]),
    ((3, 3), [2, 2], [0, 1, 1, 1]),
    ((5, 5), [1, 1], [2, 2, 2, 2]),
    ((2, 7), [1, 3], [1, 6, 0, 5]),
])  # fmt: skip
@pytest.mark.parametrize("image", [(4, 13), (5, 2), (3, 1)])
def test_parts_of_the_width_meet(target, size, stride, padding, image):
    channels = 24
    weight = make_weight((channels, 1, *size), "int8", 3, target.int8_weight_limit)
    region = make_region(
        ops.CONV2D_NHWC, (Symbolic(), *image, channels), weight, (Requantize(0.3, 7, 0, 255),),
        QuantizedInput(0.02, 11), (stride, padding, [1, 1], channels), bias=True,
    )  # fmt: skip
    height, width = conv_shape(region).result
    tile = f"padded {min(2, height)}x{min(2, width)}"
    assert_kernel_equals_reference(DepthwiseInt8(), region, target, tile, [(n, *image, channels) for n in (1, 3, 0)])
