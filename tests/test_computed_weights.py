"""Weights that a model computes from others are stored, so that passes and kernels take them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import mcc
from mcc.compiler import load_graph
from mcc.computed_weights import store_computed_weights

QUICK = {"measure": "never", "tuning": "model"}


class Standardized(nn.Conv2d):
    """As in NFNet: zero mean and unit variance of each output's weights."""

    def forward(self, x):
        shape = self.weight.shape
        weight = F.batch_norm(self.weight.reshape(1, shape[0], -1), None, None, training=True).reshape(shape)
        return F.conv2d(x, weight * 0.1, self.bias, self.stride, self.padding)


class Twice(nn.Module):
    """Two layers read one computed weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        weight = self.weight / self.weight.norm()
        return F.linear(F.relu(F.linear(x, weight)), weight)


class Produced(nn.Module):
    """A weight that depends on the input."""

    def forward(self, x):
        return F.linear(x, x.tanh())


MODELS = {
    "standardized": (nn.Sequential(Standardized(3, 16, 3, padding=1), nn.ReLU(), Standardized(16, 8, 3)), (2, 3, 9, 9)),
    "weight norm": (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(12, 7)), nn.ReLU()), (4, 12)),
    "twice": (Twice(), (3, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_layers_read_stored_weights(name):
    model, shape = MODELS[name]
    x = torch.randn(shape)
    graph = load_graph(model.eval(), (x,), {}, None)
    assert all(node.weight_operand.is_parameter for node in graph.nodes if node.op is not None and node.op.weights)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-6)
    artifact = mcc.compile(model, (x,), passes="quantize", data=mcc.Data(calibration=[x]), **QUICK)
    assert {row.stored for row in artifact.report.layers} == {"int8"}


def test_a_weight_of_two_layers_is_stored_once():
    graph = load_graph(Twice().eval(), (torch.randn(3, 8),), {}, None)
    assert len({n.weight.fx for n in graph.nodes if n.op is not None and n.op.weights}) == 1


class Half(nn.Module):
    """A weight that is stored in half precision, converted in the root module, by a node called `to`."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8).half())

    def forward(self, x):
        return F.linear(x, self.weight.float())


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(600, 2)), nn.Parameter(torch.randn(2, 600))

    def forward(self, x):
        return F.linear(x, self.a @ self.b)


def test_converted_weights_are_stored():
    graph = load_graph(Half().eval(), (torch.randn(3, 8),), {}, None)
    assert [n.op.name for n in graph.nodes] == ["linear"]


def test_a_product_of_much_smaller_tensors_stays_one(tmp_path):
    model, x = LowRank().eval(), torch.randn(1, 600)
    artifact = mcc.compile(model, (x,), **QUICK)
    artifact.save(tmp_path / "low_rank.mcc")
    assert (tmp_path / "low_rank.mcc").stat().st_size < 200_000, "600 x 600 floats are 1,440,000 bytes"
    with torch.no_grad():
        torch.testing.assert_close(artifact(x), model(x), rtol=1e-4, atol=1e-3)


def test_a_layer_that_is_called_twice_has_one_weight():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    graph = load_graph(nn.Sequential(layer, nn.ReLU(), layer).eval(), (torch.randn(3, 8),), {}, None)
    assert len({n.weight.fx for n in graph.nodes if n.op is not None and n.op.weights}) == 1


def test_masks_and_inputs_are_no_computed_weights():
    masked = nn.Linear(6, 6)
    prune.l1_unstructured(masked, "weight", 0.5)
    for model in (masked, Produced()):
        graph = mcc.capture(model.eval(), (torch.randn(6, 6),))
        before = str(graph)
        assert str(store_computed_weights(graph)) == before
