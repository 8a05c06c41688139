"""Stage 6: choose a kernel for each region."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from mcc import ops
from mcc.backends.cpu.integer_sums import pairs_fit
from mcc.backends.cpu.integerize import permutes_codes, quantized_source
from mcc.backends.cpu.kernels import first_kernel
from mcc.backends.cpu.kernels.byte_windows import BLOCKS, WINDOW
from mcc.backends.cpu.kernels.pixel_tiles import MOST_PLANES
from mcc.backends.cpu.kernels.sparse_rows import unpermuted
from mcc.backends.cpu.lowering import Choice, Lowering
from mcc.backends.relax.emitter import tuple_of
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
_ONE_VALUE = ("pointwise", "compression")
FEW_PIXELS = 16  # of an image, one vector
FEWEST_INPUTS = 4  # of an output: with fewer there is too little to leave out
# the density below which a sparse kernel overtakes the dense one, whose integer form has instructions of its own
DENSEST = {
    "float": {
        "few rows": 0.2,
        "a permuted row": 0.6,
        "few permuted rows": 0.45,
        "few rows of blocks": 0.3,
        "rows": 0.35,
        "blocks": 0.7,
        "few pixels": 0.12,
        "pixels": 0.6,
        "windows": 0.3,
        "windows of blocks": 0.35,
    },
    "int8": {
        "few rows": 0.05,
        "few rows of blocks": 0.15,
        "rows": 0.2,
        "blocks": 0.3,
        "few pixels": 0.05,
        "pixels": 0.3,
        "windows": 0.25,
        "windows of blocks": 0.3,
    },
    "dot4": {
        "few rows": 0.05,
        "few rows of blocks": 0.15,
        "rows": 0.12,
        "blocks": 0.2,
        "few pixels": 0.05,
        "pixels": 0.25,
        "windows": 0.15,
        "windows of blocks": 0.2,
    },
    "permuted": {
        "few rows": 0.3,
        "few rows of blocks": 0.4,
        "rows": 0.33,
        "blocks": 0.4,
        "few pixels": 0.33,
        "pixels": 0.33,
        "windows": 0.33,
        "windows of blocks": 0.4,
    },
    "tiles": {
        "few rows": 0.05,
        "few rows of blocks": 0.15,
        "rows": 0.02,
        "blocks": 0.02,
        "few pixels": 0.02,
        "pixels": 0.02,
        "windows": 0.01,
        "windows of blocks": 0.01,
    },
}


def select(lowering: Lowering) -> Lowering:
    """Take the first kernel that takes the region; decode a sparse weight that none reads, and say so.

    A region that no kernel takes even then is left to the op library, with the reasons.
    """
    choices: dict[fx.Node, Choice] = {}
    refused = dict(lowering.refused)
    for output, region in lowering.regions.items():
        kernel, reasons = first_kernel(region, lowering.target)
        reason, read = "", region
        if kernel is None and region.weight.sparse is not None:
            read = replace(region, weight=replace(region.weight, dense=region.weight.decoded(), sparse=None))
            reason = f"weight decoded at build time: {reasons}"
            kernel, reasons = first_kernel(read, lowering.target)
        if kernel is None and region.activation is not None:
            # the codes may still be read as the float values they stand for
            source = region.anchor.operand(0)
            assert source is not None
            read = replace(read, activation=None, source=source)
            reason, (kernel, reasons) = f"activations decoded: {reasons}", first_kernel(read, lowering.target)
        if kernel is None:
            refused[region.anchor.fx] = reasons
            continue
        if read.weight.bits < BYTE and not read.weight.grouped:
            reason = reason or f"int{read.weight.bits} codes are stored as bytes: {kernel.name} unpacks none"
            read = replace(read, weight=replace(read.weight, bits=BYTE))
        reason = reason or _decoded(read) or _longer(read, kernel, lowering.target)
        tile = lowering.tuner.choose(kernel, read, lowering.target)
        choices[output] = Choice(read, kernel, tile, kernel.lower(read, lowering.target, tile), reason)
    return replace(lowering, choices=choices, refused=refused)


def _decoded(region: Region) -> str:
    """What of a region is stored in codes that no kernel reads, and why; empty where there is nothing."""
    weight, source = region.anchor.weight_operand, region.source
    if weight is not None and weight.op is ops.DECODE_BFLOAT16 and not region.rounds:
        return "weight decoded at build time: no kernel multiplies bfloat16 here, or what it reads is not rounded"
    if weight is not None and weight.op is ops.DEQUANTIZE and region.weight.scale is None:
        return "weight decoded at build time: no kernel reads codes with zero points of channels, or a scale of inputs"
    codes = source.operand(0) if source.op is ops.DEQUANTIZE else None
    if codes is None or region.activation is not None:
        return ""
    if region.weight.dtype != "int8":
        return "activations decoded: the weight is float32"
    kind = str(codes.dtype).removeprefix("torch.")
    many = "" if source.argument(3) is None else " with a scale for each channel"
    return f"activations decoded: no kernel reads {kind} codes{many}"


def _longer(region: Region, kernel: Kernel, target: Target) -> str:
    """Why sums of codes take more instructions than they might; empty where they do not."""
    if kernel.name not in ("conv2d_int8", "dense_int8") or target.exact_dot4 or pairs_fit(region.weight.decoded()):
        return ""
    return "neighbouring codes exceed what one instruction adds exactly, a longer sequence adds them"


def prefer_dense(node: Node, density: float, form: Form, target: Target) -> str | None:
    """Why a weight of this density had better be read dense for this op, or None if a sparse kernel gains by it.

    Measured on AVX2, AVX-512, AMX and, where bytes are permuted, a Zen 4: see `DENSEST` and tests/bench/sparse.py. A
    weight read dense is still stored without its zeros.
    """
    if node.op is ops.EMBEDDING and form.among:
        return f"no embedding reads rows of {form}"
    if node.op not in (ops.LINEAR, ops.CONV2D):
        return "there is no kernel for its sparse weights yet" if node.op in ops.LAYERS else None
    source = node.operand(0)
    assert source is not None
    kind, what = _rows(node, form) if node.op is ops.LINEAR else _pixels(node, form)
    if not kind:
        return what
    if not _gives_codes(source):
        if kind == "few rows" and unpermuted(int(source.shape[-1]), source.shape[:-1], target) is None:
            kind = "a permuted row" if math.prod(source.shape[:-1]) == 1 else "few permuted rows"
        return _too_dense(density, DENSEST["float"][kind], what)
    if form.among:
        return f"no kernel multiplies codes by weights of {form}"
    permuted = target.permutes_bytes and _permuted(node, form)
    if not permuted and (reason := _no_integers(node, source, form, target)):
        return reason
    precision = "permuted" if permuted else "dot4" if target.exact_dot4 else "int8"
    return _too_dense(density, DENSEST["tiles" if target.tiles else precision][kind], what)


def _too_dense(density: float, limit: float, what: str) -> str | None:
    if density <= limit:
        return None
    return f"at density {density:.2f} the dense kernel is faster (sparse gains below {limit} for {what})"


def _gives_codes(source: Node) -> bool:
    """Whether a layer reads unsigned codes of 8 bits, or will: activations become codes after the weights."""
    if source.op is ops.FAKE_QUANTIZE:
        return source.argument(3) is None and bool(source.argument(4) >= 0)
    return source.op is ops.FAKE_QUANTIZE_PER_TOKEN or quantized_source(source)[0] is not None


def _permuted(node: Node, form: Form) -> bool:
    """Whether a layer's codes can be permuted as bytes."""
    weight = node.weight_operand
    assert weight is not None
    if (form.rows, form.columns) not in BLOCKS:
        return False
    return permutes_codes(node) if node.op is ops.CONV2D else int(weight.shape[1]) >= WINDOW


