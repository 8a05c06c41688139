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
    from mcc.sparse_formats import Form
    from mcc.target import Target

BYTE = 8
MANY_ROWS = 8
TALL = 4  # outputs of a block that are worth more than as many weights
FEWEST_INPUTS = 4  # of an output: with fewer there is too little to leave out
# the density below which a sparse kernel overtakes the dense one, whose integer form has instructions of its own
DENSEST = {
    "float": {"few rows": 0.2, "rows": 0.35, "blocks": 0.7, "pixels": 0.5, "windows": 0.3, "windows of blocks": 0.35},
    "int8": {"few rows": 0.05, "rows": 0.2, "blocks": 0.3, "pixels": 0.3, "windows": 0.25, "windows of blocks": 0.3},
    "dot4": {"few rows": 0.05, "rows": 0.12, "blocks": 0.2, "pixels": 0.25, "windows": 0.15, "windows of blocks": 0.2},
}


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


def prefer_dense(node: Node, density: float, form: Form, target: Target) -> str | None:
    """Why a weight of this density had better be read dense for this op, or None if a sparse kernel gains by it.

    Measured on AVX-512 and AVX2, see `DENSEST` and tests/bench/sparse.py. A weight read dense is still stored without
    its zeros.
    """
    if node.op not in (ops.LINEAR, ops.CONV2D):
        return "there is no kernel for its sparse weights yet" if node.op in ops.LAYERS else None
    source, weight = node.operand(0), node.weight_operand
    assert source is not None
    assert weight is not None
    if node.op is ops.LINEAR:
        rows = math.prod(extent(s) for s in node.shape[:-1])
        kind, what = ("few rows" if rows < MANY_ROWS else "rows"), f"{rows} rows"
        if form.among or form.rows >= TALL:
            kind, what = "blocks", str(form)
    elif int(weight.shape[1]) < FEWEST_INPUTS:
        return f"the groups have {int(weight.shape[1])} input channels each"
    else:
        kind = what = "pixels" if math.prod(extent(s) for s in weight.shape[2:]) == 1 else "windows"
        if form.rows >= TALL:
            kind, what = ("blocks" if kind == "pixels" else "windows of blocks"), f"{what} and {form}"
    if source.op is ops.FAKE_QUANTIZE_PER_TOKEN:
        return "no sparse kernel quantizes the rows it reads"
    # activations become codes after the weights that read them
    codes = source.op in (ops.FAKE_QUANTIZE, ops.DEQUANTIZE)
    if codes and form.among:
        return f"no kernel multiplies codes by weights of {form}"
    precision = "float" if not codes else "dot4" if target.exact_dot4 else "int8"
    limit = DENSEST[precision][kind]
    if density <= limit:
        return None
    return f"at density {density:.2f} the dense kernel is faster (sparse gains below {limit} for {what})"
