"""Masks over weights: where they stand in a graph, and which weights they keep for a ratio, a scope and a pattern."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mcc import ops
from mcc.cost import weight_expression
from mcc.errors import SpecError
from mcc.graph import Graph, Node, identifier
from mcc.patterns import Patterns
from mcc.rewrite import Context, Pass, Rewriter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Scope = Literal["global", "layer", "output", "erk"]
SCOPES = ("global", "layer", "output", "erk")


@dataclass(frozen=True)
class Pattern:
    """Which weights go together.

    Attributes:
        rows, columns: outputs and inputs of a block that is removed as one.
        kept, among: of every `among` neighbouring inputs `kept` stay; 0, 0 where any number may.
    """

    rows: int = 1
    columns: int = 1
    kept: int = 0
    among: int = 0

    @classmethod
    def parse(cls, text: str, ratio: float) -> Pattern:
        """Read "" (single weights), "2:4" (two of four inputs stay) or "16x1" (blocks of 16 outputs by one input).

        Raises:
            SpecError: it is none of these, or a ratio that N:M does not have.
        """
        if not text:
            return cls()
        if (block := re.fullmatch(r"(\d+)x(\d+)", text)) and min(int(block[1]), int(block[2])) > 0:
            return cls(int(block[1]), int(block[2]))
        if (chosen := re.fullmatch(r"(\d+):(\d+)", text)) and 0 < int(chosen[1]) < int(chosen[2]):
            kept, among = int(chosen[1]), int(chosen[2])
            if abs(ratio - (1 - kept / among)) > 1e-9:
                raise SpecError(f"pattern {text!r} with ratio={ratio}", remedy=f"its ratio is {1 - kept / among:g}")
            return cls(kept=kept, among=among)
        raise SpecError(f"pattern={text!r}", remedy="use '' for single weights, '2:4' for N:M, or '16x1' for blocks")

    def misfit(self, shape: Sequence[int]) -> str | None:
        """Why a weight [out, in, …] cannot have this pattern, or None."""
        if shape[0] % self.rows:
            return f"its {shape[0]} outputs are no multiple of {self.rows}"
        columns = max(self.columns, self.among)
        return f"its {shape[1]} inputs are no multiple of {columns}" if shape[1] % columns else None

    def pooled(self, scores: Tensor) -> Tensor:
        """The mean score of each block, [out / rows, in / columns, …], of scores [out, in, …]."""
        out, inputs, *rest = scores.shape
        blocks = scores.reshape(out // self.rows, self.rows, inputs // self.columns, self.columns, *rest)
        return blocks.mean((1, 3))

    def spread(self, kept: Tensor) -> Tensor:
        """What `pooled` made small, of the weight's size again."""
        return kept.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)


def best_among(scores: Tensor, kept: int, among: int) -> Tensor:
    """True for the `kept` largest of every `among` neighbours along dim 1; of equal ones the last."""
    groups = scores.movedim(1, -1)
    groups = groups.reshape(*groups.shape[:-1], -1, among)
    order = groups.argsort(dim=-1, stable=True)
    mask = torch.zeros(groups.shape, dtype=torch.bool).scatter_(-1, order[..., among - kept :], value=True)
    return mask.flatten(-2).movedim(-1, 1)


def largest(scores: Tensor, ratio: float) -> Tensor:
    """False for exactly the `ratio` smallest scores of a vector; of equal ones the first go."""
    kept = torch.ones(scores.numel(), dtype=torch.bool)
    kept[scores.argsort(stable=True)[: round(ratio * scores.numel())]] = False
    return kept


def choose(scores: Mapping[str, Tensor], ratio: float, scope: Scope, pattern: Pattern) -> dict[str, Tensor]:
    """Masks that keep what scores most; every weight keeps at least one element, or the network were cut in two.

    Args:
        scores: of each weight [out, in, …].
        ratio: removed of all.
        scope: what is ranked together: everything, each layer, each output of a layer; "erk" gives layers densities
            in proportion to the sum of their sizes over the product (Evci, Gale, Menick, Castro, Elsen: Rigging the
            lottery. ICML 2020).
        pattern: what goes together.
    """
    if pattern.among:
        return {name: best_among(s, pattern.kept, pattern.among) for name, s in scores.items()}
    pooled = {name: pattern.pooled(s) for name, s in scores.items()}
    if scope == "global":
        whole = largest(torch.cat([p.flatten() for p in pooled.values()]), ratio)
        parts = torch.split(whole, [p.numel() for p in pooled.values()])
        kept = {name: part.reshape(p.shape) for (name, p), part in zip(pooled.items(), parts, strict=True)}
    elif scope == "output":
        kept = {name: _largest_of_rows(p, ratio) for name, p in pooled.items()}
    else:
        ratios = _erk_ratios(scores, ratio) if scope == "erk" else dict.fromkeys(scores, ratio)
        kept = {name: largest(p.flatten(), ratios[name]).reshape(p.shape) for name, p in pooled.items()}
    for name, mask in kept.items():
        if not mask.any():
            mask.flatten()[int(pooled[name].argmax())] = True
    return {name: pattern.spread(mask) for name, mask in kept.items()}


