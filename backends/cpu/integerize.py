"""Stage 4: find the layers with weights, and how their weights and activations are stored."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import fx

from mcc import ops
from mcc.backends.cpu.integer_sums import codes_sum_exactly
from mcc.backends.cpu.kernels.byte_windows import steps_of, stored_apart
from mcc.backends.cpu.kernels.sparse_codes_conv import codes_of_a_run
from mcc.backends.cpu.tokens import refusal as attention_refusal
from mcc.backends.kernel import (
    PER_TOKEN,
    PER_TOKEN_LIMIT,
    NofMArrays,
    QuantizedInput,
    Region,
    SparseArrays,
    StoredWeight,
)
from mcc.backends.relax.emitter import tuple_of
from mcc.formats import dequantize, unpack

if TYPE_CHECKING:
    from mcc.backends.cpu.lowering import Lowering
    from mcc.graph import Node
    from mcc.target import Target

_REASONS = dict.fromkeys(("matmul", "bmm"), "its operands are no float32 matrices, or have fewer than four rows")
ANCHORS = (ops.LINEAR, ops.CONV2D_NHWC, ops.CONV2D)


def integerize(lowering: Lowering) -> Lowering:
    """Make a region of every linear and conv2d whose weight is stored.

    Where the weight is int8 codes and the input is `dequantize` of unsigned 8-bit codes, the region reads the codes;
    where it is `fake_quantize_per_token`, what that reads.
    """
    regions: dict[fx.Node, Region] = {}
    refused: dict[fx.Node, str] = {}
    for node in lowering.graph.nodes:
        planes = node.op is ops.CONV2D and (reads_sparse(node, lowering.target) or depthwise(node))
        if node.op not in ANCHORS or (node.op is ops.CONV2D and not planes):
            if node.op is not None and node.op.macs(node.fx):
                reason = _REASONS.get(node.op.name)
                if node.op in ops.ATTENTIONS:
                    reason = attention_refusal(node, lowering.target)
                refused[node.fx] = reason or f"there is no own kernel for {node.op.name} yet"
            continue
        top = node.operand(1)
        assert top is not None
        weight = stored_weight(top)
        bias = node.operand(2)
        if weight is None or (bias is not None and not bias.is_parameter):
            refused[node.fx] = "its weight or bias is computed"
            continue
        source = node.operand(0)
        assert source is not None
        activation, codes = _activation(node, source)
        if activation is not None and weight.dtype == "int8" and codes is not None:
            source = codes
        else:
            activation = None
        rounded = _rounded(node, source, lowering.target)
        if weight.dtype == "bfloat16":
            source, weight = (rounded, weight) if rounded else (source, replace(weight, dense=weight.decoded()))
        array = None if bias is None else bias.tensor.detach().numpy().astype(np.float32)
        regions[node.fx] = Region(node, source, node, weight, array, activation, (), rounds=weight.dtype == "bfloat16")
    return replace(lowering, regions=regions, refused=refused)


def reads_sparse(node: Node, target: Target) -> bool:
    """Whether a convolution is read best with channels first: by the kernel of sparse weights, whose sums are exact.

    Codes that can be permuted as bytes have a faster one with channels last.
    """
    top, source = node.operand(1), node.operand(0)
    assert top is not None
    assert source is not None
    weight = stored_weight(top)
    if weight is None or weight.sparse is None or not all(isinstance(s, int) for s in source.shape[1:]):
        return False
    if weight.dtype != "int8" or quantized_source(source)[0] is None:
        return True
    permuted = stored_apart(weight.sparse) and permutes_codes(node, target)
    return codes_sum_exactly(weight) and not permuted


def permutes_codes(node: Node, target: Target) -> bool:
    """Whether a convolution reads enough codes side by side for them to be permuted as bytes."""
    steps = steps_of(target)
    weight, source = node.weight_operand, node.operand(0)
    assert weight is not None
    assert source is not None
    inputs, rows, columns = (int(s) for s in weight.shape[1:])
    fixed = all(isinstance(s, int) for s in source.shape[1:])
    down, across = tuple_of(node.argument(5, 1), 2)
    alone = int(node.argument(6, 1)) == 1
    side_by_side = codes_of_a_run(inputs, (rows, columns), (down, across))
    return fixed and alone and steps is not None and side_by_side >= steps.window


def depthwise(node: Node) -> bool:
    """Whether a convolution of single channels in float has a kernel with channels first too."""
    top, source = node.operand(1), node.operand(0)
    assert top is not None
    assert source is not None
    weight = stored_weight(top)
    if weight is None or weight.dense is None or weight.dtype != "float32" or source.op is ops.DEQUANTIZE:
        return False
    alone = weight.shape[1] == 1 and weight.shape[0] == int(node.argument(6, 1)) > 1
    return alone and all(isinstance(s, int) for s in source.shape[1:])


def stored_weight(top: Node) -> StoredWeight | None:
    """How a layer's weight is stored, or None where it is computed; `top` gives its values."""
    shape = tuple(int(s) for s in top.shape)
    decodes = top.op in (ops.DEQUANTIZE, ops.DECODE_CODEBOOK)
    weight = _stored_codes(top.operand(0) if decodes else top, shape)
    if weight is None or not decodes:
        return weight
    scale, third = top.operand(1), top.operand(2)
    assert scale is not None
    assert third is not None
    if top.op is ops.DECODE_CODEBOOK:
        return replace(weight, scale=scale.tensor.numpy(), table=third.tensor.numpy())
    zeros = third.tensor.numpy()
    if top.argument(3) == 0 and not zeros.any():
        return replace(weight, scale=scale.tensor.numpy())
    grouped = replace(weight, scale=scale.tensor.numpy(), zero_point=np.broadcast_to(zeros, scale.tensor.shape))
    if top.argument(3) == 0 and grouped.grouped:
        return grouped
    if weight.dense is None:
        return None
    values = dequantize(torch.from_numpy(weight.dense), scale.tensor, third.tensor, top.argument(3))
    return StoredWeight(weight.name, shape, values.numpy(), None, None)


