"""Models for ARM: compiled here, run there; the kernels are tested in test_random_kernels.py, under emulation."""

from __future__ import annotations

import pytest
import torch
from emulated import COMPILER
from torch import nn

import mcc
from mcc.errors import ArtifactError, BackendError

NET = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.GELU(), nn.Flatten(),
    nn.Linear(16 * 64, 5),
)  # fmt: skip
IMAGES = torch.randn(2, 3, 8, 8)


@pytest.mark.skipif(not COMPILER, reason="needs aarch64-linux-gnu-gcc")
@pytest.mark.parametrize("passes", ["", "quantize"])
def test_a_model_is_compiled_for_arm_and_saved(tmp_path, passes):
    artifact = mcc.compile(NET.eval(), (IMAGES,), passes=passes, target="cpu:neon", data=mcc.Data(calibration=[IMAGES]))
    assert artifact.target == "cpu:neon"
    assert {row.kernel.split()[0] for row in artifact.report.layers} == (
        {"conv2d_int8", "depthwise_int8", "dense_int8"} if passes else {"conv2d_f32", "depthwise", "dense_f32"}
    )
    artifact.save(tmp_path / "net.mcc")
    with pytest.raises(ArtifactError, match=r"is for cpu:neon; this CPU lacks asimd"):
        mcc.load(tmp_path / "net.mcc")


def test_without_a_cross_compiler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BackendError, match=r"aarch64-linux-gnu-gcc(.|\n)*install gcc-aarch64-linux-gnu"):
        mcc.compile(NET.eval(), (IMAGES,), target="cpu:neon", verify=False)
