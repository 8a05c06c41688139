"""Structured pruning: which indices of which groups go, for a ratio of indices, MACs, bytes or measured latency."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from mcc.cost import graph_size
from mcc.coupling import Coupling, Group, couple
from mcc.errors import PassError, SpecError
from mcc.patterns import Patterns
from mcc.report import Declined
from mcc.rewrite import Context, Lossy, Pass
from mcc.saliency import NEEDS, Saliencies, SaliencyName, saliencies
from mcc.surgery import keep, zeroed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mcc.graph import Graph

Measure = Literal["indices", "macs", "bytes", "latency"]
STEPS = 12  # of the bisection: the share of indices is found to 1 / 4096
LATENCY_STEPS = 6  # each of them compiles


def groups_taken(coupling: Coupling, kinds: tuple[str, ...], patterns: Patterns, context: Context) -> list[Group]:
    """The groups of some kinds that patterns take and nothing blocks; others of these kinds are declined."""
    taken = []
    for group in (g for g in coupling.groups if g.kind in kinds):
        reason = patterns.refusal(group.givers) or next(iter(group.blocked), None)
        if reason is None:
            taken.append(group)
        else:
            decline_group(group, reason, context)
    return taken


def decline_group(group: Group, reason: str, context: Context) -> None:
    """Record a group that is left alone, under the first layer that gives it."""
    context.declined.append(Declined(group.givers[0], f"{group.size} {group.kind}s: {reason}"))


@dataclass(frozen=True)
class StructuredPruning(Pass):
    """Removes whole groups of coupled indices; subclasses say of which kinds.

    Attributes:
        ratio: what is removed, as a share of what `of` measures; in (0, 1).
        of: "indices" counts them, "macs" and "bytes" are the graph's, "latency" is its artifact's on the target.
        saliency: what is kept longest, see `mcc.saliency.saliencies`.
        scope: "layer" takes the same share of every group, "global" ranks the indices of all groups, relative to the
            mean of their group.
        align: what is left of a group is a multiple of this where its size allows.
        largest: share that a group may lose at most.
        include: patterns of layer names, shell style; a group is taken if it is the output of a layer that matches.
        exclude: patterns of layers whose outputs stay.
    """

    ratio: float = 0.5
    of: Measure = "indices"
    saliency: SaliencyName = "l2"
    scope: Literal["layer", "global"] = "layer"
    align: int = 1
    largest: float = 0.9
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    guarantee = Lossy()
    kinds: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        name = self.pass_name()
        if not 0 < self.ratio < 1 or not 0 < self.largest < 1 or self.align < 1:
            raise SpecError(
                f"{name}: ratio={self.ratio}, largest={self.largest}, align={self.align}",
                remedy="ratio and largest are shares between 0 and 1, align is 1 or more",
            )
        for option, allowed in (
            ("of", ("indices", "macs", "bytes", "latency")), ("scope", ("layer", "global")),
            ("saliency", ("l1", "l2", "batch-norm", "fpgm", "random", "activation", "taylor", "fisher")),
        ):  # fmt: skip
            if getattr(self, option) not in allowed:
                raise SpecError(
                    f"{name}: {option}={getattr(self, option)!r}", remedy=f"use one of {', '.join(allowed)}"
                )

    @property
    def needs_data(self) -> tuple[str, ...]:
        """What the saliency is computed from."""
        return (NEEDS[self.saliency],) if self.saliency in NEEDS else ()

    def run(self, graph: Graph, context: Context) -> Graph:
        """Choose what goes, and remove it."""
        coupling = couple(graph)
        groups = self._groups(coupling, context)
        order = _relative(saliencies(self.saliency, coupling, groups, context), groups)
        chosen = self._choose(graph, coupling, groups, order, context)
        removed = {g.axis: indices for g, indices in chosen.items() if len(indices) < g.size}
        if not removed:
            raise PassError(
                f"{self}: nothing goes: {', '.join(f'{g.size} {g.kind}s of {g.givers[0]}' for g in groups[:3])} …",
                remedy="raise `ratio` or `largest`, or lower `align`",
            )
        context.edited(sum(g.size - len(indices) for g, indices in chosen.items()))
        return keep(coupling, removed)

    def reference(self, before: Graph, after: Graph) -> Graph:
        """The graph before, everything stored at the removed indices zero."""
        return zeroed(before, after)

    def _groups(self, coupling: Coupling, context: Context) -> list[Group]:
        """The groups to prune; others of the kinds are declined."""
        patterns = Patterns(self.include, self.exclude)
        taken = groups_taken(coupling, self.kinds, patterns, context)
        if patterns.unmatched or not taken:
            kinds = " or ".join(self.kinds)
            unmatched = f"pattern {patterns.unmatched!r} matches no layer with a {kinds}"
            what = unmatched if patterns.unmatched else f"no {kinds} can go"
            raise PassError(f"{self}: {what}", remedy=f"`mcc inspect --prunable` lists groups; here: {context.reasons}")
        return taken

    def _choose(
        self, graph: Graph, coupling: Coupling, groups: list[Group], order: Saliencies, context: Context
    ) -> dict[Group, Tensor]:
        if self.of == "indices":
            return self._kept(groups, order, self.ratio)
        cost = self._cost(graph, [coupling.groups.index(g) for g in groups], context)
        whole = cost(None)
        wanted, low, high = (1 - self.ratio) * whole, 0.0, 1.0
        best = self._kept(groups, order, high)
        least = cost(list(best.values()))
        if least > wanted:
            raise PassError(
                f"{self}: {self.of} cannot fall by {self.ratio:.0%}, only by {1 - least / whole:.0%}",
                remedy="raise `largest`, lower `ratio`, or include more layers",
            )
        for _ in range(LATENCY_STEPS if self.of == "latency" else STEPS):
            middle = (low + high) / 2
            trial = self._kept(groups, order, middle)
            reached = cost(list(trial.values()))
            if reached <= wanted:
                high, best, least = middle, trial, reached
            else:
                low = middle
        context.note(f"{self.of} fall by {1 - least / whole:.1%}, for which {high:.1%} of the indices are removed")
        return best

    def _cost(self, graph: Graph, places: list[int], context: Context) -> Callable[[Sequence[Tensor] | None], float]:
        """What `of` measures, of the graph with only some indices of the groups at `places`."""
        if self.of == "latency" and context.latency is None:
            raise PassError(
                f"{self}: latency cannot be measured here",
                remedy="compile for this machine, or choose of='macs'",
            )
        whole = graph.copy()

        def cost(indices: Sequence[Tensor] | None) -> float:
            trial = whole.copy()
            if indices is not None:
                found = couple(trial)
                axes = [found.groups[i].axis for i in places]
                trial = keep(found, {a: k for a, k in zip(axes, indices, strict=True) if len(k) < a.size})
            if self.of == "latency":
                assert context.latency is not None
                return context.latency(trial)
            size = graph_size(trial)
            return float(size.macs if self.of == "macs" else size.stored_bytes)

        return cost

    def _kept(self, groups: list[Group], order: Saliencies, share: float) -> dict[Group, Tensor]:
        """What stays of each group when `share` of all indices, or of each group's, is removed."""
        if self.scope == "layer":
            gone = {g: share * g.size for g in groups}
        else:
            every = torch.cat([order[g.axis] for g in groups])
            lowest = torch.zeros(len(every), dtype=torch.bool)
            lowest[every.argsort(stable=True)[: round(share * len(every))]] = True
            parts = torch.split(lowest, [g.size for g in groups])
            gone = {g: float(part.sum()) for g, part in zip(groups, parts, strict=True)}
        return {g: _most_salient(order[g.axis], self._left(g.size, gone[g])) for g in groups}

    def _left(self, size: int, gone: float) -> int:
        """How many indices stay, of a group that should lose `gone`."""
        least = max(math.ceil((1 - self.largest) * size), 1)
        left = max(size - round(gone), least)
        return min(-(-left // self.align) * self.align, size)


def _most_salient(saliency: Tensor, count: int) -> Tensor:
    """The indices of the `count` largest, increasing; of equal ones the last stay."""
    return saliency.argsort(stable=True)[len(saliency) - count :].sort().values


def _relative(found: Saliencies, groups: list[Group]) -> Saliencies:
    return {g.axis: found[g.axis] / found[g.axis].mean().clamp_min(torch.finfo(torch.float64).tiny) for g in groups}
