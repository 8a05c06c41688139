"""Regions for kernel tests, made from numbers alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import tvm
from emulated import run_emulated

from mcc import ops
from mcc.backends.cpu.microkernel import compiled_kernel
from mcc.backends.kernel import Activation, EpilogueStep, Kernel, QuantizedInput, Region, SparseArrays, StoredWeight
from mcc.target import Target, missing_features, parse_target

TARGETS = [t for t in map(parse_target, ("cpu:avx2", "cpu:avx512", "cpu:avx512vnni")) if not missing_features(t)]
OFF_STEPS = 40.7  # numbers over this, and codes times the scales of the cases, never lie halfway between two codes
NEON = parse_target("cpu:neon")


class Symbolic:
    """Stands for a dim that is read at run time; `hint` is its value in the example inputs, as torch.SymInt has it."""

    def __init__(self, hint: int = 8) -> None:
        self.node = SimpleNamespace(hint=hint)


@dataclass
class Value:
    """What a kernel asks of a node."""

    shape: tuple[Any, ...] = ()
    op: ops.Op | None = None
    arguments: tuple[Any, ...] = ()

    def argument(self, position: int, default: Any = None) -> Any:
        return self.arguments[position] if position < len(self.arguments) else default


def make_weight(
    shape: tuple[int, ...], dtype: str, seed: int, limit: int = 127, density: float | None = None,
    block: tuple[int, int] = (1, 1),
) -> StoredWeight:  # fmt: skip
    random = np.random.default_rng(seed)
    weight = (random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    scale = None
    if dtype == "int8":
        scale = (np.abs(weight).reshape(shape[0], -1).max(1) / limit + 1e-6).astype(np.float32)
        weight = np.clip(np.rint(weight / scale.reshape(-1, *[1] * (len(shape) - 1))), -limit, limit).astype(np.int8)
    if density is None:
        return StoredWeight("w", shape, weight, None, scale)
    height, width = block
    rows = weight.reshape(shape[0] // height, height, -1, width).swapaxes(1, 2)
    mask = random.random(rows.shape[:2]) < density
    row_pointers = np.concatenate([[0], mask.sum(1).cumsum()]).astype(np.int32)
    columns = np.nonzero(mask)[1].astype(np.uint16)
    return StoredWeight("w", shape, None, SparseArrays(rows[mask].reshape(-1), columns, row_pointers, block), scale)


def make_grouped_weight(shape: tuple[int, int], bits: int, groups: int, seed: int, zeros: str = "none") -> StoredWeight:
    """Codes over their whole range, with float16 scales that group by group are far apart; zero points as `zeros` says."""
    random = np.random.default_rng(seed)
    low = -(1 << (bits - 1))
    codes = random.integers(low, -low, shape).astype(np.int8)
    scale = (random.uniform(0.01, 1.0, (shape[0], groups)) / np.sqrt(shape[1] << bits)).astype(np.float16)
    points = {
        "none": None, "affine": random.integers(low, -low, scale.shape).astype(np.int8),
        "halves": np.full(scale.shape, -0.5, np.float16),
    }  # fmt: skip
    return StoredWeight("w", shape, codes, None, scale, points[zeros], bits)


def make_table_weight(shape: tuple[int, int], bits: int, groups: int, seed: int, span: int) -> StoredWeight:
    """Codes of a table of any numbers, each for `span` inputs."""
    random = np.random.default_rng(seed)
    codes = make_grouped_weight((shape[0], shape[1] // span), bits, groups, seed)
    table = random.standard_normal((1 << bits, span)).astype(np.float32)
    return dataclasses.replace(codes, shape=shape, table=table)


def make_region(
    op: ops.Op, source: tuple[Any, ...], weight: StoredWeight, epilogue: tuple[EpilogueStep, ...] = (),
    activation: QuantizedInput | None = None, options: tuple[Any, ...] = (), bias: bool = True,
    before: ops.Op | None = None,
) -> Region:  # fmt: skip
    values = np.random.default_rng(7).standard_normal(weight.shape[0]).astype(np.float32) if bias else None
    anchor = Value(op=op, arguments=(None, None, None, *options))
    return Region(anchor, Value(source, before), Value(), weight, values, activation, epilogue)  # type: ignore[arg-type]


def run_kernel(
    kernel: Kernel, region: Region, target: Target, tile: str, sources: list[np.ndarray]
) -> list[np.ndarray]:
    """Compile a kernel and run it on each source."""
    lowered = kernel.lower(region, target, tile)
    calls = []
    for source in sources:
        operands = make_operands(kernel, region, source)
        out = np.full(kernel.reference(region, source, operands).shape, 77, region.output_dtype)
        calls.append([np.ascontiguousarray(a) for a in (source, *operands, *lowered.packed.values(), out)])
    return run_function(lowered.function, target, calls)


def run_function(function: tvm.tirx.PrimFunc, target: Target, calls: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Compile a kernel's function and call it with each list of arguments; the last of them is the output, returned."""
    if missing_features(target):
        return run_emulated(function, target, calls)
    module = compiled_kernel(function, target)
    results = []
    for call in calls:
        arguments = [tvm.runtime.tensor(a, tvm.cpu()) for a in call]
        module[function.attrs["global_symbol"]](*arguments)
        results.append(arguments[-1].numpy())
    return results


