"""Every kernel family on random regions, against NumPy: a few on each commit, two thousand in CI, some for ARM."""

from __future__ import annotations

import pytest
from cases import FAMILIES, cases
from emulated import COMPILER, EMULATOR
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from regions import NEON, TARGETS, assert_kernel_equals_reference

from mcc.target import missing_features, parse_target

# each example is compiled: shrinking one would take minutes; a fixed choice keeps CI's verdict its own
COMPILED = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": (Phase.explicit, Phase.generate)}
PARTS, CASES_A_PART = 8, 250
# those that are quick to compile, and have the most shapes, more often
OFTEN = {"conv2d": 4, "depthwise": 4, "sparse": 4, "low_bit": 1}
WITH_VBMI = [t for t in (parse_target("cpu:avx512vbmi"),) if not missing_features(t)]
WIDE = [t for t in TARGETS if t.vector_lanes == 16]
ON_FEW_TARGETS = {"sparse_rows": WIDE}
HERE = [family for family in FAMILIES if ON_FEW_TARGETS.get(family, TARGETS)]
WEIGHED = [family for family in HERE for _ in range(OFTEN.get(family, 2))]
ON_X86 = ("sparse_n_of_m", "sparse_codes", "sparse_codes_conv2d", *ON_FEW_TARGETS)
ARM = [family for family in FAMILIES if family not in ON_X86]


def check(case, target):
    assert case.kernel.refuses(case.region, target) is None
    assert_kernel_equals_reference(case.kernel, case.region, target, case.tile, case.shapes)


def drawn_cases(family):
    """A case of a family, and one of its targets."""
    targets = st.sampled_from(ON_FEW_TARGETS.get(family, [*TARGETS, *WITH_VBMI]))
    return targets.flatmap(lambda t: st.tuples(cases(family, t), st.just(t)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kernel_equals_its_reference(family):
    if family not in HERE:
        pytest.skip("this CPU permutes no two registers")

    @settings(max_examples=4, derandomize=True, **COMPILED)
    @given(drawn_cases(family))
    def run(drawn):
        check(*drawn)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_two_thousand_kernels_equal_their_references(part):
    @seed(part)
    @settings(max_examples=CASES_A_PART, database=None, **COMPILED)
    @given(st.sampled_from(WEIGHED).flatmap(drawn_cases))
    def run(drawn):
        check(*drawn)

    run()


@pytest.mark.slow
@pytest.mark.skipif(not (COMPILER and EMULATOR), reason="needs aarch64-linux-gnu-gcc and qemu-aarch64")
@pytest.mark.parametrize("family", ARM)
def test_arm_kernels_are_right_under_emulation(family):
    @settings(max_examples=5, derandomize=True, **COMPILED)
    @given(cases(family, NEON))
    def run(case):
        check(case, NEON)

    run()
