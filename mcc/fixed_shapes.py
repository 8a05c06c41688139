"""Graphs of any batch or length for inputs of one shape alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor, fx

from mcc.errors import CaptureError
from mcc.text import value_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcc.graph import Graph

SPECIALIZED = 2
"""Dims of any size have this lower bound when torch traces; graphs take 1 all the same, and mcc tests it."""


def fix_shapes(graph: Graph, example: Sequence[Any]) -> Graph:
    """A copy of a graph for inputs of exactly the example's shapes, as of one of any batch one for a single image.

    Kernels that need to know how many rows there are take layers of it that they did not take before.

    Raises:
        CaptureError: the example is not what the graph takes.
    """
    if len(example) != len(graph.inputs):
        raise CaptureError(f"the graph takes {len(graph.inputs)} inputs, {len(example)} were given")
    sizes = _sizes(graph, example)
    fixed = graph.copy()
    mode = fixed.fake_mode
    for node, value in zip(fixed.inputs, example, strict=True):
        if not isinstance(value, Tensor) or (value.dtype, value.ndim) != (node.dtype, len(node.shape)):
            raise _refusal(graph, node.name, value)
        if any(_expression(size).subs(sizes) != given for size, given in zip(node.shape, value.shape, strict=True)):
            raise _refusal(graph, node.name, value)
        node.fx.meta["val"] = mode.from_tensor(value, static_shapes=True)
    try:
        fixed.repropagate()
    except Exception as error:
        shapes = ", ".join(str(tuple(value.shape)) for value in example)
        reason = (str(error) or repr(error)).splitlines()[0]
        raise CaptureError(
            f"the graph does not take inputs of shapes {shapes}: {reason}",
            remedy="give one that the model takes",
        ) from error
    return _with_numbers(fixed).clean()


def _sizes(graph: Graph, example: Sequence[Any]) -> dict[sympy.Symbol, int]:
    """What the symbols of the graph's dims are: from plain dims, else solved from expressions such as 2 s."""
    dims = [
        (node.name, value, _expression(size), given)
        for node, value in zip(graph.inputs, example, strict=True)
        if isinstance(value, Tensor)
        for size, given in zip(node.shape, value.shape, strict=False)
    ]
    sizes: dict[sympy.Symbol, int] = {}
    for *_, expression, given in dims:
        if isinstance(expression, sympy.Symbol):
            sizes.setdefault(expression, given)
    for name, value, expression, given in dims:
        left = expression.subs(sizes)
        if len(left.free_symbols) == 1:
            (symbol,) = left.free_symbols
            found = sympy.solve(sympy.Eq(left, given), symbol)
            if len(found) != 1 or not found[0].is_integer:
                raise _refusal(graph, name, value)
            sizes[symbol] = int(found[0])
    ranges = getattr(graph.fake_mode.shape_env, "var_to_range", {})
    for name, value, expression, _ in dims:
        for symbol in expression.free_symbols & ranges.keys():
            lowest, highest = ranges[symbol].lower, ranges[symbol].upper
            if sizes.get(symbol, lowest) > highest or SPECIALIZED < lowest > sizes.get(symbol, lowest):
                raise _refusal(graph, name, value)
    return sizes


def _expression(size: int | torch.SymInt) -> sympy.Expr:
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def _refusal(graph: Graph, name: str, value: Any) -> CaptureError:
    given = value_text(value, graph) if isinstance(value, Tensor) else repr(value)
    return CaptureError(
        f"input {name} is {value_text(graph.node(name).value, graph)}, the example {given}",
        remedy="give an example of a shape that the graph takes",
    )


def _with_numbers(graph: Graph) -> Graph:
    """The graph, edited: sizes that became numbers are numbers where they are read."""
    for size in [n.fx for n in graph.nodes if isinstance(n.value, int)]:

        def known(read: fx.Node, size: fx.Node = size) -> Any:
            return size.meta["val"] if read is size else read

        for user in list(size.users):
            user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), known)
    return graph
