"""Encoding: masks and fake-quantizers become stored formats. The last step before a backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mcc import ops
from mcc.bfloat16 import encode_bfloat16
from mcc.codebooks import codebook_codes
from mcc.cost import WIDEST_PACKED, WeightExpression, code_bits, weight_expression
from mcc.formats import pack, packed_bytes, quantize
from mcc.graph import Graph, Node, identifier
from mcc.report import Declined
from mcc.rewrite import Rewriter
from mcc.sparse_formats import Form, encode_n_of_m, encode_sparse, form_among, smallest_form

_TOPS = (ops.MUL, ops.FAKE_QUANTIZE, ops.FAKE_CODEBOOK, ops.ROUND_BFLOAT16)
SparseVerdict = Callable[[Node, float, Form], str | None]
"""Given an op, its weight's density and form: why the backend would rather have the weight dense, or None if not."""


def encode(graph: Graph, prefer_dense: SparseVerdict) -> tuple[Graph, list[Declined]]:
    """Return a copy of `graph` with every weight in its stored format, and the masked layers stored dense, with why.

    A mask over a weight becomes `decode_sparse` where that stores fewer bytes and the backend profits, else zeros in
    a dense weight. `fake_quantize` of a weight becomes its codes under `dequantize`, packed where they have four bits
    or fewer; of an activation, `quantize` under `dequantize`. A weight rounded to bfloat16 becomes its bits.
    """
    graph = graph.copy()
    dense: list[Declined] = []
    for node in graph.nodes:
        if node.op is ops.FAKE_QUANTIZE and weight_expression(node) is None:
            _encode_activation(node)
        elif _is_weight_top(node):
            layer = node.users[0].layer if node.users else node.name
            reason = _encode_weight(node, prefer_dense)
            if reason is not None:
                dense.append(Declined(layer, reason))
    return graph.clean().repropagate(), dense


def _is_weight_top(node: Node) -> bool:
    """Whether this is the outermost mask or quantizer over a stored weight."""
    if node.op not in _TOPS:
        return False
    expression = weight_expression(node)
    if expression is None or not (expression.mask is not None or expression.quantizer is not None or expression.rounds):
        return False
    return all(user.op not in _TOPS or weight_expression(user) is None for user in node.users)


def _encode_activation(node: Node) -> None:
    rewriter = Rewriter(node.graph, node)
    x, scale, zero_point = (node.operand(i) for i in range(3))
    axis, low, high = (node.argument(i) for i in range(3, 6))
    dtype = torch.uint8 if low >= 0 else torch.int8 if high <= torch.iinfo(torch.int8).max else torch.int16
    codes = rewriter.call(ops.QUANTIZE, x, scale, zero_point, axis, low, high, dtype)
    codes.rename(f"{node.name.removesuffix('_quantized')}_codes")
    values = rewriter.call(ops.DEQUANTIZE, codes, scale, zero_point, axis)
    values.take_place_of(node)


def _encode_weight(node: Node, prefer_dense: SparseVerdict) -> str | None:
    """Replace one weight expression; returns why it is stored dense although it has a mask, or None."""
    expression = weight_expression(node)
    assert expression is not None
    rewriter = Rewriter(node.graph, node)
    name = str(expression.root.fx.target)
    stored = _stored_values(expression)
    form = _sparse_form(expression, stored)
    reason = None if form is None else _dense_reason(node, expression, stored, form, prefer_dense)
    if expression.mask is not None and form is not None and reason is None:
        made = _read_without_zeros(rewriter, name, stored, expression, form)
        made.rename(f"{identifier(name)}_sparse")
    elif expression.quantizer is not None:
        made = _read_codes(rewriter, name, stored, expression.quantizer)
    elif expression.rounds:
        made = rewriter.call(ops.DECODE_BFLOAT16, rewriter.read(f"{name}_bfloat16", encode_bfloat16(stored)))
    else:
        made = rewriter.read(f"{name}_dense", stored)
    if expression.quantizer is not None and expression.quantizer.op is ops.FAKE_CODEBOOK:
        made = rewriter.call(ops.DECODE_CODEBOOK, made, *(expression.quantizer.operand(i) for i in (1, 2)))
    elif expression.quantizer is not None:
        scale, zero_point = expression.quantizer.operand(1), expression.quantizer.operand(2)
        made = rewriter.call(ops.DEQUANTIZE, made, scale, zero_point, expression.quantizer.argument(3))
    made.take_place_of(node)
    return reason


