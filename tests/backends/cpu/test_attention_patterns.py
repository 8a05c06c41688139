"""Attention that models spell out, as the op that has a kernel."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import mcc
from mcc.backends.cpu.attention_patterns import gather_attention
from mcc.target import parse_target

QUICK = {"measure": "never", "tuning": "model"}
TARGET = parse_target("cpu:avx2")


class Spelled(nn.Module):
    """Softmax of scores times values; `how` makes probabilities from query and key."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.bias = nn.Parameter(torch.randn(1, 2, 5, 7))
        self.windows = nn.Parameter(torch.randn(3, 5, 7))
        self.temperature = nn.Parameter(torch.rand(2, 1, 1) + 0.5)

    def forward(self, query, key, value):
        return self.how(self, query, key) @ value


def windowed(model, q, k):
    scores = q @ k.transpose(-2, -1) + model.bias
    batch, heads, rows, columns = scores.shape
    split = scores.view(batch // 3, 3, heads, rows, columns) + model.windows[None, :, None]
    return split.view(-1, heads, rows, columns).softmax(-1)


LOWEST = torch.finfo(torch.float32).min
WAYS = {
    "scaled": lambda m, q, k: (q @ k.transpose(-2, -1) / math.sqrt(32)).softmax(-1),
    "scaled before": lambda m, q, k: ((q * 0.25) @ k.transpose(-2, -1)).softmax(-1),
    "biased": lambda m, q, k: nn.functional.dropout(
        (q @ k.transpose(-2, -1) * 0.2 + m.bias).softmax(-1), 0.1, m.training
    ),
    "bias comes first": lambda m, q, k: (m.bias + q @ k.permute(0, 1, 3, 2)).softmax(-1),
    "scaled after the bias": lambda m, q, k: ((q @ k.transpose(-2, -1) + m.bias) * 0.3).softmax(-1),
    "two masks": lambda m, q, k: (q @ k.transpose(-2, -1) + m.bias + m.windows[0]).softmax(-1),
    "temperature": lambda m, q, k: (q @ k.transpose(-2, -1) * m.temperature + m.bias).softmax(-1),
    "windows": windowed,
    "filled": lambda m, q, k: (q @ k.transpose(-2, -1) * 0.2).masked_fill(m.windows[0] > 1, LOWEST).softmax(-1),
    "filled by choice": lambda m, q, k: torch.where(m.windows[0] < 1, q @ k.transpose(-2, -1) * 0.2, LOWEST).softmax(
        -1
    ),
    "chosen": lambda m, q, k: torch.where(
        m.windows[0] < 1, q @ k.transpose(-2, -1) * 0.2, torch.full((), -math.inf)
    ).softmax(-1),
    "biased and filled": lambda m, q, k: (
        (q @ k.transpose(-2, -1) + m.bias).masked_fill(m.windows[0] > 1, LOWEST) + m.bias
    ).softmax(-1),
    "hidden": lambda m, q, k: (q @ k.transpose(-2, -1) * 0.2).masked_fill(m.windows[0] > 1, -math.inf).softmax(-1),
}


def operands(batch=6, heads=(2,), rows=5, columns=7, depth=32):
    return (
        torch.randn(batch, *heads, rows, depth), torch.randn(batch, *heads, columns, depth),
        torch.randn(batch, *heads, columns, 24),
    )  # fmt: skip


def gathered(model, inputs):
    graph = mcc.capture(model.eval(), inputs)
    gather_attention(graph, TARGET)
    with torch.no_grad():
        torch.testing.assert_close(graph(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)
    return [n.op.name for n in graph.nodes]


@pytest.mark.parametrize("way", WAYS)
def test_it_is_gathered(way):
    model, inputs = Spelled(WAYS[way]), operands()
    names = gathered(model, inputs)
    assert "scaled_dot_product_attention" in names
    assert not {"matmul", "softmax.int"} & set(names)
    artifact = mcc.compile(model, inputs, **QUICK)
    assert any(row.kernel == "attention" for row in artifact.report.layers)
    with torch.no_grad():
        torch.testing.assert_close(artifact(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [(), (3, 2), (2, 2, 3)], ids=str)
def test_there_may_be_no_heads_and_several_batches(heads):
    model, inputs = Spelled(WAYS["scaled"]), operands(batch=2, heads=heads)
    assert "scaled_dot_product_attention" in gathered(model, inputs)


class Fused(nn.Module):
    def forward(self, query, key, value):
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)


@pytest.mark.parametrize("heads", [(), (3, 2)], ids=str)
def test_the_op_itself_may_have_other_dims(heads):
    model, inputs = Fused(), operands(batch=2, heads=heads)
    artifact = mcc.compile(model, inputs, **QUICK)
    assert [row.kernel for row in artifact.report.layers] == ["attention"]
    torch.testing.assert_close(artifact(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


def test_a_varying_batch_stays_so():
    model, inputs = Spelled(WAYS["biased"]).eval(), operands()
    artifact = mcc.compile(model, inputs, dynamic_shapes=({0: "batch"},) * 3, **QUICK)
    other = operands(batch=1)
    with torch.no_grad():
        torch.testing.assert_close(artifact(*other), model(*other), rtol=1e-4, atol=1e-4)


class Masked(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, query, key, value, mask):
        return self.how(query @ key.transpose(-2, -1), mask).softmax(-1) @ value


@pytest.mark.parametrize(("how", "mask"), [
    (lambda s, m: m * 2 + s, torch.randn(5, 7)),  # what is multiplied is the mask
    (lambda s, m: s + m, torch.rand(5, 7) > 0.5),  # true adds one
    (lambda s, m: s + m, torch.randint(0, 3, (5, 7))),
    (lambda s, m: s + m, torch.randn(5, 7).half()),
    (lambda s, m: s + m, torch.randn(7)),
    (lambda s, m: s + m, torch.randn(())),
    (lambda s, m: (s.view(3, 2, 2, 5, 7) + m).view(6, 2, 5, 7), torch.randn(3, 2, 1, 5, 7)),
    (lambda s, m: (s.view(6, 1, 2, 5, 7) + m).view(6, 2, 5, 7), torch.randn(1, 1, 2, 5, 1)),
    (lambda s, m: (s.view(6, 2, 7, 5, 1) + m).view(6, 2, 5, 7), torch.randn(1, 1, 7, 5, 1)),
    (lambda s, m: s / 1e30 * m[:1, :1] + m, torch.randn(5, 7)),
])  # fmt: skip
def test_masks_of_any_kind_mean_what_they_meant(how, mask):
    model, inputs = Masked(how), (*operands(), mask)
    artifact = mcc.compile(model, inputs, **QUICK)
    other = (*operands(), mask.flip(-1) if mask.dim() else mask)
    torch.testing.assert_close(artifact(*other), model(*other), rtol=1e-4, atol=1e-4)


def returned(model, q, k):
    model.kept = (q @ k.transpose(-2, -1)).softmax(-1)
    return model.kept


class ProbabilitiesToo(Spelled):
    def forward(self, query, key, value):
        seen = super().forward(query, key, value)
        return seen, self.kept


@pytest.mark.parametrize(("model", "inputs", "why"), [
    (ProbabilitiesToo(returned), operands(), "something else reads the probabilities"),
    (Spelled(lambda m, q, k: (q @ k.transpose(-2, -1)).softmax(-2)), operands(), "the softmax goes over queries"),
    (Spelled(lambda m, q, k: (q @ k.transpose(-2, -1) * m.windows[0]).softmax(-1)), operands(), "a factor for each key"),
    (Spelled(lambda m, q, k: ((q @ k.transpose(-2, -1) + m.bias) * m.temperature).softmax(-1)), operands(),
     "the mask is multiplied by a tensor"),
    (Spelled(lambda m, q, k: (q @ k.transpose(-2, -1)).masked_fill(m.windows[0] > 9, -1e9).softmax(-1)), operands(),
     "a row that is hidden as a whole would be another one"),
])  # fmt: skip
def test_what_is_no_attention_is_left(model, inputs, why):
    graph = mcc.capture(model.eval(), inputs)
    gather_attention(graph, TARGET)
    assert "matmul" in [n.op.name for n in graph.nodes], why