def _no_integers(node: Node, source: Node, form: Form, target: Target) -> str | None:
    """Why no other sparse kernel had better read a layer's codes, if none had."""
    if source.op is ops.FAKE_QUANTIZE_PER_TOKEN:
        return "no sparse kernel quantizes the rows it reads"
    if node.op is not ops.CONV2D:
        return None
    if (beside := _single_channels_beside(node)) is not None:
        return f"{beside.layer} beside it has single channels, and codes of those lie with channels last"
    if target.permutes_bytes and (form.rows, form.columns) in BLOCKS:
        return "few of its codes lie side by side, and those of other layers lie with channels last"
    return None


def _single_channels_beside(node: Node) -> Node | None:
    """A depthwise convolution that a convolution reads from or gives to, with functions of one value between."""
    before, after = node.operand(0), list(node.users)
    while before is not None and before.op not in ops.LAYERS and before.fx.all_input_nodes:
        before = before.operand(0)
    while after and not any(user.op in ops.LAYERS for user in after):
        passing = [user for user in after if user.op is not None and user.op.family in _ONE_VALUE]
        after = [reader for user in passing for reader in user.users]
    for other in (before, *after):
        weight = other.weight_operand if other is not None and other.op is ops.CONV2D else None
        if other is not None and weight is not None and int(weight.shape[1]) == 1 < int(other.argument(6, 1)):
            return other
    return None


def _rows(node: Node, form: Form) -> tuple[str, str]:
    """What a linear layer is to `DENSEST`, and in words."""
    rows = math.prod(extent(s) for s in node.shape[:-1])
    kind = "few rows" if rows < MANY_ROWS else "rows"
    if form.among:
        return "blocks", str(form)
    if form.rows < TALL:
        return kind, f"{rows} rows"
    return ("few rows of blocks" if kind == "few rows" else "blocks"), f"{rows} rows and {form}"


def _pixels(node: Node, form: Form) -> tuple[str, str]:
    """What a convolution is to `DENSEST`, and in words; or nothing, and why its weight is better dense."""
    weight = node.weight_operand
    assert weight is not None
    inputs, *kernel = (int(s) for s in weight.shape[1:])
    planes = math.prod(map(min, kernel, tuple_of(node.argument(3, 1), 2)))
    if inputs < FEWEST_INPUTS:
        return "", f"the groups have {inputs} input channels each"
    if planes > MOST_PLANES:
        return "", f"its stride would cut each channel into {planes} planes"
    pixels = math.prod(extent(s) for s in node.shape[2:])
    if pixels < FEW_PIXELS:
        return "few pixels", f"{pixels} pixels"
    kind = "pixels" if kernel == [1, 1] else "windows"
    if form.rows < TALL:
        return kind, kind
    return ("blocks" if kind == "pixels" else "windows of blocks"), f"{kind} and {form}"
