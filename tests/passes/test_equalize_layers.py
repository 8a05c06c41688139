"""equalize-layers: pairs of layers, what may lie between them, exactness, and what it does for quantization."""

from __future__ import annotations

import pytest
import torch
from networks import Residual, Shared
from torch import nn

import mcc
from mcc.errors import PassError, SpecError
from mcc.passes import EqualizeLayers, FoldBatchNorm, Quantize
from mcc.pipeline import Pipeline
from mcc.target import parse_target


def run(model, x, *steps):
    graph = mcc.capture(model.eval(), (x,))
    return Pipeline(steps, parse_target("cpu"), mcc.Data(calibration=[x])).run(graph, (x,))


def uneven(model, seed=0):
    """The same function, its channels spread over three powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        for layer in layers:
            shape = [-1, *[1] * (layer.weight.dim() - 1)]
            layer.weight.mul_(10 ** (3 * torch.rand(len(layer.weight), generator=generator) - 1.5).reshape(shape))
    return model


CHAINS = {
    "relu": (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), (3, 6), [("0", "2")]),
    "three in a row": (
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.LeakyReLU(), nn.Linear(7, 5)), (3, 6),
        [("0", "2"), ("2", "4")],
    ),
    "depthwise between": (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        (2, 3, 7, 7), [("0", "2"), ("2", "4")],
    ),
    "groups and a pool": (
        nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.MaxPool2d(2), nn.Conv2d(8, 6, 1, groups=2, bias=False)),
        (2, 4, 8, 8), [("0", "2")],
    ),
    "transposed": (
        nn.Sequential(nn.ConvTranspose2d(3, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ConvTranspose2d(6, 4, 2, groups=2)),
        (2, 3, 5, 5), [("0", "2"), ("2", "3")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_layers_of_a_chain_reach_equally_far_and_compute_what_they_did(name):
    model, shape, pairs = CHAINS[name]
    model = uneven(model).double().float()
    x = torch.randn(shape)
    graph, rows = run(model, x, EqualizeLayers(sweeps=200))
    assert rows[1].edits == len(pairs)
    expected = model.double()(x.double())
    model.float()
    torch.testing.assert_close(graph(x).double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    for first, second in pairs:
        given, read = (graph.tensor(f"{n}.weight").detach().abs() for n in (first, second))
        ends = dict(model.named_modules())
        given = (given.transpose(0, 1) if isinstance(ends[first], nn.ConvTranspose2d) else given).flatten(1).amax(1)
        if ends[first].bias is not None:
            given = torch.maximum(given, graph.tensor(f"{first}.bias").detach().abs())
        if not isinstance(ends[second], nn.ConvTranspose2d):
            groups = getattr(ends[second], "groups", 1)
            read = read.reshape(groups, len(read) // groups, *read.shape[1:]).transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(given, read.flatten(1).amax(1), rtol=0.01, atol=0)


@pytest.mark.parametrize(("middle", "reason"), [
    (nn.ReLU6(), "hardtanh follows it|relu6 follows it|clamp follows it"), (nn.GELU(), "gelu follows it"),
    (nn.Flatten(), "reshape follows it"), (nn.BatchNorm2d(8), "batch_norm follows it"),
])  # fmt: skip
def test_what_scales_no_channel_by_itself_stands_between(middle, reason):
    last = nn.Linear(8 * 36, 4) if isinstance(middle, nn.Flatten) else nn.Conv2d(8, 4, 1)
    with pytest.raises(PassError, match=reason):
        run(nn.Sequential(nn.Conv2d(3, 8, 3), middle, last), torch.randn(2, 3, 8, 8), EqualizeLayers())


def test_shared_weights_and_values_that_others_read_are_declined():
    with pytest.raises(PassError, match=r"its weight is shared"):
        run(Shared(), torch.randn(2, 12), EqualizeLayers())
    with pytest.raises(PassError, match="read elsewhere too"):
        run(Residual(), torch.randn(2, 3, 8, 8), FoldBatchNorm(), EqualizeLayers())


def test_channels_that_are_zero_stay_so():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[1], model[2].weight[:, 2] = 0, 0
    graph, _ = run(model, torch.randn(2, 4), EqualizeLayers())
    assert graph.tensor("0.weight").isfinite().all()
    assert not graph.tensor("0.weight")[1].any()


def test_a_network_of_uneven_channels_quantizes_better():
    torch.manual_seed(0)
    model = uneven(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1)))
    x = torch.randn(8, 3, 12, 12)
    exact = model(x)
    plain, equalized = (
        run(model, x, *steps)[0](x) for steps in ((Quantize(),), (EqualizeLayers(), Quantize()))
    )  # fmt: skip
    errors = [float((found - exact).detach().norm() / exact.detach().norm()) for found in (plain, equalized)]
    assert errors[1] < 0.8 * errors[0], errors


@pytest.mark.parametrize("gain", [1e-3, 1e-6, 1e-10])
def test_a_channel_that_is_all_bias_does_not_outgrow_the_others(gain):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(16)
    with torch.no_grad():
        norm.weight[3], norm.bias[3] = gain, 1
    model, x = nn.Sequential(nn.Conv2d(3, 16, 3), norm, nn.ReLU(), nn.Conv2d(16, 8, 1)).eval(), torch.randn(8, 3, 9, 9)
    exact = model(x).detach()
    found = run(model, x, FoldBatchNorm(), EqualizeLayers(), Quantize())[0](x).detach()
    assert float((found - exact).norm() / exact.norm()) < 0.02


def test_a_pool_over_channels_stands_between():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 4, 1)

        def forward(self, x):
            return self.b(nn.functional.max_pool2d(self.a(x), (3, 1), (1, 1), (1, 0)))

    with pytest.raises(PassError, match="max_pool2d follows it"):
        run(Pooled(), torch.randn(2, 3, 9), EqualizeLayers())


def test_sweeps_are_a_number():
    with pytest.raises(SpecError, match="sweeps=0"):
        EqualizeLayers(sweeps=0)
