"""ONNX models: the file is interpreted with PyTorch calls inside a module's forward, which capture then exports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mcc.errors import CaptureError
from mcc.onnx_nodes import attributes_of
from mcc.onnx_ops import BUFFER_INPUTS, ONNX_OPS, STATIC_INPUTS, Sizes, as_tensor
from mcc.onnx_places import PLACES
from mcc.onnx_quantizers import as_bytes, spell_out
from mcc.onnx_recurrent import with_torch_weights

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import ModelProto, NodeProto

_MOST_SIZES = 64
EXAMPLE_DIM = 2


def import_onnx(model: str | Path | ModelProto) -> tuple[OnnxModule, tuple[Tensor, ...], object]:
    """Read an ONNX model.

    Returns:
        a module that computes it, example inputs, and its named dims as dynamic shapes.

    Raises:
        CaptureError: the file cannot be read, or uses operators that are not in the table.
    """
    import onnx  # only ONNX models need it

    if isinstance(model, str | Path):
        try:
            proto = onnx.load(str(model))
            onnx.checker.check_model(proto)
        except Exception as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise CaptureError(f"cannot read {model} as ONNX: {reason}") from error
    elif isinstance(model, onnx.ModelProto):
        proto = model
    else:
        raise CaptureError(
            f"cannot compile a {type(model).__name__}",
            remedy="give an nn.Module, a torch.export.ExportedProgram, an mcc.Graph or an ONNX model",
        )
    module = OnnxModule(proto)
    graph_inputs = [i for i in proto.graph.input if i.name in module.input_names]
    inputs, dims = [], []
    for value in graph_inputs:
        shape = value.type.tensor_type.shape.dim
        names = {i: d.dim_param.replace(" ", "_") for i, d in enumerate(shape) if d.dim_param}
        sizes = [EXAMPLE_DIM if d.dim_param else d.dim_value for d in shape]
        kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        inputs.append(_example(sizes, kind))
        dims.append({i: name for i, name in names.items() if name.isidentifier()})
    return module, tuple(inputs), (tuple(dims),)  # forward takes *inputs: one entry for all


def _example(sizes: list[int], kind: np.dtype[Any]) -> Tensor:
    random = np.random.default_rng(0)
    if np.issubdtype(kind, np.floating):
        return torch.from_numpy(random.standard_normal(sizes).astype(kind))
    return torch.from_numpy(np.ones(sizes, kind))


class OnnxModule(nn.Module):
    """Runs an ONNX graph; float initializers are parameters under their own names.

    `MatMul` with a stored matrix becomes `linear` with its transpose, so that passes and kernels see a layer.
    """

    def __init__(self, model: ModelProto) -> None:
        import onnx

        super().__init__()
        graph = model.graph
        arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        arrays |= {n.output[0]: _constant_value(n) for n in graph.node if n.op_type == "Constant"}
        nodes = with_torch_weights(spell_out(graph.node, arrays), arrays)
        # other domains have operators of these names that are something else
        foreign = {f"{n.domain}.{n.op_type}" for n in nodes if n.domain not in ("", "ai.onnx") and n.op_type in PLACES}
        unknown = sorted(({n.op_type for n in nodes} - set(ONNX_OPS) - {"Constant"}) | foreign)
        if unknown:
            raise CaptureError(
                f"ONNX operators that are not supported: {', '.join(unknown)}",
                remedy="export the model without them, or give mcc the PyTorch module",
            )
        self.fixed: dict[str, str | Sizes] = {}
        self._matrices = self._stored_matrices(nodes, arrays) - {o.name for o in graph.output}
        static, buffers = (
            {n.input[k] for n in nodes for k in table.get(n.op_type, ()) if k < len(n.input)}
            for table in (STATIC_INPUTS, BUFFER_INPUTS)
        )
        read = {name for n in nodes for name in n.input} | {o.name for o in graph.output}
        for key, array in ((k, a) for k, a in arrays.items() if k in read):
            self._store(key, as_bytes(array), static=key in static, buffer=key in buffers)
        self._steps = [
            (n.op_type, list(n.input), list(n.output), {"outputs": len(n.output)} | _attributes(n))
            for n in nodes
            if n.op_type != "Constant"
        ]
        self.input_names = [i.name for i in graph.input if i.name not in arrays]
        self._outputs = [o.name for o in graph.output]

    def _stored_matrices(self, nodes: Any, arrays: dict[str, NDArray[Any]]) -> set[str]:
        """Stored matrices that only ever stand on the right of a MatMul: kept transposed."""
        right = {n.input[1] for n in nodes if n.op_type == "MatMul" and n.input[1] in arrays}
        other = {name for n in nodes for i, name in enumerate(n.input) if not (n.op_type == "MatMul" and i == 1)}
        return {name for name in right - other if arrays[name].ndim == 2 and arrays[name].dtype == np.float32}

    def _store(self, key: str, array: NDArray[Any], *, static: bool, buffer: bool) -> None:
        if static or (array.dtype == np.int64 and array.ndim <= 1 and array.size <= _MOST_SIZES):
            self.fixed[key] = Sizes(array.reshape(-1).tolist(), scalar=array.ndim == 0)
            return
        array = array.T if key in self._matrices else array
        tensor = torch.from_numpy(np.array(array, dtype=array.dtype, order="C"))
        path, _, leaf = key.replace("/", ".").strip(".").replace("::", ".").rpartition(".")
        owner: nn.Module = self
        for part in [p for p in path.split(".") if p]:
            if part not in dict(owner.named_children()):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        leaf = leaf if leaf and not hasattr(owner, leaf) else f"{leaf}_"
        # a single number is the file's way to write a constant
        if tensor.is_floating_point() and tensor.dim() > 0 and not buffer:
            owner.register_parameter(leaf, nn.Parameter(tensor))
        else:
            owner.register_buffer(leaf, tensor)
        self.fixed[key] = ".".join([*[p for p in path.split(".") if p], leaf])

    def forward(self, *inputs: Tensor) -> Any:
        """Run the graph."""
        stored = dict(self.named_parameters()) | dict(self.named_buffers())
        values: dict[str, Any] = {k: stored[v] if isinstance(v, str) else v for k, v in self.fixed.items()}
        values |= dict(zip(self.input_names, inputs, strict=True)) | {"": None}
        for kind, operands, results, attributes in self._steps:
            arguments = [values[name] for name in operands]
            if kind == "MatMul" and operands[1] in self._matrices:
                made = nn.functional.linear(as_tensor(arguments[0]), arguments[1])
            else:
                made = ONNX_OPS[kind](attributes, *arguments)
            many = isinstance(made, tuple | list) and not isinstance(made, Sizes)
            values.update(zip(results, made if many else [made], strict=False))
        outputs = tuple(as_tensor(values[name]) for name in self._outputs)
        return outputs[0] if len(outputs) == 1 else outputs


def _attributes(node: NodeProto) -> dict[str, Any]:
    import onnx

    found = attributes_of(node)
    if node.op_type == "ConstantOfShape" and "value" in found:
        found["value"] = onnx.numpy_helper.to_array(found["value"])
    return found


def _constant_value(node: NodeProto) -> NDArray[Any]:
    import onnx

    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if attribute.name == "value":
            return onnx.numpy_helper.to_array(value)
        if attribute.name in ("value_float", "value_int", "value_floats", "value_ints"):
            return np.array(value, dtype=np.float32 if "float" in attribute.name else np.int64)
    raise CaptureError(
        f"ONNX Constant {node.output[0]} holds strings or sparse values", remedy="remove it from the model"
    )
