"""Targets: what a machine can do, in words that the artifact records and the loader checks.

This file is loaded by deployed programs: it imports the standard library alone.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from mcc.errors import TargetError

Isa = Literal["avx2", "avx512", "avx512vnni"]

_V3 = ("abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
_V4 = (*_V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")
_FEATURES: dict[Isa, tuple[str, ...]] = {
    "avx2": _V3,
    "avx512": _V4,
    "avx512vnni": (*_V4, "avx512_vnni"),
}


@dataclass(frozen=True)
class Target:
    """A CPU target.

    Attributes:
        isa: the vector instruction set kernels are generated for.
    """

    isa: Isa

    @property
    def features(self) -> tuple[str, ...]:
        """The CPU flags, as Linux names them, that code for this target needs."""
        return _FEATURES[self.isa]

    @property
    def llvm_cpu(self) -> str:
        """The `mcpu` that gives LLVM these features (VNNI apart) and no more."""
        return "x86-64-v3" if self.isa == "avx2" else "x86-64-v4"

    @property
    def llvm_attributes(self) -> tuple[str, ...]:
        """The `mattr` that go with `llvm_cpu`; 512-bit vectors are asked for, which LLVM shuns by default."""
        if self.isa == "avx2":
            return ()
        return ("-prefer-256-bit", "+avx512vnni") if self.isa == "avx512vnni" else ("-prefer-256-bit",)

    @property
    def vector_lanes(self) -> int:
        """32-bit lanes of one vector register."""
        return 8 if self.isa == "avx2" else 16

    @property
    def vector_registers(self) -> int:
        """Vector registers a kernel may hold values in."""
        return 16 if self.isa == "avx2" else 32

    @property
    def int8_weight_limit(self) -> int:
        """The largest |code| of an int8 weight for which the fast int8 kernel is exact.

        Without VNNI one `vpmaddubsw` adds two products of unsigned activation codes (up to 255) and weight
        codes in 16 bits, so two neighbours must satisfy |w0| + |w1| <= 128.
        """
        return 127 if self.isa == "avx512vnni" else 63

    def __str__(self) -> str:
        return f"cpu:{self.isa}"


@cache
def host_features() -> frozenset[str]:
    """The CPU flags of this machine; empty where they cannot be read."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def missing_features(target: Target) -> tuple[str, ...]:
    """The features of `target` this machine lacks, sorted."""
    return tuple(sorted(set(target.features) - host_features()))


def host_target() -> Target:
    """The best target this machine can run.

    Raises:
        TargetError: the CPU is not an x86-64 with AVX2 and FMA.
    """
    for isa in ("avx512vnni", "avx512", "avx2"):
        target = Target(isa)
        if not missing_features(target):
            return target
    raise TargetError(
        f"this CPU lacks {', '.join(missing_features(Target('avx2')))}, which every CPU kernel needs",
        remedy="run on an x86-64 machine with AVX2 and FMA",
    )


def parse_target(text: str) -> Target:
    """Read "cpu" (this machine) or "cpu:avx2", "cpu:avx512", "cpu:avx512vnni".

    Raises:
        TargetError: no such target.
    """
    kind, _, isa = text.partition(":")
    if kind == "cpu" and not isa:
        return host_target()
    for known in _FEATURES:
        if kind == "cpu" and isa == known:
            return Target(known)
    raise TargetError(f"unknown target {text!r}", remedy=f"use one of {', '.join(target_names())}")


def target_names() -> tuple[str, ...]:
    """Every text `parse_target` takes."""
    return ("cpu", *(f"cpu:{isa}" for isa in _FEATURES))
