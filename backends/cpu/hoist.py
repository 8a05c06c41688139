"""Stage 2: move quantizers up through ops that only pick or place values, so that these handle codes.

    quantize(max_pool2d(x)) = max_pool2d(quantize(x)), quantize(cat(a, b)) = cat(quantize(a), quantize(b))

exactly, because rounding keeps order. The layer before then writes codes, a quarter of the bytes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import fx

from mcc import ops
from mcc.backends.cpu.pads import PADS, filling
from mcc.ops import OPS

if TYPE_CHECKING:
    from mcc.backends.cpu.lowering import Lowering
    from mcc.graph import Node

_MOVES = (
    OPS["max_pool2d"], OPS["cat"], ops.RESHAPE, OPS["permute"], OPS["transpose.int"],
    OPS["upsample_nearest2d.vec"], *PADS,
)  # fmt: skip


def hoist(lowering: Lowering) -> Lowering:
    """Move every quantizer as far up as it goes, in a copy of the graph."""
    graph = lowering.graph.copy()
    moved = False
    queue = [n for n in graph.nodes if n.op is ops.QUANTIZE]
    while queue:
        quantizer = queue.pop()
        source = quantizer.operand(0)
        if source is not None and _passes(quantizer, source):
            queue += _move(quantizer, source)
            moved = True
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
