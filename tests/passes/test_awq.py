"""awq: the same values out, less error after rounding where channels differ, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mcc
from mcc.data import Data
from mcc.errors import DataError, PassError, SpecError
from mcc.passes import Awq, Quantize
from mcc.pipeline import Pipeline
from mcc.statistics import channel_moments
from mcc.target import parse_target


def run(model, x, *steps, calibration=None):
    graph = mcc.capture(model.eval(), (x,))
    data = Data(calibration=[x] if calibration is None else calibration)
    return Pipeline(steps, parse_target("cpu:avx512vnni"), data).run(graph, (x,))


class Block(nn.Module):
    """A norm whose gain makes a few channels large, read by two layers, as in a trained language model."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(width), nn.Linear(width, 48), nn.Linear(width, 32, bias=False)
        self.out = nn.Linear(48, 8)
        self.norm.weight.data[::16] *= 30

    def forward(self, x):
        y = self.norm(x)
        return self.out(self.a(y).relu()).sum(-1, keepdim=True) + self.b(y)


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, False), (4, True), (4, False)])
def test_outputs_are_closer_after_rounding(bits, symmetric):
    model, x = Block(), torch.randn(128, 64)
    step = Quantize(weights=f"int{bits}", activations=None, group_size=32, symmetric=symmetric)
    plain, _ = run(model, x, step)
    scaled, rows = run(model, x, Awq(bits, 32, symmetric), step)  # verified to be exact before rounding
    test = torch.randn(64, 64)
    with torch.no_grad():
        exact = model(test)
        errors = [float((graph(test) - exact).square().mean()) for graph in (plain, scaled)]
    assert errors[1] < 0.8 * errors[0]
    assert rows[1].edits == 1
    assert rows[1].notes[0].startswith("mean error of outputs, relative: ")


def test_layers_that_read_no_gain_are_declined_by_name():
    _, rows = run(Block(), torch.randn(32, 64), Awq(group_size=32))
    assert [(d.layer, d.reason) for d in rows[1].declined] == [
        ("out", "it reads relu, which has no gain for each channel")
    ]


def test_channels_that_are_always_zero_stay_finite():
    model, x = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 4)), torch.randn(16, 32)
    model[0].weight.data[3] = 0.0
    model[0].bias.data[3] = 0.0
    graph, _ = run(model, x, Awq(group_size=32))
    assert all(p.isfinite().all() for _, p in graph.named_parameters())


def test_moments_are_those_of_all_rows():
    x = torch.randn(5, 3, 8)
    graph = mcc.capture(nn.Sequential(nn.ReLU(), nn.Linear(8, 2)), (x,), dynamic_shapes=({0: "batch"},))
    (name,) = (n.name for n in graph.nodes if n.op is mcc.ops.RELU)
    moments = channel_moments(graph, [name], [x[:2], x[2:2], x[2:]])[name]
    rows = x.relu().reshape(-1, 8).double()
    torch.testing.assert_close(moments.sizes, rows.mean(0))
    torch.testing.assert_close(moments.products, rows.T @ rows / 15)


def test_what_cannot_be_done_is_refused_in_words():
    with pytest.raises(SpecError, match="awq: bits=8"):
        Awq(bits=8)
    with pytest.raises(SpecError, match="awq: group_size=33"):
        Awq(group_size=33)
    with pytest.raises(PassError, match="no linear layer can be scaled: 1: its 64 inputs are no multiple of 128"):
        run(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 4)), torch.randn(4, 64), Awq())
    with pytest.raises(DataError, match="is empty"):
        run(Block(), torch.randn(4, 64), Awq(group_size=32), calibration=[])
