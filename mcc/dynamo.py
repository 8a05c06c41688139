"""`torch.compile(model, backend="mcc")`: static shapes, inference.

Dynamo hands over a graph at torch level with parameters as inputs; it is exported again with those held fixed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from mcc import compiler
from mcc.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def compile_static(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
    """A dynamo backend.

    Raises:
        CaptureError: a shape is dynamic, or gradients are wanted.
    """
    if not all(isinstance(x, Tensor) for x in example_inputs):
        raise CaptureError(
            "torch.compile gave symbolic sizes", remedy='use torch.compile(model, backend="mcc", dynamic=False)'
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in example_inputs):
        raise CaptureError("mcc compiles inference only", remedy="call the model under torch.inference_mode()")
    fixed = [
        isinstance(x, torch.nn.Parameter) or _is_buffer(x, n)
        for x, n in zip(example_inputs, _placeholders(module), strict=True)
    ]
    held = _Held(module, example_inputs, fixed)
    varying = tuple(x.detach().clone() for x, f in zip(example_inputs, fixed, strict=True) if not f)
    artifact = compiler.compile(held.eval(), varying, measure="never", tuning="model")

    def run(*inputs: Any) -> tuple[Any, ...]:
        result = artifact(*(x.detach() for x, f in zip(inputs, fixed, strict=True) if not f))
        return result if isinstance(result, tuple) else tuple(result) if isinstance(result, list) else (result,)

    return run


def _placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in module.graph.nodes if n.op == "placeholder"]


def _is_buffer(value: Tensor, node: fx.Node) -> bool:
    """Whether dynamo lifted this input out of a module: it names such inputs for their place in it."""
    del value
    return "_buffers_" in node.name or "_parameters_" in node.name


class _Held(torch.nn.Module):
    """The dynamo graph with its parameters back inside."""

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Tensor], fixed: list[bool]) -> None:
        super().__init__()
        self.module = module
        self._fixed = fixed
        for i, (value, is_fixed) in enumerate(zip(inputs, fixed, strict=True)):
            if is_fixed:
                self.register_buffer(f"held_{i}", value.detach().clone())

    def forward(self, *inputs: Tensor) -> Any:
        varying = iter(inputs)
        return self.module(*(getattr(self, f"held_{i}") if f else next(varying) for i, f in enumerate(self._fixed)))
