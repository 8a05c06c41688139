"""Runs kernels for ARM under qemu-user, where a cross compiler and it are installed."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import tvm

from mcc.backends.cpu.microkernel import compiled_kernel
from mcc.target import Target

COMPILER = shutil.which("aarch64-linux-gnu-gcc")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
CPU = "neoverse-n1"  # has dot products and nothing later: an instruction too new ends the program
_TYPE_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}  # of DLPack
_DRIVER = Path(__file__).with_name("run_kernel.c")


def run_emulated(function: tvm.tirx.PrimFunc, target: Target, calls: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Compile a kernel and call it with each list of arguments; the last of them is the output, returned."""
    assert COMPILER is not None
    assert EMULATOR is not None
    module = compiled_kernel(function, target)
    symbol = f"-DKERNEL=__tvm_ffi_{function.attrs['global_symbol']}"
    with tempfile.TemporaryDirectory(prefix="mcc-emulated-") as name:
        folder = Path(name)
        module.write_to_file(str(folder / "kernel.o"))
        program = str(folder / "run")
        _run(COMPILER, "-O2", "-static", symbol, str(_DRIVER), str(folder / "kernel.o"), "-o", program, "-lm")
        results = []
        for arguments in calls:
            (folder / "arguments").write_bytes(_packed(arguments))
            _run(EMULATOR, "-cpu", CPU, program, str(folder / "arguments"), str(folder / "result"))
            out = arguments[-1]
            results.append(np.fromfile(folder / "result", out.dtype).reshape(out.shape))
    return results


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[0]}: status {done.returncode}, {done.stderr}"


def _packed(arrays: list[np.ndarray]) -> bytes:
    parts = [np.int32(len(arrays)).tobytes()]
    for a in arrays:
        head = [_TYPE_CODES[a.dtype.kind], 8 * a.dtype.itemsize, a.ndim]
        parts += [np.array(head, np.int32).tobytes(), np.array(a.shape, np.int64).tobytes(), a.tobytes()]
    return b"".join(parts)
