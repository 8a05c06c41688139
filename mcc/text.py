"""Graphs as stable text, the form golden tests compare.

    %x: f32[batch, 3, 8, 8]
    %conv: f32[batch, 4, 8, 8] = conv2d(%x, @conv.weight, padding=1)
    return %conv

Nodes stand in topological order under names from module paths; `@` reads a parameter; arguments that have their
default value are left out; a list of equal integers is written as one of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mcc import ops

if TYPE_CHECKING:
    from mcc.graph import Graph, Node

_SHORT = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.uint16: "u16",
    torch.bool: "bool",
}  # fmt: skip


# where a tensor lies and which library computes it is nothing of the graph's
_SAYS_NOTHING = ("cudnn_enabled", "cudnn_enable", "device", "layout", "pin_memory", "non_blocking")


def short_dtype(dtype: torch.dtype) -> str:
    """`f32` for torch.float32, and so on."""
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


def dim_text(size: int | torch.SymInt, graph: Graph) -> str:
    """A dim: a number, or an expression over the names of symbolic dims."""
    if isinstance(size, int):
        return str(size)
    expression = size.node.expr
    names = {symbol: sympy.Symbol(graph.dims.get(str(symbol), str(symbol))) for symbol in expression.free_symbols}
    return str(expression.subs(names))


def value_text(value: object, graph: Graph) -> str:
    """The type of a value: `f32[batch, 3]`, a tuple of such, or `size`."""
    if isinstance(value, Tensor):
        return f"{short_dtype(value.dtype)}[{', '.join(dim_text(s, graph) for s in value.shape)}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(value_text(v, graph) for v in value)})"
    return "size"


def argument_text(argument: object) -> str:
    """One argument of a call."""
    if isinstance(argument, fx.Node):
        return f"@{argument.target}" if argument.op == "get_attr" else f"%{argument.name}"
    if isinstance(argument, list | tuple):
        return f"[{', '.join(argument_text(a) for a in argument)}]"
    if isinstance(argument, torch.dtype):
        return short_dtype(argument)
    return str(argument)


def _is_default(argument: object, default: object) -> bool:
    if isinstance(argument, fx.Node) or isinstance(default, fx.Node):
        return False
    if isinstance(argument, list | tuple):
        spread = list(default) if isinstance(default, list | tuple) else [default] * len(argument)
        return all(not isinstance(a, fx.Node) for a in argument) and list(argument) == spread
    return type(argument) is type(default) and bool(argument == default)


def _holds_nodes(argument: object) -> bool:
    return any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(argument))


def _schema_text(node: fx.Node) -> list[str]:
    """Operands by place, options by name; the cudnn switch says nothing about what is computed."""
    parts: list[str] = []
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    by_name = False
    for position, spec in enumerate(schema):
        given = position < len(node.args) or spec.name in node.kwargs
        argument = node.args[position] if position < len(node.args) else node.kwargs.get(spec.name)
        has_default = spec.has_default_value()
        if not given or spec.name in _SAYS_NOTHING or (has_default and _is_default(argument, spec.default_value)):
            by_name = True
            continue
        if has_default and isinstance(argument, list | tuple) and len(set(map(str, argument))) == 1:
            argument = argument[0]
        by_name = by_name or not (_holds_nodes(argument) and spec.name != "shape")
        text = argument_text(argument)
        parts.append(f"{spec.name}={text}" if by_name else text)
    return parts


def call_text(node: Node) -> str:
    """The right-hand side of a call: `conv2d(%x, @conv.weight, padding=1)`."""
    target = node.fx.target
    if isinstance(target, torch._ops.OpOverload):
        arguments = _schema_text(node.fx)
    else:
        arguments = [argument_text(a) for a in node.fx.args]
    return f"{ops.op_name(target)}({', '.join(arguments)})"


def node_text(node: Node) -> str:
    """One line of the graph's text."""
    head = f"%{node.name}: {value_text(node.value, node.graph)}"
    return head if node.fx.op == "placeholder" else f"{head} = {call_text(node)}"


def located_text(node: Node) -> str:
    """A node for an error message: its line, the layer and source line it came from."""
    origin = ", ".join(part for part in (node.layer, node.source) if part)
    return f"{node_text(node)}   from {origin}" if origin else node_text(node)


def graph_text(graph: Graph) -> str:
    """The whole graph."""
    lines = [node_text(n) for n in (*graph.inputs, *graph.nodes)]
    leaves = pytree.tree_leaves(graph.module.graph.output_node().args[0])
    lines.append(f"return {', '.join(argument_text(leaf) for leaf in leaves)}")
    return "\n".join(lines) + "\n"
