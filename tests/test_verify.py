"""What verification lets through where activations are rounded, and what it does not."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import mcc
from mcc.data import Data
from mcc.encode import encode
from mcc.errors import VerificationError
from mcc.passes import Quantize
from mcc.pipeline import Pipeline
from mcc.rewrite import Exact, Pass
from mcc.target import parse_target
from mcc.verify import _perturbed, verify_artifact, verify_encoding


@dataclass(frozen=True)
class Change(Pass):
    """Multiply a stored tensor, which is not exact."""

    name: str = ""
    factor: float = 1.0

    guarantee = Exact()

    def run(self, graph, context):
        graph.set_tensor(self.name, graph.tensor(self.name).detach() * self.factor)
        return graph


class TwoHeads(nn.Module):
    """Two outputs; masked logits in the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 8)
        self.register_buffer("mask", torch.tensor([0.0] * 7 + [-float("inf")]))

    def forward(self, x):
        return self.a(x) + self.mask, self.b(x)


def run(*steps):
    x = torch.randn(32, 16)
    graph = mcc.capture(TwoHeads(), (x,))
    return Pipeline(steps, parse_target("cpu:avx512vnni"), Data(calibration=[x])).run(graph, (x,))


@pytest.mark.parametrize("quantize", [Quantize(exclude=("b",)), Quantize(activations="dynamic", exclude=("b",))])
@pytest.mark.parametrize(("name", "factor"), [("a.bias", 3.0), ("a.weight", 1.02), ("b.weight", 1.001)])
def test_a_pass_that_is_not_exact_is_named_whatever_is_rounded(quantize, name, factor):
    """Beside an infinity, beyond what flips of steps explain, and on an output that nothing rounded reaches."""
    with pytest.raises(VerificationError, match="change.* broke its guarantee") as caught:
        run(quantize, Change(name, factor))
    assert f"%{name[0]}" in str(caught.value) or "%add" in str(caught.value)


@pytest.mark.parametrize("quantize", [Quantize(), Quantize(activations="dynamic")])
def test_a_change_in_the_last_digits_passes(quantize):
    run(quantize, Change("a.bias", 1 + 1e-7))


def test_an_artifact_beside_an_infinity_is_compared():
    graph, _ = run(Quantize())
    x = torch.randn(32, 16)
    wrong = tuple(torch.full((32, 8), 1e6) + (graph.tensor("mask") if i == 0 else 0) for i in range(2))
    with pytest.raises(VerificationError, match="the artifact differs from its graph"):
        verify_artifact(graph, lambda *_: wrong, [(x,)])


def test_an_encoded_graph_may_flip_steps_but_not_compute_something_else():
    """As where batch norms are folded into layers whose activations have few bits."""
    model, x, name = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(200_000, 16), "0.weight"
    pipeline = Pipeline(
        (Quantize(activations="int2", include=("2",)),), parse_target("cpu:avx512vnni"), Data(calibration=[x])
    )
    graph, _ = pipeline.run(mcc.capture(model, (x,)), (x,))
    near, wrong = graph.copy(), graph.copy()
    weight = graph.tensor(name).detach()
    near.set_tensor(name, weight * (1 + 1e-5 * torch.randn(weight.shape)))
    wrong.set_tensor(name, weight + 0.05)
    with torch.no_grad():
        assert (near(x) - graph(x)).abs().max() > 1e-2  # a step has flipped
    verify_encoding(graph, near, [(x,)])
    with pytest.raises(VerificationError, match="the encoded graph differs from the compressed one"):
        verify_encoding(graph, wrong, [(x,)])


def test_what_flips_is_told_where_all_weights_are_codes():
    """As in models whose norms have no weights: a change of last digits is one of the scales."""
    model, x = (
        nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 4, bias=False)),
        torch.randn(50_000, 16),
    )
    pipeline = Pipeline((Quantize(activations="int4"),), parse_target("cpu:avx512vnni"), Data(calibration=[x]))
    compressed, _ = pipeline.run(mcc.capture(model, (x,)), (x,))
    encoded, _ = encode(compressed, lambda *_: None)
    assert not any(p.is_floating_point() for _, p in encoded.named_parameters())
    moved = _perturbed(encoded)
    with torch.no_grad():
        assert (moved(x) - encoded(x)).abs().max() > 1e-2  # a step has flipped
        assert (moved(x) - encoded(x)).norm() < 1e-2 * encoded(x).norm()