def _sparse_form(expression: WeightExpression, stored: Tensor) -> Form | None:
    """How a masked weight is best stored without its zeros; of what shares scales in groups, N of M where it can be."""
    if expression.mask is None:
        return None
    bits = 8 * stored.element_size()
    if expression.quantizer is not None and expression.quantizer.op is not ops.FAKE_CODEBOOK:
        bits = code_bits(expression.quantizer)
    among = form_among(expression.mask, bits) if expression.grouped else None
    return among or smallest_form(expression.mask, bits)


def _read_without_zeros(
    rewriter: Rewriter, name: str, stored: Tensor, expression: WeightExpression, form: Form
) -> Node:
    mask, quantizer = expression.mask, expression.quantizer
    assert mask is not None
    if form.among:
        chosen = encode_n_of_m(stored, mask)
        if quantizer is None or code_bits(quantizer) > WIDEST_PACKED:
            values = rewriter.read(f"{name}_values", chosen.values)
        else:
            values = _read_codes(rewriter, f"{name}_values", chosen.values, quantizer)
        packed = rewriter.read(f"{name}_places", pack(chosen.places, chosen.bits, 0))
        places = rewriter.call(ops.UNPACK, packed, chosen.bits, 0, list(chosen.places.shape))
        places.rename(f"{identifier(name)}_in_groups")
        return rewriter.call(ops.DECODE_N_OF_M, values, places, chosen.among)
    sparse = encode_sparse(stored, mask)
    arrays = {"values": sparse.values, "columns": sparse.columns, "row_pointers": sparse.row_pointers}
    operands = [rewriter.read(f"{name}_{part}", tensor) for part, tensor in arrays.items()]
    return rewriter.call(ops.DECODE_SPARSE, *operands, list(stored.shape), list(sparse.block))


def _read_codes(rewriter: Rewriter, name: str, codes: Tensor, quantizer: Node) -> Node:
    bits = code_bits(quantizer)
    low = -(1 << (bits - 1)) if quantizer.op is ops.FAKE_CODEBOOK else quantizer.argument(4)
    if bits > WIDEST_PACKED:
        return rewriter.read(f"{name}_codes", codes)
    packed = rewriter.read(f"{name}_packed", pack(codes, bits, low))
    made = rewriter.call(ops.UNPACK, packed, bits, low, list(codes.shape))
    made.rename(f"{identifier(name)}_codes")
    return made


def _stored_values(expression: WeightExpression) -> Tensor:
    values = expression.values
    quantizer = expression.quantizer
    if quantizer is None:
        return values
    scale, third = quantizer.operand(1), quantizer.operand(2)
    assert scale is not None
    assert third is not None
    if quantizer.op is ops.FAKE_CODEBOOK:
        entries: Tensor = codebook_codes(values, scale.tensor, third.tensor)
        return entries
    axis, low, high = (quantizer.argument(i) for i in range(3, 6))
    codes: Tensor = quantize(values, scale.tensor, third.tensor, axis, low, high, torch.int8)
    return codes


def _dense_reason(
    node: Node, expression: WeightExpression, stored: Tensor, form: Form, prefer_dense: SparseVerdict
) -> str | None:
    density = expression.kept / max(expression.elements, 1)
    dense_bytes = stored.numel() * stored.element_size()
    if expression.quantizer is not None and expression.quantizer.op is ops.FAKE_CODEBOOK:
        return "stored dense: no sparse kernel reads codes of a table"
    if expression.quantizer is not None:
        zero_point = expression.quantizer.operand(2)
        if zero_point is not None and bool(zero_point.tensor.any()):
            return "stored dense: its zeros are not code 0"
        if expression.grouped and not form.among:
            return "stored dense: of weights whose groups have scales, kernels read N of M alone"
        dense_bytes = packed_bytes(stored.numel(), code_bits(expression.quantizer))
    if form.stored_bytes >= dense_bytes:
        sizes = f"sparse takes {form.stored_bytes:,} bytes, dense {dense_bytes:,}"
        return f"stored dense: at density {density:.2f} {sizes}"
    for user in node.users:
        reason = prefer_dense(user, density, form)
        if reason is not None:
            return f"stored dense: {reason}"
    return None
