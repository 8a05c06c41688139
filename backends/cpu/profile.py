"""Where a model's time goes: every kernel call timed on its own, beside what the machine can reach."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
import tvm.tirx.script.builder.ir as B
from tvm import relax
from tvm.script import tirx as T

from mcc.backends.cpu.build import compile_module
from mcc.backends.cpu.kernels.bfloat16 import PAIR, multiplying
from mcc.backends.cpu.kernels.tile_registers import MOST_WORDS, PAIR_OF_TILES, TILE_ROWS, TileRegisters
from mcc.backends.cpu.microkernel import (
    Expression,
    Parameter,
    Vectors,
    compiled_kernel,
    kernel_function,
    serial,
    tvm_target,
)
from mcc.memory import workspace_arrays
from mcc.target import host_target
from mcc.tvm_runtime import use_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mcc.backends.cpu.lowering import Lowering
    from mcc.report import LayerRow
    from mcc.target import Target

CHAINS = 12  # accumulators that hide the latency of a multiply-add on every CPU we know
STEPS = 20_000
KNOWN_TO = 0.05  # how well what being asked costs is known, relative: no call is said to take less
INTEGER_KERNELS = (
    "dense_int8", "dense_per_token", "low_bit_per_token", "conv2d_int8", "depthwise_int8", "sparse_codes",
    "sparse_per_token",
)  # fmt: skip
BFLOAT16_KERNELS = ("dense_bf16", "conv2d_bf16")
_BOOKKEEPING = "vm.builtin."


@dataclass(frozen=True)
class KernelTime:
    """One call of a kernel.

    Attributes:
        layer: the module it runs, or empty where it runs none with weights.
        op: what it computes.
        kernel: family and tile, or the name of a function of the op library.
        milliseconds: least of all runs.
        macs: multiply-accumulates; 0 where they are not counted.
        percent_of_peak: of the multiply-accumulates that one core was measured to reach on this element type, times the
            threads; None where there are no macs.
    """

    layer: str
    op: str
    kernel: str
    milliseconds: float
    macs: int
    percent_of_peak: float | None


class Profiler:
    """Times every call of an emitted model's kernels, in order.

    Args:
        lowering: through all stages but `build`.
        inputs: flattened.
    """

    def __init__(self, lowering: Lowering, inputs: Sequence[NDArray[Any]]) -> None:
        self._lowering = lowering
        executable, memory = compile_module(lowering, "bytecode")
        self._machine = relax.VirtualMachine(executable, tvm.cpu())
        weights = [tvm.runtime.tensor(np.ascontiguousarray(w)) for w in lowering.weights.values()]
        workspace = [tvm.runtime.from_dlpack(x) for x in workspace_arrays(memory.workspace)]
        self._arguments = [*(tvm.runtime.tensor(x) for x in inputs), *map(tvm.runtime.convert, (weights, workspace))]
        kinds = ("float32", "int8", *(["bfloat16"] if lowering.target.bfloat16 else []))
        self._peaks = {kind: peak(lowering.target, kind) for kind in kinds}

    def measure(self, runs: int, threads: int = 1) -> list[KernelTime]:
        """The least time of `runs` of every call, kernels using `threads`."""
        use_threads(threads)
        calls = _timed(self._machine, self._arguments, runs)
        asking = _cost_of_asking({call.arguments for call in calls}, runs)
        costs = [asking[call.arguments] for call in calls]
        times = [(c.name, max(c.milliseconds - cost, KNOWN_TO * cost)) for c, cost in zip(calls, costs, strict=True)]
        peaks = {kind: threads * reached for kind, reached in self._peaks.items()}
        return _rows(times, self._lowering, peaks)


@dataclass(frozen=True)
class _Call:
    name: str
    arguments: int
    milliseconds: float


def _timed(machine: relax.VirtualMachine, inputs: Sequence[Any], runs: int) -> list[_Call]:
    """The least time of `runs` of every call of a kernel, that of being asked included."""
    calls: list[_Call] = []
    started = 0.0

    def instrument(function: object, name: str, before: bool, result: object, *rest: object) -> None:  # noqa: FBT001
        nonlocal started
        del function, result
        if before:
            started = time.perf_counter()
        elif not name.startswith(_BOOKKEEPING):
            calls.append(_Call(name, len(rest), (time.perf_counter() - started) * 1e3))

    machine.set_instrument(instrument)
    best: list[_Call] = []
    for _ in range(runs):
        calls.clear()
        machine["main"](*inputs)
        best = [min(pair, key=lambda c: c.milliseconds) for pair in zip(calls, best or calls, strict=True)]
    return best


def _cost_of_asking(counts: set[int], runs: int) -> dict[int, float]:
    """Milliseconds that a call of a kernel with so many arguments takes to time if the kernel does nothing."""
    builder = relax.BlockBuilder()
    value = relax.Var("x", relax.TensorType((1,), "float32"))
    with builder.function("main", [value]):
        result: Any = value
        for count in sorted(counts):
            name = f"nothing{count}"
            parameters = [Parameter(f"p{i}", (1,), "float32") for i in range(count)]
            function = builder.add_func(kernel_function(name, parameters, lambda *_: B.evaluate(0)), name)
            result = builder.emit(relax.call_tir(function, [value] * (count - 1), relax.TensorType((1,), "float32")))
        builder.emit_func_output(result)
    executable = relax.build(builder.get(), tvm_target(host_target()), exec_mode="bytecode")
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return {c.arguments: c.milliseconds for c in _timed(machine, [tvm.runtime.tensor(np.zeros(1, "float32"))], runs)}


def _rows(calls: list[tuple[str, float]], lowering: Lowering, peaks: dict[str, float]) -> list[KernelTime]:
    """Match calls with the layers that have own kernels: both are in the order of the graph."""
    own = iter(row for row in lowering.layers if row.kernel != "op library")
    families = tuple({row.kernel.split()[0] for row in lowering.layers if row.kernel != "op library"})
    rows = []
    for name, milliseconds in calls:
        layer = next(own) if name.startswith(families) else None
        rows.append(_row(layer, name, milliseconds, peaks))
    return rows


def _row(layer: LayerRow | None, name: str, milliseconds: float, peaks: dict[str, float]) -> KernelTime:
    if layer is None:
        return KernelTime("", name, "op library", milliseconds, 0, None)
    # sparse codes are summed in float, and those of depthwise layers where only that is exact
    kind = "int8" if layer.kernel.startswith(INTEGER_KERNELS) else "float32"
    kind = "bfloat16" if layer.kernel.startswith(BFLOAT16_KERNELS) else kind
    percent = 100 * layer.macs / (milliseconds * 1e-3) / peaks[kind] if layer.macs and milliseconds else None
    return KernelTime(layer.layer, layer.op, layer.kernel, milliseconds, layer.macs, percent)


def peak(target: Target, kind: str) -> float:
    """Multiply-accumulates a second of one core, from registers, by the best instruction that the target has.

    Those are float32's, `dot4` for int8, `dot2` for bfloat16, and tile registers for both where there are any.
    """
    v = Vectors(target)
    if target.tiles and kind != "float32":
        return _tiles_peak(v, kind)
    dtype, products = {"float32": ("float32", 1), "int8": ("int32", 4), "bfloat16": ("float32", PAIR)}[kind]

    def body(x: Expression, y: Expression) -> None:
        (sums,) = v.registers(1, CHAINS, dtype)
        for register in sums:
            register.set(v.load(x, 0))
        a, b = B.Bind(v.load(x, v.lanes)), B.Bind(v.load(x, 2 * v.lanes))
        x_words, b_words = (T.reinterpret(f"int32x{v.lanes}", part) for part in (a, b))

        def multiplied(total: Expression) -> Expression:
            if kind == "bfloat16":
                return v.dot2(total, x_words, b_words)
            # codes from the sum itself: of two that stay the same the product would be taken once
            return v.fma(a, b, total) if kind == "float32" else v.dot4(total, total, b, bounded=True)

        with multiplying() if kind == "bfloat16" else nullcontext(), B.serial(0, STEPS):
            for register in sums:
                register.set(multiplied(register.get()))
        for i, register in enumerate(sums):
            v.store(y, i * v.lanes, register.get())

    function = kernel_function(
        "peak", [Parameter("X", (3 * v.lanes,), dtype), Parameter("Y", (CHAINS * v.lanes,), dtype)], body
    )
    seconds = _least_seconds(function, target, [np.zeros(n * v.lanes, dtype) for n in (3, CHAINS)])
    return STEPS * CHAINS * v.lanes * products / seconds


def _tiles_peak(v: Vectors, kind: str) -> float:
    products, dtype = {"int8": (4, "int32"), "bfloat16": (PAIR, "float32")}[kind]
    registers = TileRegisters(v, dtype, TILE_ROWS, MOST_WORDS)

    def body(y: Expression) -> None:
        registers.shared(serial)(1, lambda _: serial(STEPS, lambda _: registers.multiply_held()))
        B.buffer_store(y, T.float32(0), [0])

    function = kernel_function("peak", [Parameter("Y", (1,), "float32")], body)
    seconds = _least_seconds(function, v.target, [np.zeros(1, "float32")])
    return STEPS * PAIR_OF_TILES**2 * TILE_ROWS**2 * MOST_WORDS * products / seconds


def _least_seconds(function: tvm.tirx.PrimFunc, target: Target, arrays: Sequence[NDArray[Any]]) -> float:
    timer = compiled_kernel(function, target).time_evaluator("peak", tvm.cpu(), number=3, repeat=5)
    return float(min(timer(*(tvm.runtime.tensor(a, tvm.cpu()) for a in arrays)).results))
