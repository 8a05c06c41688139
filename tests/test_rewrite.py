"""Passes of a user's own: match and rewrite, pattern and replacement, whole-graph; and what verification says of wrong ones."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from networks import mlp
from torch import nn

import mcc
from mcc import ops
from mcc.data import Data
from mcc.errors import DataError, PassError, VerificationError
from mcc.passes import EliminateIdentity, FineTune, FoldBatchNorm, FoldConstants, PruneWeights, Quantize
from mcc.pipeline import Pipeline
from mcc.target import parse_target

A = torch.ops.aten


@dataclass(frozen=True)
class ReplaceHardswishByRelu(mcc.Rewrite):
    """Replace hardswish(x) by relu(x)."""

    guarantee = mcc.Lossy()

    def match(self, node):
        return mcc.Match(node) if node.op is ops.OPS["hardswish"] else mcc.Reject.other_op(node)

    def rewrite(self, match, rewriter):
        return rewriter.call(ops.RELU, match.node.operand(0))


@dataclass(frozen=True)
class FuseRmsNorm(mcc.Rewrite):
    """Replace the six small ops of an RMS norm by one."""

    guarantee = mcc.Within(rtol=1e-5, atol=1e-6)

    def pattern(self, x, weight, eps):
        mean = A.mean.dim(A.pow.Tensor_Scalar(x, 2), [-1], True)
        return A.mul.Tensor(weight, A.mul.Tensor(x, A.rsqrt.default(A.add.Tensor(mean, eps))))

    def replacement(self, x, weight, eps):
        return F.rms_norm(x, weight.shape, weight, eps)


@dataclass(frozen=True)
class DoubleWeights(mcc.Pass):
    """Wrong on purpose: says it is exact, and doubles one weight."""

    guarantee = mcc.Exact()

    def run(self, graph, context):
        graph.set_tensor("2.weight", graph.tensor("2.weight").detach() * 2)
        context.edited()
        return graph


class RmsNorm(nn.Module):
    def __init__(self, width: int, *, swapped: bool) -> None:
        super().__init__()
        self.weight, self.swapped = nn.Parameter(torch.rand(width)), swapped

    def forward(self, x):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return y * self.weight if self.swapped else self.weight * y


def run(model, steps, *inputs, data=None):
    graph = mcc.capture(model.eval(), inputs)
    return Pipeline(tuple(steps), parse_target("cpu:avx2"), data or Data()).run(graph, inputs)


def test_a_match_and_rewrite_pass_changes_the_graph_and_counts_its_edits():
    graph, rows = run(
        nn.Sequential(nn.Linear(4, 4), nn.Hardswish(), nn.Hardswish()), [ReplaceHardswishByRelu()], torch.randn(2, 4)
    )
    assert [n.op.name for n in graph.nodes] == ["linear", "relu", "relu"]
    assert (rows[1].text, rows[1].edits) == ("replace-hardswish-by-relu", 2)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_pattern_matches_with_its_operands_either_way(swapped):
    graph, rows = run(nn.Sequential(RmsNorm(8, swapped=swapped), nn.Linear(8, 3)), [FuseRmsNorm()], torch.randn(2, 8))
    assert [n.op.name for n in graph.nodes] == ["rms_norm", "linear"]
    assert rows[1].largest_error < 1e-6


def test_a_pattern_whose_inner_value_is_used_elsewhere_is_declined_with_the_reason():
    class Escaping(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8))

        def forward(self, x):
            mean = x.pow(2).mean(-1, keepdim=True)
            return self.weight * (x * torch.rsqrt(mean + 1e-6)), mean

    _, rows = run(Escaping(), [FuseRmsNorm()], torch.randn(2, 8))
    assert (rows[1].edits, rows[1].declined[0].reason) == (0, "%mean inside the pattern is used elsewhere")


def test_a_pattern_in_other_than_aten_ops_is_refused():
    @dataclass(frozen=True)
    class Functional(mcc.Rewrite):
        guarantee = mcc.Lossy()

        def pattern(self, x):
            return F.hardswish(x)

        def replacement(self, x):
            return F.relu(x)

    with pytest.raises(PassError, match=r"functional: the pattern calls .* which is not an op of the table"):
        run(mlp(4, 3), [Functional()], torch.randn(2, 4))


def test_a_replacement_of_another_shape_is_refused_with_both_shapes():
    @dataclass(frozen=True)
    class Shrink(mcc.Rewrite):
        guarantee = mcc.Lossy()

        def match(self, node):
            return mcc.Match(node) if node.op is ops.RELU else mcc.Reject.other_op(node)

        def rewrite(self, match, rewriter):
            return rewriter.call(ops.OPS["mean.dim"], match.node.operand(0), [1])

    with pytest.raises(PassError, match=r"shrink: the replacement has shape \(2,\), the node \(2, 3\)"):
        run(mlp(4, 3, 2), [Shrink()], torch.randn(2, 4))


def test_a_wrong_pass_among_five_is_named_with_the_node_and_both_values():
    steps = [EliminateIdentity(), FoldBatchNorm(), DoubleWeights(), FoldConstants(), PruneWeights()]
    with pytest.raises(VerificationError) as caught:
        run(mlp(8, 8, 6, 4), steps, torch.randn(3, 8))
    assert caught.value.pass_text == "double-weights"
    assert caught.value.node_name == "linear_2"
    assert "double-weights broke its guarantee that the graph computes what it computed before: %linear_2 at [" in str(
        caught.value
    )
    assert "should be" in str(caught.value)
    assert "%linear_2: f32[3, 6] = linear(%relu_1, @2.weight, @2.bias)   from 2" in str(caught.value)


def test_a_pass_that_makes_nan_is_caught():
    @dataclass(frozen=True)
    class Poison(mcc.Pass):
        guarantee = mcc.Exact()

        def run(self, graph, context):
            graph.set_tensor("0.bias", graph.tensor("0.bias").detach() * float("nan"))
            return graph

    with pytest.raises(VerificationError, match="is nan"):
        run(mlp(4, 3), [Poison()], torch.randn(2, 4))


def test_a_pass_that_changes_the_outputs_shape_is_caught():
    @dataclass(frozen=True)
    class Cut(mcc.Pass):
        guarantee = mcc.Lossy()

        def run(self, graph, context):
            graph.set_tensor("0.weight", graph.tensor("0.weight").detach()[:2])
            graph.set_tensor("0.bias", graph.tensor("0.bias").detach()[:2])
            return graph

    with pytest.raises(
        VerificationError, match=r"cut changed output linear_0 from torch.float32 \[2, 3\] to torch.float32 \[2, 2\]"
    ):
        run(mlp(4, 3), [Cut()], torch.randn(2, 4))


def test_a_pass_that_raises_is_named():
    @dataclass(frozen=True)
    class Broken(mcc.Pass):
        guarantee = mcc.Exact()

        def run(self, graph, context):
            raise KeyError("where")

    with pytest.raises(PassError, match="broken failed: KeyError: 'where'"):
        run(mlp(4, 3), [Broken()], torch.randn(2, 4))


def test_a_pass_without_its_data_fails_before_any_pass_runs():
    ran = []

    @dataclass(frozen=True)
    class Spy(mcc.Pass):
        guarantee = mcc.Exact()

        def run(self, graph, context):
            ran.append(1)
            return graph

    for step, field in ((Quantize(), "calibration"), (FineTune(), "train")):
        with pytest.raises(DataError, match=f"{step} needs data.{field}"):
            run(mlp(4, 3), [Spy(), step], torch.randn(2, 4))
    assert ran == []


def test_the_users_metric_is_measured_after_each_pass():
    data = Data(evaluate=lambda model: float(model(torch.ones(1, 4)).numel()))
    _, rows = run(mlp(4, 3), [EliminateIdentity()], torch.randn(2, 4), data=data)
    assert [row.metric for row in rows] == [3.0, 3.0]
