"""The kernel of transposes: which orders of dims it takes, and that it moves every element."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from regions import TARGETS, run_function
from tvm import tirx

from mcc.backends.cpu.kernels.transpose import Sides, sides, takes_transpose, transpose_function

NARROW_AND_WIDE = list(dict.fromkeys([TARGETS[0], TARGETS[-1]]))
VARIES = tirx.Var("n", "int64")  # a dim that is read at run time


def test_orders_that_are_transposes_of_matrices():
    assert sides((2, 3, 8, 9), (0, 2, 3, 1)) == Sides((0,), (1,), (2, 3))
    assert sides((2, 8, 9, 3), (0, 3, 1, 2)) == Sides((0,), (1, 2), (3,))
    assert sides((8, 9), (1, 0)) == Sides((), (0,), (1,))
    assert sides((1, 1, 8, 9), (3, 2, 0, 1)) == Sides((), (2,), (3,))
    assert sides((2, 3, 4, 5), (0, 2, 1, 3)) is None
    assert sides((2, 3, 4), (2, 1, 0)) is None
    assert sides((1, 3, 4), (1, 0, 2)) is None


def test_sides_need_a_vector_of_float_or_few_elements_beside_one():
    target = TARGETS[-1]
    assert takes_transpose((1, 3, 8, 9), (0, 2, 3, 1), "uint8", target)
    assert takes_transpose((1, 40, 8, 9), (0, 2, 3, 1), "float32", target)
    assert not takes_transpose((1, 40, 8, 9), (0, 2, 3, 1), "uint8", target)
    assert not takes_transpose((1, 40, 8, 9), (0, 2, 3, 1), "int64", target)
    assert not takes_transpose((1, 3, 2, 2), (0, 2, 3, 1), "float32", target)
    assert not takes_transpose((2, 0, 64), (0, 2, 1), "float32", target)
    assert takes_transpose((VARIES, 3, VARIES, VARIES), (0, 2, 3, 1), "float32", target)


@pytest.mark.parametrize("target", NARROW_AND_WIDE, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize("few", [2, 3, 4])
def test_few_channels_are_interleaved_and_taken_apart(target, dtype, few):
    for size, varies in itertools.product([(4, 9), (5, 41)], [False, True]):
        check((2, few, *size), (0, 2, 3, 1), dtype, target, varies=varies)
        check((2, *size, few), (0, 3, 1, 2), dtype, target, varies=varies)


@pytest.mark.parametrize("target", NARROW_AND_WIDE, ids=str)
@pytest.mark.parametrize("size", [(16, 16), (17, 35), (40, 16), (131, 19)])
def test_blocks_cover_sides_that_are_no_multiple_of_a_vector(target, size):
    check((3, *size), (0, 2, 1), "float32", target)
    check(size, (1, 0), "float32", target)
    check((3, *size), (0, 2, 1), "float32", target, varies=True)


@pytest.mark.parametrize("size", [(1, 40), (5, 3), (40, 7), (0, 40), (40, 0)])
def test_sides_that_vary_may_be_short_or_empty(size):
    check((2, *size), (0, 2, 1), "float32", TARGETS[0], varies=True)


def check(dims, order, dtype, target, *, varies=False):
    x = np.random.default_rng(1).integers(0, 256, dims).astype(dtype)
    known = tuple(VARIES if varies and size not in (2, 3, 4) else size for size in dims)
    wanted = np.ascontiguousarray(x.transpose(order))
    function = transpose_function(known, order, dtype, target).with_attr("global_symbol", "transpose")
    (found,) = run_function(function, target, [[x, np.zeros_like(wanted)]])
    np.testing.assert_array_equal(found, wanted)
