"""Sums to codes by one multiply-add, in NumPy: what the instructions do, against rounding in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from regions import make_region, make_weight

from mcc import ops
from mcc.backends.cpu.epilogue import ToCodes, channel_vectors
from mcc.backends.cpu.integer_sums import largest_sum
from mcc.backends.cpu.requantize import direct_requantize
from mcc.backends.kernel import QuantizedInput, Requantize


def region(channels, taps=9, scale=None, bias=True, step=0.03):
    weight = make_weight((channels, 1, taps, 1), "int8", 3)
    if scale is not None:
        weight = dataclasses.replace(weight, scale=np.full(channels, scale, np.float32))
    options = ((1, 1), (0, 0, 0, 0), (1, 1), channels)
    source = (1, 9, 9, channels)
    epilogue = (Requantize(step, 7, 0, 255),)
    return make_region(ops.CONV2D_NHWC, source, weight, epilogue, QuantizedInput(1.0, 3), options, bias)


def codes(made, sums):
    """One fused multiply-add, and the low words of its bits; float64 holds the product, and its sum to half a digit."""
    begun = (made.start[:, None] + sums).astype(np.int32).view(np.float32).astype(np.float64)
    value = (begun * made.scale.astype(np.float64)[:, None] + made.shift.astype(np.float64)[:, None]).astype(np.float32)
    return (value.view(np.int32) + made.odd).astype(np.int16)


def test_codes_are_the_rounded_values():
    r = region(64, step=3.0)
    made = direct_requantize(r, ToCodes(7, 0, 255, fits=True))
    sums = np.random.default_rng(0).integers(-largest_sum(r), largest_sum(r), (64, 20_000))
    vectors = channel_vectors(r)
    exact = sums * vectors["scale"].astype(np.float64)[:, None] + vectors["bias"].astype(np.float64)[:, None]
    expected = np.rint(exact) + 7
    found = codes(made, sums)
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 1e-3
    # where they differ the value was as good as half between two codes
    assert np.abs(np.abs(exact - np.floor(exact)) - 0.5)[found != expected].max() < 1e-3


@pytest.mark.parametrize("zero_point", [0, 7, 128])
def test_halves_go_to_even_before_the_zero_point_is_added(zero_point):
    r = region(4, scale=2.0**-6, bias=False, step=1.0)
    made = direct_requantize(r, ToCodes(zero_point, 0, 255, fits=True))
    sums = np.arange(-8000, 8000)[None].repeat(4, 0)
    np.testing.assert_array_equal(codes(made, sums), np.rint(sums * 2.0**-6) + zero_point)


def test_sums_that_leave_the_range_are_left_to_conversion():
    assert direct_requantize(region(4, taps=200), ToCodes(7, 0, 255, fits=True)) is None
    assert direct_requantize(region(4, scale=0.9), ToCodes(7, 0, 255, fits=True)) is None


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-5, 1e-6, 1e-7, 1e-9])
def test_small_channels_are_rounded_as_exactly_or_left_to_conversion(size):
    """A channel that gives next to nothing still has a bias with any fraction."""
    r = region(16, step=0.05)
    weight = dataclasses.replace(r.weight, scale=(r.weight.scale * size).astype(np.float32))
    r = dataclasses.replace(r, weight=weight)
    made = direct_requantize(r, ToCodes(7, 0, 255, fits=True))
    if made is None:
        assert size < 1e-4
        return
    sums = np.random.default_rng(0).integers(-largest_sum(r), largest_sum(r), (16, 5_000))
    vectors = channel_vectors(r)
    exact = sums * vectors["scale"].astype(np.float64)[:, None] + vectors["bias"].astype(np.float64)[:, None]
    wrong = codes(made, sums) != np.rint(exact) + 7
    assert np.abs(np.abs(exact - np.floor(exact)) - 0.5)[wrong].max(initial=0) < 3e-3
