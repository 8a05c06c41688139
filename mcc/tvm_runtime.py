"""TVM's runtime library, found without importing TVM's package, and the threads its kernels use."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

from mcc.errors import TargetError

_SHARE_LISTED_CORES = -3
_IMPORT = threading.Lock()


@cache
def tvm_ffi_module() -> Any:
    """The tvm_ffi module with TVM's runtime library behind it.

    tvm_ffi imports torch where it is installed (231 MB instead of 45); hiding it for the moment of import avoids that.
    """
    with _IMPORT:
        hidden = "torch" not in sys.modules
        if hidden:
            sys.modules["torch"] = None  # type: ignore[assignment]  # None makes an import of it fail
        try:
            import tvm_ffi
        finally:
            if hidden:
                sys.modules.pop("torch", None)
    return tvm_ffi, load_runtime("tvm_runtime")


@cache
def load_runtime(name: str) -> ctypes.CDLL:
    """One of TVM's libraries.

    Raises:
        TargetError: TVM is not installed.
    """
    spec = importlib.util.find_spec("tvm")  # finds the package's folder without running the package
    if spec is None or spec.origin is None:
        raise TargetError("TVM's runtime library is not installed", remedy="pip install apache-tvm==0.27.0.post1")
    return ctypes.CDLL(str(Path(spec.origin).parent / "lib" / f"lib{name}.so"), ctypes.RTLD_GLOBAL)


class _Caller(threading.local):
    """What each calling thread has set.

    Attributes:
        count: of the threads that kernels use; none before the first call.
    """

    count = 0


class Threads:
    """How many threads kernels use, for each calling thread: TVM keeps a pool for every one of them.

    A pool must be made with all the cores it may ever use, and without the binding to cores that TVM does by default
    (it would narrow the caller's affinity). With one thread no pool is made at all.
    """

    def __init__(self) -> None:
        ffi, library = tvm_ffi_module()
        self._configure = ffi.get_global_func("runtime.config_threadpool")
        self._limit = library._ZN3tvm7runtime9threading17SetMaxConcurrencyEi
        self._limit.argtypes, self._limit.restype = [ctypes.c_int], None
        self._array = ffi.Array
        self._caller = _Caller()
        self._forked = False
        os.register_at_fork(after_in_child=self._after_fork)

    def use(self, count: int) -> None:
        """Let kernels called from this thread use `count` threads."""
        if self._caller.count != count:
            self._change(count)

    def _change(self, count: int) -> None:
        cores = sorted(os.sched_getaffinity(0))
        if count == 1 or len(cores) == 1 or self._forked:
            self._limit(1)
        else:
            self._limit(len(cores))
            self._configure(_SHARE_LISTED_CORES, min(count, len(cores)), self._array([str(c) for c in cores]))
        self._caller.count = count

    def _after_fork(self) -> None:
        # the pool's threads do not survive a fork: waiting for them would hang
        self._forked = True
        self._caller.count = 0


def use_threads(count: int) -> None:
    """Let kernels called from this thread use `count` threads."""
    pool().use(count)


@cache
def pool() -> Threads:
    """Those of this process."""
    return Threads()
