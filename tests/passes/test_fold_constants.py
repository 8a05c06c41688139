"""fold-constants: what is computed at compile time, and what is left."""

from __future__ import annotations

import torch
from torch import nn

import mcc
from mcc.data import Data
from mcc.passes import FoldConstants, PruneWeights
from mcc.pipeline import Pipeline
from mcc.target import parse_target


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6))

    def forward(self, x):
        return x + torch.arange(6) * self.scale


def test_arithmetic_on_constants_is_stored(check_rewrite):
    check_rewrite(Positions(), FoldConstants(), inputs=(torch.randn(3, 6),), before="""
        %x: f32[3, 6]
        %arange: i64[6] = arange(end=6)
        %mul: f32[6] = mul.Tensor(%arange, @scale)
        %add: f32[3, 6] = add.Tensor(%x, %mul)
        return %add
    """, after="""
        %x: f32[3, 6]
        %add: f32[3, 6] = add.Tensor(%x, @folded.mul)
        return %add
    """)  # fmt: skip


def test_a_large_result_is_left_with_its_size():
    class Large(nn.Module):
        def forward(self, x):
            return x + torch.zeros(1024, 513)

    x = torch.randn(1, 1)
    _, rows = Pipeline((FoldConstants(),), parse_target("cpu:avx2"), Data()).run(mcc.capture(Large(), (x,)), (x,))
    assert rows[1].declined[0].reason == "its 2,101,248 bytes would be stored instead of computed"


def test_a_masked_weight_stays_an_expression():
    x = torch.randn(2, 8)
    graph = mcc.capture(nn.Linear(8, 8), (x,))
    graph, _ = Pipeline((PruneWeights(), FoldConstants()), parse_target("cpu:avx2"), Data()).run(graph, (x,))
    assert [n.op.name for n in graph.nodes] == ["mul.Tensor", "linear"]


def test_sizes_of_a_dynamic_dim_are_not_constants():
    class Counted(nn.Module):
        def forward(self, x):
            return x * torch.arange(x.shape[0]).unsqueeze(1)

    x = torch.randn(2, 3)
    graph = mcc.capture(Counted(), (x,), dynamic_shapes={"x": {0: "batch"}})
    graph, _ = Pipeline((FoldConstants(),), parse_target("cpu:avx2"), Data()).run(graph, (x,))
    assert graph(torch.ones(4, 1).expand(4, 3))[3, 0] == 3
