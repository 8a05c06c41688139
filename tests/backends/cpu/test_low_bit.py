"""Weights of a few bits through the whole compiler: right answers, few bytes, and a reason where a layer has more."""

from __future__ import annotations

import pytest
import torch
from networks import Shared
from torch import nn

import mcc
from mcc.data import Data
from mcc.errors import PassError, SpecError
from mcc.passes import AdaRound, FineTune, PruneWeights, Quantize
from mcc.pipeline import Pipeline
from mcc.target import parse_target

QUICK = {"measure": "never", "tuning": "model"}
BATCH = ({0: "batch"},)


def compressed(model, x, *steps):
    """The graph that an artifact is to equal."""
    return Pipeline(steps, parse_target("cpu"), Data(calibration=[x])).run(mcc.capture(model.eval(), (x,)), (x,))[0]


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("weights", "bits"), [("int8", 8), ("int4", 4), ("int3", 3), ("int2", 2)])
def test_linear_layers_take_no_more_than_their_bits_and_equal_the_graph(tmp_path, weights, bits, symmetric):
    model = nn.Sequential(nn.Linear(96, 256), nn.GELU(), nn.Linear(256, 64)).eval()
    x, step = torch.randn(7, 96), Quantize(weights=weights, activations=None, group_size=32, symmetric=symmetric)
    graph = compressed(model, x, step)
    artifact = mcc.compile(model, (x,), passes=[step], dynamic_shapes=BATCH, **QUICK)
    artifact.save(tmp_path / "m.mcc")
    loaded = mcc.load(tmp_path / "m.mcc")
    for batch in (1, 7, 0):
        torch.testing.assert_close(loaded(x[:batch]), graph(x)[:batch], rtol=1e-4, atol=1e-5)
    for row, layer in zip(loaded.report.layers, (model[0], model[2]), strict=True):
        assert row.stored == f"int{bits} in groups of 32"
        extra = 16 + (0 if symmetric else 8)  # bits of a scale and a zero point
        assert row.stored_bytes <= layer.weight.numel() * (bits + extra / 32) / 8 + 4 * len(layer.bias)
        assert row.reason == ""


@pytest.mark.slow
@pytest.mark.parametrize("activations", [None, "dynamic"])
@pytest.mark.parametrize(("weights", "midpoints", "bits"), [
    ("binary", False, 1), ("ternary", False, 2), ("int2", True, 2), ("int3", True, 3), ("int4", True, 4),
])  # fmt: skip
def test_codes_that_stand_for_halves_and_for_three_values(weights, midpoints, bits, activations):
    """The zero point that all groups have is in the kernel's code: it takes no bytes."""
    model, x = nn.Linear(96, 72).eval(), torch.randn(7, 96)
    step = Quantize(weights=weights, activations=activations, group_size=32, midpoints=midpoints)
    graph = compressed(model, x, step)
    values = graph.node("weight_quantized").fx.target(
        *(graph.tensor(n).detach() for n in ("weight", "weight_scale", "weight_zero_point")), *graph.node("weight_quantized").fx.args[3:]
    )  # fmt: skip
    kinds = {"binary": 2, "ternary": 3}.get(weights, 1 << bits)
    assert all(len(group.unique()) <= kinds for group in values.reshape(-1, 32))
    if midpoints or weights == "binary":
        assert (values != 0).all()
    artifact = mcc.compile(model, (x,), passes=[step], dynamic_shapes=BATCH, **QUICK)
    for batch in (1, 7, 0):
        torch.testing.assert_close(artifact(x[:batch]), graph(x)[:batch], rtol=1e-4, atol=1e-4)
    (row,) = artifact.report.layers
    assert row.reason == ""
    rows = 80 if parse_target("cpu").vector_lanes == 16 else 72  # whole vectors of outputs
    assert row.stored_bytes == rows * (96 * bits / 8 + 3 * 2 + 4)


def test_what_halves_cannot_do_is_refused_in_words():
    x = torch.randn(2, 64)
    with pytest.raises(SpecError, match="integer sums need one scale and no zero point"):
        Quantize(weights="binary")
    with pytest.raises(SpecError, match="midpoints of three codes"):
        Quantize(weights="ternary", activations=None, midpoints=True)
    with pytest.raises(SpecError, match="midpoints have one zero point"):
        Quantize(weights="int2", activations=None, midpoints=True, symmetric=False)
    with pytest.raises(PassError, match="its pruned weights would not stay zero: no code stands for it"):
        compressed(nn.Linear(64, 8), x, PruneWeights(ratio=0.5), Quantize(weights="binary", activations=None))
    with pytest.raises(PassError, match="no kernel of conv1d reads codes that stand for halves"):
        compressed(nn.Conv1d(4, 4, 3), torch.randn(1, 4, 8), Quantize(weights="binary", activations=None))


def test_the_scale_of_two_values_is_the_mean():
    """Rastegari et al.: XNOR-Net. ECCV 2016."""
    model = nn.Linear(512, 16).eval()
    graph = compressed(model, torch.randn(2, 512), Quantize(weights="binary", activations=None))
    best = 2 * model.weight.detach().abs().mean(1, keepdim=True)
    torch.testing.assert_close(graph.tensor("weight_scale").float(), best, rtol=1e-3, atol=0)


