"""Stage 6: choose a kernel for each region."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from mcc import ops
from mcc.backends.cpu.kernels import KERNELS
from mcc.backends.cpu.lowering import Choice, Lowering
from mcc.ops import extent

if TYPE_CHECKING:
    from torch import fx

    from mcc.backends.kernel import Kernel, Region
    from mcc.graph import Node

BYTE = 8
MANY_ROWS = 8
DENSEST_FEW, DENSEST_MANY = 0.2, 0.35


def select(lowering: Lowering) -> Lowering:
    """Take the first kernel that takes the region; decode a sparse weight that none reads, and say so.

    A region that no kernel takes even then is left to the op library, with the reasons.
    """
    choices: dict[fx.Node, Choice] = {}
    refused = dict(lowering.refused)
    for output, region in lowering.regions.items():
        kernel, reasons = _first(region, lowering)
        reason, read = "", region
        if kernel is None and region.weight.sparse is not None:
            read = replace(region, weight=replace(region.weight, dense=region.weight.decoded(), sparse=None))
            reason = f"weight decoded at build time: {reasons}"
            kernel, reasons = _first(read, lowering)
        if kernel is None and region.activation is not None:
            # the codes may still be read as the float values they stand for
            source = region.anchor.operand(0)
            assert source is not None
            read = replace(read, activation=None, source=source)
            reason, (kernel, reasons) = f"activations decoded: {reasons}", _first(read, lowering)
        if kernel is None:
            refused[region.anchor.fx] = reasons
            continue
        if read.weight.bits < BYTE and not read.weight.grouped:
            reason = reason or f"int{read.weight.bits} codes are stored as bytes: {kernel.name} unpacks none"
            read = replace(read, weight=replace(read.weight, bits=BYTE))
        tile = lowering.tuner.choose(kernel, read, lowering.target)
        choices[output] = Choice(read, kernel, tile, kernel.lower(read, lowering.target, tile), reason)
    return replace(lowering, choices=choices, refused=refused)


def _first(region: Region, lowering: Lowering) -> tuple[Kernel | None, str]:
    reasons = []
    for kernel in (k for k in KERNELS if k.anchor is region.anchor.op):
        reason = kernel.refuses(region, lowering.target)
        if reason is None:
            return kernel, ""
        reasons.append(f"{kernel.name}: {reason}")
    return None, "; ".join(reasons)


def prefer_dense(node: Node, density: float) -> str | None:
    """Why a weight of this density had better be read dense for this op, or None if a sparse kernel gains by it.

    Measured on AVX-512 and AVX2: the sparse dense-layer kernel overtakes the dense one below a density of 0.2 for a few
    rows and 0.35 for many. A weight read dense is still stored without its zeros. A convolution has no sparse kernel
    yet: sparse or dense, its weight is decoded at build time, and the report says so.
    """
    if node.op is not ops.LINEAR:
        return "there is no kernel for sparse convolution weights yet" if node.op in ops.LAYERS else None
    rows = math.prod(extent(s) for s in node.shape[:-1])
    limit = DENSEST_FEW if rows < MANY_ROWS else DENSEST_MANY
    if density <= limit:
        return None
    return f"at density {density:.2f} the dense kernel is faster (sparse gains below {limit} for {rows} rows)"
