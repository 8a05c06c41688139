"""Layers in AMX's tile registers: against exact sums on CPUs that have them, and as machine code on all."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from regions import Symbolic, Value, assert_kernel_equals_reference, make_region, make_weight
from torch import nn

import mcc
from mcc import ops, target
from mcc.backends.cpu.kernels import conv2d_loops, panels
from mcc.backends.cpu.kernels.ahead import NextPanel
from mcc.backends.cpu.kernels.conv2d import Conv2dInt8
from mcc.backends.cpu.kernels.conv2d_bfloat16 import Conv2dBfloat16
from mcc.backends.cpu.kernels.dense import DenseInt8
from mcc.backends.cpu.kernels.dense_bfloat16 import DenseBfloat16
from mcc.backends.cpu.kernels.dense_per_token import DensePerToken
from mcc.backends.cpu.kernels.tile_registers import TILE, in_pairs, words_of_a_step
from mcc.backends.cpu.microkernel import tvm_target
from mcc.backends.cpu.profile import peak
from mcc.backends.kernel import (
    PER_TOKEN,
    Activation,
    Add,
    Clamp,
    QuantizedInput,
    Relu,
    Requantize,
    StoredWeight,
    to_bfloat16,
)
from mcc.target import missing_features, parse_target

TARGET = parse_target("cpu:amx")
MISSING = missing_features(TARGET)
needs_tiles = pytest.mark.skipif(bool(MISSING), reason=f"this CPU lacks {', '.join(MISSING)}")
COMPILED = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
CODES = QuantizedInput(0.02, 131)
REQUANTIZE = Requantize(0.05, 3, 0, 255)
EPILOGUES = st.sampled_from([
    (), (REQUANTIZE,), (Relu(), REQUANTIZE), (Activation("silu"),), (Add(Value(), QuantizedInput(0.03, 7)), REQUANTIZE),
    (Clamp(0.0, 1.0), Add(Value()), Relu()),
])  # fmt: skip
WORDS = st.sampled_from([4, 6, 7, 15, 16, 18, 32, 37 * 4])  # of a row: of one step or several, full or not


def bfloat16_weight(shape):
    dense = make_weight(shape, "float32", 1).dense
    return StoredWeight("w", shape, to_bfloat16(dense), None, None)


def dense_case(kind, rows, words, outputs, epilogue):
    """A kernel and a region of rows of so many words."""
    if kind == "bfloat16":
        inputs = 2 * words
        region = make_region(ops.LINEAR, (rows, inputs), bfloat16_weight((outputs, inputs)), epilogue)
        return DenseBfloat16(), dataclasses.replace(region, rounds=True)
    inputs = 4 * words
    kernel, codes = (DenseInt8(), CODES) if kind == "int8" else (DensePerToken(), PER_TOKEN)
    return kernel, make_region(ops.LINEAR, (rows, inputs), make_weight((outputs, inputs), "int8", 1), epilogue, codes)


@needs_tiles
@settings(max_examples=25, **COMPILED)
@given(st.sampled_from(["int8", "per token", "bfloat16"]), WORDS, st.integers(1, 70), EPILOGUES, st.integers(0, 90))
def test_dense_layers_of_any_number_of_rows(kind, words, outputs, epilogue, fixed):
    rows = [fixed] if fixed >= 5 else [0, 1, 4, 5, 7, 16, 31, 32, 33, 65, 129]
    kernel, region = dense_case(kind, fixed if fixed >= 5 else Symbolic(), words, outputs, epilogue)
    assert kernel.refuses(region, TARGET) is None
    assert kernel.tiles(region, TARGET)[0] == TILE
    shapes = [(n, region.weight.shape[1]) for n in rows]
    assert_kernel_equals_reference(kernel, region, TARGET, TILE, shapes)


@st.composite
def convolutions(draw):
    """Sizes of a convolution that tiles take: source, weight, options."""
    word = draw(st.sampled_from([4, 2]))
    groups = draw(st.sampled_from([1, 1, 1, 2]))
    inputs = word * draw(st.sampled_from([4, 8, 16, 24])) if groups == 2 else draw(st.sampled_from([3, 16, 32, 64, 96]))
    outputs = groups * draw(st.sampled_from([16, 24, 33, 64]))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (1, 5), (7, 7)]))
    stride, dilation = draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 1, 2]))
    padding = draw(st.sampled_from([[0, 0, 0, 0], [1, 1, 1, 1], [0, 2, 1, 3]]))
    height, width = draw(st.integers(13, 20)), draw(st.integers(13, 70))
    if kernel == (1, 1):
        height, width = draw(st.sampled_from([(7, 7), (1, 40), (40, 1), (12, 50)]))
    source = draw(st.sampled_from([1, 3, 5])), height, width, groups * inputs
    return word, source, (outputs, inputs, *kernel), ([stride] * 2, padding, [dilation] * 2, groups)


@needs_tiles
@settings(max_examples=60, **COMPILED)
@given(convolutions(), EPILOGUES, st.booleans())
def test_convolutions(sizes, epilogue, varies):
    word, (batch, height, width, inputs), shape, options = sizes
    source = (batch, Symbolic(height), Symbolic(width), inputs) if varies else (batch, height, width, inputs)
    if word == 4:
        kernel: Conv2dInt8 | Conv2dBfloat16 = Conv2dInt8()
        region = make_region(ops.CONV2D_NHWC, source, make_weight(shape, "int8", 1), epilogue, CODES, options)
    else:
        kernel = Conv2dBfloat16()
        region = make_region(ops.CONV2D_NHWC, source, bfloat16_weight(shape), epilogue, None, options)
        region = dataclasses.replace(region, rounds=True)
    if kernel.refuses(region, TARGET) is None and TILE in kernel.tiles(region, TARGET):
        others = [(batch, height + 3, width + 21, inputs), (batch, height, width + 4, inputs)] if varies else []
        assert_kernel_equals_reference(kernel, region, TARGET, TILE, [(batch, height, width, inputs), *others])


@pytest.mark.parametrize("kind", ["int8", "per token", "bfloat16"])
def test_the_machine_code_multiplies_tiles(kind):
    """What is cross-compiled, on every machine."""
    kernel, region = dense_case(kind, 40, 32, 48, ())
    lowered = kernel.lower(region, TARGET, TILE)
    module = tvm.tirx.build(tvm.IRModule.from_expr(lowered.function), target=tvm_target(TARGET))
    code = module.inspect_source("asm")
    instruction = "tdpbf16ps" if kind == "bfloat16" else "tdpbusd"
    assert code.count(instruction) >= 4
    assert code.count("tileloadd") >= 8
    # what is prepared is released again
    assert code.count("ldtilecfg") == code.count("tilerelease") > 0


@pytest.mark.parametrize("module", [conv2d_loops, panels])
def test_what_blocks_ask_for_ahead_is_all_of_the_weights(module, monkeypatch):
    """In words, however many of them a step multiplies."""
    asked = []

    class Recorded(NextPanel):
        def share(self, v, rows, example=1):
            asked.append((self.size, self.words * self.steps))
            return super().share(v, rows, example)

    monkeypatch.setattr(module, "NextPanel", Recorded)
    if module is panels:
        kernel, region = dense_case("int8", 40, 64, 96, ())
    else:
        kernel, weight = Conv2dInt8(), make_weight((96, 64, 3, 3), "int8", 1)
        region = make_region(ops.CONV2D_NHWC, (1, 20, 20, 64), weight, (), CODES, ([1, 1], [1] * 4, [1, 1], 1))
    words = kernel.lower(region, TARGET, TILE).packed["weight"].size // 4
    assert set(asked) == {(words, words // 3)}


def test_steps_cut_a_row_evenly_and_are_not_small():
    assert [words_of_a_step(n) for n in (4, 16, 18, 20, 36, 192, 250)] == [4, 16, 9, 10, 12, 16, 10]
    # a few words fill too little of a tile, and a prime number of them leaves one
    assert [words_of_a_step(n) for n in (0, 1, 3, 29, 58)] == [None] * 5


def test_rows_are_cut_in_pairs_of_tiles_with_the_least_left_over():
    for rows in range(1, 200):
        height = in_pairs(rows)
        blocks = -(-rows // (2 * height))
        assert height <= min(rows, 16)
        assert blocks == -(-rows // 32)
        assert 2 * height * blocks - rows < 2 * blocks


def test_layers_that_tiles_do_not_suit_have_none():
    few = make_region(ops.LINEAR, (4, 64), make_weight((32, 64), "int8", 1), (), CODES)
    odd = make_region(ops.LINEAR, (64, 63), make_weight((32, 63), "int8", 1), (), CODES)
    fits = make_region(ops.LINEAR, (64, 64), make_weight((32, 64), "int8", 1), (), CODES)
    assert [TILE in DenseInt8().tiles(region, TARGET) for region in (few, odd, fits)] == [False, False, True]
    assert TILE not in DenseInt8().tiles(fits, parse_target("cpu:avx512bf16"))


def test_a_system_that_does_not_grant_tile_registers_has_none(monkeypatch):
    host = target.host_features()
    monkeypatch.setattr(target, "_tiles_permitted", lambda: False)
    assert target.host_features.__wrapped__() == host.difference({"amx_bf16", "amx_int8", "amx_tile"})


@needs_tiles
def test_the_peak_of_tiles_is_above_that_of_vectors():
    assert peak(TARGET, "int8") > peak(parse_target("cpu:avx512bf16"), "int8")


@needs_tiles
@pytest.mark.parametrize("batch", [1, 6])
def test_two_threads_call_one_artifact(batch):
    """Each thread prepares its own registers, and so does each of the pool that a call shares its work with."""
    torch.manual_seed(0)
    wide = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 64, 1)
    )
    model, x = wide.eval(), torch.randn(batch, 3, 40, 40)
    data = mcc.Data(calibration=[x])
    artifact = mcc.compile(model, (x,), passes="quantize", data=data, tuning="model", threads=2)
    assert any(row.kernel == f"conv2d_int8 {TILE}" for row in artifact.report.layers)
    inputs = [torch.randn(batch, 3, 40, 40).numpy() for _ in range(8)]
    one_by_one = [artifact(a).copy() for a in inputs]
    with ThreadPoolExecutor(2) as pool:
        at_once = list(pool.map(lambda a: artifact(a).copy(), inputs))
    for a, b in zip(one_by_one, at_once, strict=True):
        np.testing.assert_array_equal(a, b)
