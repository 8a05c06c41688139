"""Sparse weights read by windows of inputs: what the arrays hold, which layers are read so, and a network of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from regions import Symbolic, make_region, make_weight, run_kernel
from torch import nn

import mcc
from mcc import Data, ops
from mcc.backends.cpu.kernels.byte_windows import LARGE, SMALL, SMALL_OF_WORDS
from mcc.backends.cpu.kernels.sparse_codes import SparseCodes, SparsePerToken
from mcc.backends.cpu.kernels.sparse_codes_conv import SparseCodesConv2d
from mcc.backends.kernel import PER_TOKEN, QuantizedInput, SparseArrays, StoredWeight
from mcc.passes import PruneWeights, Quantize
from mcc.target import missing_features, parse_target

TARGET, NARROW = parse_target("cpu:avx512vbmi"), parse_target("cpu:avx2")
LANES = 16
STEPS = st.sampled_from([LARGE, SMALL, SMALL_OF_WORDS])
CODES_KERNEL = SparseCodes()
CODES = QuantizedInput(0.1, 3)
SINGLE, COLUMNS = (make_weight((16, 64), "int8", 0, density=0.1, block=b).sparse for b in ((1, 1), (16, 1)))
HERE = pytest.mark.parametrize("target", [
    pytest.param(t, marks=pytest.mark.skipif(bool(missing_features(t)), reason=f"this CPU is no {t}"))
    for t in map(parse_target, ("cpu:avx2", "cpu:avx512", "cpu:avx512vnni", "cpu:avx512vbmi"))
])  # fmt: skip


def dense(arrays, steps, outputs, inputs):
    """The weight that the steps multiply."""
    weight = np.zeros((-(-outputs // LANES) * LANES, inputs), np.int32)
    weights, places = (arrays[key].reshape(-1, LANES, steps.together) for key in ("weight", "places"))
    for vector, (begin, end) in enumerate(zip(arrays["first_steps"], arrays["first_steps"][1:], strict=False)):
        for step in range(begin, end):
            inputs_read = arrays["windows"][step] + places[step].astype(np.int64)
            np.add.at(weight, (vector * LANES + np.arange(LANES)[:, None], inputs_read), weights[step])
    return weight[:outputs]


def by_vectors(weight):
    """The one run of a linear layer."""
    return [(0, np.pad(weight, ((0, -len(weight) % LANES), (0, 0))).reshape(-1, LANES, weight.shape[1]))]


@given(STEPS, st.integers(1, 40), st.integers(0, 236), st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]), st.integers(0, 99))
def test_windows_hold_every_weight_once_and_stay_within_the_row(steps, outputs, more, density, seed):
    inputs = steps.window + more
    weight = make_weight((outputs, inputs), "int8", seed, density=density).decoded()
    arrays = steps.pack(by_vectors(weight), SINGLE)
    np.testing.assert_array_equal(dense(arrays, steps, outputs, inputs), weight)
    assert arrays["places"].max() < steps.window
    assert arrays["windows"].min() >= 0
    assert arrays["windows"].max() <= inputs - steps.window


def test_an_output_takes_its_next_four_weights_of_the_window_that_another_waits_for():
    """Two outputs: one with weights 0 to 4, one with weights 31 and 100; of 128 inputs."""
    weight = np.zeros((LANES, 128), np.int8)
    weight[0, :5], weight[1, [31, 100]] = range(1, 6), (6, 7)
    arrays = LARGE.pack([(0, weight[None])], SINGLE)
    assert arrays["windows"].tolist() == [0, 0, 64]
    weights, places = (arrays[key].reshape(3, LANES, 4)[:, :2].tolist() for key in ("weight", "places"))
    assert weights == [[[1, 2, 3, 4], [6, 0, 0, 0]], [[5, 0, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 0], [7, 0, 0, 0]]]
    assert places == [[[0, 1, 2, 3], [31, 0, 0, 0]], [[4, 0, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 0], [36, 0, 0, 0]]]


def test_runs_of_codes_begin_where_they_lie_from_the_first():
    """Two rows of an image, 1,000 codes apart; the second vector of outputs reads nothing of the first."""
    ones, nothing = np.ones((LANES, 64), np.int8), np.zeros((LANES, 64), np.int8)
    arrays = LARGE.pack([(0, np.stack([ones, nothing])), (1000, np.stack([ones, ones]))], SINGLE)
    assert arrays["windows"].tolist() == [0] * 16 + [1000] * 16 + [1000] * 16
    assert arrays["first_steps"].tolist() == [0, 32, 48]


def test_columns_of_sixteen_store_the_places_of_all_lanes_once():
    """A zero within a column is a weight as any other."""
    weight = np.zeros((LANES, 128), np.int8)
    weight[:, [3, 40, 41, 42, 90]] = np.arange(80).reshape(LANES, 5)
    arrays = LARGE.pack([(0, weight[None])], COLUMNS)
    assert arrays["windows"].tolist() == [0, 64]
    assert arrays["places"].reshape(-1, 4).tolist() == [[3, 40, 41, 42], [26, 0, 0, 0]]
    assert arrays["weight"].reshape(-1, LANES, 4)[0].tolist() == weight[:, [3, 40, 41, 42]].tolist()


def test_why_it_takes_no_other_layers():
    def refusal(inputs=128, activation=CODES, dtype="int8", target=TARGET, kernel=CODES_KERNEL, **form):
        weight = make_weight((32, inputs), dtype, 0, **{"density": 0.1} | form)
        return kernel.refuses(make_region(ops.LINEAR, (4, inputs), weight, (), activation), target)

    assert refusal() is None
    assert refusal(target=parse_target("cpu:neon")) == "cpu:neon permutes no bytes"
    assert refusal(inputs=63) == "fewer than 64 codes lie side by side"
    assert refusal(inputs=63, target=NARROW) is None
    assert refusal(inputs=15, target=NARROW) == "fewer than 16 codes lie side by side"
    assert refusal(density=None) == "the weight is not stored by single elements or columns of 16"
    assert refusal(block=(4, 4)) == "the weight is not stored by single elements or columns of 16"
    assert refusal(activation=PER_TOKEN) == "the activations are not codes with one scale"
    assert refusal(dtype="float32") == "the weight is not int8 with a scale for each output"
    assert refusal(activation=PER_TOKEN, kernel=SparsePerToken()) is None
    assert refusal(kernel=SparsePerToken()) == "the activations are not codes with a scale for each token"


def compiled(model, x, target, ratio, activations="int8", **options):
    passes = [PruneWeights(ratio=ratio, scope="layer"), Quantize(activations=activations)]
    settings = {"data": Data(calibration=[x]), "measure": "never", "tuning": "model", "target": target} | options
    return mcc.compile(model, (x,), passes=passes, **settings)


@pytest.mark.parametrize(("target", "ratio", "inputs", "kernel"), [
    ("cpu:avx512vbmi", 0.7, 256, "sparse_codes"), ("cpu:avx512vbmi", 0.5, 256, "dense_int8"),
    ("cpu:avx512vbmi", 0.95, 48, "sparse_slabs"), ("cpu:avx512vnni", 0.82, 256, "sparse_codes"),
    ("cpu:avx512vnni", 0.75, 256, "dense_int8"), ("cpu:avx2", 0.75, 256, "sparse_codes"),
    ("cpu:avx512", 0.75, 256, "sparse_codes"), ("cpu:avx2", 0.65, 256, "dense_int8"),
    ("cpu:avx2", 0.95, 14, "sparse_slabs"),
])  # fmt: skip
def test_which_densities_are_read_by_windows(target, ratio, inputs, kernel):
    torch.manual_seed(0)
    artifact = compiled(nn.Sequential(nn.Linear(inputs, 64)), torch.randn(32, inputs), target, ratio, verify=False)
    assert [row.kernel.split()[0] for row in artifact.report.layers] == [kernel]


@HERE
@pytest.mark.parametrize(("activations", "kernel"), [("int8", "sparse_codes"), ("dynamic", "sparse_per_token")])
def test_a_pruned_and_quantized_network_gives_what_its_graph_gives(target, activations, kernel):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 70), nn.ReLU(), nn.Linear(70, 65), nn.GELU(), nn.Linear(65, 9)).eval()
    artifact = compiled(model, torch.randn(21, 100), target, 0.82, activations, dynamic_shapes=({0: "batch"},))
    assert [row.kernel.split()[0] for row in artifact.report.layers] == [kernel] * 3
    x = torch.randn(33, 100)
    for rows in (1, 2, 7, 33):
        torch.testing.assert_close(artifact(x[:rows]), artifact(x)[:rows], rtol=0, atol=0)


@pytest.mark.parametrize(("target", "ratio", "inputs", "rows", "kernel"), [
    ("cpu:avx512vnni", 0.7, 256, 1, "sparse_rows"), ("cpu:avx512vnni", 0.7, 256, 6, "sparse_rows"),
    ("cpu:avx512vnni", 0.45, 256, 1, "sparse_rows"), ("cpu:avx512vnni", 0.35, 256, 1, "dense_f32"),
    ("cpu:avx512vnni", 0.5, 256, 6, "dense_f32"), ("cpu:avx512vnni", 0.9, 31, 1, "sparse_dense"),
    ("cpu:avx512vnni", 0.9, 256, 12, "sparse_rows"), ("cpu:avx512vnni", 0.9, 256, 13, "sparse_slabs"),
    ("cpu:avx2", 0.9, 256, 1, "sparse_dense"),
    ("cpu:avx2", 0.7, 256, 1, "dense_f32"), ("cpu:avx2", 0.9, 256, 7, "sparse_slabs"),
])  # fmt: skip
def test_which_rows_of_floats_are_permuted(target, ratio, inputs, rows, kernel):
    settings = {"target": target, "measure": "never", "tuning": "model", "verify": False}
    model, x = nn.Linear(inputs, 64), torch.randn(rows, inputs)
    artifact = mcc.compile(model, (x,), passes=[PruneWeights(ratio=ratio)], **settings)
    assert [row.kernel.split()[0] for row in artifact.report.layers] == [kernel]


def test_two_threads_give_what_one_gives_for_a_wide_layer():
    torch.manual_seed(0)
    model, x = nn.Linear(3000, 9000), torch.randn(2, 3000)
    settings = {"passes": [PruneWeights(ratio=0.9)], "measure": "never", "tuning": "model", "verify": False}
    one, two = (mcc.compile(model, (x,), threads=n, **settings)(x) for n in (1, 2))
    torch.testing.assert_close(two, one, rtol=0, atol=0)


def refusal_of_convolution(inputs, kernel, target=TARGET, groups=1, dilation=(1, 1), block=(1, 1), height=9):
    weight = make_weight((32, inputs // groups, *kernel), "int8", 0, density=0.1, block=block)
    options = ((1, 1), (1, 1, 1, 1), dilation, groups)
    region = make_region(ops.CONV2D_NHWC, (1, height, 9, inputs), weight, (), CODES, options)
    return SparseCodesConv2d().refuses(region, target)


def test_which_convolutions_are_read_by_windows():
    """Codes of neighbouring columns lie side by side, those of columns apart do not."""
    assert refusal_of_convolution(64, (1, 1)) is None
    assert refusal_of_convolution(22, (3, 3)) is None
    assert refusal_of_convolution(64, (3, 3), dilation=(2, 2)) is None
    few = "fewer than 64 codes lie side by side"
    assert [refusal_of_convolution(*c) for c in ((63, (1, 1)), (21, (3, 3)), (22, (1, 3)))] == [few] * 3
    assert refusal_of_convolution(22, (3, 3), dilation=(1, 2)) == few
    assert refusal_of_convolution(64, (1, 1), parse_target("cpu:neon")) == "cpu:neon permutes no bytes"
    assert refusal_of_convolution(3, (7, 7), NARROW) is None
    assert (
        refusal_of_convolution(64, (1, 1), block=(8, 1))
        == "the weight is not stored by single elements or columns of 16"
    )
    other = "its height or width varies, or it has groups"
    assert refusal_of_convolution(128, (1, 1), groups=2) == other
    assert refusal_of_convolution(64, (1, 1), height=Symbolic()) == other


class Blocks(nn.Module):
    """Convolutions around a depthwise one, with a residual, a stride, and a few channels at first."""

    def __init__(self):
        super().__init__()
        self.first, self.wide = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 72, 3, padding=1)
        self.alone, self.narrow = nn.Conv2d(72, 72, 3, 2, 1, groups=72), nn.Conv2d(72, 65, 1)
        self.again = nn.Conv2d(65, 65, 3, padding=1)

    def forward(self, x):
        x = self.narrow(self.alone(self.wide(self.first(x).relu()).relu()).relu())
        return x + self.again(x.relu())


@pytest.mark.parametrize(("target", "kernels"), [
    ("cpu:avx512vbmi", ["conv2d_int8", "sparse_codes_conv2d", "depthwise_int8", *["sparse_codes_conv2d"] * 2]),
    ("cpu:avx2", ["conv2d_int8", "sparse_codes_conv2d", "depthwise_int8", *["sparse_codes_conv2d"] * 2]),
])  # fmt: skip
def test_convolutions_of_codes_lie_with_channels_last_where_bytes_are_permuted(target, kernels):
    torch.manual_seed(0)
    artifact = compiled(Blocks(), torch.randn(1, 3, 17, 19), target, 0.9, verify=False)
    assert [row.kernel.split()[0] for row in artifact.report.layers] == kernels


@HERE
def test_a_network_of_sparse_convolutions_gives_what_its_graph_gives(target):
    torch.manual_seed(0)
    artifact = compiled(Blocks(), torch.randn(2, 3, 17, 19), target, 0.82, dynamic_shapes=({0: "batch"},))
    kernels = [row.kernel.split()[0] for row in artifact.report.layers]
    assert kernels == ["conv2d_int8", "sparse_codes_conv2d", "depthwise_int8", *["sparse_codes_conv2d"] * 2]
    x = torch.randn(7, 3, 17, 19)
    torch.testing.assert_close(artifact(x[:1]), artifact(x)[:1], rtol=0, atol=0)


def test_a_grouped_convolution_of_codes_is_dense_and_says_why():
    artifact = compiled(nn.Conv2d(64, 64, 3, groups=2), torch.randn(1, 64, 9, 9), NARROW, 0.9, verify=False)
    assert [row.kernel.split()[0] for row in artifact.report.layers] == ["conv2d_int8"]
    (declined,) = [d.reason for row in artifact.report.passes for d in row.declined]
    assert declined == "stored dense: it has groups, and those of other layers lie with channels last"


def test_words_of_the_largest_codes_are_exact():
    """255 times 127 and -127, as few inputs as a window has; columns of which one half is zero."""
    if missing_features(NARROW):
        pytest.skip("this CPU is no cpu:avx2")
    weight = np.zeros((16, 16), np.int8)
    weight[:8, [0, 1, 15]], weight[4:8, 7], weight[0, 3] = 127, -127, -127
    arrays = SMALL_OF_WORDS.pack([(0, weight.reshape(2, 8, 16))], COLUMNS)
    assert arrays["first_steps"].tolist() == [0, 3, 3]
    assert arrays["places"].reshape(-1, 2).tolist() == [[0, 1], [3, 7], [15, 0]]
    begins = np.array([0, *np.count_nonzero(weight, 1).cumsum()], np.int32)
    sparse = SparseArrays(weight[weight != 0], np.nonzero(weight)[1].astype(np.uint16), begins, (1, 1))
    stored = StoredWeight("w", weight.shape, None, sparse, np.ones(16, np.float32))
    region = make_region(ops.LINEAR, (Symbolic(), 16), stored, (), QuantizedInput(1.0, 0), bias=False)
    source = np.full((13, 16), 255, np.uint8)
    (found,) = run_kernel(CODES_KERNEL, region, NARROW, "12x1", [source])
    np.testing.assert_array_equal(found, source.astype(np.int64) @ weight.T.astype(np.int64))


@pytest.mark.parametrize("inputs", [64, 40])
def test_codes_of_16_bits_are_judged_as_the_floats_they_are_read_as(inputs):
    artifact = compiled(nn.Linear(inputs, 64), torch.randn(7, inputs), NARROW, 0.75, "int16", verify=False)
    reason = "at density 0.25 the dense kernel is faster (sparse gains below 0.2 for 7 rows)"
    assert [d.reason for row in artifact.report.passes for d in row.declined] == [f"stored dense: {reason}"]


def test_a_convolution_of_16_bits_keeps_its_sparse_kernel():
    x = torch.randn(1, 64, 14, 14)
    artifact = compiled(nn.Conv2d(64, 64, 3, padding=1), x, TARGET, 0.9, "int16", verify=False)
    assert [row.kernel.split()[0] for row in artifact.report.layers] == ["sparse_conv2d"]


@pytest.mark.parametrize("target", ["cpu:avx2", "cpu:avx512vbmi"])
def test_convolutions_of_any_size_read_codes_dense_and_say_why(target):
    sizes = ({2: "height", 3: "width"},)
    layer, x = nn.Conv2d(64, 32, 3, padding=1), torch.randn(1, 64, 14, 15)
    report = compiled(layer, x, target, 0.9, verify=False, dynamic_shapes=sizes).report
    assert [row.kernel.split()[0] for row in report.layers] == ["conv2d_int8"]
    (declined,) = [d.reason for row in report.passes for d in row.declined]
    assert declined == "stored dense: its height or width varies, and codes of such images lie with channels last"


def test_a_convolution_of_few_channels_between_permuted_ones_is_dense_and_says_why():
    layers = nn.Conv2d(64, 20, 3), nn.ReLU(), nn.Conv2d(20, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)
    artifact = compiled(nn.Sequential(*layers), torch.randn(1, 64, 14, 14), TARGET, 0.9, verify=False)
    kernels = [row.kernel.split()[0] for row in artifact.report.layers]
    assert kernels == ["sparse_codes_conv2d", "conv2d_int8", "sparse_codes_conv2d"]
    (declined,) = [d for row in artifact.report.passes for d in row.declined]
    few = "few of its codes lie side by side, and those of other layers lie with channels last"
    assert (declined.layer, declined.reason) == ("2", f"stored dense: {few}")
