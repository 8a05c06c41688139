"""Neuron pruning: narrower hidden layers between linear layers, as in the feed-forward part of a transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mcc.structured import StructuredPruning


@dataclass(frozen=True)
class PruneNeurons(StructuredPruning):
    """Remove neurons: rows of linear layers, and columns of those that read them; hidden states of recurrent layers.

        %up: f32[8, 256] = linear(%x, @up.weight, @up.bias)
        %gelu: f32[8, 256] = gelu(%up)
        %down: f32[8, 64] = linear(%gelu, @down.weight, @down.bias)
    becomes, @up.weight now [128, 64] and @down.weight [64, 128],
        %up: f32[8, 128] = linear(%x, @up.weight, @up.bias)
        %gelu: f32[8, 128] = gelu(%up)
        %down: f32[8, 64] = linear(%gelu, @down.weight, @down.bias)

    Both halves of a gated layer lose the same neurons, all gates of a recurrent layer the same state. For the options
    see `mcc.structured.StructuredPruning`.
    Ma, Fang, Wang: LLM-Pruner: on the structural pruning of large language models. NeurIPS 2023.
    """

    kinds: ClassVar[tuple[str, ...]] = ("neuron", "state")
