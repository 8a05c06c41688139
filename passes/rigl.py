"""Training with a fixed number of weights whose places change: the least leave, those the loss asks for enter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mcc.errors import SpecError
from mcc.graph import Graph, Node, Schedule
from mcc.masks import SCOPES, Layers, Pattern, Scope, choose, insert_mask, mask_name, masked_weights
from mcc.rewrite import Context, Lossy, Pass

END = 0.75


@dataclass(frozen=True)
class Rigl(Pass):
    """Multiply weights by masks that a later fine-tune moves, their density staying what it is.

        %fc: f32[8, 10] = linear(%x, @fc.weight, @fc.bias)
    becomes
        %fc_weight_masked: f32[10, 64] = mul.Tensor(@fc.weight, @fc.weight_mask)
        %fc: f32[8, 10] = linear(%x, %fc_weight_masked, @fc.bias)

    At each of `updates` moments in the first three quarters of the training, every layer gives up the weights of least
    magnitude and gains as many where the gradient of the loss is largest, starting from zero; the share that moves
    falls like a cosine. A network can so be trained sparse from the start, or recover what one-shot pruning took.
    Evci, Gale, Menick, Castro, Elsen: Rigging the lottery: making all tickets winners. ICML 2020.

    Attributes:
        ratio: fraction of weights that are zero, in (0, 1).
        scope: which weights begin, by magnitude: "erk" gives small layers more, as the paper does, "layer" each the
            same share, "output" each output, "global" ranks all together.
        share: of a layer's weights that move at the first update.
        updates: how often.
        include: patterns of layer names to take, shell style.
        exclude: patterns of layer names to leave.
    """

    ratio: float = 0.9
    scope: Scope = "erk"
    share: float = 0.3
    updates: int = 50
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    guarantee = Lossy()

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1 or not 0 < self.share <= 1 or self.updates < 1:
            raise SpecError(
                f"rigl: ratio={self.ratio}, share={self.share}, updates={self.updates}",
                remedy="ratio and share are fractions up to 1, updates is 1 or more",
            )
        if self.scope not in SCOPES:
            raise SpecError(f"rigl: scope={self.scope!r}", remedy=f"use one of {', '.join(SCOPES)}")

    @property
    def needs_after(self) -> tuple[str, ...]:
        """Masks move only while the graph trains."""
        return ("fine-tune",)

    def run(self, graph: Graph, context: Context) -> Graph:
        """Insert masks, and the schedule that moves them."""
        layers = Layers(self.include, self.exclude).taken(self, graph, context, _takes_all)
        there = dict(graph.module.named_buffers())
        scores = {name: graph.tensor(name).detach().abs() for name in layers}
        for name in layers:
            if mask_name(graph, name) in there:  # what is pruned already goes first, and may come back
                scores[name] = torch.where(there[mask_name(graph, name)], scores[name], -1.0)
        for name, mask in choose(scores, self.ratio, self.scope, Pattern()).items():
            insert_mask(graph, name, mask)
            context.edited()
        counter = graph.free_name("rigl_updates")
        graph.set_tensor(counter, torch.tensor(0))
        return graph.with_schedules((*graph.schedules, Rewiring(self.share, self.updates, tuple(layers), counter)))

    def reference(self, before: Graph, after: Graph) -> Graph:
        """The graph before, with the masked weights set to zero in their tensors."""
        return masked_weights(before, after)


@dataclass(frozen=True)
class Rewiring(Schedule):
    """Moves masks while a graph trains.

    Attributes:
        share: of a layer's weights that move at first.
        updates: how often.
        names: of the masked weights.
        counter: the buffer that counts the updates done: it is in the checkpoints of training.
    """

    share: float
    updates: int
    names: tuple[str, ...]
    counter: str

    def advance(self, graph: Graph, progress: float) -> None:
        """Before an update set what is masked to zero and lift the masks: gradients are dense in that step."""
        due = math.floor(progress / END * self.updates)
        if progress == 1:
            graph.remove_tensor(self.counter)
        elif progress < END and due > int(graph.tensor(self.counter)):
            graph.set_tensor(self.counter, torch.tensor(due))
            for name in self.names:
                weight, mask = graph.tensor(name), graph.tensor(mask_name(graph, name))
                weight.detach().mul_(mask)
                graph.set_tensor(_lifted(name), mask)
                graph.set_tensor(mask_name(graph, name), torch.ones_like(mask))

    def after_gradients(self, graph: Graph, progress: float) -> None:
        """Choose anew where the masks were lifted."""
        tensors = dict(graph.module.named_buffers())
        for name in self.names:
            if _lifted(name) not in tensors:
                continue
            weight, mask = graph.tensor(name), tensors[_lifted(name)]
            if weight.grad is not None:  # one that is frozen keeps its mask
                moving = self.share / 2 * (1 + math.cos(math.pi * progress / END))
                kept, grown = _moved(weight.detach(), weight.grad, mask, moving)
                weight.detach().mul_(kept)
                mask = kept | grown
                weight.grad.mul_(mask)
            graph.set_tensor(mask_name(graph, name), mask)
            graph.remove_tensor(_lifted(name))


def _moved(weight: Tensor, gradient: Tensor, mask: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Masks of the weights that stay, all but `share` of those of `mask`, and of as many others that enter."""
    count = min(round(share * int(mask.sum())), int((~mask).sum()))
    leaving = torch.where(mask, weight.abs(), math.inf).flatten().topk(count, largest=False).indices
    entering = torch.where(mask, -1.0, gradient.abs()).flatten().topk(count).indices
    kept, grown = mask.flatten().clone(), torch.zeros(mask.numel(), dtype=torch.bool)
    kept[leaving], grown[entering] = False, True
    return kept.reshape(mask.shape), grown.reshape(mask.shape)


def _lifted(name: str) -> str:
    return f"{name}_lifted_mask"


def _takes_all(node: Node) -> None:
    del node