def _largest_of_rows(scores: Tensor, ratio: float) -> Tensor:
    rows = scores.flatten(1)
    kept = torch.ones(rows.shape, dtype=torch.bool)
    kept.scatter_(1, rows.argsort(dim=1, stable=True)[:, : round(ratio * rows.shape[1])], value=False)
    return kept.reshape(scores.shape)


def _erk_ratios(scores: Mapping[str, Tensor], ratio: float) -> dict[str, float]:
    """Of each weight the share that is removed; those that would keep more than all keep all."""
    wanted = (1 - ratio) * sum(s.numel() for s in scores.values())
    shares = {name: sum(s.shape) / s.numel() for name, s in scores.items()}
    whole: set[str] = set()
    while True:
        left = wanted - sum(scores[n].numel() for n in whole)
        rest = [n for n in scores if n not in whole]
        factor = left / max(sum(shares[n] * scores[n].numel() for n in rest), 1e-30)
        over = {n for n in rest if factor * shares[n] > 1}
        if not over:
            return {n: 0.0 if n in whole else 1 - factor * shares[n] for n in scores}
        whole |= over


def mask_name(graph: Graph, name: str) -> str:
    """The name of the mask that a weight is multiplied by: of one that there is, or that there may be."""
    for raw in graph.module.graph.nodes:
        if raw.op == "get_attr" and raw.target == name:
            for user in Node(raw, graph).users:
                mask = user.operand(1) if user.op is ops.MUL else None
                if mask is not None and mask.is_parameter and mask.dtype is torch.bool:
                    return str(mask.fx.target)
    return f"{name}_mask"


def insert_mask(graph: Graph, name: str, mask: Tensor) -> None:
    """Multiply the weight `name` by a mask in front of every reader; one that stands there keeps its zeros too."""
    there = mask_name(graph, name)
    if there in dict(graph.module.named_buffers()):
        graph.set_tensor(there, mask & graph.tensor(there))
        return
    root = next(Node(n, graph) for n in graph.module.graph.nodes if n.op == "get_attr" and n.target == name)
    readers = list(root.fx.users)
    first = next(n for n in graph.module.graph.nodes if n in root.fx.users)
    rewriter = Rewriter(graph, Node(first, graph))
    masked = rewriter.call(ops.MUL, root, rewriter.read(there, mask))
    masked.rename(f"{identifier(name)}_masked")
    for reader in readers:
        reader.replace_input_with(root.fx, masked.fx)


def masked_weights(before: Graph, after: Graph) -> Graph:
    """`before` with every masked weight of `after` in its tensors, zeros where the mask is."""
    made = before.copy()
    for node in after.nodes:
        expression = weight_expression(node) if node.op is ops.MUL else None
        if expression is not None and expression.mask is not None:
            kept = torch.where(expression.mask, expression.root.tensor.detach(), 0.0)
            made.set_tensor(str(expression.root.fx.target), kept)
    return made


@dataclass(frozen=True)
class Layers:
    """Patterns of layer names that a pass takes and leaves, shell style."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def taken(
        self, step: Pass, graph: Graph, context: Context, refusal: Callable[[Node], str | None]
    ) -> dict[str, list[Node]]:
        """The layers to prune by the name of their weight; others are declined with the reason.

        Raises:
            PassError: a pattern matches nothing, or there is no layer.
        """
        found: dict[str, list[Node]] = {}
        patterns = Patterns(self.include, self.exclude)
        layers = [n for n in graph.nodes if n.op in ops.LAYERS]
        for node in layers:
            reason = patterns.refusal([node.layer]) or _unmaskable(node) or refusal(node)
            if reason is not None:
                context.decline(node, reason)
                continue
            root = node.weight
            assert root is not None
            found.setdefault(str(root.fx.target), []).append(node)
        if patterns.unmatched or not found:
            raise patterns.failure(step, f"no layer to prune: {context.reasons}", (n.layer for n in layers))
        return found


def _unmaskable(node: Node) -> str | None:
    if node.weight is None:
        return "its weight is computed"
    direct = node.operand(1)
    if direct is not None and direct.op in ops.FIXED:
        return "its weight is already encoded: prune before that"
    if direct is not None and direct.op is ops.ROUND_BFLOAT16:
        return "its weight is rounded to bfloat16, which no sparse kernel reads"
    zero = direct.operand(2) if direct is not None and direct.op is ops.FAKE_QUANTIZE else None
    if zero is not None and bool((zero.tensor % 1 != 0).any()):
        return "its pruned weights would not stay zero: no code stands for it"
    return None
