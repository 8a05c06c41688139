"""What kernels of linear layers with scales for groups of inputs share: panels of words, scales and zero points."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from mcc.backends.cpu.kernels.panels import PanelPlan
    from mcc.backends.cpu.microkernel import Expression
    from mcc.backends.kernel import StoredWeight

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}  # the bits of a code that words hold together


def not_grouped(weight: StoredWeight, multiple: Mapping[int, int]) -> str | None:
    """Why a weight is not dense signed codes with scales for groups, or None if it is.

    Args:
        weight: of a region.
        multiple: what several groups must have a multiple of inputs of, by the bits of codes that are taken.
    """
    if not weight.grouped or weight.sparse is not None or weight.bits not in multiple:
        return "the weight is not dense codes of 1 to 4 or 8 bits with scales for groups"
    if int(weight.decoded().max(initial=0)) >> (weight.bits - 1):
        return f"its codes are not signed ones of {weight.bits} bits"
    inputs = multiple[weight.bits] * weight.span
    if weight.scale is not None and weight.scale.shape[1] > 1 and weight.group_size % inputs:
        return f"groups of {weight.group_size} are no multiple of {inputs}"
    return None


class GroupedBody:
    """The arrays that a kernel reads: words, scales, and zero points and biases where there are such.

    Args:
        plan: of the kernel.
        words: of weights, int32 [out, groups, words of a group].
        codes: of an output that a whole number of words holds, a block.
    """

    def __init__(self, plan: PanelPlan, words: NDArray[np.int32], codes: int) -> None:
        weight = plan.region.weight
        assert weight.scale is not None
        self.plan, self.v, self.bits = plan, plan.vectors, weight.bits
        self.groups, self.group, self.span = weight.scale.shape[1], weight.group_size, weight.span
        self.block_codes = codes
        self.blocks = -(-(self.group // self.span) // codes)
        self.words = codes * self.bits // 32  # of a block
        self.packed: dict[str, NDArray[Any]] = {
            "weight": self._panels(words), "scale": self._panels(weight.scale[:, :, None])
        }  # fmt: skip
        # what all groups have is in the code
        zeros = np.zeros(1) if weight.zero_point is None else weight.zero_point
        self.zero = float(zeros.flat[0]) if (zeros == zeros.flat[0]).all() else None
        if self.zero is None:
            assert weight.zero_point is not None
            self.packed["zero_point"] = self._panels(weight.zero_point[:, :, None])
        if plan.region.bias is not None:
            self.packed["bias"] = np.pad(plan.region.bias, (0, plan.padded_outputs - plan.outputs))

    def _panels(self, parts: NDArray[Any]) -> NDArray[Any]:
        """[out, groups, n] -> panels [groups][n][width] end to end."""
        padded = np.pad(parts, ((0, self.plan.padded_outputs - len(parts)), (0, 0), (0, 0)))
        width = self.plan.width
        panels = [padded[i : i + width].transpose(1, 2, 0).reshape(-1) for i in range(0, len(padded), width)]
        return np.concatenate(panels)

    def element(self, arrays: Mapping[str, Expression], output: Expression, k: Expression) -> Expression:
        """The weight's value at an output and an input."""
        first, width, lane = self.plan.place(output)
        group, inside = tirx.floordiv(k, self.group), tirx.floormod(k, self.group)
        block = group * self.blocks + tirx.floordiv(inside, self.block_codes)
        base = first * (self.groups * self.blocks * self.words) + block * (self.words * width) + lane

        def word(n: Expression) -> Expression:
            return arrays["weight"][base + n * width]

        code = T.cast(self.signed_code(word, tirx.floormod(inside, self.block_codes)), "float32")
        place = first * self.groups + group * width + lane
        zero = T.cast(arrays["zero_point"][place], "float32") if self.zero is None else T.float32(self.zero)
        return (code - zero) * T.cast(arrays["scale"][place], "float32")

    def signed_code(self, word: Callable[[Expression], Expression], c: Expression) -> Expression:
        """Code number `c` of a block, int32, from words of that block."""
        raise NotImplementedError

    def group_vectors(
        self, arrays: dict[str, Expression], panel: Expression, vectors: int, g: Expression
    ) -> tuple[list[Expression], list[Expression]]:
        """Scales of group `g`, and what code 0 stands for; nothing of that where all zero points are zero."""
        v = self.v
        base = panel * (self.plan.width * self.groups) + g * (vectors * v.lanes)
        kind = f"float32x{v.lanes}"
        scales = [v.hold(T.cast(v.load(arrays["scale"], base + j * v.lanes), kind)) for j in range(vectors)]
        if self.zero is not None:
            return scales, [v.hold(s * v.constant(-self.zero)) for s in scales] if self.zero else []
        zeros = arrays["zero_point"]
        values = [T.cast(v.load(zeros, base + j * v.lanes), kind) for j in range(vectors)]
        return scales, [v.hold(v.constant(0.0) - z * s) for z, s in zip(values, scales, strict=True)]
