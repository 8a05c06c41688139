"""Quantized ONNX models: QLinear operators and packed weights become quantize and dequantize around plain operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mcc.errors import CaptureError
from mcc.onnx_nodes import attributes_of, make_node, store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray
    from onnx import NodeProto

    from mcc.onnx_nodes import Arrays

ROUNDED_WHEN_THEY_COME = ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger")
CODES = {
    "uint8": (0, 255), "int8": (-128, 127), "int16": (-(1 << 15), (1 << 15) - 1), "uint4": (0, 15), "int4": (-8, 7),
    "uint2": (0, 3), "int2": (-2, 1),
}  # fmt: skip
_ZERO_POINT = 2  # its place


def spell_out(nodes: Iterable[NodeProto], arrays: Arrays) -> list[NodeProto]:
    """The nodes with QuantizeLinear, DequantizeLinear and plain operators alone.

    Args:
        nodes: of a graph.
        arrays: its stored tensors, to which are added those that the new nodes read.

    Raises:
        CaptureError: a scale is computed, or an operator chooses scales when values come.
    """
    found: list[NodeProto] = []
    for node in nodes:
        if node.op_type in ROUNDED_WHEN_THEY_COME:
            raise CaptureError(
                f"ONNX {node.op_type} {node.name} chooses scales when values come",
                remedy="quantize the float model with quantize{activations='dynamic'}, or statically",
            )
        rule = _RULES.get(node.op_type)
        found += [node] if rule is None else rule(node, arrays)
    quantizers = ("QuantizeLinear", "DequantizeLinear")
    return [_with_zero_point(n, arrays) if n.op_type in quantizers else n for n in found]


def _dequantized(node: NodeProto, place: int, **attributes: Any) -> NodeProto:
    """What dequantizes the codes at inputs `place` to `place` + 2: values, scale, zero point."""
    inputs = list(node.input[place : place + 3])
    return make_node("DequantizeLinear", inputs, [f"{node.output[0]}::operand{place}"], **attributes)


def _between(kind: str, node: NodeProto, before: list[NodeProto], result: int, **attributes: Any) -> list[NodeProto]:
    """Dequantize, a plain operator, and quantize with the scale and zero point at `result` if they are given."""
    inputs, name = [n.output[0] for n in before], node.output[0]
    if len(node.input) <= result:
        return [*before, make_node(kind, inputs, [name], **attributes)]
    plain = make_node(kind, inputs, [f"{name}::float"], **attributes)
    # without a zero point codes are as those of the first operand
    like = list(before[0].input[_ZERO_POINT:])
    return [
        *before,
        plain,
        make_node("QuantizeLinear", [f"{name}::float", *node.input[result : result + 2]], [name], like=like),
    ]


def _bias(node: NodeProto, place: int, scales: tuple[int, int], arrays: Arrays) -> list[NodeProto]:
    """What dequantizes an int32 bias, whose scale is the product of those of the operands; none where there is none."""
    if len(node.input) <= place or not node.input[place]:
        return []
    first, second = (_array(node, node.input[s], arrays) for s in scales)
    scale = (first * second * attributes_of(node).get("alpha", 1.0)).astype(np.float32)
    name = store(arrays, f"{node.output[0]}_bias_scale", scale)
    # the bias of a Gemm may be a row
    return [make_node("DequantizeLinear", [node.input[place], name], [f"{node.output[0]}::bias"], axis=-1)]


def _array(node: NodeProto, name: str, arrays: Arrays) -> NDArray[Any]:
    if name not in arrays:
        raise CaptureError(
            f"ONNX {node.op_type} {node.name} computes its scale {name}",
            remedy="quantize the model with scales that are stored",
        )
    return arrays[name]


def _convolution(node: NodeProto, arrays: Arrays) -> list[NodeProto]:
    operands = [_dequantized(node, 0), _dequantized(node, 3, axis=0), *_bias(node, 8, (1, 4), arrays)]
    return _between("Conv", node, operands, 6, **attributes_of(node))


def _product(node: NodeProto, arrays: Arrays) -> list[NodeProto]:
    del arrays
    return _between("MatMul", node, [_dequantized(node, 0), _dequantized(node, 3, axis=-1)], 6)


def _elementwise(kind: str) -> Callable[[NodeProto, Arrays], list[NodeProto]]:
    def rule(node: NodeProto, arrays: Arrays) -> list[NodeProto]:
        del arrays
        return _between(kind, node, [_dequantized(node, 0), _dequantized(node, 3)], 6)

    return rule


def _unary(kind: str) -> Callable[[NodeProto, Arrays], list[NodeProto]]:
    def rule(node: NodeProto, arrays: Arrays) -> list[NodeProto]:
        del arrays
        attributes = attributes_of(node)
        if attributes.pop("channels_last", 0):
            raise CaptureError(
                f"ONNX {node.op_type} {node.name} has channels last", remedy="export the model with channels first"
            )
        return _between(kind, node, [_dequantized(node, 0)], 3, **attributes)

    return rule


def _concatenation(node: NodeProto, arrays: Arrays) -> list[NodeProto]:
    """QLinearConcat of ONNX Runtime: scale and zero point of the result, then three inputs for each part."""
    del arrays
    parts = [_dequantized(node, place) for place in range(2, len(node.input), 3)]
    name = node.output[0]
    joined = make_node("Concat", [p.output[0] for p in parts], [f"{name}::float"], **attributes_of(node))
    return [*parts, joined, make_node("QuantizeLinear", [f"{name}::float", *node.input[:2]], [name])]


def _gemm(node: NodeProto, arrays: Arrays) -> list[NodeProto]:
    """QGemm of ONNX Runtime: a, its scale and zero point, b, …, c as int32, and the result's, left out for floats."""
    attributes = attributes_of(node)
    axis = 0 if attributes.get("transB") else 1
    operands = [_dequantized(node, 0), _dequantized(node, 3, axis=axis), *_bias(node, 6, (1, 4), arrays)]
    return _between("Gemm", node, operands, 7, **attributes)


