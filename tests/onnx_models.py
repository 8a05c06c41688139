"""ONNX models made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper, shape_inference
from torch import nn

_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "uint8": TensorProto.UINT8}


def make_model(
    nodes: Sequence[Any],
    inputs: dict[str, tuple[str, list[int | str]]],
    outputs: Sequence[str],
    weights: dict[str, np.ndarray] | None = None,
    opset: int = 20,
) -> ModelProto:
    """A model of these nodes; inputs by name as (dtype, shape)."""
    graph = helper.make_graph(
        list(nodes), "test", [helper.make_tensor_value_info(n, _TYPES[t], s) for n, (t, s) in inputs.items()],
        [helper.make_empty_tensor_value_info(n) for n in outputs],
        [numpy_helper.from_array(a, n) for n, a in (weights or {}).items()],
    )  # fmt: skip
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10 if opset < 23 else 11,
    )
    return shape_inference.infer_shapes(model)


def mlp_model(model: nn.Sequential) -> ModelProto:
    """A Sequential of linear and relu layers."""
    nodes, weights, value = [], {}, "x"
    for i, layer in enumerate(model):
        if isinstance(layer, nn.Linear):
            weights |= {f"{n}{i}": p.detach().numpy() for n, p in layer.named_parameters()}
            nodes.append(helper.make_node("Gemm", [value, f"weight{i}", f"bias{i}"], [f"h{i}"], transB=1))
        else:
            nodes.append(helper.make_node("Relu", [value], [f"h{i}"]))
        value = f"h{i}"
    return make_model(nodes, {"x": ("float32", ["batch", model[0].in_features])}, [value], weights)
