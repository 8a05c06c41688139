"""Which densities of a weight a sparse kernel gains by: measured limits and, about these, measuring here."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mcc import ops
from mcc.backends.cpu.integerize import permutes_codes, quantized_source
from mcc.backends.cpu.kernels.byte_windows import BLOCKS, LARGE, SMALL, SMALL_OF_WORDS, steps_of
from mcc.backends.cpu.kernels.pixel_tiles import MOST_PLANES
from mcc.backends.cpu.kernels.sparse_rows import unpermuted
from mcc.backends.kernel import SparseArrays
from mcc.backends.relax.emitter import tuple_of
from mcc.backends.tune import measures
from mcc.cost import weight_expression
from mcc.ops import extent
from mcc.sparse_formats import Form

if TYPE_CHECKING:
    from mcc.backends.cpu.kernels.windows import Steps
    from mcc.backends.kernel import Region
    from mcc.backends.tune import Tuning
    from mcc.graph import Node
    from mcc.target import Target

SOME_ROWS, MANY_ROWS = 8, 32
FEWEST_IN_GROUPS = 4  # rows for which dense codes of few bits are unpacked once
TALL = 4  # outputs of a block that are worth more than as many weights
_ONE_VALUE = ("pointwise", "compression")
FEW_PIXELS = 16  # of an image, one vector
FEWEST_INPUTS = 4  # of an output: with fewer there is too little to leave out
UNSURE = 1.5  # times a limit, or a limit by it: between, kernels are timed where they can be
# the density below which a sparse kernel overtakes the dense one, whose integer form has instructions of its own;
# "parts" is reckoned from "permuted", by how full steps are, and "words" timed on 8 lanes alone
DENSEST = {
    "float": {
        "few rows": 0.2,
        "a permuted row": 0.6,
        "few permuted rows": 0.45,
        "few rows of blocks": 0.3,
        "rows": 0.35,
        "many rows": 0.5,
        "blocks": 0.7,
        "few rows in groups": 0.5,
        "rows in groups": 0.3,
        "few pixels": 0.12,
        "pixels": 0.6,
        "windows": 0.3,
        "windows of blocks": 0.35,
    },
    "int8": {
        "few rows": 0.05,
        "few rows of blocks": 0.15,
        "rows": 0.2,
        "many rows": 0.2,
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
        "many rows": 0.12,
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
        "many rows": 0.33,
        "blocks": 0.4,
        "few pixels": 0.33,
        "pixels": 0.33,
        "windows": 0.33,
        "windows of blocks": 0.4,
    },
    "words": {
        "few rows": 0.25,
        "few rows of blocks": 0.25,
        "rows": 0.3,
        "many rows": 0.3,
        "blocks": 0.33,
        "few pixels": 0.25,
        "pixels": 0.3,
        "windows": 0.3,
        "windows of blocks": 0.33,
    },
    "parts": {
        "few rows": 0.2,
        "few rows of blocks": 0.3,
        "rows": 0.2,
        "many rows": 0.2,
        "blocks": 0.3,
        "few pixels": 0.2,
        "pixels": 0.2,
        "windows": 0.2,
        "windows of blocks": 0.3,
    },
    "tiles": {
        "few rows": 0.05,
        "few rows of blocks": 0.15,
        "rows": 0.02,
        "many rows": 0.02,
        "blocks": 0.02,
        "few pixels": 0.02,
        "pixels": 0.02,
        "windows": 0.01,
        "windows of blocks": 0.01,
    },
}
PERMUTED = {LARGE: "permuted", SMALL: "parts", SMALL_OF_WORDS: "words"}  # how codes are, by what a step is


def prefer_dense(node: Node, density: float, form: Form, target: Target, tuning: Tuning = "model") -> str | None:
    """Why a weight of this density had better be read dense for this op, or None if a sparse kernel gains by it.

    Measured on AVX2, AVX-512 and AMX: see `DENSEST` and tests/bench/sparse.py; where bytes are permuted on a Zen 4 and,
    16 at a time, on a Zen 3. A weight read dense is still stored without its zeros. Where kernels are timed, linear
    layers not far beyond a limit count as gaining: `select` will time both.
    """
    if node.op is ops.EMBEDDING and form.among:
        return f"no embedding reads rows of {form}"
    if node.op not in (ops.LINEAR, ops.CONV2D):
        return "there is no kernel for its sparse weights yet" if node.op in ops.LAYERS else None
    source = node.operand(0)
    assert source is not None
    if node.op is ops.CONV2D and (refused := _refused_windows(node)):
        return refused
    codes = _gives_codes(source)
    if codes and form.among:
        return f"no kernel multiplies codes by weights of {form}"
    if codes and _steps(node, form, target) is None and (reason := _no_integers(node, source, form, target)):
        return reason
    limit, what = _limit(node, form, target, codes=codes)
    timed = node.op is ops.LINEAR and measures(tuning, target)
    if density <= (UNSURE * limit if timed else limit):
        return None
    return f"at density {density:.2f} the dense kernel is faster (sparse gains below {limit} for {what})"


def unsure(region: Region, target: Target) -> bool:
    """Whether the kernel of a sparse weight may be slower than the dense one: near the limit, on either side."""
    sparse = region.weight.sparse
    if region.anchor.op is not ops.LINEAR or not isinstance(sparse, SparseArrays):
        return False
    form = Form(*sparse.block, 0, 0, 0)
    limit, _ = _limit(region.anchor, form, target, codes=region.activation is not None)
    return sparse.values.size > limit / UNSURE * math.prod(region.weight.shape)


def _limit(node: Node, form: Form, target: Target, *, codes: bool) -> tuple[float, str]:
    """The density up to which a sparse kernel gains, and what the layer is, in words."""
    kind, what = _rows(node, form) if node.op is ops.LINEAR else _pixels(node, form)
    source = node.operand(0)
    assert source is not None
    if codes:
        steps = _steps(node, form, target)
        precision = PERMUTED[steps] if steps else "dot4" if target.exact_dot4 else "int8"
        return DENSEST["tiles" if target.tiles else precision][kind], what
    if kind == "few rows" and unpermuted(int(source.shape[-1]), source.shape[:-1], target) is None:
        alone = all(isinstance(size, int) and size == 1 for size in source.shape[:-1])
        kind = "a permuted row" if alone else "few permuted rows"
    return DENSEST["float"][kind], what


def _gives_codes(source: Node) -> bool:
    """Whether a layer reads unsigned codes of 8 bits, or will: activations become codes after the weights."""
    if source.op is ops.FAKE_QUANTIZE:
        return source.argument(3) is None and bool(source.argument(4) >= 0)
    return source.op is ops.FAKE_QUANTIZE_PER_TOKEN or quantized_source(source)[0] is not None


def _steps(node: Node, form: Form, target: Target) -> Steps | None:
    """The steps in which a layer's codes can be permuted as bytes, or None."""
    steps = steps_of(target)
    weight = node.weight_operand
    assert weight is not None
    if (form.rows, form.columns) not in BLOCKS or steps is None:
        return None
    enough = permutes_codes(node, target) if node.op is ops.CONV2D else int(weight.shape[1]) >= steps.window
    return steps if enough else None


