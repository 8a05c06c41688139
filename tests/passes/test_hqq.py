"""HQQ: zero points between codes, smaller errors than rounding to nearest, and a kernel that reads them."""

from __future__ import annotations

import pytest
import torch
from networks import TiedLanguageModel
from torch import nn

import mcc
from mcc.data import Data
from mcc.errors import PassError, SpecError
from mcc.passes import Hqq, PruneWeights, Quantize
from mcc.passes.hqq import half_quadratic
from mcc.pipeline import Pipeline
from mcc.quantization import code_range
from mcc.target import parse_target

QUICK = {"measure": "never", "tuning": "model"}


def run(model, x, *steps):
    graph = mcc.capture(model.eval(), (x,))
    return Pipeline(steps, parse_target("cpu:avx2"), Data(calibration=[x])).run(graph, (x,))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_errors_are_smaller_than_those_of_affine_rounding_in_both_norms(bits):
    """Of weights with heavy tails, as trained ones have."""
    model, x = nn.Linear(256, 64, bias=False), torch.eye(256)
    model.weight.data = torch.distributions.StudentT(4.0).sample(model.weight.shape) * 0.05
    errors = []
    for step in (Hqq(bits), Quantize(f"int{bits}", None, 64, symmetric=False)):
        graph, _ = run(model, x, step)
        with torch.no_grad():
            errors.append((graph(x) - model(x)).abs())
    assert errors[0].pow(0.7).mean() < errors[1].pow(0.7).mean()
    assert errors[0].norm() < errors[1].norm()


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["", "; quantize{activations='dynamic'}"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_kernels_read_zero_points_between_codes(bits, activations):
    model, x = nn.Linear(128, 72).eval(), torch.randn(7, 128)
    passes = f"hqq{{bits={bits}, group_size=32}}{activations}"
    artifact = mcc.compile(model, (x,), passes=passes, dynamic_shapes=({0: "batch"},), **QUICK)
    graph, _ = run(model, x, Hqq(bits, 32), *([Quantize(activations="dynamic")] if activations else []))
    zero = graph.tensor("weight_zero_point")
    assert zero.dtype is torch.float16
    assert (zero != zero.round()).float().mean() > 0.5
    for batch in (1, 7, 0):
        torch.testing.assert_close(artifact(x[:batch]), graph(x)[:batch], rtol=1e-4, atol=1e-4)
    assert [row.reason for row in artifact.report.layers] == [""]


@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-5, 1e-3, 1e-2])
def test_groups_that_hardly_vary_keep_their_value(spread):
    model = nn.Linear(64, 3, bias=False)
    model.weight.data = (1 + spread * torch.randn(3, 64)) / 64
    graph, _ = run(model, torch.eye(64), Hqq())
    with torch.no_grad():
        found = graph(torch.eye(64)).T
    assert (found - model.weight).abs().max() <= max(4 * spread, 1e-3) / 64


@pytest.mark.parametrize("value", [0.0, 0.3, -7.0, 1e-30, 1e6])
def test_constant_and_extreme_groups_come_out_as_they_are(value):
    groups = torch.full((2, 3, 32), value)
    groups[0, 0, 5] = value * 1.5
    scale, zero = half_quadratic(groups, code_range(4))
    codes = torch.clamp(torch.round(groups / scale.float()[..., None] + zero.float()[..., None]), -8, 7)
    found = (codes - zero.float()[..., None]) * scale.float()[..., None]
    torch.testing.assert_close(found, groups, rtol=5e-3, atol=1e-35)


def test_what_is_not_taken_is_listed_with_the_reason():
    x = torch.randn(2, 64)
    _, rows = run(nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 4)), x, Hqq(group_size=64))
    assert [d.reason for d in rows[1].declined] == ["its 96 inputs are no multiple of 64"]
    with pytest.raises(PassError, match="its pruned weights would not stay zero: no code stands for it"):
        run(nn.Linear(64, 8), x, PruneWeights(ratio=0.5), Hqq())
    with pytest.raises(PassError, match="no layer to prune: linear: its pruned weights would not stay zero"):
        run(nn.Linear(64, 8), x, Hqq(), PruneWeights(ratio=0.5))
    steps = Hqq(group_size=None), Quantize(activations="dynamic")
    _, rows = run(TiedLanguageModel(), torch.randint(0, 50, (2, 6)), *steps)
    assert ("embed", "its weight is read by embedding as well") in [(d.layer, d.reason) for d in rows[1].declined]
    with pytest.raises(PassError, match="conv1d is not linear"):
        run(nn.Conv1d(4, 4, 3), torch.randn(1, 4, 8), Hqq())
    with pytest.raises(SpecError, match="bits=5"):
        Hqq(bits=5)
