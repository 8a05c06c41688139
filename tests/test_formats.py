"""Stored formats: sparse rows round-trip, encode chooses by bytes and kernel, graphs compute the same."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from networks import TiedLanguageModel, mlp
from torch import nn

import mcc
from mcc.backends import cpu
from mcc.backends.kernel import NofMArrays, SparseArrays, StoredWeight
from mcc.cost import layer_costs
from mcc.data import Data
from mcc.encode import encode
from mcc.formats import along_axis, pack, packed_bytes
from mcc.masks import best_among
from mcc.passes import PruneWeights, Quantize
from mcc.pipeline import Pipeline
from mcc.sparse_formats import BLOCKS, encode_n_of_m, encode_sparse, smallest_form, sparse_bytes
from mcc.target import parse_target


@given(
    shape=st.sampled_from([(1, 1), (3, 7), (5, 2, 3), (4, 2, 3, 3)]),
    density=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.int8]),
    seed=st.integers(0, 99),
)
def test_sparse_rows_decode_to_the_masked_weight(shape, density, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-9, 9, shape, generator=generator).to(dtype)
    mask = torch.rand(shape, generator=generator) < density
    sparse = encode_sparse(weight, mask)
    assert_decodes(sparse, weight, mask)


@given(
    block=st.sampled_from([*BLOCKS, (1, 1)]), blocks=st.sampled_from([(1, 1), (2, 3), (3, 5)]),
    density=st.floats(0.1, 0.9), seed=st.integers(0, 99),
)  # fmt: skip
def test_masks_of_whole_blocks_are_stored_by_blocks(block, blocks, density, seed):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(blocks, generator=generator) < density
    mask = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    weight = torch.randn(mask.shape, generator=generator)
    sparse = encode_sparse(weight, mask)
    if mask.any():
        assert np.prod(sparse.block) >= np.prod(block)
        assert sparse.columns.numel() * np.prod(sparse.block) == sparse.values.numel()
    assert_decodes(sparse, weight, mask)
    arrays = SparseArrays(*(t.numpy() for t in (sparse.values, sparse.columns, sparse.row_pointers)), sparse.block)
    plain = StoredWeight("w", tuple(mask.shape), None, arrays, None)
    assert np.array_equal(plain.decoded(), np.where(mask.numpy(), weight.numpy(), 0))
    assert np.diff(arrays.by_element.row_pointers).tolist() == mask.sum(1).tolist()


def assert_decodes(sparse, weight, mask):
    parts = (sparse.values, sparse.columns, sparse.row_pointers)
    decoded = torch.ops.mcc.decode_sparse(*parts, list(weight.shape), list(sparse.block))
    assert np.array_equal(decoded.numpy(), np.where(mask.numpy(), weight.numpy(), 0))
    assert sparse.stored_bytes == sparse_bytes(mask, weight.element_size())


@given(
    pattern=st.sampled_from([(1, 4), (2, 4), (4, 8), (3, 8)]), size=st.sampled_from([(1, 1), (3, 2), (5, 7)]),
    holes=st.floats(0, 0.5), seed=st.integers(0, 99),
)  # fmt: skip
def test_weights_with_n_of_m_are_stored_with_their_places(pattern, size, holes, seed):
    (kept, among), generator = pattern, torch.Generator().manual_seed(seed)
    scores = torch.rand(size[0], size[1], among, generator=generator)
    mask = (scores.argsort(-1).argsort(-1) < kept) & (torch.rand(scores.shape, generator=generator) >= holes)
    mask, weight = mask.flatten(1), torch.randn(size[0], size[1] * among, generator=generator)
    mask[0, 0] |= not mask.any()
    stored = encode_n_of_m(weight, mask)
    assert stored.values.shape == stored.places.shape
    assert torch.equal(torch.ops.mcc.decode_n_of_m(stored.values, stored.places, stored.among), weight * mask)
    arrays = NofMArrays(stored.values.numpy(), stored.places.numpy(), stored.among)
    assert np.array_equal(arrays.decoded(), (weight * mask).numpy())


def test_the_form_with_the_fewest_bytes_is_taken():
    torch.manual_seed(0)
    scores = torch.rand(64, 64)
    two_of_four = smallest_form(best_among(scores, 2, 4), 32)
    assert (str(two_of_four), two_of_four.stored_bytes) == ("2:4", 2048 * 4 + 2048 * 2 // 8)
    assert str(smallest_form(best_among(scores, 4, 8), 32)) == "4:8"
    assert str(smallest_form(scores < 0.5, 32)) == "blocks of 1x1"
    assert str(smallest_form((torch.rand(4, 64) < 0.3).repeat_interleave(16, 0), 32)) == "blocks of 16x1"


def test_two_of_four_weights_stand_with_packed_places(golden):
    torch.manual_seed(0)
    x = torch.randn(64, 40)
    before = compressed(nn.Sequential(nn.Linear(40, 24)), x, PruneWeights(ratio=0.5, pattern="2:4"))
    graph, declined = encode(before, prefer_dense)
    golden("two_of_four_layer", str(graph))
    torch.testing.assert_close(graph(x), before(x))
    assert declined == []


def test_codes_are_not_multiplied_by_n_of_m_weights_and_the_report_says_so():
    x = torch.randn(64, 40)
    steps = (PruneWeights(ratio=0.5, pattern="2:4"), Quantize())
    _, declined = encode(compressed(nn.Sequential(nn.Linear(40, 24)), x, *steps), prefer_dense)
    assert [d.reason for d in declined] == ["stored dense: no kernel multiplies codes by weights of 2:4"]


def test_two_of_four_codes_of_four_bits_stand_packed_with_packed_places_and_scales_of_groups(golden):
    torch.manual_seed(0)
    x = torch.randn(1, 64)
    steps = PruneWeights(ratio=0.5, pattern="2:4"), Quantize(weights="int4", activations=None, group_size=32)
    before = compressed(nn.Sequential(nn.Linear(64, 24)), x, *steps)
    graph, declined = encode(before, prefer_dense)
    golden("two_of_four_int4_layer", str(graph))
    torch.testing.assert_close(graph(x), before(x))
    assert declined == []
    (masked,), (stored,) = (layer_costs(g) for g in (before, graph))
    weights = 24 * 64 // 2
    assert stored.stored_bytes == masked.stored_bytes == weights // 2 + weights // 4 + 24 * 2 * 4 + 1
    assert masked.parameters >= stored.parameters > 0


@pytest.mark.parametrize(("rows", "pattern", "reason"), [
    (64, "2:4", "stored dense: at density 0.50 the dense kernel is faster (sparse gains below 0.3 for 64 rows and 2:4)"),
    (64, "1:4", None), (1, "", "stored dense: of weights whose groups have scales, kernels read N of M alone"),
])  # fmt: skip
def test_when_weights_whose_groups_have_scales_are_stored_without_zeros(rows, pattern, reason):
    torch.manual_seed(0)
    x = torch.randn(rows, 64)
    prune = PruneWeights(ratio=0.75 if pattern == "1:4" else 0.5, pattern=pattern)
    quantize = Quantize(weights="int4", activations=None, group_size=32)
    _, declined = encode(compressed(nn.Sequential(nn.Linear(64, 24)), x, prune, quantize), prefer_dense)
    assert [d.reason for d in declined] == ([] if reason is None else [reason])


def test_a_block_takes_one_index():
    mask = torch.zeros(32, 64, dtype=torch.bool)
    mask[:16, 5] = mask[16:, 9] = True
    sparse = encode_sparse(torch.ones(32, 64), mask)
    assert (sparse.block, sparse.columns.tolist(), sparse.row_pointers.tolist()) == ((16, 1), [5, 9], [0, 1, 2])
    assert sparse.stored_bytes == 32 * 4 + 2 * 2 + 3 * 4


@given(
    bits=st.integers(1, 7), shape=st.sampled_from([(1,), (3, 7), (5, 2, 3), (0, 4)]), lowest=st.integers(-64, 0),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_packed_codes_unpack_to_themselves_and_take_no_more_than_their_bits(bits, shape, lowest, seed):
    random = np.random.default_rng(seed)
    low = max(lowest, -(1 << bits))
    codes = torch.from_numpy(random.integers(low, low + (1 << bits), shape).astype(np.int8))
    packed = pack(codes, bits, low)
    assert packed.numel() == packed_bytes(codes.numel(), bits) == -(-codes.numel() * bits // 8)
    assert torch.equal(torch.ops.mcc.unpack(packed, bits, low, list(shape)), codes)


def test_packing_starts_at_the_lowest_bit():
    assert pack(torch.tensor([-8, 7, -7], dtype=torch.int8), 4, -8).tolist() == [0xF0, 0x01]


def test_wide_rows_take_wide_columns():
    weight = torch.zeros(1, 1 << 17)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[0, -1] = True
    assert encode_sparse(weight, mask).columns.dtype is torch.int32


prefer_dense = partial(cpu.prefer_dense, target=parse_target("cpu:avx512"))


def compressed(model, x, *steps):
    graph = mcc.capture(model.eval(), (x,))
    return Pipeline(steps, parse_target("cpu:avx512vnni"), Data(calibration=[x])).run(graph, (x,))[0]


def test_a_sparse_int8_weight_is_a_decode_inside_a_dequantize(golden):
    x = torch.randn(64, 40)
    graph, declined = encode(
        compressed(nn.Sequential(nn.Linear(40, 24)), x, PruneWeights(ratio=0.9), Quantize()), prefer_dense
    )
    golden("sparse_int8_layer", str(graph))
    assert declined == []


def test_an_encoded_graph_computes_what_the_masked_one_does():
    x = torch.randn(64, 40)
    for steps in ((PruneWeights(ratio=0.9),), (PruneWeights(ratio=0.9), Quantize()), (Quantize(activations=None),)):
        graph = compressed(mlp(40, 24, 8), x, *steps)
        encoded, _ = encode(graph, prefer_dense)
        torch.testing.assert_close(encoded(x), graph(x), rtol=1e-5, atol=1e-6)


def test_a_layer_too_dense_for_the_sparse_form_is_stored_dense_and_says_so():
    _, declined = encode(compressed(nn.Linear(40, 24), torch.randn(64, 40), PruneWeights(ratio=0.1)), prefer_dense)
    assert declined[0].reason == "stored dense: at density 0.90 sparse takes 5,284 bytes, dense 3,840"


def test_a_layer_whose_dense_kernel_is_faster_is_stored_dense_and_says_so():
    _, declined = encode(compressed(nn.Linear(40, 24), torch.randn(64, 40), PruneWeights(ratio=0.4)), prefer_dense)
    assert declined[0].reason == (
        "stored dense: at density 0.60 the dense kernel is faster (sparse gains below 0.5 for 64 rows)"
    )


@pytest.mark.parametrize(("target", "reasons"), [("cpu:avx512vnni", []), ("cpu:amx", [
    "stored dense: at density 0.10 the dense kernel is faster (sparse gains below 0.02 for 64 rows)",
])])  # fmt: skip
def test_sparse_codes_beside_instructions_that_multiply_whole_tiles(target, reasons):
    graph = compressed(nn.Sequential(nn.Linear(40, 24)), torch.randn(64, 40), PruneWeights(ratio=0.9), Quantize())
    _, declined = encode(graph, partial(cpu.prefer_dense, target=parse_target(target)))
    assert [layer.reason for layer in declined] == reasons


def test_encoding_leaves_the_graph_it_was_given():
    x = torch.randn(64, 40)
    graph = compressed(mlp(40, 24, 8), x, PruneWeights(ratio=0.9))
    text = str(graph)
    encode(graph, prefer_dense)
    assert str(graph) == text


def test_a_tied_weight_is_encoded_for_the_layer_and_read_whole_by_the_embedding():
    ids = torch.randint(0, 50, (8, 16))
    graph = compressed(TiedLanguageModel(), ids, PruneWeights(ratio=0.9, include=("embed",)))
    encoded, _ = encode(graph, prefer_dense)
    torch.testing.assert_close(encoded(ids), graph(ids))


def test_codes_of_few_bits_stand_packed_under_a_dequantize_with_a_scale_for_each_group(golden):
    x = torch.randn(3, 64)
    step = Quantize(weights="int4", activations=None, group_size=32, symmetric=False)
    graph, declined = encode(compressed(mlp(64, 24, 8), x, step), prefer_dense)
    golden("int4_groups_mlp", str(graph))
    assert [d.layer for d in declined] == []


@pytest.mark.parametrize(("symmetric", "reasons"), [(False, ["stored dense: its zeros are not code 0"]), (True, [])])
def test_a_pruned_weight_in_groups_stays_zero_and_where_it_is_stored_dense_the_reason_is_told(symmetric, reasons):
    x = torch.randn(3, 64)
    step = Quantize(weights="int4", activations=None, group_size=32, symmetric=symmetric)
    before = compressed(nn.Sequential(nn.Linear(64, 24)), x, PruneWeights(ratio=0.95), step)
    graph, declined = encode(before, prefer_dense)
    assert [d.reason for d in declined] == reasons
    torch.testing.assert_close(graph(x), before(x))
    weight = graph(torch.eye(64)) - graph(torch.zeros(1, 64))
    assert int((weight.abs() < 1e-6).sum()) >= int(0.95 * 64 * 24)


@given(
    values=arrays(np.float32, (4, 6), elements=st.floats(-3, 3, width=32)),
    kind=st.sampled_from(["one", "rows", "columns", "groups"]),
    zero=st.integers(-3, 3),
    seed=st.integers(0, 99),
)
def test_the_gradients_of_a_quantizer_are_those_of_rounding_taken_as_the_identity(values, kind, zero, seed):
    """The reference lets autograd differentiate scale * (x / scale + what rounding adds), or scale * the last code."""
    generator = torch.Generator().manual_seed(seed)
    shape, axis = {"one": ((), None), "rows": ((4,), 0), "columns": ((6,), 1), "groups": ((4, 2), 0)}[kind]
    x, scale = (
        torch.from_numpy(values).requires_grad_(),
        (torch.rand(shape, generator=generator) + 0.2).requires_grad_(),
    )
    zero_point, weights = torch.full(shape, zero, dtype=torch.int32), torch.randn(4, 6, generator=generator)
    made = torch.ops.mcc.fake_quantize(x, scale, zero_point, axis, -4, 3)
    found = torch.autograd.grad((made * weights).sum(), (x, scale))
    step = along_axis(scale, x, axis)
    in_steps = x / step
    rounded = in_steps.detach().round()
    last = rounded.clamp(-4 - zero, 3 - zero)
    reference = torch.where(last == rounded, in_steps + (rounded - in_steps.detach()), last) * step
    torch.testing.assert_close(made, reference)
    torch.testing.assert_close(
        found, torch.autograd.grad((reference * weights).sum(), (x, scale)), rtol=1e-4, atol=1e-4
    )
