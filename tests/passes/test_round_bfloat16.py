"""round-bfloat16: what it rounds, what it leaves, and artifacts of it."""

from __future__ import annotations

import pytest
import torch
from networks import mlp
from torch import nn

import mcc
from mcc import ops
from mcc.cost import graph_size
from mcc.data import Data
from mcc.errors import PassError
from mcc.passes import FoldConstants, PruneWeights, Quantize, RoundBfloat16
from mcc.pipeline import Pipeline
from mcc.target import missing_features, parse_target

TARGET = "cpu:avx512bf16"
MISSING = missing_features(parse_target(TARGET))
needs_bfloat16 = pytest.mark.skipif(bool(MISSING), reason=f"this CPU lacks {', '.join(MISSING)}")


class Block(nn.Module):
    """Convolutions with and without groups, a residual, and two layers that read one value."""

    def __init__(self):
        super().__init__()
        self.first, self.alone = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.left, self.right = nn.Linear(16, 10), nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = x + self.point(torch.relu(self.alone(x)))
        x = x.mean((2, 3))
        return self.left(x) * torch.sigmoid(self.right(x))


def run(model, x, *steps, target=TARGET):
    graph = mcc.capture(model.eval(), (x,), dynamic_shapes=({0: "batch"},))
    return Pipeline(steps, parse_target(target), Data()).run(graph, (x,))


def test_weights_and_what_layers_read_are_rounded():
    graph, _ = run(mlp(12, 8, 4), torch.randn(2, 12), RoundBfloat16())
    assert (
        str(graph)
        == """\
%input_1: f32[batch, 12]
%input_1_rounded: f32[batch, 12] = mcc.round_bfloat16(%input_1)
%weight_0_rounded: f32[8, 12] = mcc.round_bfloat16(@0.weight)
%linear_0: f32[batch, 8] = linear(%input_1_rounded, %weight_0_rounded, @0.bias)
%relu_1: f32[batch, 8] = relu(%linear_0)
%relu_1_rounded: f32[batch, 8] = mcc.round_bfloat16(%relu_1)
%weight_2_rounded: f32[4, 8] = mcc.round_bfloat16(@2.weight)
%linear_2: f32[batch, 4] = linear(%relu_1_rounded, %weight_2_rounded, @2.bias)
return %linear_2
"""
    )


def test_layers_that_read_one_value_share_what_is_rounded_and_others_are_named():
    graph, rows = run(Block(), torch.randn(2, 3, 8, 8), RoundBfloat16(exclude=("point",)))
    assert {d.layer: d.reason for d in rows[1].declined} == {
        "alone": "it has groups, or no batch: such convolutions run in float32", "point": "excluded by 'point'",
    }  # fmt: skip
    left, right = (next(n for n in graph.nodes if n.layer == name and n.op is ops.LINEAR) for name in ("left", "right"))
    assert left.operand(0).fx is right.operand(0).fx
    assert rows[1].largest_error == 0


def test_stored_bytes_are_halved_and_the_graph_trains():
    model, x = mlp(64, 64, 64), torch.randn(2, 64)
    plain, _ = run(model, x)
    graph, _ = run(model, x, RoundBfloat16())
    biases = 2 * 64 * 4
    assert graph_size(graph).stored_bytes - biases == (graph_size(plain).stored_bytes - biases) // 2
    graph.train()
    graph(x).square().sum().backward()
    assert graph.tensor("0.weight").grad.abs().sum() > 0


def test_targets_without_the_instruction_are_refused_and_so_is_nothing_to_round():
    with pytest.raises(PassError, match="cpu:avx2 does not multiply bfloat16"):
        run(mlp(8, 8), torch.randn(2, 8), RoundBfloat16(), target="cpu:avx2")
    with pytest.raises(PassError, match="pattern 'fc' matches no layer"):
        run(mlp(8, 8), torch.randn(2, 8), RoundBfloat16(exclude=("fc",)))
    with pytest.raises(PassError, match="its weight is rounded already"):
        run(mlp(8, 8), torch.randn(2, 8), RoundBfloat16(), RoundBfloat16())
    with pytest.raises(PassError, match="has a mask"):
        run(mlp(8, 8), torch.randn(2, 8), PruneWeights(ratio=0.5), RoundBfloat16())
    with pytest.raises(PassError, match="no layer to prune: 0: its weight is rounded to bfloat16"):
        run(mlp(8, 8), torch.randn(2, 8), RoundBfloat16(), PruneWeights(ratio=0.5))
    with pytest.raises(PassError, match="no layer to quantize: 0: its weight is rounded to bfloat16"):
        run(mlp(8, 8), torch.randn(2, 8), RoundBfloat16(), Quantize(activations=None))