def _stored_codes(inner: Node | None, shape: tuple[int, ...]) -> StoredWeight | None:
    """Values or codes, as yet without a scale."""
    if inner is None:
        return None
    if inner.op is ops.DECODE_SPARSE:
        parts = [inner.operand(i) for i in range(3)]
        values, columns, row_pointers = (p.tensor.detach().numpy() for p in parts if p is not None)
        name = str(parts[0].fx.target).removesuffix("_values") if parts[0] is not None else ""
        block = inner.argument(4)
        return StoredWeight(name, shape, None, SparseArrays(values, columns, row_pointers, (block[0], block[1])), None)
    if inner.op is ops.DECODE_N_OF_M:
        kept, places = inner.operand(0), inner.operand(1)
        assert kept is not None
        assert places is not None
        packed = places.operand(0)
        assert packed is not None
        unpacked = unpack(packed.tensor, *places.fx.args[1:]).numpy()
        codes = _stored_codes(kept, ())  # or values
        assert codes is not None
        assert codes.dense is not None
        arrays = NofMArrays(codes.dense, unpacked, inner.argument(2))
        return StoredWeight(codes.name.removesuffix("_values"), shape, None, arrays, None, bits=codes.bits)
    if inner.op is ops.UNPACK:
        packed = inner.operand(0)
        assert packed is not None
        bits, low = inner.argument(1), inner.argument(2)
        codes = unpack(packed.tensor, bits, low, inner.argument(3)).numpy()
        return StoredWeight(str(packed.fx.target).removesuffix("_packed"), shape, codes, None, None, bits=bits)
    if inner.op is ops.DECODE_BFLOAT16:
        stored = inner.operand(0)
        assert stored is not None
        return StoredWeight(str(stored.fx.target).removesuffix("_bfloat16"), shape, stored.tensor.numpy(), None, None)
    if not inner.is_parameter or inner.dtype not in (torch.float32, torch.int8):
        return None
    name = str(inner.fx.target).removesuffix("_codes").removesuffix("_dense")
    return StoredWeight(name, shape, inner.tensor.detach().contiguous().numpy(), None, None)


def _activation(node: Node, source: Node) -> tuple[QuantizedInput | None, Node | None]:
    """How a layer has its activations as codes, and what it reads then; None twice where it takes float values."""
    if node.op is ops.LINEAR and source.op is ops.FAKE_QUANTIZE_PER_TOKEN and source.argument(1) == PER_TOKEN_LIMIT:
        return PER_TOKEN, source.operand(0)
    return quantized_source(source)


def _rounded(node: Node, source: Node, target: Target) -> Node | None:
    """What a layer reads before it is rounded to bfloat16, where its kernel rounds it; else None."""
    alone = node.op is ops.LINEAR or (node.op is ops.CONV2D_NHWC and node.argument(6, 1) == 1)
    if not alone or not target.bfloat16:
        return None
    if source.op is ops.DECODE_BFLOAT16:  # a constant that is rounded: to round it again changes nothing
        return source
    return source.operand(0) if source.op is ops.ROUND_BFLOAT16 else None


def quantized_source(source: Node) -> tuple[QuantizedInput | None, Node | None]:
    """How to read the codes under a float value, and the node that gives them; None twice where there are none."""
    codes = source.operand(0) if source.op is ops.DEQUANTIZE else None
    if codes is None or codes.dtype is not torch.uint8 or source.argument(3) is not None:
        return None, None
    scale, zero_point = source.operand(1), source.operand(2)
    if scale is None or zero_point is None or not (scale.is_parameter and zero_point.is_parameter):
        return None, None
    return QuantizedInput(float(scale.tensor), int(zero_point.tensor)), codes
