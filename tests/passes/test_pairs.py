"""Int8 weights for CPUs whose fast instruction adds two products in 16 bits: neighbours that fit together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import mlp
from torch import nn

import mcc
from mcc.backends.cpu.integer_sums import pairs_fit
from mcc.pairs import LARGEST_SUM, fit_pairs, fitted
from mcc.passes import AdaRound, Quantize
from mcc.pipeline import Pipeline
from mcc.quantization import channel_scales
from mcc.target import parse_target


def run(model, x, *steps):
    graph = mcc.capture(model.eval(), (x,))
    return Pipeline(steps, parse_target("cpu:avx2"), mcc.Data(calibration=[x])).run(graph, (x,))


STEPS = st.integers(-1290, 1290).map(lambda n: n / 10)


@given(st.tuples(STEPS, STEPS))
def test_a_pair_gets_the_nearest_codes_that_fit(pair):
    a, b = np.meshgrid(np.arange(-127, 128), np.arange(-127, 128), indexing="ij")
    allowed = (a * b <= 0) | (abs(a) + abs(b) <= LARGEST_SUM)
    errors = np.where(allowed, (a - pair[0]) ** 2 + (b - pair[1]) ** 2, np.inf)
    found = fitted(torch.tensor([pair], dtype=torch.float64)[..., None])[0, :, 0]
    assert allowed[int(found[0]) + 127, int(found[1]) + 127]
    error = float((found - torch.tensor(pair, dtype=torch.float64)).square().sum())
    assert error <= errors.min() + 1e-9


@settings(deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from([(8, 6), (5, 4, 3, 3), (3, 2)]),
    st.sampled_from(["normal", "uniform", "heavy"]),
)
def test_pairs_fit_and_err_less_than_half_the_codes_would(seed, shape, kind):
    random = np.random.default_rng(seed)
    draw = {
        "normal": random.standard_normal,
        "uniform": lambda s: random.uniform(0.5, 1, s),
        "heavy": lambda s: random.standard_t(2, s),
    }
    weight = torch.from_numpy(draw[kind](shape).astype(np.float32))
    scale, changed = fit_pairs(weight)
    steps = scale.reshape([-1, *[1] * (weight.dim() - 1)])
    codes = torch.round(changed / steps)
    assert codes.abs().max() <= 127
    assert pairs_fit(codes.to(torch.int8).numpy())
    halved = channel_scales(weight, 0, (-63, 63)).reshape(steps.shape)
    ways = codes * steps, torch.round(weight / halved) * halved
    error, other = (((way - weight).double() / halved).norm() for way in ways)
    assert error <= other + 2e-5 * weight.numel() ** 0.5  # steps: 63 of a scale in float32 are up to 1e-5 off


class Layers(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 12, 1),
            nn.ConvTranspose2d(12, 6, 2), nn.Flatten(), nn.Linear(6 * 25, 8),
        )  # fmt: skip


@pytest.mark.parametrize("passes", ["quantize", "quantize; ada-round{iterations=20}"])
def test_layers_for_avx2_have_codes_to_127_that_its_instruction_adds(passes):
    x = torch.randn(3, 4, 8, 8)
    artifact = mcc.compile(
        Layers().eval(), (x,), passes=passes, target="cpu:avx2", data=mcc.Data(calibration=[x]), measure="never",
        tuning="model",
    )  # fmt: skip
    assert [row.reason for row in artifact.report.layers] == [""] * 5
    graph, rows = run(Layers(), x, Quantize())
    limits = {n.name: n.argument(5) for n in graph.nodes if n.op is mcc.ops.FAKE_QUANTIZE and n.argument(3) is not None}
    assert list(limits.values()) == [127, 63, 127, 63, 127]
    assert any("codes of neighbours within 128 together, others within ±63" in note for note in rows[1].notes)


def test_codes_that_take_a_longer_sequence_are_named():
    model, x = mlp(12, 4), torch.randn(2, 12)
    with torch.no_grad():
        model[0].weight.copy_(torch.linspace(0.5, 1, 48).reshape(4, 12))
    artifact = mcc.compile(
        model, (x,), passes=[Quantize(weight_range="full")], target="cpu:avx2", data=mcc.Data(calibration=[x]),
        measure="never", tuning="model",
    )  # fmt: skip
    (row,) = artifact.report.layers
    assert row.reason == "neighbouring codes exceed what one instruction adds exactly, a longer sequence adds them"


def test_learned_rounding_keeps_neighbours_together():
    torch.manual_seed(0)
    model, x = nn.Linear(32, 16), torch.rand(64, 32)
    with torch.no_grad():
        model.weight.uniform_(0.4, 1)  # every pair is at the limit
    graph, _ = run(model, x, Quantize(), AdaRound(iterations=50))
    quantizer = next(n for n in graph.nodes if n.op is mcc.ops.FAKE_QUANTIZE and n.argument(3) == 0)
    codes = torch.round(graph.tensor("weight") / quantizer.operand(1).tensor[:, None])
    assert pairs_fit(codes.detach().to(torch.int8).numpy())