def test_two_passes_over_layers_that_read_one_value_each_round_it():
    for first, second in (("left", "right"), ("right", "left")):
        steps = (RoundBfloat16(include=(first,)), RoundBfloat16(include=(second,)))
        graph, rows = run(Block(), torch.randn(2, 3, 8, 8), *steps)
        assert [row.edits for row in rows[1:]] == [1, 1]
        assert sum(n.op is ops.ROUND_BFLOAT16 for n in graph.nodes) == 4


def test_rounded_layers_keep_their_names_and_their_weights():
    graph, rows = run(
        Block(), torch.randn(2, 3, 8, 8), RoundBfloat16(include=("first", "left")), FoldConstants(),
        Quantize(activations=None, exclude=("point",)),
    )  # fmt: skip
    assert [n.layer for n in graph.nodes if n.op is ops.LINEAR] == ["left", "right"]
    assert {d.layer: d.reason for d in rows[-1].declined} == {
        "first": "its weight is rounded to bfloat16", "left": "its weight is rounded to bfloat16",
        "point": "excluded by 'point'",
    }  # fmt: skip
    assert graph.tensor("left.weight").requires_grad


class Tied(nn.Module):
    """A head with the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


@needs_bfloat16
def test_a_tied_embedding_reads_the_rows_of_the_rounded_head():
    model, ids = Tied().eval(), torch.randint(0, 40, (2, 5))
    artifact = mcc.compile(model, (ids,), passes="round-bfloat16", target=TARGET, measure="never", tuning="model")
    weight = model.head.weight.detach().to(torch.bfloat16).float()
    wanted = torch.tanh(weight[ids]).to(torch.bfloat16).float() @ weight.T
    torch.testing.assert_close(artifact(ids), wanted, rtol=1e-5, atol=1e-5)
    assert graph_size(mcc.capture(model, (ids,))).parameters == 40 * 16
    assert [row.kernel.split()[0] for row in artifact.report.layers] == ["lookup", "dense_bf16"]
    assert [row.stored for row in artifact.report.layers] == ["that of head", "bfloat16"]


@needs_bfloat16
def test_odd_channels_and_constant_inputs():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 5, 3), nn.Linear(6, 4)
            self.register_buffer("queries", torch.randn(7, 6))

        def forward(self, x):
            return self.conv(x), self.fc(self.queries)

    model, x = Odd().eval(), torch.randn(1, 3, 6, 6)
    x[0, 1, 2, 2] = torch.inf
    artifact = mcc.compile(model, (x,), passes="round-bfloat16", target=TARGET, measure="never", tuning="model")
    image, rows = artifact(x)
    assert not image.isnan().any()
    assert torch.equal(image.isinf(), model(x)[0].isinf())
    torch.testing.assert_close(rows, model(x)[1].detach(), rtol=2e-2, atol=2e-2)
    assert {row.kernel.split()[0] for row in artifact.report.layers} == {"conv2d_bf16", "dense_bf16"}


@needs_bfloat16
def test_an_artifact_reads_two_bytes_a_weight_and_computes_what_the_graph_does(tmp_path):
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(2, 3, 9, 7)
    artifact = mcc.compile(
        model, (x,), passes="round-bfloat16", target=TARGET, measure="never", tuning="model",
        dynamic_shapes=({0: "batch"},),
    )  # fmt: skip
    kernels = {row.layer: row.kernel.split()[0] for row in artifact.report.layers}
    assert kernels["first"] == kernels["point"] == "conv2d_bf16"
    assert kernels["left"] == kernels["right"] == "dense_bf16"
    artifact.save(tmp_path / "block.mcc")
    loaded = mcc.load(tmp_path / "block.mcc")
    for batch in (0, 1, 5):
        x = torch.randn(batch, 3, 9, 7)
        wanted = model(x).detach()
        assert (loaded(x) - wanted).norm() <= 1e-2 * wanted.norm() + 1e-6
