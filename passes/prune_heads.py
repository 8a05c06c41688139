"""Head pruning: attention with fewer heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mcc.structured import StructuredPruning


@dataclass(frozen=True)
class PruneHeads(StructuredPruning):
    """Remove attention heads: rows of the projections to queries, keys and values, and columns of the one behind.

        %q: f32[8, 12, 64] = linear(%x, @q.weight, @q.bias)
        %reshape: f32[8, 12, 4, 16] = reshape(%q, [8, 12, 4, 16])
    becomes, with two of four heads,
        %q: f32[8, 12, 32] = linear(%x, @q.weight, @q.bias)
        %reshape: f32[8, 12, 2, 16] = reshape(%q, [8, 12, 2, 16])

    A head whose keys and values several query heads share goes with those. Heads are found by what the graph does, in
    whatever way attention is written. For the options see `mcc.structured.StructuredPruning`.
    Michel, Levy, Neubig: Are sixteen heads really better than one? NeurIPS 2019.
    """

    kinds: ClassVar[tuple[str, ...]] = ("head",)
