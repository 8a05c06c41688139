"""Every kernel family on random regions, against NumPy: a few on each commit, two thousand in CI, some for ARM."""

from __future__ import annotations

import pytest
from cases import FAMILIES, cases
from emulated import COMPILER, EMULATOR
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from regions import NEON, TARGETS, assert_kernel_equals_reference

# each example is compiled: shrinking one would take minutes; a fixed choice keeps CI's verdict its own
COMPILED = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": (Phase.explicit, Phase.generate)}
PARTS, CASES_A_PART = 8, 250
# those that are quick to compile, and have the most shapes, more often
OFTEN = {"conv2d": 4, "depthwise": 4, "sparse": 4, "low_bit": 1}
WEIGHED = [family for family in FAMILIES for _ in range(OFTEN.get(family, 2))]


def check(case, target):
    assert case.kernel.refuses(case.region, target) is None
    assert_kernel_equals_reference(case.kernel, case.region, target, case.tile, case.shapes)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kernel_equals_its_reference(family):
    @settings(max_examples=4, derandomize=True, **COMPILED)
    @given(st.sampled_from(TARGETS).flatmap(lambda t: st.tuples(cases(family, t), st.just(t))))
    def run(drawn):
        check(*drawn)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_two_thousand_kernels_equal_their_references(part):
    drawn = st.tuples(st.sampled_from(WEIGHED), st.sampled_from(TARGETS))

    @seed(part)
    @settings(max_examples=CASES_A_PART, database=None, **COMPILED)
    @given(drawn.flatmap(lambda d: st.tuples(cases(*d), st.just(d[1]))))
    def run(drawn):
        check(*drawn)

    run()


@pytest.mark.slow
@pytest.mark.skipif(not (COMPILER and EMULATOR), reason="needs aarch64-linux-gnu-gcc and qemu-aarch64")
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "sparse_n_of_m"])
def test_arm_kernels_are_right_under_emulation(family):
    @settings(max_examples=5, derandomize=True, **COMPILED)
    @given(cases(family, NEON))
    def run(case):
        check(case, NEON)

    run()
