"""regularize-channels: the gradients it adds are those of its penalty, and channels it penalizes shrink."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mcc
from mcc.data import Data
from mcc.errors import PassError, SpecError
from mcc.passes import FineTune, RegularizeChannels
from mcc.pipeline import Pipeline
from mcc.rewrite import Context
from mcc.target import parse_target


class Residual(nn.Module):
    """The channels of two convolutions, a batch norm and a head are one group; those within the branch another."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.stem(x)
        x = self.norm(x + self.outer(self.inner(x).relu()))
        return self.head(x.mean((2, 3)))


def penalized(penalty, **options):
    torch.manual_seed(0)
    graph = mcc.capture(Residual().eval(), (torch.randn(2, 3, 7, 7),))
    step = RegularizeChannels(penalty=penalty, **options)
    made = step.run(graph, Context(parse_target("cpu"), Data()))
    for _, parameter in made.named_parameters():
        parameter.grad = torch.zeros_like(parameter)
    return made


def test_group_lasso_adds_the_gradient_of_the_norms_of_coupled_channels():
    graph = penalized("group-lasso", strength=0.3)
    graph.schedules[0].after_gradients(graph, 0.5)
    weights = {n: p.detach().double().requires_grad_() for n, p in graph.named_parameters()}
    stem, inner, outer, head = (weights[f"{n}.weight"] for n in ("stem", "inner", "outer", "head"))
    stage = stem.square().sum((1, 2, 3)) + outer.square().sum((1, 2, 3)) + inner.square().sum((0, 2, 3))
    branch = inner.square().sum((1, 2, 3)) + outer.square().sum((0, 2, 3))
    loss = 0.3 * ((stage + head.square().sum(0)).sqrt().sum() + branch.sqrt().sum())
    loss.backward()
    for name, parameter in graph.named_parameters():
        wanted = weights[name].grad
        wanted = torch.zeros_like(weights[name]) if wanted is None else wanted
        torch.testing.assert_close(parameter.grad.double(), wanted, rtol=1e-5, atol=1e-7)


def test_network_slimming_adds_the_sign_of_the_gains_and_declines_channels_without_one():
    graph = penalized("batch-norm", strength=0.3)
    graph.schedules[0].after_gradients(graph, 0.5)
    for name, parameter in graph.named_parameters():
        wanted = 0.3 * parameter.detach().sign() if name == "norm.weight" else torch.zeros_like(parameter)
        torch.testing.assert_close(parameter.grad, wanted)


def test_growing_regularization_pulls_at_the_least_channels_ever_more():
    graph = penalized("growing", strength=0.4, ratio=0.5)
    found = []
    for progress in (0.25, 1.0):
        for _, parameter in graph.named_parameters():
            parameter.grad.zero_()
        graph.schedules[0].after_gradients(graph, progress)
        found.append(graph.tensor("outer.weight").grad.clone())
    weight = graph.tensor("outer.weight").detach()
    share = found[1] / weight / 0.4  # in how many of its two groups a weight is penalized
    assert sorted(set(share.round(decimals=4).flatten().tolist())) == [0.0, 1.0, 2.0]
    assert (share.amax((1, 2, 3)) > share.amin((1, 2, 3))).all()
    torch.testing.assert_close(found[0], found[1] / 4)


@pytest.mark.parametrize(("penalty", "strength"), [("group-lasso", 0.1), ("batch-norm", 0.1), ("growing", 0.5)])
def test_penalized_channels_shrink_in_training(penalty, strength):
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(8, 3, 7, 7, generator=generator), torch.randint(0, 2, (8,), generator=generator))
        for _ in range(30)
    ]
    norms = []
    for steps in ([], [RegularizeChannels(penalty=penalty, strength=strength)]):
        torch.manual_seed(0)
        graph = mcc.capture(Residual().eval(), (batches[0][0],))
        tune = FineTune(epochs=1, optimizer="sgd", learning_rate=0.05)
        made, _ = Pipeline((*steps, tune), parse_target("cpu"), Data(train=batches)).run(graph, (batches[0][0],))
        name = "norm.weight" if penalty == "batch-norm" else "outer.weight"
        norms.append(float(made.tensor(name).detach().norm()))
        assert made.schedules == ()
    assert norms[1] < 0.9 * norms[0]


def test_the_graph_stays_as_it_is(check_rewrite):
    graph = mcc.capture(Residual().eval(), (torch.randn(2, 3, 7, 7),))
    before = str(graph)
    made = RegularizeChannels().run(graph, Context(parse_target("cpu"), Data()))
    assert str(made) == before


def test_what_cannot_be_penalized_is_named():
    graph = mcc.capture(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).eval(), (torch.randn(2, 4),))
    with pytest.raises(PassError, match="nothing to penalize: .*5 neurons: no batch norm scales it"):
        RegularizeChannels(penalty="batch-norm").run(graph, Context(parse_target("cpu"), Data()))
    with pytest.raises(PassError, match="pattern 'nothing' matches no layer"):
        RegularizeChannels(include=("nothing",)).run(graph, Context(parse_target("cpu"), Data()))
    for options in ({"penalty": "ridge"}, {"strength": 0.0}, {"ratio": 1.0}):
        with pytest.raises(SpecError, match="regularize-channels: "):
            RegularizeChannels(**options)
