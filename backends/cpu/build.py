"""Stage 8: compile the relax module to a shared object."""

from __future__ import annotations

import platform
import subprocess
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tvm
from tvm import relax, s_tir, tirx

from mcc.backends.cpu.direct import direct_functions
from mcc.backends.cpu.memory_plan import MemoryPlan, plan_memory
from mcc.backends.cpu.microkernel import NOT_FOR_KERNELS, OPAQUE, tvm_target
from mcc.backends.relax.schedule import schedule_module
from mcc.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcc.backends.cpu.lowering import Lowering

_R = relax.transform
_BEFORE_SCHEDULE = (
    relax.backend.DispatchSampling, relax.backend.DispatchSortScan, _R.LegalizeOps, _R.AnnotateTIROpPattern,
    _R.FoldConstant, _R.FuseOps, _R.FuseTIR,
)  # fmt: skip
_BEFORE_PLAN = (
    _R.RewriteDataflowReshape, _R.ToNonDataflow, _R.RemovePurityChecking, _R.CallTIRRewrite, _R.StaticPlanBlockMemory,
)  # fmt: skip
_AFTER_PLAN = (
    _R.LowerAllocTensor, _R.KillAfterLastUse, _R.LowerRuntimeBuiltin, _R.ComputePrimValue,
    _R.VMShapeLower,
)  # fmt: skip
_BEFORE_COMPACTION = (
    s_tir.transform.LowerInitBlock, s_tir.transform.PlanAndUpdateBufferAllocationLocation,
    s_tir.transform.ConvertBlocksToOpaque,
)  # fmt: skip
# Kernels are called by the compiled main function alone, which checks what it is given: their own checks of every
# argument would be half of a small artifact.
_CONFIG = {"tirx.disable_assert": True}
# as machine code a call costs 0.2 us less, but LLVM's time grows with the square of them: two minutes for 1,900
MOST_COMPILED = 800
_LINK_FLAGS = ("-shared", "-s", "-Wl,--gc-sections,--build-id=none,-z,noseparate-code,--hash-style=gnu")


def build(lowering: Lowering) -> Lowering:
    """Schedule what is not a kernel, compile, and link with the machine's C compiler.

    Raises:
        BackendError: TVM or the linker refuses.
    """
    calls = sum(len(block.bindings) for block in lowering.module["main"].body.blocks)
    executable, memory = compile_module(lowering, "compiled" if calls <= MOST_COMPILED else "bytecode")
    try:
        with tempfile.TemporaryDirectory(prefix="mcc-") as folder:
            path = Path(folder) / "library.so"
            executable.export_library(str(path), fcompile=partial(_link, lowering.target.machine))
            return replace(lowering, library=path.read_bytes(), memory=memory)
    except (RuntimeError, OSError) as error:
        raise _failure(error) from error


def compile_module(lowering: Lowering, mode: Literal["compiled", "bytecode"]) -> tuple[Any, MemoryPlan]:
    """The relax executable, its main function as machine code or as bytecode, which can be profiled; and its memory.

    Raises:
        BackendError: TVM refuses.
    """
    target = tvm_target(lowering.target)
    plans: list[MemoryPlan] = []

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]  # TVM has no types
    def lower(module: Any, context: object) -> Any:
        del context
        with target:
            for stage in _BEFORE_SCHEDULE:
                module = stage()(module)
            module = _compacted(schedule_module(module))
            for stage in _BEFORE_PLAN:
                module = stage()(module)
            module, plan = plan_memory(module)
            for function in direct_functions(module) if mode == "compiled" else ():
                module[function.attrs["global_symbol"]] = function
            plans.append(plan)
            for stage in _AFTER_PLAN:
                module = stage()(module)
            return _R.AttachGlobalSymbol()(_mend_shape_functions(module))

    try:
        with tvm.transform.PassContext(config=_CONFIG, disabled_pass=NOT_FOR_KERNELS):
            return relax.build(lowering.module, target, relax_pipeline=lower, exec_mode=mode), plans[-1]
    except (RuntimeError, ValueError, TypeError) as error:
        raise _failure(error) from error


def _compacted(module: tvm.IRModule) -> tvm.IRModule:
    """Cut the buffers of the op library's functions to what is used; kernels are left alone."""
    library = {
        name: function
        for name, function in module.functions.items()
        if isinstance(function, tirx.PrimFunc) and int(function.attrs.get("op_pattern", 0)) != OPAQUE
    }
    compacted = tvm.IRModule(library)
    for step in _BEFORE_COMPACTION:
        compacted = step()(compacted)
    # called by itself a pass runs also where it is disabled
    compacted = s_tir.transform.CompactBufferAllocation()(compacted)
    for name, function in compacted.functions.items():
        module[module.get_global_var(name.name_hint)] = function
    return module


def _failure(error: Exception) -> BackendError:
    # TVM's messages end in a drawing of where in the script it was
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^~|")]
    return BackendError(
        f"TVM could not compile the model: {lines[-1] if lines else repr(error)}",
        remedy="please report this with the model",
    )


def _mend_shape_functions(module: tvm.IRModule) -> tvm.IRModule:
    """Make shape functions deterministic, and like all others free of aliases.

    TVM emits their stores in the order of memory addresses, which varies from run to run. And whether the last function
    of a module may have aliasing arguments decides for all of them: with a shape function last, kernels write their
    accumulators to memory at every step (2.4 times slower, measured).
    """
    for name, function in list(module.functions.items()):
        if not isinstance(function, tirx.PrimFunc) or not name.name_hint.startswith("shape_func"):
            continue
        body = function.body
        if isinstance(body, tirx.SeqStmt) and all(isinstance(s, tirx.BufferStore) for s in body.seq):
            body = tirx.SeqStmt(sorted(body.seq, key=lambda s: int(s.indices[0])))
        module[name] = function.with_body(body).with_attr("tirx.noalias", True)
    return module


def _link(
    machine: str, output: str, objects: Sequence[str], options: Sequence[str] | None = None, **ignored: object
) -> None:
    del options, ignored
    compiler = "cc" if machine == platform.machine() else f"{machine}-linux-gnu-gcc"
    command = [compiler, *_LINK_FLAGS, "-o", output, *objects, "-lm"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        package = "gcc or clang" if compiler == "cc" else f"gcc-{machine.replace('_', '-')}-linux-gnu"
        raise BackendError(f"there is no C compiler `{compiler}` to link with", remedy=f"install {package}") from error
    if done.returncode:
        raise BackendError(f"linking failed: {done.stderr.strip().splitlines()[-1]}")
