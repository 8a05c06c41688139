"""ONNX's LSTM and GRU as PyTorch's: one direction's weights a tensor each, gates in PyTorch's order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mcc.errors import CaptureError
from mcc.onnx_nodes import attributes_of, make_node, store

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray
    from onnx import NodeProto
    from torch import Tensor

# input, output, forget, cell to input, forget, cell, output; update, reset, new to reset, update, new
_ORDERS = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2)}
_ACTIVATIONS = {"LSTM": [b"Sigmoid", b"Tanh", b"Tanh"], "GRU": [b"Sigmoid", b"Tanh"]}
_PLAIN_OPTIONS = ("clip", "input_forget", "layout", "activation_alpha", "activation_beta")


def with_torch_weights(nodes: Iterable[NodeProto], arrays: dict[str, NDArray[Any]]) -> list[NodeProto]:
    """The nodes; an LSTM or GRU reads x, its first states, and input weight, recurrent weight and biases by direction.

    Args:
        nodes: of a graph.
        arrays: its stored tensors, to which are added those that the new nodes read.

    Raises:
        CaptureError: a layer has options that PyTorch's lacks, or computed weights.
    """
    return [_spelled(n, arrays) if n.op_type in _ORDERS else n for n in nodes]


def _spelled(node: NodeProto, arrays: dict[str, NDArray[Any]]) -> NodeProto:
    attributes = attributes_of(node)
    given: list[str] = list(node.input)
    x, weights, recurrent, bias, lengths, hidden, cell, *peepholes = given + [""] * (8 - len(given))
    directions = 2 if attributes.get("direction") == b"bidirectional" else 1
    plain = attributes.get("activations", _ACTIVATIONS[node.op_type] * directions)
    reset_after = node.op_type == "LSTM" or attributes.get("linear_before_reset")
    for found, reason in (
        (lengths or any(peepholes), "has sequence lengths or peepholes"),
        (any(attributes.get(name) for name in _PLAIN_OPTIONS), f"has one of {', '.join(_PLAIN_OPTIONS)}"),
        (list(plain) != _ACTIVATIONS[node.op_type] * directions, "has other activations"),
        (not reset_after, "applies its reset gate before the product"),
        (weights not in arrays or recurrent not in arrays or (bias and bias not in arrays), "computes its weights"),
    ):
        if found:
            raise CaptureError(
                f"ONNX {node.op_type} {node.name} {reason}", remedy="export the model with torch.nn's form of it"
            )
    read = [x, hidden, *([cell] if node.op_type == "LSTM" else [])]
    for d in range(directions):
        parts = {weights: [arrays[weights][d]], recurrent: [arrays[recurrent][d]]}
        if bias:
            parts[bias] = np.split(arrays[bias][d], 2)
        for name, pieces in parts.items():
            for k, piece in enumerate(pieces):
                gates = np.split(piece, len(_ORDERS[node.op_type]))
                stored = f"{name}_{d}" if len(pieces) == 1 else f"{name}_{d}_{('input', 'hidden')[k]}"
                read.append(store(arrays, stored, np.concatenate([gates[g] for g in _ORDERS[node.op_type]])))
    return make_node(node.op_type, read, node.output, **attributes)


def _run(kind: str, attributes: Mapping[str, Any], x: Tensor, states: list[Tensor | None], weights: Any) -> Any:
    """Y [steps, directions, batch, hidden] and the last states [directions, batch, hidden]."""
    direction, size = attributes.get("direction", b"forward"), attributes["hidden_size"]
    directions = 2 if direction == b"bidirectional" else 1
    first = [x.new_zeros([directions, x.shape[1], size]) if s is None else s for s in states]
    source = x.flip(0) if direction == b"reverse" else x
    function = getattr(torch._VF, kind.lower())  # noqa: SLF001 (what torch's modules call)
    initial = tuple(first) if kind == "LSTM" else first[0]
    biases = len(weights) > 2 * directions
    sequence, *last = function(source, initial, list(weights), biases, 1, 0.0, False, directions == 2, False)
    sequence = sequence.flip(0) if direction == b"reverse" else sequence
    by_direction = sequence.reshape([*sequence.shape[:2], directions, size]).permute(0, 2, 1, 3)
    return [by_direction, *last]


def lstm(
    attributes: Mapping[str, Any], x: Tensor, hidden: Tensor | None, cell: Tensor | None, *weights: Tensor
) -> list[Tensor]:
    """An LSTM layer."""
    made: list[Tensor] = _run("LSTM", attributes, x, [hidden, cell], weights)
    return made


def gru(attributes: Mapping[str, Any], x: Tensor, hidden: Tensor | None, *weights: Tensor) -> list[Tensor]:
    """A GRU layer."""
    made: list[Tensor] = _run("GRU", attributes, x, [hidden], weights)
    return made
