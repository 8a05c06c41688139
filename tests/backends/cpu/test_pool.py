"""The kernel of windows: largest values and means of images with channels last, as PyTorch computes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from regions import TARGETS, run_function
from torch import nn
from torch.nn import functional as F
from tvm import tirx

import mcc
from mcc.backends.cpu.kernels.pool import PoolShape, pool_function

NARROW_AND_WIDE = list(dict.fromkeys([TARGETS[0], TARGETS[-1]]))


@pytest.mark.parametrize("target", NARROW_AND_WIDE, ids=str)
@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), [
    ((17, 23), (3, 3), (2, 2), (1, 1)), ((8, 8), (2, 2), (2, 2), (0, 0)), ((9, 14), (5, 5), (1, 1), (2, 2)),
    ((13, 11), (2, 3), (3, 1), (1, 0)), ((13, 13), (13, 13), (1, 1), (6, 6)), ((7, 7), (7, 7), (1, 1), (0, 0)),
    ((4, 19), (1, 1), (2, 3), (0, 0)),
])  # fmt: skip
def test_windows_of_all_kinds(target, size, kernel, stride, padding):
    for channels, varies in ((4, False), (70, False), (24, True)):
        check((2, *size, channels), kernel, stride, padding, target, varies=varies)


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20)), channels=st.integers(4, 70),
    kernel=st.tuples(st.integers(1, 6), st.integers(1, 6)), stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    varies=st.booleans(), data=st.data(),
)  # fmt: skip
@settings(max_examples=10)
def test_any_windows(sizes, channels, kernel, stride, varies, data):
    kernel = tuple(map(min, kernel, sizes[1:]))
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    check((*sizes, channels), kernel, stride, padding, TARGETS[-1], varies=varies)


def test_no_images_and_windows_in_padding_alone():
    check((0, 6, 6, 8), (2, 2), (2, 2), (1, 1), TARGETS[0], varies=True)
    x = np.ones((1, 2, 2, 8), np.float32)
    shape = PoolShape(x.shape, (1, 3), (1, 1), (1, 2), (0, 2), True, True, "float32")
    (found,) = run_function(named(shape, TARGETS[0]), TARGETS[0], [[x, np.zeros((1, 1, 3, 8), np.float32)]])
    np.testing.assert_array_equal(found[0, 0, :, 0], [-np.inf, 1, -np.inf])


@pytest.mark.parametrize("channels", [3, 5])
def test_a_network_pools_what_the_kernel_takes_and_what_it_does_not(channels):
    torch.manual_seed(0)
    pools = nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d((1, 3), 1), nn.AvgPool2d((4, 66), 1)
    model = nn.Sequential(nn.Conv2d(2, channels, 1), *pools).eval()
    x = torch.randn(2, 2, 12, 140)
    np.testing.assert_allclose(mcc.compile(model, (x,))(x.numpy()), model(x).detach(), rtol=1e-5, atol=1e-5)


def named(shape, target):
    return pool_function(shape, target).with_attr("global_symbol", "pool")


def check(dims, kernel, stride, padding, target, *, varies):
    """Largest values of floats and codes exactly, means to float32's rounding."""
    codes = np.random.default_rng(1).integers(0, 256, dims)
    known = tuple(tirx.Var(f"n{i}", "int64") if varies and i < 3 else d for i, d in enumerate(dims))
    image = torch.from_numpy(codes.astype(np.float64)).permute(0, 3, 1, 2)
    pooled = [
        F.max_pool2d(image, kernel, stride, padding),
        *(F.avg_pool2d(image, kernel, stride, padding, count_include_pad=c) for c in (True, False)),
    ]
    for (largest, counts, dtype), wanted in zip(
        [(True, True, "float32"), (False, True, "float32"), (False, False, "float32"), (True, True, "uint8")],
        [*pooled, pooled[0]], strict=True,
    ):  # fmt: skip
        last = wanted.permute(0, 2, 3, 1).numpy()
        sizes = known[1:3] if varies else last.shape[1:3]
        shape = PoolShape(known, sizes, kernel, stride, padding, largest, counts, dtype)
        operands = [codes.astype(dtype), np.zeros(last.shape, dtype)]
        (found,) = run_function(named(shape, target), target, [operands])
        np.testing.assert_allclose(found, last, rtol=0 if largest else 1e-6)
