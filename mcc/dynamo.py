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

    from mcc.runtime import Artifact


def compile_static(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
    """A dynamo backend; it compiles at the first call, when dynamo's fake tensors have made room for real ones.

    Raises:
        CaptureError: a shape is dynamic; at the first call: gradients are wanted.
    """
    if not all(isinstance(x, Tensor) for x in example_inputs):
        raise CaptureError(
            "torch.compile gave symbolic sizes", remedy='use torch.compile(model, backend="mcc", dynamic=False)'
        )
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    fixed = [_is_state(n) for n in placeholders]
    artifact: Artifact | None = None

    def run(*inputs: Any) -> tuple[Any, ...]:
        nonlocal artifact
        varying = tuple(x.detach() for x, f in zip(inputs, fixed, strict=True) if not f)
        if artifact is None:
            if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
                raise CaptureError("mcc compiles inference only", remedy="call the model under torch.inference_mode()")
            held = _Held(module, inputs, fixed).eval()
            # a tensor made in inference mode cannot be exported: clones are made outside of it
            with torch.inference_mode(mode=False):
                example = tuple(x.clone() for x in varying)
                artifact = compiler.compile(held, example, measure="never", tuning="model")
        result = artifact(*varying)
        return tuple(result) if isinstance(result, tuple | list) else (result,)

    outside: Callable[..., tuple[Any, ...]] = torch.compiler.disable(run)  # type: ignore[no-untyped-call]
    return outside


def _is_state(node: fx.Node) -> bool:
    """Whether dynamo lifted this input out of a module: it is named for its place in one."""
    return "_buffers_" in node.name or "_parameters_" in node.name


class _Held(torch.nn.Module):
    """The dynamo graph with its parameters back inside."""

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Tensor], fixed: list[bool]) -> None:
        super().__init__()
        self.module = module
        self._fixed = fixed
        with torch.inference_mode(mode=False):
            for i, (value, is_fixed) in enumerate(zip(inputs, fixed, strict=True)):
                if is_fixed:
                    self.register_buffer(f"held_{i}", value.detach().clone())

    def forward(self, *inputs: Tensor) -> Any:
        varying = iter(inputs)
        return self.module(*(getattr(self, f"held_{i}") if f else next(varying) for i, f in enumerate(self._fixed)))
