"""Channel pruning: convolutions, and what reads them, with fewer channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mcc.structured import StructuredPruning


@dataclass(frozen=True)
class PruneChannels(StructuredPruning):
    """Remove channels of convolutions with everything that is coupled to them.

        %c1: f32[8, 16, 32, 32] = conv2d(%x, @c1.weight, @c1.bias)
        %relu: f32[8, 16, 32, 32] = relu(%c1)
        %c2: f32[8, 10, 32, 32] = conv2d(%relu, @c2.weight, @c2.bias)
    becomes, @c1.weight now [8, 3, 3, 3] and @c2.weight [10, 8, 3, 3],
        %c1: f32[8, 8, 32, 32] = conv2d(%x, @c1.weight, @c1.bias)
        %relu: f32[8, 8, 32, 32] = relu(%c1)
        %c2: f32[8, 10, 32, 32] = conv2d(%relu, @c2.weight, @c2.bias)

    Channels that residual adds, depthwise and grouped convolutions, norms, concatenations or shuffles tie to each other
    go together. `mcc.coupling` says what the smaller graph computes. The graph is smaller from here on: train it to
    recover, by a `fine-tune` behind. For the options see `mcc.structured.StructuredPruning`.
    Li, Kadav, Durdanovic, Samet, Graf: Pruning filters for efficient ConvNets. ICLR 2017.
    Fang, Ma, Song, Mi, Wang: DepGraph: towards any structural pruning. CVPR 2023.
    """

    kinds: ClassVar[tuple[str, ...]] = ("channel",)
