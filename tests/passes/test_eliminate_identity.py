"""eliminate-identity: graphs before and after."""

from __future__ import annotations

import torch
from torch import nn

from mcc.passes import EliminateIdentity


class Identities(nn.Module):
    def forward(self, x):
        y = torch.nn.functional.dropout(x, 0.5, self.training)
        y = y.reshape(4, 6).transpose(0, 1).transpose(0, 1)
        y = torch.relu(torch.relu(y))
        _unused = y + 1
        return y.permute(0, 1)


def test_calls_that_change_nothing_go(check_rewrite):
    check_rewrite(Identities(), EliminateIdentity(), inputs=(torch.randn(4, 6),), before="""
        %x: f32[4, 6]
        %dropout: f32[4, 6] = dropout(%x, p=0.5, train=False)
        %reshape: f32[4, 6] = reshape(%dropout, shape=[4, 6])
        %transpose: f32[6, 4] = transpose.int(%reshape, dim0=0, dim1=1)
        %transpose_1: f32[4, 6] = transpose.int(%transpose, dim0=0, dim1=1)
        %relu: f32[4, 6] = relu(%transpose_1)
        %relu_1: f32[4, 6] = relu(%relu)
        %permute: f32[4, 6] = permute(%relu_1, dims=[0, 1])
        return %permute
    """, after="""
        %x: f32[4, 6]
        %relu: f32[4, 6] = relu(%x)
        return %relu
    """)  # fmt: skip


class Changes(nn.Module):
    def forward(self, x):
        return x.reshape(6, 4).transpose(0, 1).to(torch.float64)


def test_calls_that_change_something_stay(check_rewrite):
    text = """
        %x: f32[4, 6]
        %reshape: f32[6, 4] = reshape(%x, shape=[6, 4])
        %transpose: f32[4, 6] = transpose.int(%reshape, dim0=0, dim1=1)
        %to: f64[4, 6] = to.dtype(%transpose, dtype=f64)
        return %to
    """
    check_rewrite(Changes(), EliminateIdentity(), inputs=(torch.randn(4, 6),), before=text, after=text)
