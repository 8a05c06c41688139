"""Targets: what a machine can do, in words that the artifact records and the loader checks.

This file is loaded by deployed programs: it imports the standard library alone.
"""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from mcc.errors import TargetError

Isa = Literal["avx2", "avx512", "avx512vnni", "avx512vbmi", "avx512bf16", "amx", "neon"]

_V3 = ("abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
_V4 = (*_V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")
_VBMI = (*_V4, "avx512_vnni", "avx512vbmi")
_BFLOAT16 = (*_VBMI, "avx512_bf16")
_TILES = ("amx_bf16", "amx_int8", "amx_tile")


@dataclass(frozen=True)
class _InstructionSet:
    features: tuple[str, ...]
    machine: str
    cpu: str
    attributes: tuple[str, ...]
    lanes: int
    registers: int


# 512-bit vectors are asked for, which LLVM shuns by default
_WIDE = ("-prefer-256-bit",)
_WITH_VNNI = (*_WIDE, "+avx512vnni")
_WITH_VBMI = (*_WITH_VNNI, "+avx512vbmi")
_WITH_BFLOAT16 = (*_WITH_VBMI, "+avx512bf16")
_ISAS: dict[Isa, _InstructionSet] = {
    "avx2": _InstructionSet(_V3, "x86_64", "x86-64-v3", (), 8, 16),
    "avx512": _InstructionSet(_V4, "x86_64", "x86-64-v4", _WIDE, 16, 32),
    "avx512vnni": _InstructionSet((*_V4, "avx512_vnni"), "x86_64", "x86-64-v4", _WITH_VNNI, 16, 32),
    "avx512vbmi": _InstructionSet(_VBMI, "x86_64", "x86-64-v4", _WITH_VBMI, 16, 32),
    "avx512bf16": _InstructionSet(_BFLOAT16, "x86_64", "x86-64-v4", _WITH_BFLOAT16, 16, 32),
    "amx": _InstructionSet(
        (*_BFLOAT16, *_TILES),
        "x86_64",
        "x86-64-v4",
        (*_WITH_BFLOAT16, "+amx-tile", "+amx-int8", "+amx-bf16"),
        16,
        32,
    ),
    "neon": _InstructionSet(("asimd", "asimddp"), "aarch64", "generic", ("+v8.2a", "+dotprod"), 4, 32),
}
# bits of the two words in which Linux names an aarch64's features
_AARCH64 = {"asimd": (16, 1), "asimddp": (16, 20)}
# Linux saves the tile registers of those processes alone that ask for it
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _TILE_DATA = 158, 0x1023, 18


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
        return _ISAS[self.isa].features

    @property
    def machine(self) -> str:
        """The architecture, "x86_64" or "aarch64"."""
        return _ISAS[self.isa].machine

    @property
    def llvm_cpu(self) -> str:
        """The `mcpu` that gives LLVM these features (VNNI and dotprod apart) and no more."""
        return _ISAS[self.isa].cpu

    @property
    def llvm_attributes(self) -> tuple[str, ...]:
        """The `mattr` that go with `llvm_cpu`."""
        return _ISAS[self.isa].attributes

    @property
    def vector_lanes(self) -> int:
        """32-bit lanes of one vector register."""
        return _ISAS[self.isa].lanes

    @property
    def vector_registers(self) -> int:
        """Vector registers a kernel may hold values in."""
        return _ISAS[self.isa].registers

    @property
    def exact_dot4(self) -> bool:
        """Whether one instruction adds four products of bytes, and does not saturate between them."""
        return "avx512_vnni" in self.features or "asimddp" in self.features

    @property
    def picked_bytes(self) -> int:
        """Bytes among which one instruction picks each byte of a register; 0 on ARM, where that has not been timed."""
        return 64 if "avx512vbmi" in self.features else 16 if "avx2" in self.features else 0

    @property
    def bfloat16(self) -> bool:
        """Whether one instruction adds two products of bfloat16 to a float32."""
        return "avx512_bf16" in self.features

    @property
    def tiles(self) -> bool:
        """Whether it has tile registers, of 16 rows of 64 bytes, and instructions that multiply two of them."""
        return self.isa == "amx"

    @property
    def code_offset(self) -> int:
        """What that instruction needs taken from unsigned codes: 128 where it multiplies signed bytes alone."""
        return 128 if self.isa == "neon" else 0

    @property
    def int8_weight_limit(self) -> int:
        """The largest |code| of an int8 weight for which the fast int8 kernel is exact.

        Where that takes `vpmaddubsw`, which adds two products of unsigned activation codes (up to 255) and weight
        codes in 16 bits, two neighbours must satisfy |w0| + |w1| <= 128.
        """
        return 127 if self.exact_dot4 else 63

    def __str__(self) -> str:
        return f"cpu:{self.isa}"


@cache
def host_features() -> frozenset[str]:
    """The CPU flags of this machine; empty where they cannot be read.

    Those of tile registers are among them where the system lets this process use them, which it is asked for here.
    """
    if platform.machine() == "aarch64":
        words = {number: ctypes.CDLL(None).getauxval(number) for number, _ in _AARCH64.values()}
        return frozenset(name for name, (number, bit) in _AARCH64.items() if words[number] >> bit & 1)
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            flags = frozenset(line.partition(":")[2].split())
            return flags if flags.isdisjoint(_TILES) or _tiles_permitted() else flags.difference(_TILES)
    return frozenset()


def _tiles_permitted() -> bool:
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _TILE_DATA) == 0)


def missing_features(target: Target) -> tuple[str, ...]:
    """The features of `target` this machine lacks, sorted."""
    return tuple(sorted(set(target.features) - host_features()))


def host_target() -> Target:
    """The best target this machine can run.

    Raises:
        TargetError: the CPU is neither an x86-64 with AVX2 and FMA nor an aarch64 with dot products.
    """
    for isa in ("amx", "avx512vbmi", "avx512vnni", "avx512", "avx2", "neon"):
        target = Target(isa)
        if not missing_features(target):
            return target
    least = Target("neon" if platform.machine() == "aarch64" else "avx2")
    raise TargetError(
        f"this CPU lacks {', '.join(missing_features(least))}, which every CPU kernel needs",
        remedy="run on an x86-64 machine with AVX2 and FMA, or on an aarch64 with asimddp",
    )


def parse_target(text: str) -> Target:
    """Read "cpu" (this machine) or "cpu:" and an instruction set, as `target_names` has them.

    Raises:
        TargetError: no such target.
    """
    kind, _, isa = text.partition(":")
    if kind == "cpu" and not isa:
        return host_target()
    for known in _ISAS:
        if kind == "cpu" and isa == known:
            return Target(known)
    raise TargetError(f"unknown target {text!r}", remedy=f"use one of {', '.join(target_names())}")


def target_names() -> tuple[str, ...]:
    """Every text `parse_target` takes."""
    return ("cpu", *(f"cpu:{isa}" for isa in _ISAS))
