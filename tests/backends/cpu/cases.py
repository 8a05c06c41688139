"""Random regions with a kernel that takes them: any shape, stride, grouping, padding, format and epilogue."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from regions import Symbolic, Value, make_grouped_weight, make_region, make_table_weight, make_weight

from mcc import ops
from mcc.backends.cpu.kernels.byte_windows import steps_of
from mcc.backends.cpu.kernels.conv2d import Conv2dFloat, Conv2dInt8
from mcc.backends.cpu.kernels.dense import DenseFloat, DenseInt8
from mcc.backends.cpu.kernels.dense_per_token import DensePerToken
from mcc.backends.cpu.kernels.depthwise import Depthwise
from mcc.backends.cpu.kernels.depthwise_int8 import DepthwiseInt8
from mcc.backends.cpu.kernels.low_bit import LowBitDense
from mcc.backends.cpu.kernels.low_bit_per_token import LowBitPerToken
from mcc.backends.cpu.kernels.sparse import SparseDense
from mcc.backends.cpu.kernels.sparse_blocks import SparseBlocks
from mcc.backends.cpu.kernels.sparse_codes import SparseCodes, SparsePerToken
from mcc.backends.cpu.kernels.sparse_codes_conv import SparseCodesConv2d, codes_of_a_run
from mcc.backends.cpu.kernels.sparse_conv import DepthwisePlanes, SparseConv2d
from mcc.backends.cpu.kernels.sparse_n_of_m import SparseNofM
from mcc.backends.cpu.kernels.sparse_rows import SparseRows
from mcc.backends.cpu.kernels.sparse_slabs import SparseSlabs
from mcc.backends.kernel import (
    PER_TOKEN,
    Activation,
    Add,
    Clamp,
    Kernel,
    Multiply,
    NofMArrays,
    QuantizedInput,
    Region,
    Relu,
    Requantize,
    Rescale,
    RescaleSums,
    Scale,
)
from mcc.sparse_formats import AMONG, BLOCKS
from mcc.target import Target

ROWS = [1, 2, 3, 5, 7, 16, 33, 64, 65, 131]
OTHER = Value()
TABLES = (2, 3, 4)  # bits
FORMATS = ("float32", "int8", "codes")  # "int8": the weight alone, "codes": weight and activations
ACTIVATIONS = ("sigmoid", "silu", "tanh", "gelu", "gelu_tanh", "hardsigmoid", "hardswish")
FAMILIES = (
    "dense_float",
    "dense_int8",
    "dense_per_token",
    "low_bit",
    "low_bit_per_token",
    "sparse",
    "sparse_codes",
    "sparse_rows",
    "sparse_slabs",
    "sparse_blocks",
    "sparse_n_of_m",
    "sparse_conv2d",
    "sparse_codes_conv2d",
    "depthwise_planes",
    "conv2d",
    "depthwise",
    "depthwise_int8",
)


@dataclass(frozen=True)
class Case:
    """A kernel, what it runs, and the shapes of the sources it is called with."""

    kernel: Kernel
    region: Region
    tile: str
    shapes: list[tuple[int, ...]]


@st.composite
def cases(draw: Any, family: str, target: Target) -> Case:
    """A case of a family for a target."""
    kernel, region, shapes = draw(_DRAWN[family](target))
    codes = region.activation is not None and not region.activation.per_token and region.weight.scale is not None
    if codes and region.anchor.op is not ops.CONV2D and draw(st.integers(0, 2)) == 0:
        integers = draw(integer_regions(region))
        region = integers if kernel.refuses(integers, target) is None else region
    tiles = kernel.tiles(region, target)
    return Case(kernel, region, tiles[draw(st.integers(0, 4)) % len(tiles)], shapes)


@st.composite
def epilogues(draw: Any) -> tuple[Any, ...]:
    """Up to three steps in any order, then perhaps a requantize."""
    step = st.one_of(
        st.just(Relu()),
        st.builds(Clamp, st.sampled_from([-1.0, 0.0]), st.sampled_from([0.5, 6.0])),
        st.builds(Activation, st.sampled_from(ACTIVATIONS)),
        st.builds(Scale, st.sampled_from([-0.5, 1.702])),
    )
    codes = st.builds(QuantizedInput, st.just(0.03), st.integers(0, 255))
    kinds = st.sampled_from([Add, Multiply])
    step = st.one_of(step, st.builds(lambda kind, c: kind(OTHER, c), kinds, st.one_of(st.none(), codes)))
    steps = draw(st.lists(step, max_size=3))
    if draw(st.booleans()):
        low, high = draw(st.sampled_from([(0, 255), (0, 255), (3, 200), (0, 127)]))
        steps.append(Requantize(draw(st.sampled_from([0.03, 0.0625])), draw(st.integers(0, 255)), low, high))
    return tuple(steps)


@st.composite
def integer_regions(draw: Any, region: Region) -> Region:
    """The same layer with integers for scales and bias, its sums rescaled; some products are out of bounds."""
    outputs, random = region.weight.shape[0], np.random.default_rng(draw(st.integers(0, 9)))
    factors = (10.0 ** random.uniform(-5, draw(st.sampled_from([-2, 0.5])), outputs)).astype(np.float32)
    steps: list[Any] = [RescaleSums(factors, draw(st.sampled_from([None, 0, 0, 3, 8])))]
    codes = st.builds(QuantizedInput, st.sampled_from([0.37, 1.1, 70.0]), zero_points, st.just(False), st.just(8))
    further = st.one_of(
        st.just(Relu()), st.just(Clamp(-20.0, 100.5)), st.just(Rescale(0.3, 0)), codes.map(lambda c: Add(OTHER, c))
    )
    joins = region.anchor.op is not ops.CONV2D or region.weight.sparse is None
    steps += [s for s in draw(st.lists(further, max_size=2)) if joins or not isinstance(s, Add)]
    if draw(st.booleans()):
        steps.append(Requantize(1.0, draw(st.integers(0, 255)), *draw(st.sampled_from([(0, 255), (3, 200)]))))
    bias = None if region.bias is None else np.rint(region.bias * 1000).astype(np.float32)
    weight = replace(region.weight, scale=np.ones(outputs, np.float32))
    activation = QuantizedInput(1.0, draw(zero_points))
    return replace(region, weight=weight, bias=bias, activation=activation, epilogue=tuple(steps))


channels = st.one_of(st.sampled_from([1, 3, 4, 16, 32, 64]), st.integers(1, 70))
zero_points = st.one_of(st.just(0), st.integers(0, 255))


@st.composite
def _dense(draw: Any, target: Target, form: str) -> tuple[Kernel, Region, list[tuple[int, ...]]]:
    inputs, outputs = draw(channels), draw(channels)
    bias = draw(st.booleans())
    if form != "float":
        limit = draw(st.sampled_from([target.int8_weight_limit, 127]))
        weight = make_weight((outputs, inputs), "int8", 2, limit)
        activation = PER_TOKEN if form == "per token" else QuantizedInput(0.02, draw(zero_points))
        kernel: Kernel = DensePerToken() if form == "per token" else DenseInt8()
    else:
        weight, activation = make_weight((outputs, inputs), draw(st.sampled_from(FORMATS[:2])), 1), None
        kernel = DenseFloat()
    before = draw(st.sampled_from([None, ops.RELU])) if form == "float" else None
    region = make_region(
        ops.LINEAR, (Symbolic(), inputs), weight, draw(epilogues()), activation, bias=bias, before=before
    )
    return kernel, region, [(m, inputs) for m in (*ROWS, 0)]


@st.composite
def _low_bit(draw: Any, target: Target, per_token: bool) -> tuple[Kernel, Region, list[tuple[int, ...]]]:
    bits, outputs = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(channels)
    zeros = draw(st.sampled_from(["none", "affine", "halves"]))
    groups = draw(st.integers(1, 4))
    tables = bits in TABLES and not per_token and target.isa != "neon"
    span = draw(st.sampled_from([0, 1, 2])) if tables else 0  # 0 for codes that are numbers
    inputs = max(span, 1) * draw(channels) if groups == 1 else groups * draw(st.sampled_from([64, 128]))
    weight = (
        make_table_weight((outputs, inputs), bits, groups, 5, span)
        if span
        else make_grouped_weight((outputs, inputs), bits, groups, 5, zeros)
    )
    rows = Symbolic(draw(st.sampled_from([1, 64])))
    activation = PER_TOKEN if per_token else None
    region = make_region(ops.LINEAR, (rows, inputs), weight, draw(epilogues()), activation, bias=draw(st.booleans()))
    return LowBitPerToken() if per_token else LowBitDense(), region, [(m, inputs) for m in (*ROWS, 0)]


@st.composite
def _sparse(draw: Any, target: Target, *, blocks: bool) -> tuple[Kernel, Region, list[tuple[int, ...]]]:
    block = draw(st.sampled_from(BLOCKS)) if blocks else (1, 1)
    outputs, inputs = (size * draw(st.integers(1, 70 // size)) for size in block)
    alone = inputs < target.vector_lanes or draw(st.booleans())
    known = draw(st.sampled_from([1, 2, 3])) if blocks else 1
    form, density = draw(st.sampled_from(FORMATS)), draw(st.sampled_from([0.0, 0.05, 0.3, 1.0]))
    weight = make_weight((outputs, inputs), "float32" if form == "float32" else "int8", 3, density=density, block=block)
    activation = QuantizedInput(0.02, draw(zero_points)) if form == "codes" else None
    region = make_region(
        ops.LINEAR,
        (known if alone else Symbolic(), inputs),
        weight,
        draw(epilogues()),
        activation,
        bias=draw(st.booleans()),
    )
    return (
        SparseBlocks() if blocks else SparseDense(),
        region,
        [(m, inputs) for m in ([known] if alone else (*ROWS, 0))],
    )


@st.composite
def _sparse_codes(draw: Any, target: Target) -> tuple[Kernel, Region, list[tuple[int, ...]]]:
    block = draw(st.sampled_from([(1, 1), (16, 1)]))
    outputs = block[0] * draw(st.integers(1, 70 // block[0]))
    few = _window(target)
    inputs = draw(st.one_of(st.sampled_from([few, few + 1, few + 3, 256]), st.integers(few, 300)))
    density, limit = draw(st.sampled_from([0.0, 0.02, 0.1, 0.4, 1.0])), draw(st.sampled_from([63, 127]))
    weight = make_weight((outputs, inputs), "int8", 3, limit, density=density, block=block)
    rows, steps, bias = draw(st.sampled_from([Symbolic(), 1, 3])), draw(epilogues()), draw(st.booleans())
    activation = draw(st.one_of(st.just(PER_TOKEN), zero_points.map(lambda z: QuantizedInput(0.02, z))))
    region = make_region(ops.LINEAR, (rows, inputs), weight, steps, activation, bias=bias)
    return (
        SparsePerToken() if activation is PER_TOKEN else SparseCodes(),
        region,
        [(m, inputs) for m in ((*ROWS, 0) if isinstance(rows, Symbolic) else (rows,))],
    )


@st.composite
def _sparse_rows(draw: Any, target: Target) -> tuple[Kernel, Region, list[tuple[int, ...]]]:
    outputs, inputs = draw(st.integers(1, 70)), draw(st.one_of(st.sampled_from([32, 64, 256]), st.integers(32, 300)))
    density = draw(st.sampled_from([0.0, 0.02, 0.1, 0.4, 1.0]))
    weight = make_weight((outputs, inputs), draw(st.sampled_from(FORMATS[:2])), 3, density=density)
    rows = draw(st.sampled_from([(), (1,), (2,), (1, 3), (6,), (3, 4), (11,), (Symbolic(),), (Symbolic(), 3)]))
    region = make_region(ops.LINEAR, (*rows, inputs), weight, draw(epilogues()), bias=draw(st.booleans()))
    known = all(isinstance(size, int) for size in rows)
    shapes = [rows] if known else [(m, *rows[1:]) for m in (*ROWS, 0, 12, 13, 83)]
    return SparseRows(), region, [(*shape, inputs) for shape in shapes]


@st.composite
def _sparse_slabs(draw: Any, target: Target) -> tuple[Kernel, Region, list[tuple[int, ...]]]:
    # parts have 128 outputs at least, slabs some 8 elements of an output or what the nearest cache holds
    high, wide = block = draw(st.sampled_from(BLOCKS)) if draw(st.booleans()) else (1, 1)
    outputs = high * -(-draw(st.sampled_from([1, 16, 70, 131, 260, 600])) // high)
    inputs = wide * -(-draw(st.sampled_from([16, 33, 130, 420])) // wide)
    density, form = draw(st.sampled_from([0.0, 0.02, 0.1, 0.4, 1.0])), draw(st.sampled_from(FORMATS))
    weight = make_weight((outputs, inputs), "float32" if form == "float32" else "int8", 3, density=density, block=block)
    activation = QuantizedInput(0.02, draw(zero_points)) if form == "codes" else None
    fewest = [] if block != (1, 1) else [(2,), (3,), (1, 5)]
    rows = draw(st.sampled_from([*fewest, (7,), (16,), (1, 33), (64,), (5, 20), (321,), (3, 171), (Symbolic(), 7)]))
    region = make_region(ops.LINEAR, (*rows, inputs), weight, draw(epilogues()), activation, bias=draw(st.booleans()))
    known = all(isinstance(size, int) for size in rows)
    return SparseSlabs(), region, [(*rows, inputs)] if known else [(m, *rows[1:], inputs) for m in (0, 1, 2, 5, 19)]


@st.composite
def _n_of_m(draw: Any, target: Target) -> tuple[Kernel, Region, list[tuple[int, ...]]]:
    among = draw(st.sampled_from(AMONG))
    kept, groups, outputs = draw(st.integers(1, among // 2)), draw(st.integers(1, 20)), draw(channels)
    dense = make_weight((outputs, groups * among), draw(st.sampled_from(FORMATS[:2])), 6)
    random = np.random.default_rng(8)
    places = np.sort(random.random((outputs, groups, among)).argsort(-1)[..., :kept], -1).astype(np.int8)
    assert dense.dense is not None
    values = np.take_along_axis(dense.dense.reshape(outputs, groups, among), places.astype(np.int64), 2)
    weight = replace(dense, dense=None, sparse=NofMArrays(values, places, among))
    if draw(st.booleans()):  # groups of inputs share scales
        shared = draw(st.sampled_from([n for n in range(1, groups + 1) if groups % n == 0]))
        codes = make_grouped_weight((outputs, groups * kept), draw(st.sampled_from([2, 3, 4, 8])), shared, 6)
        assert codes.dense is not None
        arrays = NofMArrays(codes.dense.reshape(values.shape), places, among)
        weight = replace(codes, shape=weight.shape, dense=None, sparse=arrays)
    rows = Symbolic(draw(st.sampled_from([1, 64])))
    region = make_region(ops.LINEAR, (rows, groups * among), weight, draw(epilogues()), bias=draw(st.booleans()))
    return SparseNofM(), region, [(m, groups * among) for m in (*ROWS, 0)]


@st.composite
def _windows(draw: Any, image: tuple[int, int]) -> tuple[tuple[int, int], list[int], list[int], list[int]]:
    """Kernel size, stride, padding (top, left, bottom, right) and dilation for which an image gives some output."""
    kernel, stride, dilation, before, after = [], [], [], [], []
    for extent in image:
        kernel.append(draw(st.sampled_from([1, 2, 3, 3, 5, 7])))
        stride.append(draw(st.sampled_from([1, 1, 2, 3])))
        dilation.append(draw(st.sampled_from([1, 1, 1, 2, 5])))
        reach = (kernel[-1] - 1) * dilation[-1] + 1
        before.append(draw(st.integers(max(0, (reach - extent + 1) // 2), max(3, reach))))
        after.append(draw(st.integers(max(0, reach - extent - before[-1]), max(3, reach))))
    return (kernel[0], kernel[1]), stride, [*before, *after], dilation


@st.composite
def _conv2d(draw: Any, target: Target, family: str) -> tuple[Kernel, Region, list[tuple[int, ...]]]:
    image = (draw(st.integers(1, 15)), draw(st.integers(1, 20)))
    size, stride, padding, dilation = draw(_windows(image))
    if family == "conv2d":
        groups = draw(st.sampled_from([1, 1, 1, 2, 3, 8, 13, 20]))
        most = 70 // groups
        inputs, outputs = (groups * draw(st.integers(1, most)) for _ in range(2))
        outputs = draw(st.sampled_from([inputs, outputs]))
    else:
        groups = inputs = outputs = draw(st.integers(16, 100))
    form = "codes" if family == "depthwise_int8" else draw(st.sampled_from(FORMATS))
    kernel: Kernel = {"depthwise": Depthwise(), "depthwise_int8": DepthwiseInt8()}.get(
        family, Conv2dInt8() if form == "codes" else Conv2dFloat()
    )
    limit = target.int8_weight_limit if family == "depthwise_int8" else draw(st.sampled_from([63, 127]))
    shape = (outputs, inputs // groups, *size)
    weight = make_weight(shape, "float32" if form == "float32" else "int8", 4, limit)
    activation = QuantizedInput(0.02, draw(zero_points)) if form == "codes" else None
    if family == "depthwise_int8":
        dilation = [dilation[0], 1]
    options = (stride, padding, dilation, groups)
    seldom = 9 if family == "depthwise_int8" else 6  # its code for any size takes seconds to compile
    height, width = (Symbolic(size) if draw(st.integers(1, seldom)) == 1 else size for size in image)
    region = make_region(
        ops.CONV2D_NHWC, (Symbolic(), height, width, inputs), weight, draw(epilogues()), activation, options,
        bias=draw(st.booleans()),
    )  # fmt: skip
    more = [draw(st.sampled_from([0, 1, 2, 5, 30])) if isinstance(size, Symbolic) else 0 for size in (height, width)]
    larger = [size + grown for size, grown in zip(image, more, strict=True)]
    return kernel, region, [(1, *larger, inputs), *((n, *image, inputs) for n in (1, 2, 5, 0))]


def _window(target: Target) -> int:
    """Codes of which those of a step are picked."""
    steps = steps_of(target)
    assert steps is not None
    return steps.window


@st.composite
def _sparse_codes_conv2d(draw: Any, target: Target) -> tuple[Kernel, Region, list[tuple[int, ...]]]:
    image = (draw(st.integers(1, 15)), draw(st.integers(1, 20)))
    size, stride, padding, dilation = draw(_windows(image))
    fewest = -(-_window(target) // codes_of_a_run(1, size, (dilation[0], dilation[1])))
    inputs = max(fewest, draw(st.one_of(st.sampled_from([64, 128]), st.integers(fewest, fewest + 70))))
    block = draw(st.sampled_from([(1, 1), (16, 1)]))
    outputs, density = block[0] * draw(st.integers(1, 70 // block[0])), draw(st.sampled_from([0.0, 0.02, 0.1, 0.4]))
    limit = draw(st.sampled_from([63, 127]))
    weight = make_weight((outputs, inputs, *size), "int8", 4, limit, density=density, block=block)
    activation = QuantizedInput(0.02, draw(zero_points))
    region = make_region(
        ops.CONV2D_NHWC, (Symbolic(), *image, inputs), weight, draw(epilogues()), activation,
        (stride, padding, dilation, 1), bias=draw(st.booleans()),
    )  # fmt: skip
    return SparseCodesConv2d(), region, [(n, *image, inputs) for n in (1, 2, 5, 0)]


@st.composite
def _sparse_conv2d(draw: Any, target: Target, *, depthwise: bool) -> tuple[Kernel, Region, list[tuple[int, ...]]]:
    del target
    image = (draw(st.integers(1, 15)), draw(st.one_of(st.integers(1, 20), st.integers(100, 150))))
    size, stride, padding, dilation = draw(_windows(image))
    groups = draw(st.integers(2, 70)) if depthwise else draw(st.sampled_from([1, 1, 1, 2, 3, 8]))
    most = 1 if depthwise else 70 // groups
    inputs, outputs = (groups * draw(st.integers(1, most)) for _ in range(2))
    form = draw(st.sampled_from(FORMATS[:2] if depthwise else FORMATS))
    density = None if depthwise else draw(st.sampled_from([0.0, 0.05, 0.3, 1.0]))
    block = draw(st.sampled_from([(1, 1), (4, 1), (8, 1)])) if density is not None else (1, 1)
    outputs = -(-outputs // block[0]) * block[0] if groups == 1 else outputs
    block = block if groups == 1 else (1, 1)
    shape, dtype = (outputs, inputs // groups, *size), "float32" if form == "float32" else "int8"
    weight = make_weight(shape, dtype, 4, 63, density=density, block=block)
    activation = QuantizedInput(0.02, draw(zero_points)) if form == "codes" else None
    region = make_region(
        ops.CONV2D, (Symbolic(), inputs, *image), weight, draw(epilogues()), activation,
        (stride, padding[:2], dilation, groups), bias=draw(st.booleans()),
    )  # fmt: skip
    return DepthwisePlanes() if depthwise else SparseConv2d(), region, [(n, inputs, *image) for n in (1, 2, 5, 0)]


_DRAWN = {
    "sparse_codes_conv2d": _sparse_codes_conv2d,
    "sparse_conv2d": lambda target: _sparse_conv2d(target, depthwise=False),
    "depthwise_planes": lambda target: _sparse_conv2d(target, depthwise=True),
    "dense_float": lambda t: _dense(t, "float"),
    "dense_int8": lambda t: _dense(t, "one scale"),
    "dense_per_token": lambda t: _dense(t, "per token"),
    "low_bit": lambda target: _low_bit(target, per_token=False),
    "low_bit_per_token": lambda target: _low_bit(target, per_token=True),
    "sparse": lambda target: _sparse(target, blocks=False),
    "sparse_codes": _sparse_codes,
    "sparse_rows": _sparse_rows,
    "sparse_slabs": _sparse_slabs,
    "sparse_n_of_m": _n_of_m,
    "sparse_blocks": lambda target: _sparse(target, blocks=True),
    "conv2d": lambda t: _conv2d(t, "conv2d"),
    "depthwise": lambda t: _conv2d(t, "depthwise"),
    "depthwise_int8": lambda t: _conv2d(t, "depthwise_int8"),
}
