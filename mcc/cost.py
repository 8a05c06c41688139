"""What a graph costs: parameters, stored bytes and MACs, by layer and in all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mcc import ops
from mcc.bfloat16 import round_bfloat16
from mcc.codebooks import entries_of
from mcc.formats import along_axis, packed_bytes, unpack
from mcc.graph import Graph, Node
from mcc.report import Size
from mcc.sparse_formats import smallest_form

# bytes: a constant that is larger, and larger than what it is made of, is computed at every call instead of stored
LARGEST_GROWTH = 1 << 20
BFLOAT16_BYTES = 2
WIDEST_PACKED = 4  # bits; wider codes are bytes, which every kernel reads
_QUANTIZERS = (ops.FAKE_QUANTIZE, ops.QUANTIZE, ops.DEQUANTIZE, ops.FAKE_CODEBOOK, ops.DECODE_CODEBOOK)

_ROUNDINGS = (ops.ROUND_BFLOAT16, ops.DECODE_BFLOAT16)


@dataclass(frozen=True)
class LayerCost:
    """The cost of one call.

    Attributes:
        layer: the layer's name.
        op: the op's name.
        macs: multiply-accumulates at the example shapes, zero weights not counted.
        parameters: weights read, zero ones not counted.
        stored_bytes: bytes of those weights as stored, or as `encode` would store them.
    """

    layer: str
    op: str
    macs: int
    parameters: int
    stored_bytes: int


@dataclass(frozen=True)
class WeightExpression:
    """A weight as it stands in the graph.

    Attributes:
        root: the node that reads the stored tensor (of a sparse weight, its values).
        mask: the 0/1 mask it is multiplied by, or None.
        quantizer: the fake_quantize, quantize, dequantize, fake_codebook or decode_codebook node over it, or None.
        sparse: the decode_sparse or decode_n_of_m node over it, or None.
        packed: the unpack node over it, or None.
        rounded: the round_bfloat16 or decode_bfloat16 node over it, or None.
    """

    root: Node
    mask: Tensor | None
    quantizer: Node | None
    sparse: Node | None
    packed: Node | None
    rounded: Node | None

    @property
    def elements(self) -> int:
        """Elements of the dense weight."""
        shape = (self.quantizer or self.sparse or self.packed or self.root).shape
        return math.prod(int(s) for s in shape)

    @property
    def kept(self) -> int:
        """Elements stored as non-zero; of packed codes those that stand for something else than zero."""
        if self.packed is not None and self.quantizer is not None:
            codes = unpack(self.root.tensor, *self.packed.fx.args[1:])
            if self.sparse is not None:  # zeros are code 0
                return int(torch.count_nonzero(codes))
            if (table := _table(self.quantizer)) is not None:
                return int(torch.count_nonzero(entries_of(codes, table)))
            zero_point = self.quantizer.operand(2)
            assert zero_point is not None
            return int(torch.count_nonzero(codes - along_axis(zero_point.tensor, codes, self.quantizer.argument(3))))
        return int(torch.count_nonzero(self.values))

    @property
    def grouped(self) -> bool:
        """Whether groups of a row's inputs have scales of their own."""
        scale = None if self.quantizer is None else self.quantizer.operand(1)
        return scale is not None and len(scale.shape) > 1

    @property
    def rounds(self) -> bool:
        """Whether the stored tensor is float32 that stands for bfloat16."""
        return self.rounded is not None and self.rounded.op is ops.ROUND_BFLOAT16

    @property
    def values(self) -> Tensor:
        """The stored tensor, rounded to bfloat16 where it is, masked elements zero."""
        values = self.root.tensor.detach()
        if self.rounds:
            values = round_bfloat16(values)
        return values if self.mask is None else values * self.mask

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weight with its indices and scales, in the format `encode` would choose by size."""
        element = self.root.tensor.element_size()
        size = self.elements * (BFLOAT16_BYTES if self.rounds and self.mask is None else element)
        if self.quantizer is not None and self.quantizer.op in (ops.FAKE_QUANTIZE, ops.FAKE_CODEBOOK):
            table = _table(self.quantizer)
            codes = self.elements // (1 if table is None else table.shape[1])
            size = packed_bytes(codes, code_bits(self.quantizer))
        if self.packed is not None:
            size = self.root.tensor.numel()
        if self.mask is not None and (self.quantizer is None or self.quantizer.op is not ops.FAKE_CODEBOOK):
            bits = 8 * element if self.quantizer is None else code_bits(self.quantizer)
            size = min(size, smallest_form(self.mask, bits).stored_bytes)
        if self.sparse is not None:
            operands = (self.sparse.operand(i) for i in range(3))
            stored = [o.operand(0) if o is not None and o.op is ops.UNPACK else o for o in operands]
            size = sum(o.tensor.numel() * o.tensor.element_size() for o in stored if o is not None)
        if self.quantizer is not None:
            operands = (self.quantizer.operand(i) for i in (1, 2))
            size += sum(o.tensor.numel() * o.tensor.element_size() for o in operands if o is not None)
        return size


def _table(quantizer: Node) -> Tensor | None:
    """The table that a weight's codes stand for entries of, or None."""
    table = quantizer.operand(2) if quantizer.op in (ops.FAKE_CODEBOOK, ops.DECODE_CODEBOOK) else None
    return None if table is None else table.tensor


