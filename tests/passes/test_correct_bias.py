"""correct-bias: means of outputs are those of the float network again, channel by channel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mcc
from mcc.data import Data
from mcc.errors import DataError, PassError
from mcc.passes import CorrectBias, Quantize
from mcc.pipeline import Pipeline
from mcc.statistics import StepwiseRuns
from mcc.target import parse_target

INT2 = Quantize(weights="int2", activations=None)


def run(model, x, *steps, calibration=None):
    graph = mcc.capture(model.eval(), (x,))
    data = Data(calibration=[x] if calibration is None else calibration)
    return Pipeline(steps, parse_target("cpu:avx512vnni"), data).run(graph, (x,))


def means(value: Tensor, axis: int) -> Tensor:
    return value.double().movedim(axis, -1).flatten(0, -2).mean(0)


def test_a_layer_without_a_bias_gets_one(check_rewrite):
    x = torch.rand(6, 8)
    graph, _ = run(nn.Linear(8, 3, bias=False), x, INT2)
    pipeline = Pipeline((CorrectBias(),), parse_target("cpu:avx2"), Data(calibration=[x]))
    changed, rows = pipeline.run(graph, (x,))
    before, after = str(graph).splitlines(), str(changed).splitlines()
    assert [line for line in after if line not in before] == [
        "%linear: f32[6, 3] = linear(%input_1, %weight_quantized, @bias)"
    ]
    assert rows[-1].edits == 1
    assert changed.tensor("bias").requires_grad


@pytest.mark.parametrize(
    ("make", "shape", "axis"),
    [
        (lambda: nn.Linear(16, 5), (7, 16), -1),
        (lambda: nn.Linear(16, 5, bias=False), (3, 11, 16), -1),
        (lambda: nn.Conv2d(6, 4, 3, groups=2), (5, 6, 9, 7), 1),
        (lambda: nn.Conv1d(6, 4, 3, bias=False), (5, 6, 9), 1),
        (lambda: nn.ConvTranspose2d(6, 4, 2, 2), (5, 6, 4, 4), 1),
    ],
)
def test_means_of_a_layer_are_those_of_the_float_one(make, shape, axis):
    model, x = make(), torch.rand(*shape)
    graph, _ = run(model, x, INT2, CorrectBias())
    with torch.no_grad():
        wanted, found = means(model(x), axis), means(graph(x), axis)
        plain = means(run(model, x, INT2)[0](x), axis)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert (plain - wanted).abs().max() > 1e-3


def test_every_layer_of_a_network_is_corrected_behind_those_before():
    model, x = (
        nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4)),
        torch.rand(50, 16),
    )
    batches = [x[:13], x[13:14], x[14:14], x[14:]]
    graph = mcc.capture(model, (x,), dynamic_shapes=({0: "batch"},))
    pipeline = Pipeline((INT2, CorrectBias()), parse_target("cpu:avx2"), Data(calibration=batches))
    changed, rows = pipeline.run(graph, (x,))
    assert rows[-1].edits == 3
    for node in [n for n in changed.nodes if n.op is mcc.ops.LINEAR]:
        with torch.no_grad():
            exact, found = (torch.cat(StepwiseRuns(g, batches).run_to(node.name)) for g in (graph, changed))
        torch.testing.assert_close(means(found, -1), means(exact, -1), rtol=0, atol=1e-4)


def test_a_bias_that_others_read_or_that_is_computed_stays():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 4)
            self.b.bias = self.a.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x) + nn.functional.linear(x, self.c.weight, self.c.bias * 2)

    with pytest.raises(PassError, match="a: its bias is shared; b: its bias is shared; c: its bias is computed"):
        run(Two(), torch.rand(5, 8), INT2, CorrectBias())


def test_a_float_network_is_refused():
    with pytest.raises(PassError, match="no layer's bias can be corrected: .*it is not quantized"):
        run(nn.Linear(8, 3), torch.rand(5, 8), CorrectBias())


def test_an_image_by_itself_has_its_channels_first():
    model, x = nn.Conv2d(3, 4, 3, padding=1), torch.rand(3, 4, 8)
    graph, _ = run(model, x, INT2, CorrectBias())
    with torch.no_grad():
        torch.testing.assert_close(means(graph(x), 0), means(model(x), 0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [torch.full((5, 8), float("nan")), torch.rand(0, 8)])
def test_data_that_has_no_mean_is_refused(batch):
    x = torch.rand(5, 8)
    graph = mcc.capture(nn.Linear(8, 3), (x,), dynamic_shapes=({0: "batch"},))
    steps = (Quantize(activations="dynamic"), CorrectBias())
    with pytest.raises(DataError, match="correct-bias: the calibration data has no rows for linear, or they are not"):
        Pipeline(steps, parse_target("cpu:avx2"), Data(calibration=[batch])).run(graph, (x,))
