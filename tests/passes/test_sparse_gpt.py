"""sparse-gpt: the algorithm against its textbook form, errors below those of wanda and magnitude, patterns, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Shared, TiedLanguageModel, mlp
from test_gptq import correlated
from torch import nn

import mcc
from mcc.curvature import hessian
from mcc.data import Data
from mcc.errors import DataError, PassError, SpecError
from mcc.passes import Gptq, PruneWeights, Quantize, SparseGpt
from mcc.pipeline import Pipeline
from mcc.target import parse_target


def run(model, x, *steps):
    graph = mcc.capture(model.eval(), (x,))
    return Pipeline(steps, parse_target("cpu:avx2"), Data(calibration=[x])).run(graph, (x,))


def test_the_layer_reads_changed_weights_under_a_mask(check_rewrite):
    x = torch.randn(40, 64)
    check_rewrite(nn.Linear(64, 3), SparseGpt(ratio=0.75), inputs=(x,), data=Data(calibration=[x]), before="""
        %input_1: f32[40, 64]
        %linear: f32[40, 3] = linear(%input_1, @weight, @bias)
        return %linear
    """, after="""
        %input_1: f32[40, 64]
        %weight_masked: f32[3, 64] = mul.Tensor(@weight, @weight_mask)
        %linear: f32[40, 3] = linear(%input_1, %weight_masked, @bias)
        return %linear
    """)  # fmt: skip


def textbook(weight, curvature, mask):
    """Optimal brain surgeon, a weight at a time: what goes is made up for by all behind it, by the whole inverse."""
    weight, inverse = weight.astype(np.float64).copy(), np.linalg.inv(curvature)
    for i in range(weight.shape[1]):
        error = np.where(mask[:, i], 0, weight[:, i]) / inverse[i, i]
        weight -= error[:, None] * inverse[i]
        weight[:, i] *= mask[:, i]
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return weight


@settings(max_examples=10)
@given(st.integers(0, 100), st.sampled_from([("", 0.5), ("", 0.8), ("2:4", 0.5), ("1:4", 0.75)]))
def test_the_weights_are_those_of_the_textbook_for_its_mask(seed, pattern):
    kind, ratio = pattern
    torch.manual_seed(seed)
    model, x = nn.Linear(144, 6), correlated(500, 144, seed)
    graph, _ = run(model, x, SparseGpt(ratio=ratio, pattern=kind, damping=0.05))
    mask = graph.tensor("weight_mask").numpy()
    curvature = hessian([x]).numpy()
    damped = curvature + np.eye(144) * 0.05 * np.diag(curvature).mean()
    expected = textbook(model.weight.detach().numpy(), damped, mask)
    np.testing.assert_allclose(graph.tensor("weight").detach().numpy() * mask, expected, rtol=1e-3, atol=1e-4)
    if kind:
        kept, among = (int(n) for n in kind.split(":"))
        assert (mask.reshape(6, -1, among).sum(-1) == kept).all()
    else:
        assert (~mask).sum() == round(ratio * 128 * 6) + round(ratio * 16 * 6)


@pytest.mark.parametrize("pattern", ["", "2:4"])
def test_errors_are_below_wandas_and_those_below_magnitudes(pattern):
    torch.manual_seed(0)
    model, x = nn.Linear(128, 64), correlated(2000, 128, 0) * torch.linspace(0.1, 3, 128)[torch.randperm(128)]
    steps = {
        "sparse-gpt": SparseGpt(pattern=pattern), "wanda": PruneWeights(saliency="wanda", scope="output", pattern=pattern),
        "magnitude": PruneWeights(scope="layer", pattern=pattern),
    }  # fmt: skip
    errors = {name: float((run(model, x, step)[0](x) - model(x)).norm()) for name, step in steps.items()}
    assert errors["sparse-gpt"] < 0.8 * errors["wanda"]
    assert errors["wanda"] < 0.9 * errors["magnitude"]


def test_wanda_ranks_by_magnitude_times_the_input():
    model, x = nn.Linear(8, 4), torch.randn(500, 8) * torch.arange(1.0, 9)
    graph, _ = run(model, x, PruneWeights(saliency="wanda", scope="output"))
    scores = model.weight.detach().abs() * x.square().mean(0).sqrt()
    expected = scores >= scores.sort(1).values[:, 4:5]
    assert torch.equal(graph.tensor("weight_mask"), expected)


@pytest.mark.parametrize("layer", [
    nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(6, 9, 3, groups=3), nn.ConvTranspose2d(6, 8, 2), nn.Conv1d(6, 4, 3),
])  # fmt: skip
def test_wanda_and_snip_take_convolutions_of_any_kind(layer):
    x = torch.randn(4, 6, 7, 7)[..., 0] if isinstance(layer, nn.Conv1d) else torch.randn(4, 6, 7, 7)
    model = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1) if x.dim() == 4 else nn.AdaptiveAvgPool1d(1), nn.Flatten())
    labels = torch.zeros(4, dtype=torch.int64)
    data = Data(calibration=[x], train=[(x, labels)])
    for saliency in ("wanda", "snip"):
        graph = mcc.capture(model.eval(), (x,))
        graph, _ = Pipeline((PruneWeights(saliency=saliency),), parse_target("cpu:avx2"), data).run(graph, (x,))
        assert int(graph.tensor("0.weight_mask").sum()) == layer.weight.numel() // 2


def test_an_input_that_is_always_zero_goes_first_and_breaks_nothing():
    x = torch.randn(200, 32)
    x[:, 5] = 0
    graph, _ = run(nn.Linear(32, 4), x, SparseGpt(ratio=0.1))
    assert graph.tensor("weight").isfinite().all()


def test_pruned_weights_stay_zero_under_a_second_round_and_quantizers():
    x = torch.randn(300, 64)
    model = mlp(64, 32, 4)
    graph, _ = run(model, x, PruneWeights(ratio=0.3), SparseGpt(ratio=0.5), Gptq(group_size=32))
    first, _ = run(model, x, PruneWeights(ratio=0.3))
    for name in ("0", "2"):
        mask = graph.tensor(f"{name}.weight_mask")
        assert not (mask & ~first.tensor(f"{name}.weight_mask")).any()
        assert float((~mask).double().mean()) >= 0.5
    artifact = mcc.compile(
        model, (x,), passes=[SparseGpt(ratio=0.9), Quantize()], data=Data(calibration=[x]), tuning="model"
    )
    assert artifact(x).shape == (300, 4)


def test_what_cannot_be_pruned_is_named():
    ids = torch.randint(0, 50, (2, 5))
    _, rows = run(TiedLanguageModel(), ids, SparseGpt(pattern="2:4"))
    assert [(d.layer, d.reason) for d in rows[1].declined] == [
        ("embed", "its weight is shared: other readers would see it change")
    ]
    with pytest.raises(PassError, match="no layer to prune: layer: its weight is shared"):
        run(Shared(), torch.randn(2, 12), SparseGpt())
    with pytest.raises(PassError, match="its 6 inputs are no multiple of 4"):
        run(nn.Linear(6, 3), torch.randn(2, 6), SparseGpt(pattern="2:4"))
    with pytest.raises(SpecError, match="prune-weights has blocks"):
        SparseGpt(pattern="4x4")
    with pytest.raises(DataError, match="infinite or not a number"):
        run(nn.Linear(4, 2), torch.full((3, 4), float("inf")), SparseGpt())