def code_bits(quantizer: Node) -> int:
    """Bits that a fake-quantized weight's codes take as `encode` stores them: 1 to 4 packed, else 8."""
    if (table := _table(quantizer)) is not None:
        return (len(table) - 1).bit_length()
    bits = int(quantizer.argument(5) - quantizer.argument(4)).bit_length()
    return bits if bits <= WIDEST_PACKED else 8


def weight_expression(node: Node | None) -> WeightExpression | None:
    """Read the chain of mask, quantizer and decode ops from `node` down to a stored tensor; None if there is none."""
    mask: Tensor | None = None
    quantizer: Node | None = None
    sparse: Node | None = None
    packed: Node | None = None
    rounded: Node | None = None
    while node is not None and not node.is_parameter:
        if node.op is ops.MUL:
            other = node.operand(1)
            if other is None or not other.is_parameter or other.tensor.dtype is not torch.bool:
                return None
            if other.tensor.shape != node.value.shape:
                return None
            mask = other.tensor if mask is None else mask & other.tensor
        elif node.op in _QUANTIZERS:
            quantizer = node
        elif node.op in ops.WITHOUT_ZEROS:
            sparse = node
        elif node.op is ops.UNPACK:
            packed = node
        elif node.op in _ROUNDINGS:
            rounded = node
        else:
            return None
        node = node.operand(0)
    return None if node is None else WeightExpression(node, mask, quantizer, sparse, packed, rounded)


def layer_costs(graph: Graph) -> tuple[LayerCost, ...]:
    """The cost of every call that has MACs or weights; a tensor read twice in one form counts at its first reader."""
    seen: set[tuple[str, str]] = set()
    rows = []
    for node in graph.nodes:
        row = node.op
        if row is None or row in (ops.MUL, *ops.WITHOUT_ZEROS, ops.UNPACK, *_QUANTIZERS, *_ROUNDINGS):
            continue
        macs, parameters, stored = row.macs(node.fx), 0, 0
        for position in range(len(node.fx.args)):
            for operand in _operands(node, position):
                expression = weight_expression(operand)
                if expression is None:
                    continue
                name = str(expression.root.fx.target)
                if position == (row.weights[0] if row.weights else -1):
                    macs = macs * expression.kept // max(expression.elements, 1)
                form = "" if expression.quantizer is None else expression.quantizer.name
                if (name, form) not in seen and _is_weight(expression):
                    seen.add((name, form))
                    parameters += expression.kept
                    stored += expression.stored_bytes
        if macs or parameters:
            rows.append(LayerCost(node.layer, row.name, macs, parameters, stored))
    return tuple(rows)


def _is_weight(expression: WeightExpression) -> bool:
    """Whether this was trained: a parameter or its encoded form, not running statistics or a constant."""
    encoded = any(n is not None for n in (expression.quantizer, expression.sparse, expression.rounded))
    name = str(expression.root.fx.target)
    return encoded or isinstance(expression.root.tensor, torch.nn.Parameter) or name.endswith("_dense")


def _operands(node: Node, position: int) -> list[Node]:
    argument = node.argument(position)
    if isinstance(argument, list | tuple):
        return [Node(a, node.graph) for a in argument if hasattr(a, "op")]
    operand = node.operand(position)
    return [] if operand is None else [operand]


def graph_size(graph: Graph) -> Size:
    """Totals of `layer_costs`."""
    rows = layer_costs(graph)
    return Size(sum(r.parameters for r in rows), sum(r.stored_bytes for r in rows), sum(r.macs for r in rows))
