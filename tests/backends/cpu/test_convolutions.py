"""Convolutions that are computed as others: conv1d as conv2d, transposed ones by phases, named padding as numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from regions import TARGETS
from torch import nn
from torch.nn import functional as F

import mcc
from mcc.backends.cpu.layout import layout
from mcc.backends.cpu.lowering import Lowering
from mcc.backends.cpu.measure import measure
from mcc.backends.tune import Tuner

few = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),
)  # fmt: skip
QUICK = {"verify": False, "measure": "never", "tuning": "model"}


def check(model: nn.Module, *shape: int, kernels: list[str]) -> None:
    """One artifact against float64 at several batch sizes; `kernels` are the families of its layers."""
    model = model.eval()
    artifact = mcc.compile(model, (torch.randn(2, *shape),), dynamic_shapes=({0: "batch"},), **QUICK)
    assert [row.kernel.split()[0] for row in artifact.report.layers] == kernels
    for batch in (1, 2, 7, 0):
        x = torch.randn(batch, *shape)
        with torch.no_grad():
            expected, found = model.double()(x.double()), artifact(x)
        model.float()
        assert found.shape == expected.shape
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@few
@given(
    st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.integers(0, 2), st.sampled_from([1, 1, 2, 4]),
    st.booleans(),
)  # fmt: skip
def test_a_transposed_convolution_is_one_convolution_of_its_phases(kernel, stride, padding, extra, groups, bias):
    assume(extra < stride and (5 - 1) * stride - 2 * padding + kernel + extra > 0)
    assume(padding <= kernel - 1 + extra)  # where input pixels reach no output there is another way
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(8, 12, kernel, stride, padding, extra, groups=groups, bias=bias)
    check(nn.Sequential(layer, nn.ReLU()), 8, 5, 6, kernels=["conv2d_f32"])


@few
@given(
    st.integers(1, 5), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2), st.sampled_from([1, 2, 16]),
    st.booleans(),
)  # fmt: skip
def test_a_conv1d_is_a_convolution_of_images_of_height_one(kernel, stride, padding, dilation, groups, bias):
    torch.manual_seed(0)
    layer = nn.Conv1d(16, 16, kernel, stride, padding, dilation, groups, bias)
    check(nn.Sequential(layer, nn.BatchNorm1d(16), nn.SiLU()), 16, 20,
          kernels=["depthwise" if groups == 16 else "conv2d_f32"])  # fmt: skip


def test_what_stands_between_sequences_is_taken_in():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(16, 16, 3, padding=1), nn.Conv1d(16, 16, 3, padding=1)

        def forward(self, x):
            return x + self.second(torch.relu(self.first(x)))

    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(3, 16, 11)
    artifact = mcc.compile(model, (x,), **QUICK)
    assert [row.op for row in artifact.report.layers] == ["mcc.conv2d_nhwc + relu", "mcc.conv2d_nhwc + add"]
    torch.testing.assert_close(artifact(x), model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [
    nn.Conv2d(6, 8, 3, padding="same"), nn.Conv2d(6, 8, (4, 2), padding="same"), nn.Conv2d(6, 8, 4, padding="valid"),
    nn.Conv2d(6, 8, 3, padding="same", dilation=(2, 1)),
], ids=str)  # fmt: skip
def test_named_padding_is_numbers(layer):
    check(nn.Sequential(layer), 6, 9, 8, kernels=["conv2d_f32"])


@pytest.mark.parametrize("kernel", [3, 4])
def test_named_padding_of_a_conv1d(kernel):
    check(nn.Sequential(nn.Conv1d(6, 8, kernel, padding="same")), 6, 9, kernels=["conv2d_f32"])


class Padded(nn.Module):
    """Convolutions behind pads of their own, as models from other frameworks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, 2), nn.Conv2d(16, 16, 3, groups=16)

    def forward(self, x):
        y = F.relu6(self.first(F.pad(x, (0, 1, 0, 1))))
        return self.second(F.pad(y, (1, 1, 1, 1)))


def test_a_pad_of_zeros_is_the_padding_of_the_convolution():
    torch.manual_seed(0)
    model = Padded().eval()
    graph = layout(
        Lowering(mcc.capture(model, (torch.randn(2, 3, 16, 16),)), TARGETS[0], Tuner("model", measure))
    ).graph
    assert not any("pad" in n.op.name for n in graph.nodes if n.op is not None)
    check(model, 3, 16, 16, kernels=["conv2d_f32", "depthwise"])


def test_a_pad_of_codes_has_the_code_of_zero():
    torch.manual_seed(0)
    model, x = Padded().eval(), torch.randn(4, 3, 16, 16)
    artifact = mcc.compile(model, (x,), passes="quantize", data=mcc.Data(calibration=[x]), tuning="model")
    assert [row.kernel.split()[0] for row in artifact.report.layers] == ["conv2d_int8", "depthwise_int8"]
    with torch.no_grad():
        assert (artifact(x) - model(x)).norm() < 0.03 * model(x).norm()


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(16, 24, 4, 2, 1), nn.Conv1d(16, 24, 3)], ids=str)
def test_pruned_weights_are_computed_dense_and_the_report_says_so(layer):
    torch.manual_seed(0)
    x = torch.randn(4, 16, *[9] * (layer.weight.dim() - 2))
    artifact = mcc.compile(layer.eval(), (x,), passes="prune-weights{ratio=0.9}", tuning="model")
    (row,) = artifact.report.layers
    assert row.kernel.startswith("conv2d_f32")
    assert "no kernel for its sparse weights" in str(artifact.report)
    assert np.count_nonzero(artifact(x).numpy())


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(16, 24, 4, 2, 1), nn.Conv2d(16, 24, 3)])
def test_quantized_codes_stay_codes(layer):
    torch.manual_seed(0)
    x = torch.randn(4, 16, 7, 9)
    model = nn.Sequential(layer, nn.ReLU()).eval()
    artifact = mcc.compile(model, (x,), passes="quantize", data=mcc.Data(calibration=[x]), tuning="model")
    (row,) = artifact.report.layers
    assert row.kernel.startswith("conv2d_int8")
    with torch.no_grad():
        assert (artifact(x) - model(x)).norm() < 0.03 * model(x).norm()
