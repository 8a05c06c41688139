"""Layers whose outputs are taken apart, as layers of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mcc
from mcc.backends.cpu.split_layers import split_layers

QUICK = {"measure": "never", "tuning": "model"}


class Parted(nn.Module):
    """A layer, and what becomes of its outputs."""

    def __init__(self, how, outputs=96, *, bias=True):
        super().__init__()
        self.layer, self.how = nn.Linear(20, outputs, bias=bias), how

    def forward(self, x):
        return self.how(self.layer(x))


def heads_behind(y):
    q, k, v = y.reshape(*y.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
    return q + k * v


def selected(y):
    parts = y.view(*y.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
    return parts[0] - parts[-1] * parts[1]


def as_in_multi_head_attention(y):
    parts = y.unflatten(-1, (3, 32)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    return parts[0].view(-1, 32) + parts[1].view(-1, 32) * parts[2].view(-1, 32)


def split_then_heads(y):
    q, k = (part.view(*y.shape[:2], 3, 16).transpose(1, 2) for part in y.split(48, dim=-1))
    return q @ k.transpose(-2, -1)


WAYS = {
    "unbind": heads_behind,
    "select": selected,
    "multi-head attention": as_in_multi_head_attention,
    "split": split_then_heads,
    "split in sizes": lambda y: torch.cat([part.relu() * i for i, part in enumerate(y.split([16, 48, 32], -1))], -1),
    "chunk": lambda y: y.chunk(2, -1)[0] * torch.sigmoid(y.chunk(2, -1)[1]),
    "one part": lambda y: y[..., 16:48].tanh(),
    "the same part twice": lambda y: y[..., :48] * torch.tanh(y[..., :48]) + y[..., 48:],
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_parts_are_layers_with_the_same_values(way, bias):
    model, x = Parted(WAYS[way], bias=bias).eval(), torch.randn(3, 5, 20)
    graph = mcc.capture(model, (x,), dynamic_shapes=({0: "batch", 1: "tokens"},))
    split_layers(graph)
    widths = [int(n.shape[-1]) for n in graph.nodes if n.op.name == "linear"]
    assert 96 not in widths
    names = {n.op.name for n in graph.nodes}
    assert not names & {"split.Tensor", "split_with_sizes", "chunk", "unbind.int", "select.int", "slice.Tensor"}
    for batch in (3, 1, 0):
        other = torch.randn(batch, 5, 20)
        with torch.no_grad():
            torch.testing.assert_close(graph(other), model(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("how", "outputs", "why"), [
    (lambda y: y.reshape(3, 5, 2, 3, 16)[:, :, :, 0], 96, "the parts are no runs of outputs"),
    (lambda y: (y[..., :48], y), 96, "the whole is returned"),
    (lambda y: y[..., :48] + y.sum(-1, keepdim=True), 96, "something else reads the whole"),
    (lambda y: y[..., ::2] * 2, 96, "a part has steps"),
    (lambda y: y[..., 1:] - y[..., :-1], 96, "parts overlap"),
    (lambda y: sum(part * i for i, part in enumerate(y.split(16, -1))), 160, "there are too many parts"),
    (lambda y: y.reshape(3, 5, 12, 8).unbind(2)[0], 96, "parts are smaller than a vector"),
    (lambda y: y[:2] * 2, 96, "a part of rows"),
    (lambda y: y.view(15, 3, 32)[:, 0], 96, "the dims before the last are joined"),
])  # fmt: skip
def test_what_is_not_taken_apart_stays_whole(how, outputs, why):
    model, x = Parted(how, outputs).eval(), torch.randn(3, 5, 20)
    graph = mcc.capture(model, (x,))
    before = str(graph)
    split_layers(graph)
    assert str(graph) == before, why


def test_a_weight_that_something_else_reads_stays_whole():
    class Tied(Parted):
        def forward(self, x):
            return super().forward(x) @ self.layer.weight[:48]

    model, x = Tied(lambda y: y.chunk(2, -1)[0]).eval(), torch.randn(3, 5, 20)
    graph = mcc.capture(model, (x,))
    split_layers(graph)
    assert 96 in [int(n.shape[-1]) for n in graph.nodes if n.op.name == "linear"]


@pytest.mark.parametrize("passes", [
    "quantize", "quantize{activations='dynamic'}", "quantize{weights='int4', activations=None}",
    "quantize{weights='int4', activations=None, group_size=32, symmetric=False}",
    "quantize-codebook", "prune-weights{ratio=0.9}",
])  # fmt: skip
def test_stored_formats_are_split_or_stay_whole_and_mean_the_same(passes):
    torch.manual_seed(0)
    model, x = Parted(heads_behind).eval(), torch.randn(3, 5, 20)
    model.layer = nn.Linear(64, 96)
    x = torch.randn(3, 5, 64)
    artifact = mcc.compile(model, (x,), passes=passes, data=mcc.Data(calibration=[x]), verify=True, **QUICK)
    assert artifact.report.layers
