"""LSTM and GRU layers: a linear layer over all steps and a recurrence, right in values, gradients and artifacts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import mcc
from mcc.errors import MccError


class Tagger(nn.Module):
    """A recurrent layer with something behind it."""

    def __init__(self, kind: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.layer = kind(input_size=6, **options)
        self.head = nn.Linear(self.layer.hidden_size * (2 if self.layer.bidirectional else 1), 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.layer(x)
        return self.head(y), state if isinstance(state, Tensor) else torch.cat(state)


FORMS = [
    {"hidden_size": 20, "batch_first": True},
    {"hidden_size": 33, "num_layers": 2, "bidirectional": True},
    {"hidden_size": 5, "bias": False, "bidirectional": True, "batch_first": True},
]
CASES = list(itertools.product((nn.LSTM, nn.GRU), FORMS))
QUICK = {"verify": False, "measure": "never", "tuning": "model"}


def test_the_input_projection_is_a_linear_layer():
    graph = mcc.capture(Tagger(nn.LSTM, hidden_size=8, batch_first=True).eval(), (torch.randn(2, 5, 6),))
    assert [n.op.name for n in graph.nodes if n.op is not None and n.op.macs(n.fx)] == ["linear", "mcc.lstm", "linear"]
    assert {"layer.weight_ih_l0", "layer.weight_hh_l0"} <= dict(graph.module.named_parameters()).keys()


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_one_artifact_serves_any_batch_and_length(kind, options):
    torch.manual_seed(0)
    model = Tagger(kind, **options).eval()
    artifact = mcc.compile(model, (torch.randn(3, 7, 6),), dynamic_shapes=({0: "a", 1: "b"},), **QUICK)
    exact = Tagger(kind, **options).double().eval()
    exact.load_state_dict(model.state_dict())
    empty = (0, 4, 6) if options.get("batch_first") else (4, 0, 6)
    for shape in ((3, 7, 6), (1, 2, 6), (7, 1, 6), (40, 5, 6), (2, 90, 6), empty):
        x = torch.randn(shape)
        with torch.no_grad():
            for expected, found in zip(exact(x.double()), artifact(x), strict=True):
                torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_the_captured_graph_trains_as_the_module_does(kind, options):
    torch.manual_seed(0)
    model = Tagger(kind, **options).eval()
    x = torch.randn(3, 4, 6)
    graph = mcc.capture(model, (x,))
    for m in (model, graph.module):
        sum(out.square().sum() for out in m(x)).backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    found = {name: p.grad for name, p in graph.module.named_parameters()}
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_a_program_exported_elsewhere_has_its_calls_spelled_out():
    torch.manual_seed(0)
    model, x = Tagger(nn.LSTM, hidden_size=9, num_layers=2).eval(), torch.randn(4, 2, 6)
    artifact = mcc.compile(torch.export.export(model, (x,)), **QUICK)
    with torch.no_grad():
        for expected, found in zip(model(x), artifact(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_quantized_lstm_stays_close():
    torch.manual_seed(0)
    model, x = Tagger(nn.LSTM, hidden_size=64, batch_first=True).eval(), torch.randn(8, 12, 6)
    artifact = mcc.compile(model, (x,), passes="quantize", data=mcc.Data(calibration=[x]))
    with torch.no_grad():
        for expected, found in zip(model(x), artifact(x), strict=True):
            assert (found - expected).norm() < 0.05 * expected.norm()


def test_a_projected_state_is_refused():
    with pytest.raises(MccError, match="proj_size"):
        mcc.capture(nn.LSTM(6, 8, proj_size=4).eval(), (torch.randn(4, 2, 6),))
