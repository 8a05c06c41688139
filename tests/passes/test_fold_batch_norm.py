"""fold-batch-norm: golden text, numerics against PyTorch in float64, and what is declined."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import ConvBatchNorm
from torch import nn

import mcc
from mcc.data import Data
from mcc.passes import FoldBatchNorm, Quantize
from mcc.pipeline import Pipeline
from mcc.target import parse_target


def run(model, x, *steps, data=None):
    graph = mcc.capture(model.eval(), (x,))
    return Pipeline(steps or (FoldBatchNorm(),), parse_target("cpu:avx2"), data or Data()).run(graph, (x,))


def trained(norm: nn.Module) -> nn.Module:
    """A batch norm with statistics and an affine part that are not those it starts with."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.2, 3)
    if norm.affine:
        norm.weight.data.normal_()
        norm.bias.data.normal_()
    return norm


def test_batch_norm_folds_into_the_convolution_before_it(check_rewrite):
    check_rewrite(ConvBatchNorm(), FoldBatchNorm(), inputs=(torch.randn(2, 3, 8, 8),), before="""
        %x: f32[2, 3, 8, 8]
        %conv: f32[2, 4, 8, 8] = conv2d(%x, @conv.weight, padding=1)
        %bn: f32[2, 4, 8, 8] = batch_norm(%conv, @bn.weight, @bn.bias, @bn.running_mean, @bn.running_var, training=False, momentum=0.1, eps=1e-05)
        return %bn
    """, after="""
        %x: f32[2, 3, 8, 8]
        %bn: f32[2, 4, 8, 8] = conv2d(%x, @conv.weight, @conv.bias, padding=1)
        return %bn
    """)  # fmt: skip


LAYERS = {
    "linear": (lambda g, bias: nn.Linear(6, 8, bias=bias), nn.BatchNorm1d, (5, 6)),
    "conv1d": (lambda g, bias: nn.Conv1d(4, 8, 3, groups=g, bias=bias), nn.BatchNorm1d, (3, 4, 9)),
    "conv2d": (lambda g, bias: nn.Conv2d(4, 8, 3, groups=g, bias=bias), nn.BatchNorm2d, (3, 4, 6, 5)),
    "conv3d": (lambda g, bias: nn.Conv3d(4, 8, 2, groups=g, bias=bias), nn.BatchNorm3d, (2, 4, 4, 4, 4)),
    "conv_transpose2d": (
        lambda g, bias: nn.ConvTranspose2d(4, 8, 3, groups=g, bias=bias),
        nn.BatchNorm2d,
        (2, 4, 5, 5),
    ),
}


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(sorted(LAYERS)), groups=st.sampled_from([1, 2, 4]), bias=st.booleans(), affine=st.booleans()
)
def test_folding_is_exact_for_every_layer_with_groups_and_without_bias(kind, groups, bias, affine):
    make, norm, shape = LAYERS[kind]
    model = nn.Sequential(make(groups, bias), trained(norm(8, affine=affine)))
    x = torch.randn(shape)
    graph, rows = run(model, x)
    assert rows[1].edits == 1
    with torch.no_grad():
        torch.testing.assert_close(graph(x).double(), model.double()(x.double()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("model", "reason"), [
    (nn.Sequential(trained(nn.BatchNorm2d(3)), nn.Conv2d(3, 4, 3)), "it follows an input, not a convolution or linear layer"),
    (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), trained(nn.BatchNorm2d(4))), "it follows relu, not a convolution or linear layer"),
])  # fmt: skip
def test_a_batch_norm_that_cannot_fold_is_declined_with_the_reason(model, reason):
    _, rows = run(model, torch.randn(2, 3, 6, 6))
    assert (rows[1].edits, rows[1].declined[0].reason) == (0, reason)


def test_a_convolution_read_twice_keeps_its_batch_norm():
    class Twice(ConvBatchNorm):
        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) + y

    _, rows = run(Twice(), torch.randn(2, 3, 6, 6))
    assert rows[1].declined[0].reason == "%conv is read elsewhere too"


def test_a_shared_convolution_keeps_its_batch_norm():
    class Shared(ConvBatchNorm):
        def forward(self, x):
            return self.bn(self.conv(x)), self.conv(x + 1)

    _, rows = run(Shared(), torch.randn(2, 3, 6, 6))
    assert rows[1].declined[0].reason == "the weight or bias of %conv_conv2d is shared with another layer"


@pytest.mark.parametrize(("gain", "edits"), [(0.7, 1), (-0.7, 0)])
def test_codes_of_four_bits_have_no_negative_of_the_least_one(gain, edits):
    x, model = torch.randn(2, 3, 6, 6), ConvBatchNorm()
    with torch.no_grad():
        model.bn.weight[:2] = torch.tensor([gain, 0.0])
    _, rows = run(model, x, Quantize(weights="int4"), FoldBatchNorm(), data=Data(calibration=[x]))
    assert rows[2].edits == edits
    assert {d.reason for d in rows[2].declined} == (
        set() if edits else {"the weight of %conv is quantized, but not symmetrically by output channel"}
    )


def test_folding_after_quantization_scales_the_scales_and_keeps_the_codes():
    x = torch.randn(2, 3, 6, 6)
    model = ConvBatchNorm()
    with torch.no_grad():
        model.bn.weight[:2] = torch.tensor([-0.7, 0.0])
    before, _ = run(model, x, Quantize(), data=Data(calibration=[x]))
    after, rows = run(model, x, Quantize(), FoldBatchNorm(), data=Data(calibration=[x]))
    assert not rows[2].declined
    codes = []
    for graph in (before, after):
        (scale,) = (t for name, t in graph.module.named_buffers() if name.endswith("conv.weight_scale"))
        codes.append(torch.round(graph.tensor("conv.weight") / scale[:, None, None, None]))
    assert torch.equal(codes[1][0], -codes[0][0])
    assert torch.count_nonzero(codes[1][1]) == 0
    assert torch.equal(codes[1][2:], codes[0][2:])


def test_a_folded_graph_trains():
    x = torch.randn(2, 3, 8, 8)
    graph, _ = run(ConvBatchNorm(), x)
    graph.train()(x).sum().backward()
    assert {n for n, p in graph.named_parameters() if p.grad is not None} == {"conv.weight", "conv.bias"}


def test_scales_of_groups_are_declined_by_name():
    model = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16)).eval()
    x = torch.randn(8, 64)
    for step in (
        Quantize(weights="int4", activations=None, group_size=32),
        Quantize(weights="int4", activations="dynamic"),
    ):
        graph = mcc.capture(model, (x,))
        _, rows = Pipeline((step, FoldBatchNorm()), parse_target("cpu:avx2"), Data()).run(graph, (x,))
        assert [d.reason for d in rows[-1].declined] == [
            "the weight of %linear_0 is quantized, but not symmetrically by output channel"
        ]