@pytest.mark.parametrize("weights", ["binary", "ternary", "int2"])
def test_one_large_weight_does_not_set_the_scale_of_the_others(weights):
    model = nn.Linear(4096, 8, bias=False).eval()
    torch.nn.init.normal_(model.weight)
    model.weight.data[:, -1] = 20.0
    graph = compressed(model, torch.eye(4096), Quantize(weights=weights, activations=None))
    rounded = graph(torch.eye(4096)).T
    plain = model.weight[:, :-1]
    assert (rounded[:, :-1] - plain).square().sum() < 0.5 * plain.square().sum()


@pytest.mark.parametrize("options", [{"weights": "binary"}, {"weights": "int2", "midpoints": True}])
def test_rounding_is_learned_for_halves_too(options):
    model, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(200, 64)
    expected = model(x)
    step = Quantize(activations=None, group_size=32, **options)
    errors = [
        float((compressed(model, x, *steps)(x) - expected).detach().norm())
        for steps in ((step,), (step, AdaRound(iterations=200)))
    ]
    assert errors[1] < errors[0]


def test_without_a_group_size_a_row_is_one_group_of_any_length():
    model, x = nn.Sequential(nn.Linear(37, 19), nn.ReLU(), nn.Linear(19, 5)), torch.randn(3, 37)
    step = Quantize(weights="int4", activations=None)
    artifact = mcc.compile(model.eval(), (x,), passes=[step], **QUICK)
    torch.testing.assert_close(artifact(x), compressed(model, x, step)(x), rtol=1e-4, atol=1e-5)
    assert [row.stored for row in artifact.report.layers] == ["int4 in groups of 37", "int4 in groups of 19"]


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv1d(6, 8, 3, padding=1), nn.Conv2d(8, 16, 3)
        self.up = nn.ConvTranspose2d(16, 4, 2, stride=2)

    def forward(self, x):
        y = torch.relu(self.one(x)).unflatten(2, (8, 8))
        return self.up(torch.relu(self.two(y)))


def test_convolutions_keep_their_codes_as_bytes_and_say_so():
    model, x, step = Convolutions(), torch.randn(2, 6, 64), Quantize(weights="int4", activations=None)
    artifact = mcc.compile(model.eval(), (x,), passes=[step], **QUICK)
    torch.testing.assert_close(artifact(x), compressed(model, x, step)(x), rtol=1e-4, atol=1e-5)
    stored = {row.layer: (row.stored, row.reason) for row in artifact.report.layers}
    assert stored["two"] == ("int8", "int4 codes are stored as bytes: conv2d_f32 unpacks none")


@pytest.mark.parametrize("passes", ["", "quantize{weights='int4', activations=None}"])
def test_what_is_decoded_at_build_time_is_not_stored_beside(passes):
    model, x = nn.Conv3d(8, 8, 3, groups=2).eval(), torch.randn(1, 8, 5, 5, 5)
    artifact = mcc.compile(model, (x,), passes=passes, **QUICK)
    assert artifact.report.passes[-1].size.stored_bytes == 4 * (8 * 4 * 27 + 8)
    assert [row.stored_bytes for row in artifact.report.layers] == [4 * 8 * 4 * 27]


def test_a_few_bits_with_int8_activations_run_in_integers():
    model, x = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8)), torch.randn(5, 64)
    step = Quantize(weights="int4")
    artifact = mcc.compile(model.eval(), (x,), passes=[step], data=Data(calibration=[x]), **QUICK)
    assert [row.kernel.split()[0] for row in artifact.report.layers] == ["dense_int8", "dense_int8"]
    assert [row.reason for row in artifact.report.layers] == [
        "int4 codes are stored as bytes: dense_int8 unpacks none"
    ] * 2


def test_a_shared_weight_is_packed_once():
    model, x = Shared(), torch.randn(2, 12)
    step = Quantize(weights="int4", activations=None)
    artifact = mcc.compile(model.eval(), (x,), passes=[step], **QUICK)
    torch.testing.assert_close(artifact(x), compressed(model, x, step)(x), rtol=1e-4, atol=1e-5)
    assert len({row.stored_bytes for row in artifact.report.layers}) == 1


def test_pruned_weights_stay_zero_under_groups_and_training():
    model, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(16, 64)
    train = [(x, torch.randint(0, 4, (16,)))]
    steps = [
        PruneWeights(ratio=0.9), Quantize(weights="int4", activations=None, group_size=32, symmetric=False),
        FineTune(epochs=1),
    ]  # fmt: skip
    artifact = mcc.compile(model.eval(), (x,), passes=steps, data=Data(train=train), **QUICK)  # verified
    assert all(row.kernel.startswith("low_bit_dense") for row in artifact.report.layers)


def test_recurrent_layers_take_groups():
    model, x = nn.LSTM(32, 16, batch_first=True), torch.randn(2, 5, 32)
    step = Quantize(weights="int4", activations=None, group_size=32)
    artifact = mcc.compile(model.eval(), (x,), passes=[step], **QUICK)  # verified
    assert "int4 in groups of 32" in {row.stored for row in artifact.report.layers}
