"""Stage 6: choose a kernel for each region."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mcc import ops
from mcc.backends.cpu.densities import unsure
from mcc.backends.cpu.integer_sums import pairs_fit
from mcc.backends.cpu.kernels import first_kernel
from mcc.backends.cpu.lowering import Choice, Lowering
from mcc.backends.tune import measures

if TYPE_CHECKING:
    from torch import fx

    from mcc.backends.kernel import Kernel, Region
    from mcc.target import Target

BYTE = 8
FASTER = 0.95  # of the time: as fast, the sparse kernel reads fewer bytes, which other layers gain by


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
            read = _with_zeros(region)
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
        if read.weight.sparse is not None and measures(lowering.tuner.tuning, lowering.target):
            read, kernel, reason = _faster(read, kernel, lowering)
        if read.weight.bits < BYTE and not read.weight.grouped:
            reason = reason or f"int{read.weight.bits} codes are stored as bytes: {kernel.name} unpacks none"
            read = replace(read, weight=replace(read.weight, bits=BYTE))
        reason = reason or _decoded(read) or _longer(read, kernel, lowering.target)
        tile = lowering.tuner.choose(kernel, read, lowering.target)
        choices[output] = Choice(read, kernel, tile, kernel.lower(read, lowering.target, tile), reason)
    return replace(lowering, choices=choices, refused=refused)


def _with_zeros(region: Region) -> Region:
    """A region of a sparse weight, with the dense one in its place."""
    return replace(region, weight=replace(region.weight, dense=region.weight.decoded(), sparse=None))


def _faster(region: Region, kernel: Kernel, lowering: Lowering) -> tuple[Region, Kernel, str]:
    """A region with a sparse weight and its kernel or, where these are timed and slower, with a dense one, and why."""
    target, times = lowering.target, lowering.tuner.times
    if not unsure(region, target):
        return region, kernel, ""
    dense = _with_zeros(region)
    other, _ = first_kernel(dense, target)
    if other is None:
        return region, kernel, ""
    sparse_us, dense_us = (1e6 * min(times(k, r, target).values()) for k, r in ((kernel, region), (other, dense)))
    if dense_us > FASTER * sparse_us:
        return region, kernel, ""
    found = f"{other.name} takes {dense_us:.1f} us, {kernel.name} {sparse_us:.1f}"
    return dense, other, f"weight decoded at build time: {found}"


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