def _packed_matrix(node: NodeProto, arrays: Arrays) -> list[NodeProto]:
    """MatMulNBits of ONNX Runtime: [out, blocks, bytes] of unsigned codes, lowest bits first, scales [out * blocks]."""
    given = attributes_of(node)
    rows, inputs, size, bits = (given[k] for k in ("N", "K", "block_size", "bits"))
    if (len(node.input) > _ORDER and node.input[_ORDER]) or bits not in (2, 4, 8) or inputs % size:
        raise CaptureError(
            f"ONNX MatMulNBits {node.name} has an order of groups, {bits} bits, or {inputs} inputs in blocks of {size}",
            remedy="quantize the float model with mcc",
        )
    blocks, name, stem = inputs // size, node.output[0], node.input[1]
    packed, scales = _array(node, stem, arrays), _array(node, node.input[2], arrays)
    points = np.full((rows, blocks), 1 << (bits - 1), np.uint8)
    if len(node.input) > _POINTS and node.input[_POINTS]:
        zeros = _array(node, node.input[_POINTS], arrays)
        if zeros.dtype != np.uint8:
            raise CaptureError(
                f"ONNX MatMulNBits {node.name} has {zeros.dtype} zero points",
                remedy="quantize the float model with mcc",
            )
        points = _unpacked(zeros.reshape(rows, -1), bits)[:, :blocks]
    parts = [
        store(arrays, f"{stem}_codes", _unpacked(packed.reshape(rows, -1), bits)[:, :inputs]),
        store(arrays, f"{stem}_scales", scales.reshape(rows, blocks).astype(np.float32)),
        store(arrays, f"{stem}_zero_points", points),
    ]
    made = [
        make_node("DequantizeLinear", parts, [f"{name}::weight"], axis=1, block_size=size),
        make_node("Transpose", [f"{name}::weight"], [f"{name}::turned"], perm=[1, 0]),
    ]
    if len(node.input) <= _ORDER + 1:
        return [*made, make_node("MatMul", [node.input[0], f"{name}::turned"], [name])]
    product = make_node("MatMul", [node.input[0], f"{name}::turned"], [f"{name}::product"])
    return [*made, product, make_node("Add", [f"{name}::product", node.input[_ORDER + 1]], [name])]


_POINTS = 3  # the place of zero points
_ORDER = 4  # the place of group indices; that of a bias is behind it


def _unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes of a few bits, lowest first in each byte: [rows, bytes] gives [rows, bytes * 8 / bits]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(len(packed), -1)


_RULES: dict[str, Callable[[NodeProto, Arrays], list[NodeProto]]] = {
    "QLinearConv": _convolution, "QLinearMatMul": _product, "QGemm": _gemm,
    "QLinearAdd": _elementwise("Add"), "QLinearMul": _elementwise("Mul"), "MatMulNBits": _packed_matrix,
    "QLinearConcat": _concatenation, "QLinearGlobalAveragePool": _unary("GlobalAveragePool"),
    "QLinearAveragePool": _unary("AveragePool"), "QLinearSigmoid": _unary("Sigmoid"),
    "QLinearLeakyRelu": _unary("LeakyRelu"),
}  # fmt: skip


def _with_zero_point(node: NodeProto, arrays: Arrays) -> NodeProto:
    """A quantize or dequantize that reads scale and zero point, int32, of one shape; "codes" says what codes are."""
    scale, attributes = _array(node, node.input[1], arrays), attributes_of(node)
    given = len(node.input) > _ZERO_POINT and node.input[_ZERO_POINT]
    point = _array(node, node.input[_ZERO_POINT], arrays) if given else None
    like = [arrays[n.decode()] for n in attributes.pop("like", []) if n.decode() in arrays]
    stored = arrays.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
    kind = str(next((a.dtype for a in (point, stored, *like) if a is not None), _kind(attributes)))
    if kind not in CODES and not (stored is not None and kind == "int32"):
        raise CaptureError(f"ONNX {node.op_type} {node.name} has {kind} codes", remedy=f"use one of {', '.join(CODES)}")
    shape, points = (() if a is None or a.size == 1 else a.shape for a in (scale, point))
    zeros = np.zeros(shape, np.int32) if point is None else point.astype(np.int32).reshape(points)
    stem = node.input[1]
    names = [
        stem if scale.shape == shape else store(arrays, f"{stem}_scalar", scale.reshape(shape)),
        store(arrays, f"{stem}_zero_point", np.ascontiguousarray(np.broadcast_to(zeros, shape))),
    ]
    return make_node(node.op_type, [node.input[0], *names], node.output, **attributes | {"codes": kind})


def _kind(attributes: dict[str, Any]) -> str:
    from onnx import TensorProto

    return str(TensorProto.DataType.Name(attributes.get("output_dtype") or TensorProto.UINT8).lower())


def as_bytes(array: NDArray[Any]) -> NDArray[Any]:
    """An array of four or two bits as one of bytes; others as they are."""
    kind = str(array.dtype)
    return array.astype(kind.rstrip("24") + "8") if kind in ("int4", "uint4", "int2", "uint2") else array
