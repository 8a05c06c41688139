"""Recurrent layers as a linear layer over all steps and an op for the recurrence, both of which train.

What a layer reads from its input does not wait for the step before: captured as `linear` it is compressed and computed
like any other. Gates are in PyTorch's order.
"""

from __future__ import annotations

import operator
from contextlib import contextmanager
from functools import partial
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mcc.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_A = torch.ops.aten


def _steps(projected: Tensor, batch_first: bool, reverse: bool) -> list[Tensor]:  # noqa: FBT001
    steps = list(projected.unbind(1 if batch_first else 0))
    return steps[::-1] if reverse else steps


def _stacked(outputs: list[Tensor], batch_first: bool, reverse: bool) -> Tensor:  # noqa: FBT001
    return torch.stack(outputs[::-1] if reverse else outputs, 1 if batch_first else 0)


def _lstm(  # noqa: PLR0913 (an op's schema)
    projected: Tensor, hidden: Tensor, cell: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool,  # noqa: FBT001
    batch_first: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    outputs = []
    h, c = hidden, cell
    for step in _steps(projected, batch_first, reverse):
        gates = step + h @ weight
        i, f, g, o = (gates if bias is None else gates + bias).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return _stacked(outputs, batch_first, reverse), h.clone(), c.clone()


def _gru(
    projected: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, batch_first: bool  # noqa: FBT001
) -> tuple[Tensor, Tensor]:  # fmt: skip
    outputs = []
    h = hidden
    for step in _steps(projected, batch_first, reverse):
        recurrent = h @ weight
        r_x, z_x, n_x = step.chunk(3, -1)
        r_h, z_h, n_h = (recurrent if bias is None else recurrent + bias).chunk(3, -1)
        z = (z_x + z_h).sigmoid()
        n = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
        h = n + z * (h - n)
        outputs.append(h)
    return _stacked(outputs, batch_first, reverse), h.clone()


@torch.library.custom_op("mcc::lstm", mutates_args=())
def lstm(  # noqa: PLR0913 (an op's schema)
    projected: Tensor, hidden: Tensor, cell: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool,  # noqa: FBT001
    batch_first: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The recurrence of one direction of an LSTM layer.

    Args:
        projected: inputs times their weights, with that bias, [steps, batch, 4 hidden], or [batch, steps, 4 hidden].
        hidden: state before the first step, [batch, hidden].
        cell: the same.
        weight: [hidden, 4 hidden], gates in the order input, forget, cell, output.
        bias: [4 hidden].
        reverse: from the last step to the first.
        batch_first: which of the two forms `projected` and the first result have.

    Returns:
        The hidden state after every step, and hidden and cell state after the last one.
    """
    return _lstm(projected, hidden, cell, weight, bias, reverse, batch_first)


@torch.library.custom_op("mcc::gru", mutates_args=())
def gru(
    projected: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, batch_first: bool  # noqa: FBT001
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `lstm`, of a GRU: [3 hidden], gates in the order reset, update, new; `bias` is inside the reset gate."""
    return _gru(projected, hidden, weight, bias, reverse, batch_first)


def _fake_states(count: int) -> Callable[..., tuple[Tensor, ...]]:
    def fake(projected: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        states = rest[:count]
        sequence = projected.new_empty([*projected.shape[:2], states[0].shape[1]])
        return (sequence, *(s.new_empty(s.shape) for s in states))

    return fake


def _differentiable(op: Any, plain: Callable[..., tuple[Tensor, ...]], tensors: int) -> None:
    """Gradients by running the plain form once more."""

    def remember(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        del output
        ctx.save_for_backward(*inputs[:tensors])
        ctx.options = inputs[tensors:]

    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            inputs = [None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
            outputs = plain(*inputs, *ctx.options)
            wanted = [t for t in inputs if t is not None]
            found = iter(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True))
        return (*(None if t is None else next(found) for t in inputs), *(None for _ in ctx.options))

    op.register_autograd(backward, setup_context=remember)


lstm.register_fake(_fake_states(2))
gru.register_fake(_fake_states(1))
_differentiable(lstm, _lstm, 5)
_differentiable(gru, _gru, 4)


_EXPORTING = RLock()


def layers(call: Callable[..., Any], arguments: Sequence[Any]) -> list[Any]:
    """The sequence and the last states of an lstm or gru call, from its arguments as ATen has them.

    `call` calls an op on tensors, or writes the call into a graph and gives its node.

    Raises:
        CaptureError: a layer projects its hidden state.
    """
    source, initial, parameters, has_biases, depth, dropout, train, both, batch_first = arguments
    states = list(initial) if isinstance(initial, list | tuple) else [initial]
    op = torch.ops.mcc.lstm.default if len(states) > 1 else torch.ops.mcc.gru.default
    each, directions = (4 if has_biases else 2), (2 if both else 1)
    if len(parameters) != each * depth * directions:
        raise CaptureError("an LSTM projects its hidden state", remedy="build it with proj_size=0")
    last: list[list[Any]] = [[] for _ in states]
    for layer in range(depth):
        sequences = []
        for direction in range(directions):
            index = layer * directions + direction
            input_weight, weight, *biases = parameters[index * each : (index + 1) * each]
            input_bias, bias = biases or (None, None)
            projected = call(_A.linear.default, source, input_weight, input_bias)
            before = [call(_A.select.int, state, 0, index) for state in states]
            turned = call(_A.t.default, weight)
            found = call(op, projected, *before, turned, bias, direction == 1, bool(batch_first))
            sequences.append(call(operator.getitem, found, 0))
            for k, kept in enumerate(last):
                kept.append(call(operator.getitem, found, k + 1))
        source = sequences[0] if directions == 1 else call(_A.cat.default, sequences, -1)
        if dropout and layer + 1 < depth:
            source = call(_A.dropout.default, source, dropout, train)
    return [source, *(call(_A.stack.default, kept) for kept in last)]


@contextmanager
def spelled_out() -> Iterator[None]:
    """While a model is exported, one at a time: torch's own lstm and gru fix the number of steps."""
    functions = torch._VF  # noqa: SLF001 (what torch's modules call)

    def replaced(plain: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
        if len(arguments) != 9 or not isinstance(arguments[3], bool):
            return tuple(plain(*arguments))
        return tuple(layers(lambda target, *args: target(*args), arguments))

    with _EXPORTING:
        kept = {name: getattr(functions, name) for name in ("lstm", "gru")}
        try:
            for name, function in kept.items():
                setattr(functions, name, partial(replaced, function))
            yield
        finally:
            for name, function in kept.items():
                setattr(functions, name, function)
