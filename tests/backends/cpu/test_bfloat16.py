"""Kernels in bfloat16 against float64 sums of rounded values, and rounding itself, on CPUs that multiply it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from regions import Symbolic, Value, assert_kernel_equals_reference, make_region, make_weight, run_kernel

from mcc import ops
from mcc.backends.cpu.kernels.conv2d import Conv2dFloat
from mcc.backends.cpu.kernels.conv2d_bfloat16 import Conv2dBfloat16
from mcc.backends.cpu.kernels.dense import DenseFloat
from mcc.backends.cpu.kernels.dense_bfloat16 import DenseBfloat16
from mcc.backends.kernel import Activation, Add, Clamp, Relu, Requantize, StoredWeight, from_bfloat16, to_bfloat16
from mcc.bfloat16 import encode_bfloat16, round_bfloat16
from mcc.target import missing_features, parse_target

TARGET = parse_target("cpu:avx512bf16")
MISSING = missing_features(TARGET)
needs_bfloat16 = pytest.mark.skipif(bool(MISSING), reason=f"this CPU lacks {', '.join(MISSING)}")
COMPILED = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
EPILOGUES = st.sampled_from([
    (), (Relu(),), (Add(Value()), Relu()), (Activation("silu"),), (Clamp(0.0, 6.0), Requantize(0.03, 3, 0, 255)),
])  # fmt: skip


def rounded_weight(shape, seed=1):
    values = make_weight(shape, "float32", seed).dense
    return StoredWeight("w", shape, to_bfloat16(values), None, None)


def rounding_region(op, source, weight, epilogue, options=(), *, bias=True):
    region = make_region(op, source, weight, epilogue, options=options, bias=bias)
    return dataclasses.replace(region, rounds=True)


@needs_bfloat16
@settings(max_examples=12, **COMPILED)
@given(st.integers(1, 70), st.integers(1, 70), EPILOGUES, st.booleans(), st.integers(0, 2))
def test_dense_layers_of_any_size_and_number_of_rows(inputs, outputs, epilogue, bias, tile):
    region = rounding_region(ops.LINEAR, (Symbolic(), inputs), rounded_weight((outputs, inputs)), epilogue, bias=bias)
    kernel = DenseBfloat16()
    assert kernel.refuses(region, TARGET) is None
    tiles = kernel.tiles(region, TARGET)
    shapes = [(rows, inputs) for rows in (1, 2, 7, 33, 65, 0)]
    assert_kernel_equals_reference(kernel, region, TARGET, tiles[tile % len(tiles)], shapes)


@needs_bfloat16
@settings(max_examples=12, **COMPILED)
@given(
    st.integers(1, 40), st.integers(1, 40), st.sampled_from([(1, 1), (3, 3), (2, 5)]),
    st.sampled_from([[0, 0, 0, 0], [1, 1, 1, 1], [0, 2, 1, 3]]), st.sampled_from([[1, 1], [2, 1]]),
    st.sampled_from([[1, 1], [2, 2]]), EPILOGUES, st.booleans(),
)  # fmt: skip
def test_convolutions_of_any_channels_padding_stride_and_dilation(
    inputs, outputs, size, padding, stride, dilation, epilogue, varies
):
    image = (9, 11)
    height = Symbolic(image[0]) if varies else image[0]
    weight = rounded_weight((outputs, inputs, *size))
    options = (stride, padding, dilation, 1)
    region = rounding_region(ops.CONV2D_NHWC, (Symbolic(), height, image[1], inputs), weight, epilogue, options)
    kernel = Conv2dBfloat16()
    assert kernel.refuses(region, TARGET) is None
    assert_kernel_equals_reference(
        kernel, region, TARGET, kernel.tiles(region, TARGET)[0], [(n, *image, inputs) for n in (1, 2, 5, 0)]
    )


def test_what_is_not_rounded_or_has_groups_is_refused():
    plain = make_region(ops.LINEAR, (4, 8), make_weight((8, 8), "float32", 1))
    assert DenseBfloat16().refuses(plain, TARGET) == "weight and activations are not both rounded to bfloat16"
    assert "does not multiply bfloat16" in DenseBfloat16().refuses(plain, parse_target("cpu:avx2"))
    assert DenseFloat().refuses(plain, TARGET) is None
    options = ([1, 1], [0, 0, 0, 0], [1, 1], 2)
    grouped = rounding_region(ops.CONV2D_NHWC, (1, 4, 4, 8), rounded_weight((8, 4, 1, 1)), (), options)
    assert Conv2dBfloat16().refuses(grouped, TARGET) == "it has groups"
    assert Conv2dFloat().refuses(grouped, TARGET) == "the weight is bfloat16"


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_rounding_is_that_of_pytorch(values):
    x = torch.tensor(values, dtype=torch.float32)
    wanted = x.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(round_bfloat16(x), wanted)
    assert torch.equal(torch.ops.mcc.decode_bfloat16(encode_bfloat16(x)), wanted)
    np.testing.assert_array_equal(from_bfloat16(to_bfloat16(x.numpy())), wanted.numpy())


def test_the_gradient_passes_straight_through():
    x = torch.randn(3, 5, requires_grad=True)
    round_bfloat16(x).backward(torch.full((3, 5), 2.0))
    assert torch.equal(x.grad, torch.full((3, 5), 2.0))


@needs_bfloat16
def test_nan_and_infinity_stay_what_they_are():
    source = np.array([[np.nan, 1.0], [np.inf, 1.0], [2.0, 3.0]], np.float32)
    weight = StoredWeight("w", (1, 2), to_bfloat16(np.ones((1, 2), np.float32)), None, None)
    region = rounding_region(ops.LINEAR, (Symbolic(), 2), weight, (), bias=False)
    (found,) = run_kernel(DenseBfloat16(), region, TARGET, DenseBfloat16().tiles(region, TARGET)[0], [source])
    np.testing.assert_array_equal(found[:, 0], [np.nan, np.inf, 5.0])
