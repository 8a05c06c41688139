"""`quantize{weights="auto"}`: each layer gets the bits that the metric allows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mcc
from mcc.data import Data
from mcc.errors import DataError, PassError, SpecError
from mcc.passes import Quantize
from mcc.pipeline import Pipeline
from mcc.sensitivity import Damage, choose, damages
from mcc.target import parse_target

FORMATS = ("int8", "int4", "int2")


def measured(costs):
    """A metric of 1 that each layer's format takes something from."""
    return lambda formats: 1.0 - sum(costs[layer][FORMATS.index(kind)] for layer, kind in formats.items())


COSTS = {"robust": (0.0, 0.001, 0.002), "weak": (0.001, 0.02, 0.5), "small": (0.0, 0.004, 0.02)}
SIZES = {"robust": (300, 350, 375), "weak": (300, 350, 375), "small": (3, 4, 5)}
SAVED = {layer: dict(zip(FORMATS, sizes, strict=True)) for layer, sizes in SIZES.items()}


def test_damage_is_measured_layer_by_layer_the_worst_first():
    found = damages(measured(COSTS), 1.0, SAVED)
    assert found[0] == Damage("weak", "int2", 0.5, 375)
    assert [d.drop for d in found] == sorted((d.drop for d in found), reverse=True)
    assert len(found) == 9


@pytest.mark.parametrize(("max_drop", "wanted"), [
    (-1.0, {}),
    (0.0, {"robust": "int8", "small": "int8"}),
    (0.0035, {"robust": "int2", "weak": "int8", "small": "int8"}),
    (0.03, {"robust": "int2", "weak": "int4", "small": "int4"}),
    (1.0, {"robust": "int2", "weak": "int2", "small": "int2"}),
])  # fmt: skip
def test_what_is_chosen_saves_much_within_the_drop(max_drop, wanted):
    measure = measured(COSTS)
    chosen = choose(measure, 1.0 - max_drop, damages(measure, 1.0, SAVED))
    assert chosen == wanted
    assert not chosen or measure(chosen) >= 1.0 - max_drop - 1e-12


class Two(nn.Module):
    """A layer whose weights need their bits, for they are far apart, before one of two values."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.fine.weight.data = torch.randn(64, 64) * torch.logspace(-2, 0, 64)
        self.coarse.weight.data = torch.randint(0, 2, (64, 64)) * 2.0 - 1

    def forward(self, x):
        return self.coarse(self.fine(x))


def closeness(model, x):
    expected = model(x).detach()

    def evaluate(run):
        with torch.no_grad():
            return -float((run(x) - expected).norm() / expected.norm())

    return evaluate


@pytest.mark.parametrize("activations", [None, "dynamic"])
def test_a_layer_of_few_values_gets_few_bits(activations):
    torch.manual_seed(0)
    model, x = Two().eval(), torch.randn(200, 64)
    step = Quantize("auto", activations, max_drop=0.02)
    graph = mcc.capture(model, (x,))
    evaluate = closeness(model, x)
    after, rows = Pipeline((step,), parse_target("cpu:avx512vnni"), Data(calibration=[x], evaluate=evaluate)).run(
        graph, (x,)
    )
    assert rows[1].notes == ("fine: int8", "coarse: int2")
    assert evaluate(after) >= -0.03  # of the weights 0.02, and the activations
    artifact = mcc.compile(after, (x,), measure="never", tuning="model")
    assert evaluate(artifact) >= -0.03


def test_layers_that_cannot_pay_stay_in_float_by_name():
    model, x = Two().eval(), torch.randn(50, 64)
    data = Data(evaluate=closeness(model, x))
    pipeline = Pipeline((Quantize("auto", None, max_drop=1e-4),), parse_target("cpu:avx2"), data)
    _, rows = pipeline.run(mcc.capture(model, (x,)), (x,))
    assert [(d.layer, d.reason) for d in rows[1].declined] == [
        ("fine", "float: with it in any format, the metric would drop by more than 0.0001")
    ]
    with pytest.raises(DataError, match=r"needs data\.evaluate"):
        mcc.compile(model, (x,), passes="quantize{weights='auto', activations=None}")


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


def test_bits_are_not_spent_where_they_are_not_saved():
    """Convolutions, and linear layers that read codes, store bytes."""
    model, x = Image().eval(), torch.randn(8, 3, 8, 8)
    for activations, wanted in ((None, {"conv: int8", "fc: int2"}), ("int8", {"conv: int8", "fc: int8"})):
        data = Data(calibration=[x], evaluate=lambda _: 1.0)
        pipeline = Pipeline((Quantize("auto", activations),), parse_target("cpu:avx512vnni"), data)
        _, rows = pipeline.run(mcc.capture(model, (x,)), (x,))
        assert set(rows[1].notes) == wanted


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Embedding(20, 64), nn.Linear(64, 3)
        self.embed.weight.data *= torch.logspace(-4, 0, 64)
        self.register_buffer("gain", torch.logspace(4, 0, 64))

    def forward(self, ids):
        return self.fc(self.embed(ids) * self.gain)


def test_an_embedding_is_measured_like_a_layer():
    torch.manual_seed(0)
    model, ids = Words().eval(), torch.arange(20)[None]
    evaluate = closeness(model, ids)
    for max_drop, taken in ((1e-4, False), (2.0, True)):
        pipeline = Pipeline((Quantize("auto", None, max_drop=max_drop),), parse_target("cpu"), Data(evaluate=evaluate))
        graph, rows = pipeline.run(mcc.capture(model, (ids,)), (ids,))
        assert ("embed: int8" in rows[1].notes) == taken
        assert evaluate(graph) >= -max_drop


def test_a_metric_that_fails_is_the_users_and_a_drop_is_a_number():
    def fails(run):
        raise KeyError("labels")

    x = torch.randn(2, 64)
    with pytest.raises(DataError, match="data.evaluate failed: KeyError: 'labels'"):
        mcc.compile(Two(), (x,), passes="quantize{weights='auto', activations=None}", data=Data(evaluate=fails))
    with pytest.raises(SpecError, match="max_drop=nan"):
        Quantize("auto", max_drop=float("nan"))


def test_included_layers_alone_are_taken():
    model, x = Two().eval(), torch.randn(5, 64)
    steps = Quantize("int4", None, include=("co*",)), Quantize(activations=None)
    graph, rows = Pipeline(steps, parse_target("cpu:avx2"), Data()).run(mcc.capture(model, (x,)), (x,))
    assert [(d.layer, d.reason) for d in rows[1].declined] == [("fine", "not included")]
    assert [(d.layer, d.reason) for d in rows[2].declined] == [("coarse", "its weight is already quantized")]
    assert (graph.tensor("coarse.weight_scale").dim(), graph.tensor("fine.weight_scale").dim()) == (2, 1)
    with pytest.raises(PassError, match="pattern 'none' matches no layer"):
        Pipeline((Quantize(activations=None, include=("none",)),), parse_target("cpu:avx2"), Data()).run(graph, (x,))
