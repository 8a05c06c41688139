"""Timing a kernel on this machine."""

from __future__ import annotations

import time
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm

from mcc.backends.cpu.microkernel import compiled_kernel
from mcc.ops import extent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from mcc.backends.kernel import Lowered, Region
    from mcc.target import Target

REPEATS = 3
MANY_BYTES = 256 << 10  # of weights: in a network, other layers have taken their place in the near caches
APART_BYTES = 16 << 20  # of copies of such weights that take turns, more than a near cache holds


def measure(lowered: Lowered, region: Region, target: Target) -> Callable[[], float]:
    """What times a few calls, the least seconds of one, on random data of the example's shapes.

    Where there are many weights, each call reads a copy that the near caches do not hold; what a layer reads and writes
    besides, they do.
    """
    module = compiled_kernel(lowered.function, target)
    random = np.random.default_rng(0)
    source_shape = tuple(extent(s) for s in region.source.shape)
    if region.source_dtype == "float32":
        source = random.standard_normal(source_shape).astype(np.float32)
    else:
        source = random.integers(0, 256, source_shape).astype(np.uint8)
    result = np.zeros(tuple(extent(s) for s in region.output.shape), region.output_dtype)
    operands = [random.integers(0, 256, result.shape).astype(kind) for kind in region.operand_dtypes]
    first, last = [_tensor(a) for a in (source, *operands)], _tensor(result)
    name, packed = str(lowered.function.attrs["global_symbol"]), tuple(lowered.packed.values())
    size = sum(a.nbytes for a in packed)
    if size < MANY_BYTES:
        timer = module.time_evaluator(name, tvm.cpu(), number=1, repeat=REPEATS, min_repeat_ms=1)
        arguments = [*first, *map(_tensor, packed), last]
        return lambda: float(min(timer(*arguments).results))
    function = module[name]
    turns = cycle([[*first, *map(_tensor, packed), last] for _ in range(1 + -(-APART_BYTES // size))])
    return lambda: min(_seconds(function, next(turns)) for _ in range(REPEATS))


def _tensor(array: NDArray[Any]) -> Any:
    return tvm.runtime.tensor(array, tvm.cpu())


def _seconds(function: Callable[..., object], arguments: Sequence[Any]) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started
