"""Activations quantized per token, through the artifact: placement, exactness, mixtures, and what stays in float."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Attention, ConvBatchNorm, Shared
from torch import nn

import mcc
from mcc.data import Data
from mcc.errors import PassError
from mcc.passes import Gptq, PruneWeights, Quantize
from mcc.pipeline import Pipeline
from mcc.target import parse_target

QUICK = {"measure": "never", "tuning": "model"}
DYNAMIC = Quantize(activations="dynamic")


def run(model, x, *steps):
    graph = mcc.capture(model.eval(), (x,))
    return Pipeline(steps, parse_target("cpu:avx512vnni"), Data(calibration=[x])).run(graph, (x,))


def rounded(x):
    """Rows of x on their grids, in NumPy, written for this test."""
    x = x.numpy()
    largest = np.abs(x).max(-1, keepdims=True)
    codes = np.rint(x * np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0))
    return codes.astype(np.int64), largest / np.float32(127)


def test_layers_that_read_one_value_share_its_codes(check_rewrite):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3, bias=False)

        def forward(self, x):
            return self.a(x) + self.b(x) * x.sum(-1, keepdim=True)

    check_rewrite(Two(), DYNAMIC, inputs=(torch.randn(2, 4),), before="""
        %x: f32[2, 4]
        %a: f32[2, 3] = linear(%x, @a.weight, @a.bias)
        %b: f32[2, 3] = linear(%x, @b.weight)
        %sum_1: f32[2, 1] = sum.dim_IntList(%x, dim=[-1], keepdim=True)
        %mul: f32[2, 3] = mul.Tensor(%b, %sum_1)
        %add: f32[2, 3] = add.Tensor(%a, %mul)
        return %add
    """, after="""
        %x: f32[2, 4]
        %a_weight_quantized: f32[3, 4] = mcc.fake_quantize(@a.weight, @a.weight_scale, @a.weight_zero_point, axis=0, low=-127, high=127)
        %x_quantized: f32[2, 4] = mcc.fake_quantize_per_token(%x, limit=127)
        %a: f32[2, 3] = linear(%x_quantized, %a_weight_quantized, @a.bias)
        %b_weight_quantized: f32[3, 4] = mcc.fake_quantize(@b.weight, @b.weight_scale, @b.weight_zero_point, axis=0, low=-127, high=127)
        %b: f32[2, 3] = linear(%x_quantized, %b_weight_quantized)
        %sum_1: f32[2, 1] = sum.dim_IntList(%x, dim=[-1], keepdim=True)
        %mul: f32[2, 3] = mul.Tensor(%b, %sum_1)
        %add: f32[2, 3] = add.Tensor(%a, %mul)
        return %add
    """)  # fmt: skip


@pytest.mark.parametrize("rows", [0, 1, 7, 33])
def test_the_artifact_sums_integers_exactly(rows):
    """Powers of two as scales of weights, so that float64 holds what the kernel computes but for one rounding."""
    model, x = nn.Linear(37, 19), torch.randn(5, 37)
    model.weight.data = torch.randint(-127, 128, (19, 37)).float()
    model.weight.data[:, 0] = 127
    artifact = mcc.compile(model, (x,), passes=[DYNAMIC], dynamic_shapes=({0: "batch"},), target="cpu", **QUICK)
    x = torch.randn(rows, 37) * torch.logspace(-20, 20, rows)[:, None]
    x[rows // 2 :] = 0
    codes, scales = rounded(x)
    expected = codes @ model.weight.detach().numpy().astype(np.int64).T * scales.astype(np.float64)
    expected = expected + model.bias.detach().numpy()
    if artifact.report.passes[1].notes:  # the target keeps codes within ±63: the weights are other ones
        pytest.skip("weights of this target are not those of the test")
    np.testing.assert_allclose(artifact(x).detach().numpy(), expected, rtol=2e-6, atol=1e-6)


def test_one_large_row_does_not_spoil_the_others():
    """What a stored scale cannot do: rows of very different size, each as exact as if it were alone."""
    model, x = nn.Linear(64, 32), torch.randn(6, 64)
    x[3] *= 1e6
    artifact = mcc.compile(model, (x,), passes=[DYNAMIC], **QUICK)
    exact = model(x).detach()
    error = (artifact(x) - exact).norm(dim=1) / (exact - model.bias).norm(dim=1)
    assert error.max() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", ["int8", "int4", "int3", "int2"])
def test_weights_of_few_bits_are_read_packed(bits, symmetric):
    model, x = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 8)), torch.randn(5, 64)
    step = Quantize(weights=bits, activations="dynamic", group_size=32, symmetric=symmetric)
    artifact = mcc.compile(model.eval(), (x,), passes=[step], dynamic_shapes=({0: "batch"},), **QUICK)  # verified
    first, second = artifact.report.layers
    assert first.kernel.split()[0] == "low_bit_per_token"
    assert first.stored == f"{bits} in groups of 32"
    assert first.op.startswith("quantize per token + linear")
    assert second.kernel.split()[0] == ("dense_f32")  # 48 inputs are no whole groups: left in float, and said so
    declined = [(d.layer, d.reason) for d in artifact.report.passes[1].declined]
    assert declined == [("2", "its 48 inputs are no multiple of 32")]


def test_gptq_before_keeps_its_weights():
    model, x = nn.Linear(64, 16), torch.randn(40, 64)
    alone, _ = run(model, x, Gptq(group_size=32))
    both, rows = run(model, x, Gptq(group_size=32), DYNAMIC)
    assert torch.equal(alone.tensor("weight"), both.tensor("weight"))
    assert rows[-1].notes[0].endswith("its weight is quantized already, its activations are now")
    artifact = mcc.compile(model, (x,), passes=[Gptq(group_size=32), DYNAMIC], data=Data(calibration=[x]), **QUICK)
    assert [row.kernel.split()[0] for row in artifact.report.layers] == ["low_bit_per_token"]


def test_a_second_time_there_is_nothing_to_do():
    with pytest.raises(PassError, match="its weight is already quantized"):
        run(nn.Linear(8, 4), torch.randn(2, 8), DYNAMIC, DYNAMIC)


def test_convolutions_stay_in_float_by_name():
    with pytest.raises(PassError, match="conv2d reads no activations with a scale for each token"):
        run(ConvBatchNorm(), torch.randn(2, 3, 8, 8), DYNAMIC)


def test_sparse_weights_are_stored_dense_and_the_report_says_so():
    model, x = nn.Linear(12, 64), torch.randn(3, 12)  # too few inputs to be permuted
    passes = [PruneWeights(ratio=0.95), DYNAMIC]
    artifact = mcc.compile(model, (x,), passes=passes, target="cpu:avx2", **QUICK)  # verified
    (row,) = artifact.report.layers
    assert row.kernel.split()[0] == "dense_per_token"
    declined = [d.reason for step in artifact.report.passes for d in step.declined]
    assert declined == ["stored dense: no sparse kernel quantizes the rows it reads"]


def test_attention_and_shared_layers_run_from_several_threads():
    model = Attention(64, 4)
    example = torch.randn(2, 9, 64)
    artifact = mcc.compile(model.eval(), (example,), passes=[DYNAMIC], dynamic_shapes=({0: "batch"},), **QUICK)
    inputs = [torch.randn(n, 9, 64) for n in (1, 2, 5, 7)]
    expected = [artifact(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(artifact, inputs * 8), expected * 8, strict=True):
            assert torch.equal(found, wanted)
    x = torch.randn(2, 12)
    shared = mcc.compile(Shared().eval(), (x,), passes=[DYNAMIC], **QUICK)  # verified
    assert {row.kernel.split()[0] for row in shared.report.layers} == {"dense_per_token"}


def test_the_gradient_passes_straight_through():
    x = torch.randn(3, 5, requires_grad=True)
    torch.ops.mcc.fake_quantize_per_token(x, 127).backward(torch.ones(3, 5) * 2)
    assert torch.equal(x.grad, torch.full((3, 5), 2.0))


def test_rows_too_small_for_a_scale_are_zeros():
    x = torch.tensor([[0.0, 0.0], [1e-38, -1e-40], [3e-35, 1e-35]])
    found = torch.ops.mcc.fake_quantize_per_token(x, 127)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [0.0, 0.0], [3e-35, 1e-35]]), rtol=1e-2, atol=0)
    model = nn.Linear(2, 3)
    artifact = mcc.compile(model, (torch.randn(3, 2),), passes=[DYNAMIC], **QUICK)
    torch.testing.assert_close(artifact(x), F.linear(found, model.weight, model.bias).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_with_what_is_no_number_gives_none(weights, value):
    """As in the graph; other rows are not touched."""
    model, x = nn.Linear(64, 5), torch.randn(4, 64)
    step = Quantize(weights=weights, activations="dynamic", group_size=None if weights == "int8" else 32)
    artifact = mcc.compile(model, (x,), passes=[step], **QUICK)
    before = artifact(x)
    x[1, 5] = value
    found = artifact(x)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2, 3]], before[[0, 2, 3]])


def test_a_batch_of_none_compiles():
    model, x = nn.Linear(64, 5), torch.randn(0, 64)
    assert mcc.compile(model, (x,), passes=[DYNAMIC], **QUICK)(x).shape == (0, 5)


def test_no_note_on_codes_that_no_weight_has():
    step = Quantize(weights="int8", activations="dynamic", symmetric=False)
    graph = mcc.capture(nn.Linear(32, 4), (torch.randn(2, 32),))
    _, rows = Pipeline((step,), parse_target("cpu:avx2"), Data()).run(graph, (torch.randn(2, 32),))
    assert rows[-1].notes == ()
