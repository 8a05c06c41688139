"""What kernels pack, refuse and bound; test_random_kernels.py compares them with NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
import tvm.tirx.script.builder.ir as B
from hypothesis import given
from hypothesis import strategies as st
from regions import (
    TARGETS,
    Symbolic,
    Value,
    assert_kernel_equals_reference,
    make_grouped_weight,
    make_region,
    make_weight,
    run_kernel,
)

from mcc import ops
from mcc.backends.cpu.epilogue import emit_epilogue
from mcc.backends.cpu.integer_sums import pairs_fit
from mcc.backends.cpu.kernels.conv2d import Conv2dFloat, Conv2dInt8
from mcc.backends.cpu.kernels.conv_shape import ConvShape
from mcc.backends.cpu.kernels.dense import DenseFloat, DenseInt8, pack_panels
from mcc.backends.cpu.kernels.depthwise import Depthwise
from mcc.backends.cpu.kernels.low_bit import LowBitDense
from mcc.backends.cpu.kernels.sparse import SparseDense
from mcc.backends.cpu.kernels.sparse_slabs import SparseSlabs
from mcc.backends.cpu.kernels.tiles import PanelWidth, TileShape, panel_widths, parse_tile
from mcc.backends.cpu.microkernel import Parameter, Vectors, compiled_kernel, kernel_function
from mcc.backends.kernel import Activation, Add, QuantizedInput, Relu, Requantize, apply_epilogue


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_int8_sums_do_not_saturate_in_16_bits(target):
    """The worst case: every product at its largest, where engines that add pairs with saturation are wrong."""
    kernel = DenseInt8()
    weight = make_weight((16, 64), "int8", 2)
    weight.dense[:] = 127
    region = make_region(ops.LINEAR, (Symbolic(), 64), weight, (), QuantizedInput(1.0, 0), bias=False)
    (found,) = run_kernel(kernel, region, target, kernel.tiles(region, target)[0], [np.full((1, 64), 255, np.uint8)])
    np.testing.assert_allclose(found, np.float32(64 * 255 * 127) * weight.scale[None], rtol=1e-6)


@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_inputs_that_a_relu_made_zero_are_left_out_of_a_single_row(target, zeros):
    """Of one row alone: what is left over of many, one by one, is computed whole."""
    weight = make_weight((70, 65), "float32", 1)
    weight.dense[:, 0] = np.inf  # meets zeros, which a row by itself leaves out
    region = make_region(ops.LINEAR, (Symbolic(1), 65), weight, before=ops.RELU)
    random = np.random.default_rng(3)
    sources = [np.abs(random.standard_normal((rows, 65))).astype(np.float32) for rows in (1, 1, 7, 9)]
    for source in sources:
        source[random.random(source.shape) < zeros] = 0
        source[:, 0] = 0
    with np.errstate(invalid="ignore"):
        found = run_kernel(DenseFloat(), region, target, "8x2", sources)
    weight.dense[:, 0] = 0
    for source, result in zip(sources, found, strict=True):
        if zeros > 0.2 and len(source) == 1:
            np.testing.assert_allclose(result, DenseFloat().reference(region, source), rtol=0, atol=1e-5)
        elif len(source) > 1:
            assert np.isnan(result).all()


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_leading_dims_are_rows(target):
    region = make_region(ops.LINEAR, (Symbolic(), 3, Symbolic(), 20), make_weight((24, 20), "float32", 1))
    for kernel in (DenseFloat(),):
        assert_kernel_equals_reference(kernel, region, target, "4x2", [(2, 3, 5, 20), (1, 3, 1, 20)])


@pytest.mark.parametrize(("kernel", "image", "channels", "reason"), [
    (Conv2dFloat(), (8, 8, Symbolic()), 6, "its channels vary"),
    (Depthwise(), (8, 8, 3), 3, "it is not depthwise, or has fewer channels than a vector"),
])  # fmt: skip
def test_a_convolution_that_a_kernel_cannot_take_is_refused_in_words(kernel, image, channels, reason):
    weight = make_weight((channels, 1, 3, 3), "float32", 4)
    options = ([1, 1], [1, 1, 1, 1], [1, 1], channels)
    region = make_region(ops.CONV2D_NHWC, (Symbolic(), *image), weight, options=options)
    assert kernel.refuses(region, TARGETS[0]) == reason


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize(("channels", "groups", "size", "stride", "padding"), [
    (16, 1, 3, 1, 1), (3, 1, 7, 2, 3), (12, 3, 3, 1, 1), (30, 1, 5, 2, 2),
])  # fmt: skip
@pytest.mark.parametrize("codes", [False, True])
def test_large_images_are_padded_part_by_part(target, channels, groups, size, stride, padding, codes):
    """Only images of many times the cache's size are: those of the random tests are not."""
    weight = make_weight((24, channels // groups, size, size), "int8" if codes else "float32", 4)
    options = ([stride] * 2, [padding, padding, padding + 1, padding], [1, 1], groups)
    activation = QuantizedInput(0.02, 17) if codes else None
    region = make_region(
        ops.CONV2D_NHWC, (Symbolic(), 150, 131, channels), weight, (Relu(),), activation, options
    )  # fmt: skip
    kernel = Conv2dInt8() if codes else Conv2dFloat()
    tile = kernel.tiles(region, target)[0]
    assert_kernel_equals_reference(kernel, region, target, tile, [(n, 150, 131, channels) for n in (1, 5)])


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize(("image", "inputs", "outputs", "padding"), [
    ((7, 11), 32, 33, 1), ((12, 12), 40, 48, 0), ((64, 1), 32, 32, 1), ((13, 5), 64, 96, 2), ((30, 31), 33, 70, 1),
])  # fmt: skip
@pytest.mark.parametrize("epilogue", [(), (Add(Value()), Relu()), (Activation("silu"), Requantize(0.03, 3, 0, 255))])
def test_winograd_equals_the_direct_form(target, image, inputs, outputs, padding, epilogue):
    weight = make_weight((outputs, inputs, 3, 3), "float32", 4)
    options = ([1, 1], [padding, padding, padding, padding + 1], [1, 1], 1)
    region = make_region(ops.CONV2D_NHWC, (Symbolic(), *image, inputs), weight, epilogue, None, options)
    kernel = Conv2dFloat()
    tiles = [t for t in kernel.tiles(region, target) if t.startswith("winograd")]
    assert len(tiles) == (2 if image == (30, 31) else 1), "blocks of few tiles, and of many where that differs"
    for tile in tiles:
        assert_kernel_equals_reference(kernel, region, target, tile, [(n, *image, inputs) for n in (1, 2, 5, 0)])


@pytest.mark.parametrize(("options", "channels", "why"), [
    (([2, 2], [1] * 4, [1, 1], 1), 64, "stride"), (([1, 1], [2] * 4, [2, 2], 1), 64, "dilation"),
    (([1, 1], [1] * 4, [1, 1], 2), 64, "groups"), (([1, 1], [1] * 4, [1, 1], 1), 16, "few channels"),
])  # fmt: skip
def test_where_winograd_has_no_form_or_no_gain_the_direct_one_is_taken(options, channels, why):
    weight = make_weight((channels, channels // options[3], 3, 3), "float32", 4)
    region = make_region(ops.CONV2D_NHWC, (1, 20, 20, channels), weight, options=options)
    assert not any(t.startswith("winograd") for t in Conv2dFloat().tiles(region, TARGETS[0])), why


def test_groups_are_joined_until_they_fill_a_vector():
    passes = ConvShape(40, 40, 10, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1)).passes(16)
    assert (passes.joined, passes.count) == (4, 3)
    assert [passes.first(p) for p in range(3)] == [0, 4, 6], "the last groups overlap those before"
    weight = np.random.default_rng(0).standard_normal((40, 4, 3, 3)).astype(np.float32)
    wide = passes.joined_weight(weight)
    assert wide.shape == (3, 16, 16, 3, 3)
    assert np.array_equal(wide[2, 5, 4:8], weight[29])
    assert np.count_nonzero(wide) == 3 * 16 * 4 * 9


def test_kernels_say_why_they_refuse():
    target = TARGETS[0]
    sparse = make_region(ops.LINEAR, (4, 8), make_weight((8, 8), "float32", 1, density=0.5))
    assert SparseDense().refuses(sparse, target) == "it has several rows"
    slender = make_region(ops.LINEAR, (Symbolic(), 7), make_weight((8, 7), "float32", 1, density=0.5))
    assert SparseDense().refuses(slender, target) == "its inputs do not fill a vector"
    single = make_region(ops.LINEAR, (1, 8), make_weight((8, 8), "float32", 1, density=0.5))
    assert SparseSlabs().refuses(single, target) == "it may have few rows, which are transposed for nothing"
    assert DenseFloat().refuses(sparse, target) == "the weight is sparse"
    dense = make_region(ops.LINEAR, (1, 8), make_weight((8, 8), "float32", 1))
    assert SparseDense().refuses(dense, target) == "the weight is dense"
    assert DenseInt8().refuses(dense, target) == "weight and activations are not both int8 with stored scales"
    grouped = make_region(ops.LINEAR, (4, 64), make_grouped_weight((8, 64), 4, 2, 1))
    assert DenseFloat().refuses(grouped, target) == "groups of the weight's inputs have scales of their own"
    assert LowBitDense().refuses(grouped, target) is None
    ragged = make_region(ops.LINEAR, (4, 60), make_grouped_weight((8, 60), 4, 5, 1))
    assert LowBitDense().refuses(ragged, target) == "groups of 12 are no multiple of 8"
    wide = make_weight((1, 60_000), "int8", 1, density=1.0)
    wide.sparse.values[:] = 127
    codes = make_region(ops.LINEAR, (1, 60_000), wide, (), QuantizedInput(0.1, 0))
    assert SparseDense().refuses(codes, target) == "its integer sums may reach 1943100000, float32 is exact to 16777216"


def test_the_last_panel_may_be_as_wide_as_the_others_and_partly_used():
    count, full, tail = panel_widths(31, TileShape(6, 2), 8)
    assert (count, full, tail) == (1, PanelWidth(2, 16), PanelWidth(2, 15))
    assert [full.used_lanes(j, 8) for j in range(2)] == [8, 8]
    assert [tail.used_lanes(j, 8) for j in range(2)] == [8, 7]


def test_panels_hold_every_weight_once_and_zeros_beyond():
    weight = np.arange(1, 37 * 5 + 1, dtype=np.float32).reshape(37, 5)
    packed = pack_panels(weight, 32, 16)
    assert sorted(packed[packed != 0]) == sorted(weight.reshape(-1))
    assert packed.size == 48 * 5
    assert np.array_equal(packed[: 32 * 5].reshape(5, 32), weight[:32].T)


@given(st.lists(st.tuples(st.integers(-127, 127), st.integers(-127, 127)), min_size=1, max_size=8))
def test_pairs_fit_exactly_when_16_bits_hold_their_sum(pairs):
    weight = np.array([[w for pair in pairs for w in pair]], np.int8)
    sums = [max(0, a) * 255 + max(0, b) * 255 for a, b in pairs] + [min(0, a) * 255 + min(0, b) * 255 for a, b in pairs]
    assert pairs_fit(weight) == (max(sums) <= 32767 and min(sums) >= -32768)


@given(st.integers(1, 99), st.integers(1, 9))
def test_a_tile_reads_what_it_wrote(rows, vectors):
    assert parse_tile(str(TileShape(rows, vectors))) == TileShape(rows, vectors)


def test_sums_that_int32_cannot_hold_are_refused():
    weight = make_weight((1, 70000), "int8", 2)
    weight.dense[:] = 127
    region = make_region(ops.LINEAR, (1, 70000), weight, (), QuantizedInput(1.0, 0), bias=False)
    assert "beyond int32" in str(DenseInt8().refuses(region, TARGETS[0]))


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize(("name", "bound"), [
    ("sigmoid", 4e-7), ("silu", 5e-7), ("tanh", 4e-7), ("gelu", 4e-7), ("gelu_to_codes", 2e-4), ("gelu_tanh", 5e-7), ("hardsigmoid", 2e-7), ("hardswish", 3e-7),
])  # fmt: skip
def test_vector_functions_keep_to_their_stated_error(target, name, bound):
    """Against float64, relative to max(|x|, 1): on a dense grid, at zero, and far outside."""
    x = np.concatenate(
        [np.linspace(-100, 100, 4000), np.linspace(-1, 1, 2000), [0.0, -0.0, 1e30, -1e30, 1e-30, 87, -87, 88.5]]
    )
    x = np.pad(x, (0, -len(x) % 16)).astype(np.float32)
    v = Vectors(target)

    def body(source, out):
        with B.serial(0, len(x) // v.lanes) as i:
            v.store(out, i * v.lanes, emit_epilogue(v, v.load(source, i * v.lanes), (Activation(name),)))

    function = kernel_function("f", [Parameter("X", x.shape, "float32"), Parameter("Y", x.shape, "float32")], body)
    module = compiled_kernel(function, target)
    out = tvm.runtime.tensor(np.zeros_like(x), tvm.cpu())
    module["f"](tvm.runtime.tensor(x, tvm.cpu()), out)
    with np.errstate(over="ignore"):
        expected = apply_epilogue(x, (Activation(name.removesuffix("_to_codes")),)).astype(np.float64)
    apart = np.abs(out.numpy() - expected) / np.maximum(np.abs(x), 1)
    assert apart.max() <= bound