def make_operands(kernel: Kernel, region: Region, source: np.ndarray) -> list[np.ndarray]:
    """What the epilogue adds."""
    shape = kernel.reference(dataclasses.replace(region, epilogue=()), source).shape
    drawn = [
        np.random.default_rng(11 + k).integers(0, 256, shape).astype(kind) / (OFF_STEPS if kind == "float32" else 1)
        for k, kind in enumerate(region.operand_dtypes)
    ]
    return [a.astype(kind) for a, kind in zip(drawn, region.operand_dtypes, strict=True)]


def make_source(shape: tuple[int, ...], region: Region, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    if region.source_dtype == "float32":
        values = random.standard_normal(shape).astype(np.float32)
        return np.maximum(values, 0) if region.source.op is ops.RELU else values
    return random.integers(0, 256, shape).astype(np.uint8)


def assert_kernel_equals_reference(
    kernel: Kernel, region: Region, target: Target, tile: str, shapes: list[tuple[int, ...]]
) -> None:
    """Float results within rounding of float64; codes within the one step that a rounding epilogue may flip.

    Rescaled integers are equal.
    """
    sources = [make_source(shape, region, k) for k, shape in enumerate(shapes)]
    for source, found in zip(sources, run_kernel(kernel, region, target, tile, sources), strict=True):
        expected = kernel.reference(region, source, make_operands(kernel, region, source))
        assert found.shape == expected.shape
        if region.rescale is not None:
            np.testing.assert_array_equal(found, expected)
            continue
        apart = np.abs(found.astype(np.float64) - expected.astype(np.float64))
        if region.output_dtype == "uint8":
            assert apart.max(initial=0) <= 1
            if (
                region.anchor.op is ops.CONV2D
            ):  # the pixels of an output that has no weights are equal: they flip as one
                alike = (expected == expected[..., :1, :1]).all((2, 3))
                apart = np.concatenate([apart[~alike].reshape(-1), apart[alike][:, 0, 0]])
            # a gelu of 2e-4 error (`vector_math.gelu_to_codes`) flips up to 0.7 percent of codes, of few by chance more
            chance = 5 * np.sqrt(0.01 * apart.size) if Activation("gelu") in region.epilogue else 0
            assert (apart > 0).sum() <= max(2, 0.01 * apart.size + chance)
        else:
            assert apart.max(initial=0) <= 1e-5 * max(np.abs(expected).max(initial=1), 1)
