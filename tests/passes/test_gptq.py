"""gptq: the algorithm against its textbook form, errors below those of rounding, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Shared, TiedLanguageModel
from torch import nn

import mcc
from mcc.curvature import hessian
from mcc.data import Data
from mcc.errors import DataError, PassError, SpecError
from mcc.passes import Gptq, PruneWeights, Quantize, gptq
from mcc.passes.gptq import refitted
from mcc.pipeline import Pipeline
from mcc.quantization import code_range, group_parameters
from mcc.target import parse_target


def run(model, x, *steps, calibration=None):
    graph = mcc.capture(model.eval(), (x,))
    return Pipeline(steps, parse_target("cpu:avx2"), Data(calibration=calibration or [x])).run(graph, (x,))


def correlated(rows, inputs, seed):
    """Inputs that can make up for one another: few directions hold most of their variance."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((inputs // 4, inputs)) + 0.1 * random.standard_normal((inputs // 4, inputs))
    noise = 0.1 * random.standard_normal((rows, inputs))
    return torch.from_numpy(random.standard_normal((rows, inputs // 4)) @ mix + noise).float()


def test_the_layer_reads_a_quantizer_over_weights_on_its_grid(check_rewrite):
    x = torch.randn(40, 64)
    check_rewrite(nn.Linear(64, 3), Gptq(group_size=32), inputs=(x,), data=Data(calibration=[x]), before="""
        %input_1: f32[40, 64]
        %linear: f32[40, 3] = linear(%input_1, @weight, @bias)
        return %linear
    """, after="""
        %input_1: f32[40, 64]
        %weight_quantized: f32[3, 64] = mcc.fake_quantize(@weight, @weight_scale, @weight_zero_point, axis=0, low=-8, high=7)
        %linear: f32[40, 3] = linear(%input_1, %weight_quantized, @bias)
        return %linear
    """)  # fmt: skip


def textbook(weight, curvature, scale, zero, low, high, order, kept):
    """Optimal brain quantization in the given order: the whole inverse Hessian, updated after every input."""
    weight, inverse = weight.astype(np.float64).copy(), np.linalg.inv(curvature)
    for i in order:
        codes = np.clip(np.rint(weight[:, i] / scale[:, i]) + zero[:, i], low, high)
        rounded = (codes - zero[:, i]) * scale[:, i] * kept[:, i]
        error = (weight[:, i] - rounded) / inverse[i, i]
        weight -= error[:, None] * inverse[i]
        weight[:, i] = rounded
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return weight


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@settings(max_examples=15)
@given(
    bits=st.sampled_from([2, 3, 4]),
    outputs=st.integers(1, 5),
    groups=st.sampled_from([1, 3, 5]),
    seed=st.integers(0, 99),
)
def test_blocks_and_factors_give_what_the_textbook_form_gives(act_order, symmetric, bits, outputs, groups, seed):
    torch.manual_seed(seed)
    model, x = nn.Linear(32 * groups, outputs), correlated(200, 32 * groups, seed)
    step = Gptq(bits=bits, group_size=32, symmetric=symmetric, act_order=act_order)
    graph, _ = run(model, x, step)
    tensors = {n: graph.tensor(n).detach().double().numpy() for n in ("weight", "weight_scale", "weight_zero_point")}
    curvature = hessian([x]).numpy()
    first, zero_point = group_parameters(
        model.weight,
        groups,
        code_range(bits),
        symmetric=symmetric,
        importance=torch.from_numpy(np.diag(curvature).copy()),
    )
    scale = first.double().numpy().repeat(32, 1)
    zero = np.broadcast_to(zero_point.double().numpy(), first.shape).repeat(32, 1)
    curvature = curvature + np.eye(len(curvature)) * step.damping * np.diag(curvature).mean()
    order = np.argsort(-np.diag(curvature), kind="stable") if act_order else range(len(curvature))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    kept = np.ones_like(scale)
    expected = textbook(model.weight.detach().numpy(), curvature, scale, zero, low, high, order, kept)
    found = tensors["weight"]
    # float32 sums decide a few roundings the other way, and what follows makes up for them
    codes = found / tensors["weight_scale"].repeat(32, 1)
    assert (np.abs(codes - expected / scale) < 1e-3).mean() > 0.9
    x64 = x.double().numpy()
    errors = [np.linalg.norm(x64 @ (w - model.weight.detach().numpy()).T) for w in (found, expected)]
    assert errors[0] <= errors[1] * 1.05


@settings(max_examples=20)
@given(outputs=st.integers(1, 70), groups=st.integers(1, 4), seed=st.integers(0, 99))
def test_scales_are_refitted_by_least_squares(outputs, groups, seed):
    random = np.random.default_rng(seed)
    codes, x = random.integers(-4, 4, (outputs, groups, 32)), random.standard_normal((300, groups * 32))
    codes[0, 0] = 0  # a group that rounds to nothing keeps its scale
    scale = random.uniform(0.5, 1.5, (outputs, groups))
    weight = (codes * scale[..., None] + 0.2 * random.standard_normal(codes.shape)).reshape(outputs, -1)
    found = refitted(
        torch.from_numpy(codes).float(), torch.from_numpy(scale), torch.from_numpy(weight).float(),
        torch.from_numpy(x.T @ x / len(x)), damping=0.0,
    ).numpy()  # fmt: skip
    for row in range(outputs):
        columns = np.stack([x[:, g * 32 : (g + 1) * 32] @ codes[row, g] for g in range(groups)], 1)
        best = np.linalg.lstsq(columns, x @ weight[row], rcond=None)[0]
        best = np.where((best > scale[row] / 2) & (best < scale[row] * 2), best, scale[row])
        np.testing.assert_allclose(found[row], best, rtol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_output_is_nearer_than_that_of_rounded_weights_on_inputs_not_seen(bits):
    model, x = nn.Linear(128, 64), correlated(2_000, 128, 0)
    seen, unseen = x[:1_000], x[1_000:]
    with torch.no_grad():
        expected = model(unseen)
    rounded, _ = run(model, seen, Quantize(weights=f"int{bits}", activations=None, group_size=32))
    graph, _ = run(model, seen, Gptq(bits=bits, group_size=32))
    assert (graph(unseen) - expected).norm() < 0.6 * (rounded(unseen) - expected).norm()


def test_pruned_weights_stay_zero():
    model, x = nn.Linear(64, 16), correlated(300, 64, 0)
    graph, _ = run(model, x, PruneWeights(ratio=0.5), Gptq(group_size=32, symmetric=False))
    weight = graph(torch.eye(64)) - graph(torch.zeros(1, 64))
    assert int((weight.abs() < 1e-6).sum()) >= 512


@pytest.mark.parametrize("steps", [(), (PruneWeights(ratio=0.3),)])
@pytest.mark.parametrize("buffer", [False, True])
def test_a_layer_sees_what_the_layers_before_it_give_after_they_changed(steps, buffer, monkeypatch):
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), torch.randn(50, 64)
    if buffer:
        weight = model[0].weight.data
        del model[0].weight
        model[0].register_buffer("weight", weight)
    seen = {}
    real = gptq.layer_hessian

    def spied(node, width, arguments):
        seen[node.layer] = arguments[0][0]
        return real(node, width, arguments)

    monkeypatch.setattr(gptq, "layer_hessian", spied)
    graph, _ = run(model, x, *steps, Gptq(bits=2, group_size=32))
    graph.module.graph.output_node().args = ((graph.node("relu_1").fx,),)
    graph.module.recompile()
    torch.testing.assert_close(seen["2"], graph.module(x), rtol=1e-4, atol=1e-5)


def test_what_is_left_alone_is_listed():
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 8))
    _, rows = run(model, torch.randn(9, 4, 18), Gptq(group_size=32))
    assert [(d.layer, d.reason) for d in rows[1].declined] == [
        ("0", "conv1d is not linear"), ("4", "its 40 inputs are no multiple of 32"),
    ]  # fmt: skip


def test_a_shared_weight_is_left_alone():
    reason = "its weight is shared: other readers would see it change"
    _, rows = run(TiedLanguageModel(), torch.randint(0, 50, (2, 6)), Gptq(group_size=None))
    assert reason in {d.reason for d in rows[1].declined}
    with pytest.raises(PassError, match=f"no layer can be quantized: layer: {reason}"):
        run(Shared(), torch.randn(2, 12), Gptq(group_size=None))


def test_inputs_that_are_always_zero_do_no_harm():
    x = torch.randn(50, 64)
    x[:, 10:20] = 0
    model = nn.Linear(64, 8)
    graph, _ = run(model, x, Gptq(group_size=32))
    assert graph.tensor("weight").isfinite().all()
    zeros, _ = run(model, torch.zeros(3, 64), Gptq(group_size=32))
    assert zeros.tensor("weight").isfinite().all()


def test_wrong_options_and_data_are_refused_in_words():
    with pytest.raises(SpecError, match="gptq: bits=8"):
        Gptq(bits=8)
    with pytest.raises(SpecError, match="gptq: group_size=20"):
        Gptq(group_size=20)
    with pytest.raises(DataError, match="calibration batch 0 does not fit the graph: linear has 64 inputs, not 5"):
        run(nn.Linear(64, 8), torch.randn(2, 64), Gptq(group_size=32), calibration=[torch.randn(2, 5)])
    with pytest.raises(DataError, match="what linear reads is infinite or not a number"):
        run(nn.Linear(64, 8), torch.randn(2, 64), Gptq(group_size=32), calibration=[torch.full((2, 64), torch.inf)])
    with pytest.raises(DataError, match="linear has 64 inputs, not ndarray"):
        run(nn.Linear(64, 8), torch.randn(2, 64), Gptq(group_size=32), calibration=[np.zeros((2, 64), np.float32)])
    broken = nn.Linear(64, 8)
    broken.weight.data[0, 0] = torch.nan
    with pytest.raises(PassError, match="the weight of linear is infinite or not a number"):
        run(broken, torch.randn(2, 64), Gptq(group_size=32))
    with pytest.raises(DataError, match="the calibration data is empty"):
        run(nn.Linear(64, 8), torch.randn(2, 64), Gptq(group_size=32), calibration=iter(()))
