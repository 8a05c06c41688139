"""Sparse weights in steps through pairs of blocks: what is packed is the weight, in few steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from regions import Symbolic, assert_kernel_equals_reference, make_region

from mcc import ops
from mcc.backends.cpu.kernels.block_pairs import BlockPairs, pack_pairs
from mcc.backends.cpu.kernels.sparse_rows import SparseRows
from mcc.backends.kernel import SparseArrays, StoredWeight
from mcc.slabs import BLOCK, BLOCK_BITS, BLOCK_SHIFTS, PAIR_ARRAYS, TOGETHER, Cuts, elements_of_pairs
from mcc.target import missing_features, parse_target

TARGET = parse_target("cpu:avx512vnni")


def unpacked(steps: BlockPairs, inputs: int) -> np.ndarray:
    """The weight, every element of which one step has."""
    outputs, blocks = len(steps.outputs), -(-inputs // BLOCK)
    weight = np.zeros((outputs, blocks * BLOCK), steps.weight.dtype)
    values = steps.weight.reshape(-1, BLOCK)
    places = steps.places.view(np.uint8).reshape(-1, BLOCK, TOGETHER).swapaxes(1, 2).reshape(-1, BLOCK).astype(int)
    begins = np.stack([steps.blocks >> bits & (1 << BLOCK_BITS) - 1 for bits in BLOCK_SHIFTS], 1)
    assert not (begins % BLOCK).any()
    for vector in range(outputs // BLOCK):
        for step in range(TOGETHER * steps.first_steps[vector], TOGETHER * steps.first_steps[vector + 1]):
            for lane in np.flatnonzero(values[step]):
                second, place = divmod(places[step, lane], BLOCK)
                block = begins[step // 2, step % 2 + second] // BLOCK
                column = place * blocks + block if steps.apart else block * BLOCK + place
                row = steps.outputs[vector * BLOCK + lane]
                assert weight[row, column] == 0
                weight[row, column] = values[step, lane]
    return weight[:, :inputs]


def sparse(outputs: int, inputs: int, density: float, seed: int, dtype: str = "float32") -> np.ndarray:
    random = np.random.default_rng(seed)
    values = random.integers(1, 100, (outputs, inputs))
    return (values * (random.random((outputs, inputs)) < density)).astype(dtype)


def assert_elements_are(weight: np.ndarray, steps: BlockPairs) -> None:
    """Read back for slabs: each output's stand together, input by input."""
    arrays = {key: getattr(steps, key) for key in PAIR_ARRAYS}
    found = elements_of_pairs(arrays, Cuts(*weight.shape, 16, 16), apart=steps.apart)
    assert np.count_nonzero(np.diff(found.outputs, prepend=-1)) == np.count_nonzero(weight.any(1))
    along = np.argsort(found.outputs, kind="stable")
    outputs, inputs = np.nonzero(weight)
    np.testing.assert_array_equal(found.outputs[along], outputs)
    np.testing.assert_array_equal(found.inputs[along], inputs)
    np.testing.assert_array_equal(found.values[along], weight[outputs, inputs])
    assert found.values.dtype == weight.dtype


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4), st.integers(32, 300), st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]), st.integers(0, 9),
    st.sampled_from(["float32", "int8"]),
)  # fmt: skip
def test_every_weight_is_in_one_step(vectors, inputs, density, seed, dtype):
    weight = sparse(vectors * BLOCK, inputs, density, seed, dtype)
    steps = pack_pairs(weight)
    assert steps.weight.dtype == weight.dtype
    np.testing.assert_array_equal(unpacked(steps, inputs), weight)
    assert_elements_are(weight, steps)


def test_outputs_that_read_nothing_cost_nothing():
    weight = sparse(3 * BLOCK, 64, 0.5, 0)
    weight[::3] = 0
    steps = pack_pairs(weight)
    assert steps.first_steps[1] == 0
    np.testing.assert_array_equal(unpacked(steps, 64), weight)


@pytest.mark.parametrize(("density", "most"), [(0.1, 1.3), (0.3, 1.05), (1.0, 1.0)])
def test_few_steps_are_beyond_those_that_full_ones_would_take(density, most):
    weight = sparse(256, 768, density, 1)
    assert len(pack_pairs(weight).blocks) * 2 <= most * np.count_nonzero(weight) / BLOCK


def test_blocks_are_inputs_apart_where_neighbours_go_together():
    """As pixels do: every output reads a window of its own, of inputs that lie side by side."""
    weight = sparse(64, 512, 0.5, 2)
    for output, row in enumerate(weight):
        row[: 7 * output], row[7 * output + 64 :] = 0, 0
    steps = pack_pairs(weight)
    assert steps.apart
    np.testing.assert_array_equal(unpacked(steps, 512), weight)
    assert_elements_are(weight, steps)
    assert not pack_pairs(sparse(64, 512, 0.1, 2)).apart


def test_steps_that_touch_blocks_of_their_own_stand_with_steps_of_zeros():
    """Output 0 reads blocks 0 and 1, output 1 blocks 2 and 3, and no other step shares one with either."""
    weight = np.zeros((BLOCK, 64), np.float32)
    weight[0, [0, 17]], weight[1, [33, 50]] = (1, 2), (3, 4)
    steps = pack_pairs(weight)
    np.testing.assert_array_equal(unpacked(steps, 64), weight)
    assert len(steps.blocks) * 2 == TOGETHER


@pytest.mark.skipif(bool(missing_features(TARGET)), reason="this CPU permutes no two registers")
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 11, Symbolic()], ids=["1", "2", "3", "6", "11", "any"])
@pytest.mark.parametrize("inputs", [512, 528, 784])
def test_rows_whose_blocks_are_inputs_apart(rows, inputs):
    weight = sparse(50, inputs, 0.3, 3)
    for output, row in enumerate(weight):
        row[: 9 * output], row[9 * output + 64 :] = 0, 0
    assert pack_pairs(np.pad(weight, ((0, 14), (0, 0)))).apart
    kept = weight != 0
    pointers = np.array([0, *kept.sum(1).cumsum()], np.int32)
    arrays = SparseArrays(weight[kept], np.nonzero(kept)[1].astype(np.uint16), pointers)
    region = make_region(ops.LINEAR, (rows, inputs), StoredWeight("w", weight.shape, None, arrays, None), ())
    known, (tile,) = isinstance(rows, int), SparseRows().tiles(region, TARGET)
    shapes = [(m, inputs) for m in ((rows,) if known else (0, 1, 5, 12, 13, 33, 64, 65, 83, 128, 200))]
    assert_kernel_equals_reference(SparseRows(), region, TARGET, tile, shapes)
