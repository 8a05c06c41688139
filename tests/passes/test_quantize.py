"""quantize: ranges, scales, placement, targets; numerics against NumPy integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from networks import Residual, Shared, mlp
from torch import nn

import mcc
from mcc.data import Data
from mcc.errors import DataError, PassError, SpecError
from mcc.formats import pack
from mcc.passes import Quantize
from mcc.pipeline import Pipeline
from mcc.quantization import channel_scales, code_range, group_parameters
from mcc.statistics import OBSERVERS, Histogram, affine_parameters
from mcc.target import parse_target


def run(model, x, step, target="cpu:avx512vnni", calibration=None):
    graph = mcc.capture(model.eval(), (x,))
    return Pipeline((step,), parse_target(target), Data(calibration=calibration or [x])).run(graph, (x,))


def test_quantizers_stand_on_the_weight_and_on_what_the_layer_reads(golden):
    x = torch.randn(2, 12)
    graph, _ = run(mlp(12, 8, 4), x, Quantize())
    golden("quantized_mlp", str(graph))


def test_weights_alone_need_no_data(check_rewrite):
    check_rewrite(nn.Linear(4, 3), Quantize(activations=None), inputs=(torch.randn(2, 4),), before="""
        %input_1: f32[2, 4]
        %linear: f32[2, 3] = linear(%input_1, @weight, @bias)
        return %linear
    """, after="""
        %input_1: f32[2, 4]
        %weight_quantized: f32[3, 4] = mcc.fake_quantize(@weight, @weight_scale, @weight_zero_point, axis=0, low=-127, high=127)
        %linear: f32[2, 3] = linear(%input_1, %weight_quantized, @bias)
        return %linear
    """)  # fmt: skip


float32_weights = arrays(
    np.float32, st.tuples(st.integers(1, 7), st.integers(1, 9)), elements=st.floats(-4, 4, width=32)
)


@given(weight=float32_weights, limit=st.sampled_from([63, 127]))
def test_a_symmetric_code_is_within_half_a_step_and_in_range(weight, limit):
    tensor = torch.from_numpy(weight)
    scale = channel_scales(tensor, 0, (-limit, limit)).numpy()[:, None]
    codes = torch.ops.mcc.quantize(
        tensor, torch.from_numpy(scale[:, 0]), torch.zeros(len(weight), dtype=torch.int32), 0, -limit, limit, torch.int8
    ).numpy()  # fmt: skip
    assert np.array_equal(codes, np.clip(np.rint(weight / scale), -limit, limit))
    assert np.abs(codes).max(initial=0) <= limit
    assert (np.abs(codes * scale - weight) <= scale * (0.5 + 1e-5)).all()


@given(low=st.floats(-1e4, 1e4), high=st.floats(-1e4, 1e4))
def test_an_affine_range_has_an_exact_zero_and_holds_its_ends(low, high):
    low, high = min(low, high), max(low, high)
    scale, zero_point = affine_parameters(low, high, 0, 255)
    assert scale > 0
    assert 0 <= zero_point <= 255
    assert (0 - zero_point) * scale <= min(low, 0) + scale
    assert (255 - zero_point) * scale >= max(high, 0) - scale


@pytest.mark.parametrize("observer", OBSERVERS)
def test_every_observer_keeps_zero_and_stays_within_what_it_saw(observer):
    histogram = Histogram()
    for scale in (0.1, 1.0, 30.0):
        histogram.add(torch.randn(4000, generator=torch.Generator().manual_seed(1)) * scale)
    low, high = histogram.choose_range(observer, 256)
    assert histogram.low <= low <= 0 <= high <= histogram.high


def test_a_percentile_leaves_an_outlier_out_and_mse_shrinks_towards_the_bulk():
    histogram = Histogram()
    histogram.add(torch.cat([torch.randn(100_000, generator=torch.Generator().manual_seed(1)), torch.tensor([400.0])]))
    assert histogram.choose_range("min-max", 256)[1] == 400
    assert histogram.choose_range("percentile-99.9", 256)[1] < 10
    assert histogram.choose_range("mse", 256)[1] < 400


def test_a_moving_average_follows_the_batches_and_entropy_keeps_the_distribution():
    generator = torch.Generator().manual_seed(1)
    histogram = Histogram()
    for largest in (1.0, 1.0, 11.0):
        histogram.add(torch.tensor([0.0, largest]))
    assert histogram.choose_range("moving-average", 256) == (0.0, pytest.approx(2.0))
    tails = Histogram()
    torch.manual_seed(1)
    tails.add(torch.distributions.StudentT(3.0).sample((100_000,)))
    low, high = tails.choose_range("entropy", 256)
    assert high < 0.7 * tails.high
    assert low > 0.7 * tails.low
    assert (tails.counts * ((tails.centers() < low) | (tails.centers() > high))).sum() < 100  # of 100,000
    uniform = Histogram()
    uniform.add(torch.rand(100_000, generator=generator))
    assert uniform.choose_range("entropy", 256)[1] > 0.97


def test_each_end_of_a_range_shrinks_by_itself():
    """An outlier above does not take resolution from below, nor range."""
    histogram = Histogram()
    histogram.add(torch.cat([-torch.rand(100_000, generator=torch.Generator().manual_seed(1)), torch.tensor([30.0])]))
    low, high = histogram.choose_range("mse", 16)
    assert low < -0.8
    assert high < 15


@pytest.mark.parametrize(("weights", "activations"), [("int8", "int8"), ("int4", None), ("int8", None)])
def test_scales_may_be_powers_of_two(weights, activations):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval(), torch.randn(99, 64)
    step = Quantize(weights, activations, scales="power-of-two")
    graph, _ = run(model, x, step)
    scales = [t for n, t in graph.module.named_buffers() if n.endswith("_scale")]
    assert len(scales) == (4 if activations else 2)
    for scale in scales:
        assert torch.equal(torch.log2(scale.float()).round(), torch.log2(scale.float()))
    free, _ = run(model, x, Quantize(weights, activations))
    with torch.no_grad():
        errors = [float((g(x) - model(x)).norm()) for g in (graph, free)]
    assert errors[0] < 2 * errors[1]
    for options in ({"symmetric": False, "activations": None}, {"activations": "dynamic"}):
        with pytest.raises(SpecError, match="symmetric weights and stored activations"):
            Quantize(scales="power-of-two", **options)


def test_a_histogram_of_growing_ranges_counts_everything():
    histogram = Histogram()
    for scale in (1e-3, 1.0, 1e3):
        histogram.add(torch.linspace(-scale, scale, 1001))
    assert int(histogram.counts.sum()) == 3003
    assert (histogram.low, histogram.high) == (-1e3, 1e3)


def test_an_all_zero_channel_and_constant_activations_quantize():
    model = nn.Linear(4, 3)
    model.weight.data[1] = 0
    graph, _ = run(model, torch.zeros(2, 4), Quantize())
    torch.testing.assert_close(graph(torch.zeros(2, 4)), model.bias.expand(2, 3))


def test_weights_of_few_bits_get_a_scale_and_a_zero_point_for_each_group(check_rewrite):
    step = Quantize(weights="int4", activations=None, group_size=32, symmetric=False)
    check_rewrite(nn.Linear(96, 3), step, inputs=(torch.randn(2, 96),), before="""
        %input_1: f32[2, 96]
        %linear: f32[2, 3] = linear(%input_1, @weight, @bias)
        return %linear
    """, after="""
        %input_1: f32[2, 96]
        %weight_quantized: f32[3, 96] = mcc.fake_quantize(@weight, @weight_scale, @weight_zero_point, axis=0, low=-8, high=7)
        %linear: f32[2, 3] = linear(%input_1, %weight_quantized, @bias)
        return %linear
    """)  # fmt: skip


@given(
    rows=st.integers(1, 5), groups=st.integers(1, 3), bits=st.sampled_from([2, 3, 4, 8]), symmetric=st.booleans(),
    size=st.sampled_from([1e-6, 1.0, 1e4]), seed=st.integers(0, 99),
)  # fmt: skip
def test_group_parameters_err_no_more_than_the_full_range_does(rows, groups, bits, symmetric, size, seed):
    weight = np.random.default_rng(seed).standard_normal((rows, groups * 32)) * size
    scale, zero = (
        p.double().numpy()
        for p in group_parameters(torch.from_numpy(weight).float(), groups, code_range(bits), symmetric=symmetric)
    )
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    cut = weight.reshape(rows, groups, 32)

    def error(step, zeros):
        step, zeros = (np.broadcast_to(a, (rows, groups))[..., None] for a in (step, zeros))
        codes = np.clip(np.rint(cut / step) + zeros, low, high)
        return (((codes - zeros) * step - cut) ** 2).sum(-1)

    least, most = np.minimum(cut.min(-1), 0), np.maximum(cut.max(-1), 0)
    full = np.maximum(-least, most) / high if symmetric else (most - least) / (high - low)
    plain = 0 if symmetric else np.clip(np.rint(low - least / full), low, high)
    # a float16 scale moves the ends of the range by 2^-11 of it, an eighth of a step of 8 bits
    assert (error(scale, zero) <= error(full, plain) * 1.1 + 1e-12 * size**2).all()
    assert (zero >= low).all()
    assert (zero <= high).all()


def test_groups_too_small_for_float16_scales_keep_float32():
    scale, _ = group_parameters(torch.randn(4, 64) * 1e-6, 2, code_range(4), symmetric=True)
    assert scale.dtype is torch.float32
    assert group_parameters(torch.randn(4, 64), 2, code_range(4), symmetric=True)[0].dtype is torch.float16


@pytest.mark.parametrize(("options", "message"), [
    ({"weights": "int4", "activations": None, "group_size": 48}, "group_size=48\n  remedy  use a multiple of 32"),
    ({"weights": "int4", "group_size": 32}, "integer sums need one scale and no zero point for each output"),
    ({"weights": "int5"}, "weights='int5'\n  remedy  use one of 'int8', 'int4', 'int3', 'int2'"),
])  # fmt: skip
def test_options_that_no_kernel_could_follow_are_refused(options, message):
    with pytest.raises(SpecError, match=message):
        Quantize(**options)


def test_a_layer_whose_inputs_are_no_multiple_of_the_group_is_left_in_float_by_name():
    step = Quantize(weights="int4", activations=None, group_size=32)
    _, rows = run(mlp(64, 24, 8), torch.randn(2, 64), step)
    assert [(d.layer, d.reason) for d in rows[1].declined] == [("2", "its 24 inputs are no multiple of 32")]


def test_the_weight_range_follows_the_target_and_the_report_says_so():
    x = torch.randn(2, 12)
    for target, limit, notes in (("cpu:avx2", 63, 1), ("cpu:avx512", 63, 1), ("cpu:avx512vnni", 127, 0)):
        graph, rows = run(mlp(12, 4), x, Quantize(weight_range="halved"), target)
        quantizer = graph.node("weight_0_quantized")
        assert quantizer.argument(5) == limit
        assert len(rows[1].notes) == notes
    graph, _ = run(mlp(12, 4), x, Quantize(weight_range="full"), "cpu:avx2")
    assert graph.node("weight_0_quantized").argument(5) == 127


def test_activations_of_16_bits_are_symmetric_and_cost_next_to_nothing():
    torch.manual_seed(0)
    model, x = mlp(12, 8, 4), torch.randn(64, 12)
    graph, _ = run(model, x, Quantize(activations="int16"))
    quantizer = graph.node("input_1_quantized")
    assert quantizer.fx.args[3:] == (None, -(1 << 15), (1 << 15) - 1)
    assert float(quantizer.operand(1).tensor) == pytest.approx(float(x.abs().max()) / 32767)
    weights_alone, _ = run(model, x, Quantize(activations=None))
    torch.testing.assert_close(graph(x), weights_alone(x), rtol=0, atol=1e-3)
    artifact = mcc.compile(model, (x,), passes=[Quantize(activations="int16")], data=mcc.Data(calibration=[x]))
    torch.testing.assert_close(artifact(x), graph(x).detach(), rtol=1e-4, atol=1e-5)
    assert {row.reason for row in artifact.report.layers} == {"activations decoded: no kernel reads int16 codes"}


def test_a_residual_of_convolutions_is_added_as_the_codes_that_the_next_layer_reads():
    graph, rows = run(Residual(), torch.randn(2, 3, 8, 8), Quantize())
    assert {u.op.name for u in graph.node("relu").users} == {"mcc.fake_quantize"}
    assert {u.op.name for u in graph.node("relu_quantized").users} == {"conv2d", "add.Tensor"}
    assert rows[1].edits == 3


def test_activations_of_few_bits_have_few_codes_and_the_residual_keeps_its_float():
    graph, _ = run(Residual(), torch.randn(2, 3, 8, 8), Quantize(weights="int4", activations="int3"))
    ranges = {(q.argument(4), q.argument(5)) for q in graph.nodes if q.op.name == "mcc.fake_quantize"}
    assert ranges == {(-8, 7), (0, 7)}
    assert {u.op.name for u in graph.node("relu").users} == {"mcc.fake_quantize", "add.Tensor"}
    artifact = mcc.compile(
        Residual(), (torch.randn(2, 3, 8, 8),), passes=[Quantize(weights="int4", activations="int3")],
        data=Data(calibration=[torch.randn(2, 3, 8, 8)]), measure="never", tuning="model",
    )  # fmt: skip
    assert artifact.report.passes[-1].largest_error < 1e-5


class ResidualOfLinears(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        y = torch.relu(x)
        return self.a(y) + self.b(y) + y


def test_a_value_read_by_two_linears_is_quantized_once_and_the_residual_keeps_its_float():
    graph, rows = run(ResidualOfLinears(), torch.randn(2, 12), Quantize())
    assert {u.op.name for u in graph.node("relu").users} == {"mcc.fake_quantize", "add.Tensor"}
    assert {u.op.name for u in graph.node("relu_quantized").users} == {"linear"}
    assert rows[1].edits == 2


def test_a_shared_weight_gets_one_quantizer():
    graph, _ = run(Shared(), torch.randn(2, 12), Quantize())
    assert [n.name for n in graph.nodes if "weight_quantized" in n.name] == ["layer_weight_quantized"]


def test_layers_left_in_float_are_listed():
    x = torch.randn(2, 12)
    _, rows = run(mlp(12, 8, 4), x, Quantize(exclude=("2",)))
    assert [(d.layer, d.reason) for d in rows[1].declined] == [("2", "excluded by '2'")]
    with pytest.raises(PassError, match="pattern 'x' matches no layer\n  remedy  layers that can be quantized: 0, 2"):
        run(mlp(12, 8, 4), x, Quantize(exclude=("x",)))


class Difference(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 4)

    def forward(self, x, less):
        return self.layer(x - less)


def test_calibration_batches_may_name_their_inputs():
    model, x, less = Difference(), torch.randn(8, 12), torch.randn(8, 12) * 0.1
    pipeline = [
        Pipeline((Quantize(),), parse_target("cpu:avx512vnni"), Data(calibration=[batch]))
        for batch in ((x, less), {"less": less, "x": x}, {"less": less, "x": x, "labels": x})
    ]
    graph = mcc.capture(model, (x, less))
    (by_place, _), (by_name, _) = (p.run(graph, (x, less)) for p in pipeline[:2])
    assert torch.equal(by_place(x, less), by_name(x, less))
    with pytest.raises(DataError, match="batch has inputs less, x, labels, and the model's are x, less"):
        pipeline[2].run(graph, (x, less))
    with pytest.raises(DataError, match="is one batch\n  remedy  give a list"):
        Data(calibration={"x": x, "less": less})
    with pytest.raises(DataError, match="a calibration batch is 7"):
        Pipeline((Quantize(),), parse_target("cpu:avx512vnni"), Data(calibration=[7])).run(graph, (x, less))


def test_calibration_data_that_does_not_fit_is_refused():
    x = torch.randn(2, 12)
    with pytest.raises(DataError, match="calibration batch 0 with inputs \\[2, 5\\] does not fit the graph"):
        run(mlp(12, 4), x, Quantize(), calibration=[torch.randn(2, 5)])
    with pytest.raises(DataError, match="the calibration data is empty"):
        run(mlp(12, 4), x, Quantize(), calibration=iter(()))


def test_gradients_pass_straight_through_inside_the_range():
    x = torch.tensor([-2.0, -0.3, 0.2, 0.9, 5.0], requires_grad=True)
    y = torch.ops.mcc.fake_quantize(x, torch.tensor(0.01), torch.tensor(100, dtype=torch.int32), None, 0, 255)
    y.sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_the_custom_ops_are_sound():
    x, scale = torch.randn(4, 3, requires_grad=True), torch.rand(3) + 0.1
    zero = torch.zeros(3, dtype=torch.int32)
    torch.library.opcheck(torch.ops.mcc.fake_quantize.default, (x, scale, zero, 1, -8, 7))
    torch.library.opcheck(torch.ops.mcc.fake_quantize.default, (x, scale.clone().requires_grad_(), zero, 1, -8, 7))
    torch.library.opcheck(torch.ops.mcc.quantize.default, (x.detach(), scale, zero, 1, -8, 7, torch.int8))
    groups, zeros = torch.rand(4, 3).half() + 0.1, torch.zeros((), dtype=torch.int8)
    torch.library.opcheck(torch.ops.mcc.fake_quantize.default, (torch.randn(4, 6), groups, zeros, 0, -8, 7))
    codes = torch.randint(-8, 8, (4, 6), dtype=torch.int8)
    torch.library.opcheck(torch.ops.mcc.dequantize.default, (codes, groups, zeros, 0))
    torch.library.opcheck(torch.ops.mcc.unpack.default, (pack(codes, 4, -8), 4, -8, [4, 6]))


class Attended(nn.Module):
    """Attention of two heads, spelled out or not, between layers."""

    def __init__(self, *, spelled):
        super().__init__()
        self.query, self.out, self.spelled = nn.Linear(32, 32), nn.Linear(32, 32), spelled

    def forward(self, x):
        q, k, v = (y.reshape(1, 6, 2, 16).transpose(1, 2) for y in (self.query(x), x, torch.tanh(x)))
        if self.spelled:
            seen = (q @ k.transpose(-2, -1) * 0.25).softmax(-1) @ v
        else:
            seen = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(seen.transpose(1, 2).reshape(1, 6, 32))


@pytest.mark.parametrize("spelled", [False, True])
def test_attention_reads_codes_and_weighs_values_by_codes(golden, spelled):
    graph, _ = run(Attended(spelled=spelled), torch.randn(1, 6, 32), Quantize())
    golden("quantized_attention_spelled_out" if spelled else "quantized_attention", str(graph))


@pytest.mark.parametrize(("step", "target", "reason"), [
    (Quantize(exclude=("scaled*",)), "cpu:avx512vnni", "excluded by 'scaled*'"),
    (Quantize(), "cpu:avx2", "cpu:avx2 multiplies floats as fast as codes of activations"),
])  # fmt: skip
def test_attention_that_stays_in_float_is_declined_with_the_reason(step, target, reason):
    graph, report = run(Attended(spelled=False), torch.randn(1, 6, 32), step, target)
    assert "scaled_dot_product_attention" in [n.op.name for n in graph.nodes]
    (declined,) = [row for row in report[-1].declined if row.layer == "scaled_dot_product_attention"]
    assert declined.reason == f"attention stays in float: {reason}"


def test_a_single_query_stays_in_float():
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(16, 16)

        def forward(self, q, k, v):
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v))

    inputs = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    graph = mcc.capture(Step().eval(), inputs)
    graph, report = Pipeline((Quantize(),), parse_target("cpu:avx512vnni"), Data(calibration=[inputs])).run(
        graph, inputs
    )
    assert [d.reason for d in report[-1].declined] == ["attention stays in float: its single query reads each key once"]
    assert "mcc.rounded_attention" not in [n.op.name for n in graph.nodes]


@pytest.mark.parametrize("rows", [1, 4])
def test_keys_and_values_that_are_returned_are_left_to_the_pass_for_caches(rows):
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.projection = nn.Linear(32, 96)

        def forward(self, x, keys, values):
            q, k, v = (t.view(1, rows, 2, 16).transpose(1, 2) for t in self.projection(x).chunk(3, -1))
            keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
            return nn.functional.scaled_dot_product_attention(q, keys, values), keys, values

    inputs = torch.randn(1, rows, 32), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    artifact = mcc.compile(
        Cached().eval(), inputs, passes="quantize; quantize-kv-cache", data=Data(calibration=[inputs]), measure="never",
        tuning="model",
    )  # fmt: skip
    assert "int8 keys, values" in [row.stored for row in artifact.report.layers]


def test_what_a_layer_reads_that_is_stored_gets_no_quantizer():
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.queries = nn.Linear(12, 8), nn.Parameter(torch.randn(5, 12))

        def forward(self, x):
            return self.layer(x) @ self.layer(self.queries).transpose(0, 1)

    x = torch.randn(3, 12)
    model = Learned().eval()
    artifact = mcc.compile(model, (x,), passes="quantize", data=Data(calibration=[x]), measure="never", tuning="model")
    with torch.no_grad():
        assert float((artifact(x) - model(x)).norm()) <= 0.05 * float(model(x).norm())
