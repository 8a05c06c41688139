"""Scales of quantizers as trainable tensors, while a graph trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mcc import ops

if TYPE_CHECKING:
    from mcc.graph import Graph


@dataclass(frozen=True)
class _Scale:
    """One scale tensor.

    Attributes:
        name: in the graph.
        logarithm: what the optimizer changes: a scale stays positive, and a step is relative to it.
        stored_dtype: outside of training.
    """

    name: str
    logarithm: torch.nn.Parameter
    stored_dtype: torch.dtype


class LearnedScales:
    """The scales of a graph's fake-quantizers, learned beside its weights.

    Esser, McKinstry, Bablani, Appuswamy, Modha: Learned step size quantization. ICLR 2020; logarithms, and an optimizer
    whose steps do not depend on how large gradients are, as in Jain, Gural, Wu, Dick: Trained quantization thresholds
    for accurate and efficient fixed-point inference of deep neural networks. MLSys 2020.

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
            self._scales[name] = _Scale(name, logarithm, stored.dtype)

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
            scale.logarithm.grad = None if value.grad is None else value.grad * value.detach()
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
