"""Stage 2: move quantizers up through ops that only pick or place values, so that these handle codes.

    quantize(max_pool2d(x)) = max_pool2d(quantize(x)), quantize(cat(a, b)) = cat(quantize(a), quantize(b))

exactly, because rounding keeps order. The layer before then writes codes, a quarter of the bytes. What was quantized
before such an op is dequantized behind it, where a layer finds the codes: max_pool2d(dequantize(c)) =
dequantize(max_pool2d(c)).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import fx

from mcc import ops
from mcc.arguments import PADS, filling
from mcc.constants import same_tensor
from mcc.graph import Node
from mcc.ops import OPS

if TYPE_CHECKING:
    from mcc.backends.cpu.lowering import Lowering

_MOVES = (
    OPS["max_pool2d"], OPS["cat"], ops.RESHAPE, OPS["permute"], OPS["transpose.int"],
    OPS["upsample_nearest2d.vec"], *PADS,
)  # fmt: skip
# besides, what takes a part, or gives dims other places
_PARTS = tuple(OPS[name] for name in ("slice.Tensor", "select.int", "unsqueeze", "squeeze.dim", "squeeze.dims", "t"))


def hoist(lowering: Lowering) -> Lowering:
    """Move every quantizer as far up as it goes, and every dequantize as far down, in a copy of the graph."""
    graph = lowering.graph.copy()
    moved = False
    queue = [n for n in graph.nodes if n.op is ops.QUANTIZE]
    while queue:
        quantizer = queue.pop()
        source = quantizer.operand(0)
        if source is not None and _passes(quantizer, source):
            queue += _move(quantizer, source)
            moved = True
    for node in graph.nodes:
        if (node.op in _MOVES or node.op in _PARTS) and node.op not in PADS:
            moved = dequantize_behind(node) or moved
    return replace(lowering, graph=graph.clean().repropagate()) if moved else lowering


def _passes(quantizer: Node, source: Node) -> bool:
    """Whether a quantizer may go before the op it reads: one scale, unsigned codes, no other reader."""
    if source.op not in _MOVES or len(source.fx.users) != 1 or source.is_output:
        return False
    if quantizer.argument(3) is not None or quantizer.argument(6) is not torch.uint8 or quantizer.is_output:
        return False
    if source.op in PADS:
        zero = quantizer.operand(2)
        return filling(source) == 0 and zero is not None and zero.is_parameter
    if source.op is OPS["cat"]:
        return all(n.meta["val"].dtype is torch.float32 for n in source.fx.all_input_nodes)
    return True


def _move(quantizer: Node, source: Node) -> list[Node]:
    """Quantize what the op reads instead of what it gives; returns the new quantizers."""
    graph = quantizer.graph
    made: dict[fx.Node, fx.Node] = {}
    with graph.module.graph.inserting_before(source.fx):
        reads = [graph.module.graph.get_attr(str(a.target)) for a in quantizer.fx.args[1:3] if isinstance(a, fx.Node)]
        for read, old in zip(reads, quantizer.fx.args[1:3], strict=True):
            assert isinstance(old, fx.Node)
            read.meta = dict(old.meta)
        for operand in [n for n in source.fx.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)]:
            args = (operand, *reads, *quantizer.fx.args[3:])
            made[operand] = graph.module.graph.call_function(ops.QUANTIZE.target, args)
            made[operand].meta = dict(quantizer.fx.meta) | {"val": operand.meta["val"].to(torch.uint8)}
    for operand, codes in made.items():
        source.fx.replace_input_with(operand, codes)
    source.fx.meta["val"] = source.value.to(torch.uint8)
    if source.op in PADS:
        # the code of zero
        fill = int(quantizer.operand(2).tensor)  # type: ignore[union-attr]  # `_passes` saw it
        options = ("constant", fill) if source.op is OPS["pad"] else (fill,)
        source.fx.args = (*source.fx.args[:2], *options)
    source.take_place_of(quantizer)
    return [type(quantizer)(codes, graph) for codes in made.values()]


def _read_codes(node: Node) -> bool:
    """Whether all that an op moves was dequantized with one scale from unsigned codes that are no weights."""
    values = [Node(n, node.graph) for n in node.fx.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)]
    first = values[0]
    for value in values:
        codes = value.operand(0)
        if value.op is not ops.DEQUANTIZE or value.argument(3) is not None or codes is None or codes.is_parameter:
            return False
        if codes.dtype is not torch.uint8 or not all(same_tensor(value.operand(i), first.operand(i)) for i in (1, 2)):
            return False
    return not node.is_output


def dequantize_behind(node: Node) -> bool:
    """Move codes, and dequantize what that gives, if codes are all that the op moves; returns whether they are."""
    if not _read_codes(node):
        return False
    values = [n for n in node.fx.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)]
    scale_and_zero = values[0].args[1:]
    for value in values:
        codes = value.args[0]
        assert isinstance(codes, fx.Node)
        node.fx.replace_input_with(value, codes)
    graph = node.graph.module.graph
    with graph.inserting_after(node.fx):
        behind = graph.call_function(ops.DEQUANTIZE.target, (node.fx, *scale_and_zero))
    behind.meta = dict(node.fx.meta)
    node.fx.meta["val"] = node.value.to(torch.uint8)
    node.fx.replace_all_uses_with(behind, delete_user_cb=lambda user: user is not behind)
    return True
