"""Scales of quantizers as trainable tensors, while a graph trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mcc import ops

if TYPE_CHECKING:
    from mcc.graph import Graph, Node


@dataclass(frozen=True)
class _Scale:
    """One scale tensor.

    Attributes:
        name: in the graph.
        logarithm: what the optimizer changes: a scale stays positive, and a step is relative to it.
        share: sqrt(elements * codes) of what is quantized; with it a step changes the scale as much, relatively, as
            the gradient changes what is quantized.
        stored_dtype: outside of training.
    """

    name: str
    logarithm: torch.nn.Parameter
    share: float
    stored_dtype: torch.dtype


class LearnedScales:
    """The scales of a graph's fake-quantizers, learned beside its weights.

    Esser, McKinstry, Bablani, Appuswamy, Modha: Learned step size quantization. ICLR 2020; logarithms as in Jain,
    Gural, Wu, Dick: Trained quantization thresholds. MLSys 2020.

    Args:
        graph: its scales become float32 leaves that gradients arrive at, until `finish`.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._scales: dict[str, _Scale] = {}
        for node in graph.nodes:
            scale = node.operand(1) if node.op is ops.FAKE_QUANTIZE else None
            if scale is None or not scale.is_parameter or str(scale.fx.target) in self._scales:
                continue
            name, stored = str(scale.fx.target), scale.tensor
            graph.set_tensor(name, stored.detach().float().requires_grad_())
            logarithm = torch.nn.Parameter(graph.tensor(name).detach().log())
            self._scales[name] = _Scale(name, logarithm, _share(node, stored), stored.dtype)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What the optimizer changes."""
        return [scale.logarithm for scale in self._scales.values()]

    def read(self) -> None:
        """Take the scales as they stand in the graph, after a checkpoint was loaded."""
        for scale in self._scales.values():
            scale.logarithm.data = self._graph.tensor(scale.name).detach().log()

    def receive_gradients(self) -> None:
        """Hand the gradients that arrived at the scales on to their logarithms."""
        for scale in self._scales.values():
            value = self._graph.tensor(scale.name)
            scale.logarithm.grad = None if value.grad is None else value.grad / (value.detach() * scale.share)
            value.grad = None

    def write(self) -> None:
        """Set the graph's scales to what the optimizer made of them."""
        with torch.no_grad():
            for scale in self._scales.values():
                self._graph.tensor(scale.name).copy_(scale.logarithm.exp())

    def finish(self) -> None:
        """Store the scales as they were stored before, float32 where they left the range of that."""
        for scale in self._scales.values():
            value = self._graph.tensor(scale.name).detach()
            self._graph.set_tensor(scale.name, _narrowed(value, scale.stored_dtype))


def _narrowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    normal = torch.finfo(dtype)
    fits = bool((value >= normal.tiny).all() and (value <= normal.max).all())
    return value.to(dtype) if fits else value


def _share(node: Node, scale: Tensor) -> float:
    x = node.operand(0)
    assert x is not None
    shape = ops.shape_of(x.fx)
    of_weight = scale.numel() > 1 or x.is_parameter
    elements = math.prod(shape) / max(scale.numel(), 1) if of_weight else math.prod(shape[1:])
    return math.sqrt(max(elements, 1) * max(abs(node.argument(4)), abs(node.argument(5))))