def _no_integers(node: Node, source: Node, form: Form, target: Target) -> str | None:
    """Why no other sparse kernel had better read a layer's codes, if none had."""
    if source.op is ops.FAKE_QUANTIZE_PER_TOKEN:
        return "no sparse kernel quantizes the rows it reads"
    if node.op is not ops.CONV2D:
        return None
    if not all(isinstance(size, int) for size in source.shape[1:]):
        return "its height or width varies, and codes of such images lie with channels last"
    if (beside := _single_channels_beside(node)) is not None:
        return f"{beside.layer} beside it has single channels, and codes of those lie with channels last"
    if steps_of(target) is not None and (form.rows, form.columns) in BLOCKS:
        grouped = int(node.argument(6, 1)) > 1
        why = "it has groups" if grouped else "few of its codes lie side by side"
        return f"{why}, and those of other layers lie with channels last"
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
    kind = "few rows" if rows < SOME_ROWS else "rows" if rows < MANY_ROWS else "many rows"
    weight = weight_expression(node.weight_operand)
    if form.among and weight is not None and weight.grouped:
        return ("few rows in groups" if rows < FEWEST_IN_GROUPS else "rows in groups"), f"{rows} rows and {form}"
    if form.among:
        return "blocks", str(form)
    if form.rows < TALL:
        return kind, f"{rows} rows"
    return ("few rows of blocks" if kind == "few rows" else "blocks"), f"{rows} rows and {form}"


def _refused_windows(node: Node) -> str | None:
    """Why the weight of a convolution is better dense, whatever its density."""
    weight = node.weight_operand
    assert weight is not None
    inputs, *kernel = (int(s) for s in weight.shape[1:])
    planes = math.prod(map(min, kernel, tuple_of(node.argument(3, 1), 2)))
    if inputs < FEWEST_INPUTS:
        return f"the groups have {inputs} input channels each"
    if planes > MOST_PLANES:
        return f"its stride would cut each channel into {planes} planes"
    return None


def _pixels(node: Node, form: Form) -> tuple[str, str]:
    """What a convolution is to `DENSEST`, and in words."""
    weight = node.weight_operand
    assert weight is not None
    kernel = [int(s) for s in weight.shape[2:]]
    pixels = math.prod(extent(s) for s in node.shape[2:])
    if pixels < FEW_PIXELS:
        return "few pixels", f"{pixels} pixels"
    kind = "pixels" if kernel == [1, 1] else "windows"
    if form.rows < TALL:
        return kind, kind
    return ("blocks" if kind == "pixels" else "windows of blocks"), f"{kind} and {form}"
