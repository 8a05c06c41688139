"""Nodes of ONNX graphs, and the tensors that are stored with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from onnx import NodeProto

    Arrays = dict[str, NDArray[Any]]


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """A node's attributes by name; texts are bytes."""
    from onnx import helper  # only ONNX models need it

    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def make_node(kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> NodeProto:
    """A node of the operator `kind`."""
    from onnx import helper

    made: NodeProto = helper.make_node(kind, inputs, outputs, **attributes)
    return made


def store(arrays: Arrays, name: str, array: NDArray[Any]) -> str:
    """Add a tensor, unless it is there already, under a name that the model has for nothing else; returns the name."""
    while name in arrays and not (arrays[name].dtype == array.dtype and np.array_equal(arrays[name], array)):
        name += "_"
    arrays[name] = array
    return name
