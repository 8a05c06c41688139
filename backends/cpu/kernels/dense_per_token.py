"""Dense layers of int8 weights that read float32 and quantize it row by row: y = epilogue(x W^T + b).

All rows become codes first, in memory of the kernel's own; then the loops are those of `dense_int8`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import tvm.tirx.script.builder.ir as B

from mcc import ops
from mcc.backends.cpu.integer_sums import sums_overflow
from mcc.backends.cpu.kernels.dense import IntegerBody, lower_integers, not_plain, tiles_of_words
from mcc.backends.cpu.kernels.token_codes import CodeForm, emit_token_codes, token_codes
from mcc.backends.kernel import PER_TOKEN, Lowered, Region, apply_epilogue

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mcc.backends.cpu.microkernel import Expression
    from mcc.target import Target


@dataclass(frozen=True)
class DensePerToken:
    """float32 activations quantized per token, int8 weights, exact int32 sums."""

    name: str = "dense_per_token"
    anchor: ClassVar[ops.Op] = ops.LINEAR

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes linear with a dense int8 weight and activations quantized per token."""
        del target
        if region.activation is None or not region.activation.per_token or region.weight.scale is None:
            return "weight and activations are not int8 with a scale for each token"
        return not_plain(region.weight) or sums_overflow(region)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """As for codes with one scale."""
        return tiles_of_words(region, target, -(-region.weight.shape[1] // 4))

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        return lower_integers(self.name, region, target, tile, PerTokenBody)

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """See `per_token_reference`."""
        return per_token_reference(region, source, operands)


def per_token_reference(region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
    """The layer in NumPy: exact integer sums."""
    codes, scales = token_codes(source)
    sums = codes @ region.weight.decoded().T.astype(np.int64)
    bias = np.float32(0) if region.bias is None else region.bias
    assert region.weight.scale is not None
    values = sums * scales.astype(np.float64) * region.weight.scale + bias
    return apply_epilogue(values.astype(np.float32), region.epilogue, operands)


class PerTokenBody(IntegerBody):
    """As for codes with one scale, which it makes itself."""

    def take(self, x: Expression, rows: Expression) -> None:
        """See `IntegerBody`."""
        made = emit_token_codes(self.plan.vectors, x, rows, CodeForm(self.plan.inputs, 0, PER_TOKEN.zero_point))
        self.whole, self.code_words, self.row_scales = True, made.words, made.scales

    def scaled(self, row: Expression, total: Expression) -> Expression:
        """See `IntegerBody`."""
        return B.Bind(total * self.plan.vectors.splat(self.row_scales[row]))
