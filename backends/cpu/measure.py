"""Timing a kernel on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import tvm

from mcc.backends.cpu.microkernel import compiled_kernel
from mcc.ops import extent

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcc.backends.kernel import Lowered, Region
    from mcc.target import Target

REPEATS = 3
MANY_BYTES = 256 << 10  # of weights: in a network, other layers have taken their place in the near caches
ALL_BUT_SOURCE = "cache_flush_cpu_non_first_arg"


def measure(lowered: Lowered, region: Region, target: Target) -> Callable[[], float]:
    """What times a few calls, the least seconds of one, on random data of the example's shapes.

    Where there are many weights, all but the source is read from memory.
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
    arguments = [tvm.runtime.tensor(a, tvm.cpu()) for a in (source, *operands, *lowered.packed.values(), result)]
    name = str(lowered.function.attrs["global_symbol"])
    if sum(a.nbytes for a in lowered.packed.values()) < MANY_BYTES:
        timer = module.time_evaluator(name, tvm.cpu(), number=1, repeat=REPEATS, min_repeat_ms=1)
    else:
        timer = module.time_evaluator(name, tvm.cpu(), number=1, repeat=REPEATS, f_preproc=ALL_BUT_SOURCE)
    return lambda: float(min(timer(*arguments).results))
