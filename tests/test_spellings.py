"""Activations and norms that models spell out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mcc
from mcc.compiler import load_graph
from mcc.spellings import unify_spellings

ROOT = math.sqrt(2 / math.pi)


class Written(nn.Module):
    """A function of x, of two vectors and of a layer between."""

    def __init__(self, how):
        super().__init__()
        self.how, self.layer = how, nn.Linear(12, 12)
        self.gain, self.shift = nn.Parameter(torch.rand(12) + 0.5), nn.Parameter(torch.randn(12))

    def forward(self, x):
        return self.how(self, self.layer(x))


def centred(x):
    return x - x.mean(-1, keepdim=True)


def over_deviation(x, eps=1e-5):
    c = centred(x)
    return c / torch.sqrt(c.pow(2).mean(-1, keepdim=True) + eps)


def root_mean_square(x, eps=1e-6):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


SPELLINGS = {
    "gelu": (
        lambda m, x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
        lambda m, x: 0.5 * (x * (torch.erf(x * math.sqrt(0.5)) + 1)),
        lambda m, x: x * (1 + torch.erf(x / 1.4142135)) / 2,
        lambda m, x: x * (0.5 + 0.5 * torch.erf(x * 0.70710678)),
        lambda m, x: (2 * x) * 0.25 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    ),
    "gelu tanh": (
        lambda m, x: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0)))),
        lambda m, x: x * 0.5 * (torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)) + 1.0),
        lambda m, x: 0.5 * x * (1.0 + torch.tanh(ROOT * x + (ROOT * 0.044715) * x * x * x)),
        lambda m, x: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + x.square() * x * 0.044715))),
    ),
    "silu": (
        lambda m, x: x * torch.sigmoid(x),
        lambda m, x: torch.sigmoid(x) * x,
        lambda m, x: x * torch.sigmoid(1.702 * x),
        lambda m, x: torch.sigmoid(x / 4) * x * 3,
    ),
    "hardswish": (
        lambda m, x: x * F.hardsigmoid(x),
        lambda m, x: x * F.relu6(x + 3) / 6,
        lambda m, x: x * (F.relu6(x + 3.0) / 6.0),
        lambda m, x: x * torch.clamp(x + 3, 0, 6) * (1 / 6),
        lambda m, x: x * torch.clamp(x / 6 + 0.5, 0, 1),
    ),
    "rms_norm": (
        lambda m, x: m.gain * root_mean_square(x),
        lambda m, x: root_mean_square(x) * m.gain,
        lambda m, x: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * m.gain,
        lambda m, x: root_mean_square(x) @ torch.eye(12),
    ),
    "layer_norm": (
        lambda m, x: over_deviation(x) * m.gain + m.shift,
        lambda m, x: m.shift + m.gain * over_deviation(x),
        lambda m, x: centred(x) * torch.rsqrt(centred(x).square().mean(-1, keepdim=True) + 1e-5) * m.gain,
        lambda m, x: centred(x) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5),
    ),
}
CASES = [(kind, i) for kind, ways in SPELLINGS.items() for i in range(len(ways))]
ARITHMETIC = {"erf", "tanh", "sigmoid", "hardsigmoid", "clamp", "relu6", "rsqrt", "sqrt", "mean.dim", "var.correction"}


@pytest.mark.parametrize(("kind", "which"), CASES)
def test_it_is_the_op_that_has_the_name(kind, which):
    model, x = Written(SPELLINGS[kind][which]).eval(), torch.randn(3, 5, 12)
    graph = load_graph(model, (x,), {}, None)
    names = [n.op.name for n in graph.nodes]
    assert kind.split()[0] in names
    assert not ARITHMETIC & set(names)
    (node,) = [n for n in graph.nodes if n.op.name == kind.split()[0]]
    assert (node.fx.kwargs.get("approximate") == "tanh") == ("tanh" in kind)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_norm_takes_in_its_vectors(golden):
    model = Written(lambda m, x: over_deviation(root_mean_square(x) * m.gain) * m.gain + m.shift)
    golden("spelled_out_norms", str(load_graph(model.eval(), (torch.randn(2, 12),), {}, None)))


@pytest.mark.parametrize(("how", "why"), [
    (lambda m, x: x * 0.5 * (1.0 + torch.erf(x / 1.5)), "another constant"),
    (lambda m, x: x * 0.5 * (1.0 - torch.erf(x / math.sqrt(2))), "another sign"),
    (lambda m, x: x.relu() * 0.5 * (1.0 + torch.erf(x / math.sqrt(2))), "of another value"),
    (lambda m, x: x * (1.0 + torch.erf(x / math.sqrt(2))), "twice as large"),
    (lambda m, x: x * torch.sigmoid(x + 1), "of another value"),
    (lambda m, x: x * torch.sigmoid(-x), "another sign"),
    (lambda m, x: x * F.relu6(x + 3) / 5, "another number"),
    (lambda m, x: x * torch.clamp(x + 3, 0, 5) / 6, "another bound"),
    (lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6), "over another dim"),
    (lambda m, x: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True).abs() + 1e-6), "no square"),
    (lambda m, x: x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), "no inverse"),
    (lambda m, x: centred(x) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5), "divided by one less"),
    (lambda m, x: x / torch.sqrt(centred(x).square().mean(-1, keepdim=True) + 1e-5), "nothing is subtracted"),
    (lambda m, x: centred(x.double()) / torch.sqrt(centred(x.double()).square().mean(-1, keepdim=True)), "no float32"),
])  # fmt: skip
def test_what_computes_something_else_is_left(how, why):
    graph = mcc.capture(Written(how).eval(), (torch.randn(3, 5, 12),))
    before = str(graph)
    assert str(unify_spellings(graph)) == before, why


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.float64], ids=str)
def test_other_types_stay_spelled_out(kind):
    class Plain(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(x)

    x = torch.arange(12).reshape(3, 4).to(kind)
    graph = load_graph(Plain(), (x,), {}, None)
    assert [n.op.name for n in graph.nodes] == ["sigmoid", "mul.Tensor"]
    torch.testing.assert_close(graph(x), Plain()(x))


@pytest.mark.parametrize("how", [
    lambda m, x: F.layer_norm(x, [5, 12]) * m.gain + m.shift, lambda m, x: F.rms_norm(x, [5, 12]) * m.gain,
    lambda m, x: F.layer_norm(x, [12]) * m.gain.double(), lambda m, x: F.layer_norm(x, [12]) + torch.arange(12),
])  # fmt: skip
def test_vectors_that_a_norm_cannot_have_stay_apart(how):
    model, x = Written(how).eval(), torch.randn(3, 5, 12)
    graph = load_graph(model, (x,), {}, None)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_slope_that_is_trained_is_no_number():
    class Swish(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x * torch.sigmoid(self.slope * x)

    graph = load_graph(Swish(), (torch.randn(3, 4),), {}, None)
    graph(torch.randn(3, 4)).sum().backward()
    assert dict(graph.named_parameters())["slope"].grad is not None


def test_transposes_are_written_in_any_way():
    model, x = Written(lambda m, x: x @ m.layer.weight.T + x @ (x.mT @ x)).eval(), torch.randn(3, 5, 12)
    graph = load_graph(model, (x,), {}, None)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-4)


def test_a_norm_that_something_else_reads_keeps_its_vectors_apart():
    def how(model, x):
        y = root_mean_square(x)
        return y * model.gain + y

    graph = load_graph(Written(how).eval(), (torch.randn(2, 12),), {}, None)
    assert [n.op.name for n in graph.nodes] == ["linear", "rms_norm", "mul.Tensor", "add.Tensor"]


def test_onnx_files_of_old_operator_sets_hold_arithmetic(tmp_path):
    model = nn.Sequential(
        nn.LayerNorm(12), nn.Linear(12, 8), nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.Hardswish()
    ).eval()
    x = torch.randn(2, 3, 12)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), str(path), opset_version=13, dynamo=False)
    graph = load_graph(path, (x,), {}, None)
    names = [n.op.name for n in graph.nodes]
    assert names == ["layer_norm", "linear", "gelu", "gelu", "silu", "hardswish"]
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)


def test_training_goes_through_the_named_ops():
    model, x = Written(SPELLINGS["rms_norm"][0]), torch.randn(4, 12)
    graph = load_graph(model.eval(), (x,), {}, None)
    graph(x).square().sum().backward()
    model(x).square().sum().backward()
    gradients = {name: p.grad for name, p in graph.named_parameters()}
    torch.testing.assert_close(gradients["gain"], model.gain.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_rows_that_are_joined_before_a_layer_and_parted_behind_it_stay_as_they_are(batch):
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(12, 9)), nn.Parameter(torch.randn(9))

        def forward(self, x):
            y = torch.addmm(self.bias, x.reshape(-1, 12), self.weight)
            return y.reshape(x.shape[0], 5, 9).tanh()

    model = Joined().eval()
    graph = load_graph(model, (torch.randn(3, 5, 12),), {}, ({0: "batch"},))
    assert [n.op.name for n in graph.nodes if n.op.family != "size"] == ["linear", "tanh"]
    x = torch.randn(batch, 5, 12)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", [
    lambda m, x: x.var(-1, unbiased=False), lambda m, x: x.var(1, True, keepdim=True), lambda m, x: x.var(),
    lambda m, x: x.var(unbiased=False), lambda m, x: x.std(), lambda m, x: x.std(-1), lambda m, x: x.std(dim=(1, 2)),
    lambda m, x: sum(torch.var_mean(x, -1, unbiased=False, keepdim=True)), lambda m, x: sum(torch.std_mean(x, 1)),
    lambda m, x: torch.std(x, -1, unbiased=False, keepdim=True), lambda m, x: torch.std(x, dim=1, correction=2),
])  # fmt: skip
def test_variances_and_deviations_are_written_in_any_way(how):
    model, x = Written(how).eval(), torch.randn(3, 5, 12)
    artifact = mcc.compile(model, (x,), measure="never", tuning="model")
    with torch.no_grad():
        torch.testing.assert_close(artifact(x), model(x), rtol=1e-4, atol=1e-5)
