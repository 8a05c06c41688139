"""Stage 3: choose a kernel for each region."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from mcc.backends.cpu.kernels import KERNELS
from mcc.backends.cpu.lowering import Choice, Lowering
from mcc.backends.kernel import Kernel, Region
from mcc.graph import Node


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
        if kernel is None:
            refused[region.anchor.fx] = reasons
            continue
        tile = lowering.tuner.choose(kernel, read, lowering.target)
        choices[output] = Choice(read, kernel, tile, kernel.lower(read, lowering.target, tile), reason)
    return replace(lowering, choices=choices, refused=refused)


def _first(region: Region, lowering: Lowering) -> tuple[Kernel | None, str]:
    reasons = []
    for kernel in KERNELS:
        reason = kernel.refuses(region, lowering.target)
        if reason is None:
            return kernel, ""
        reasons.append(f"{kernel.name}: {reason}")
    return None, "; ".join(reasons)


def prefer_dense(node: Node, density: float) -> str | None:
    """Why a weight of this density had better be stored dense for this op, or None if a sparse kernel gains by it.

    Measured on AVX-512 and AVX2: the sparse dense-layer kernel passes the dense one at a density of about 0.3 for one
    row, 0.4 for many. A convolution has no sparse kernel yet, so its weight is decoded at build time, but the file is
    smaller: that is for the bytes alone to decide.
    """
    del node, density
    return None
