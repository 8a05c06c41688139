"""Linear layers of codes with an unstructured sparse weight, by permuting bytes: y = epilogue(x W^T + b), any rows.

See byte_windows.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import tvm.tirx.script.builder.ir as B
from tvm.script import tirx as T

from mcc import ops
from mcc.backends.cpu.integer_sums import sums_overflow
from mcc.backends.cpu.kernels.byte_windows import add_windows, refusal, row_tiles, steps_of
from mcc.backends.cpu.kernels.dense import IntegerBody, dense_reference
from mcc.backends.cpu.kernels.dense_per_token import PerTokenBody, per_token_reference
from mcc.backends.cpu.kernels.panels import PanelPlan
from mcc.backends.cpu.kernels.tiles import PanelWidth, parse_tile
from mcc.backends.cpu.kernels.token_codes import WORD
from mcc.backends.cpu.microkernel import Expression, Vectors, flat, product
from mcc.backends.kernel import Lowered, Region

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mcc.target import Target

LARGEST_TILE = 16  # rows


@dataclass(frozen=True)
class SparseCodes:
    """uint8 activation codes with one scale, int8 weight codes without their zeros; exact int32 sums."""

    name: str = "sparse_codes"
    anchor: ClassVar[ops.Op] = ops.LINEAR

    def refuses(self, region: Region, target: Target) -> str | None:
        """Takes linear with such a weight where bytes are permuted."""
        if region.activation is None or region.activation.per_token:
            return "the activations are not codes with one scale"
        return _refusal(region, target)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """Rows that share what they are permuted by."""
        del region
        return row_tiles(target, LARGEST_TILE)

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text."""
        return _lower(self.name, _Windows(_plan(region, target, tile)))

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """Exact integer sums."""
        return dense_reference(region, source, operands)


@dataclass(frozen=True)
class SparsePerToken:
    """float32 activations quantized per token, int8 weight codes without their zeros; exact int32 sums."""

    name: str = "sparse_per_token"
    anchor: ClassVar[ops.Op] = ops.LINEAR

    def refuses(self, region: Region, target: Target) -> str | None:
        """As for codes with one scale."""
        if region.activation is None or not region.activation.per_token:
            return "the activations are not codes with a scale for each token"
        return _refusal(region, target)

    def tiles(self, region: Region, target: Target) -> tuple[str, ...]:
        """As for codes with one scale."""
        del region
        return row_tiles(target, LARGEST_TILE)

    def lower(self, region: Region, target: Target, tile: str) -> Lowered:
        """See the module's text; all rows become codes first."""
        return _lower(self.name, _PerTokenWindows(_plan(region, target, tile)))

    def reference(self, region: Region, source: NDArray[Any], operands: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """Exact integer sums."""
        return per_token_reference(region, source, operands)


def _refusal(region: Region, target: Target) -> str | None:
    """Why no row's codes are permuted for a region, or None."""
    return refusal(region.weight, target, region.weight.shape[1]) or sums_overflow(region)


def _plan(region: Region, target: Target, tile: str) -> PanelPlan:
    return PanelPlan(region, Vectors(target), parse_tile(tile))


def _lower(name: str, body: _Windows) -> Lowered:
    packed = body.arrays()
    return Lowered(body.plan.function(name, packed, partial(body.emit_named, tuple(packed))), packed)


class _Windows(IntegerBody):
    """As dense int8, but for how sums are come by."""

    def __init__(self, plan: PanelPlan) -> None:
        super().__init__(plan, tiled=False)
        weight, lanes = plan.region.weight, plan.vectors.lanes
        rows = np.pad(weight.decoded(), ((0, plan.padded_outputs - plan.outputs), (0, 0)))
        steps = steps_of(plan.vectors.target)
        assert steps is not None
        self.steps = steps.pack([(0, rows.reshape(-1, lanes, plan.inputs))], weight.sparse)
        plan.products = self.steps["weight"].size

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Those of dense int8 and the steps."""
        return super().arrays() | self.steps

    def emit_named(self, names: tuple[str, ...], x: Expression, *arrays: Expression) -> None:
        """Emit the whole kernel."""
        self.named = dict(zip(names, arrays, strict=True))
        self.bias, self.scale, self.start = (self.named[key] for key in ("bias", "scale", "start"))
        self.take(x, product(self.plan.leading))
        self.plan.loops(self._tile)

    def take(self, x: Expression, rows: Expression) -> None:
        """Get the codes of all rows."""
        del rows
        self.codes, self.pitch = x, self.plan.inputs

    def _tile(self, panel: Expression, width: PanelWidth, first: Expression, count: int) -> None:
        """Some rows of a vector of outputs."""
        v = self.plan.vectors
        (sums,) = v.registers(1, count, "int32")
        start = B.Bind(v.load(self.start, panel * v.lanes))
        for register in sums:
            register.set(start)
        rows = [first + i for i in range(count)]
        begins = [B.Bind(T.cast(row, "int64") * self.pitch) for row in rows]
        add_windows(v, self.named, panel, (self.codes, begins), sums)
        self._finish(panel * v.lanes, width.used_lanes(0, v.lanes), rows, sums)


class _PerTokenWindows(_Windows, PerTokenBody):
    """The same, of codes that the kernel makes."""

    def take(self, x: Expression, rows: Expression) -> None:
        """Make the codes of all rows."""
        PerTokenBody.take(self, x, rows)
        self.pitch = self.groups * WORD
        if self.code_words is not None:
            self.codes = flat(self.code_words, rows * self.pitch, "uint8")
