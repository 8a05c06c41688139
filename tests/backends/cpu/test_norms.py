"""Group and instance norms of images, with what follows them, against float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from emulated import COMPILER, EMULATOR
from regions import NEON, TARGETS
from test_products import run
from torch import nn

import mcc
from mcc.backends.cpu.kernels.group_norm import GroupNormShape, group_norm_function

QUICK = {"measure": "never", "tuning": "model"}


def moved(norm):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in norm.parameters():
            p.uniform_(0.5, 2, generator=generator)
    return norm


@pytest.mark.parametrize("target", [*TARGETS, NEON], ids=str)
@pytest.mark.parametrize(("shape", "groups"), [
    ((2, 5, 7, 16), 4), ((1, 20, 13, 20), 1), ((3, 1, 1, 33), 33), ((2, 12, 11, 96), 32), ((0, 4, 4, 32), 2),
])  # fmt: skip
def test_channels_of_a_group_are_normalized_together(target, shape, groups):
    if target is NEON and not (COMPILER and EMULATOR):
        pytest.skip("needs aarch64-linux-gnu-gcc and qemu-aarch64")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 3 + 100
    weight, bias = torch.randn(2, shape[-1], generator=generator)
    norm = torch.nn.functional.group_norm(
        x.double().permute(0, 3, 1, 2), groups, weight.double(), bias.double()
    ).permute(0, 2, 3, 1)  # fmt: skip
    function = group_norm_function(GroupNormShape(shape, groups, 1e-5, weight=True, bias=True, epilogue=()), target)
    found = run(function, target, (x.numpy(), weight.numpy(), bias.numpy()), shape)
    # of values about 100 float32 keeps 1e-5; one pixel and one channel have no variance but that
    np.testing.assert_allclose(found, norm.numpy(), atol=1e-4 if shape[1] > 1 else 0.1)


BETWEEN = [
    *((nn.GroupNorm(4, 32), after) for after in (nn.Identity(), nn.SiLU(), nn.ReLU(), nn.GELU())),
    (nn.GroupNorm(32, 32, affine=False), nn.SiLU()), (nn.GroupNorm(1, 32, eps=0.1), nn.ReLU()),
    (nn.InstanceNorm2d(32), nn.ReLU()), (nn.InstanceNorm2d(32, affine=True), nn.Identity()),
]  # fmt: skip


@pytest.mark.parametrize(("norm", "after"), BETWEEN, ids=str)
@pytest.mark.parametrize("passes", ["", "quantize"])
def test_a_norm_between_convolutions_takes_in_what_follows(norm, after, passes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), moved(norm), after, nn.Conv2d(32, 8, 1)).eval()
    x = torch.randn(2, 3, 11, 9)
    data = mcc.Data(calibration=[x])
    artifact = mcc.compile(model, (x,), passes=passes, data=data, dynamic_shapes=({0: "batch"},), **QUICK)
    for batch in (0, 1, 7):
        x = torch.randn(batch, 3, 11, 9)
        found = artifact(x)
        assert found.shape == (batch, 8, 9, 7)
        if passes == "" and batch:  # torch's instance norm has no empty batch
            expected = copy.deepcopy(model).double()(x.double()).float()
            torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)
        elif batch:
            assert float((found - model(x)).norm() / model(x).norm()) < 0.05
    kernels = {row.kernel.split()[0] for row in artifact.report.layers}
    assert kernels == ({"conv2d_int8"} if passes else {"conv2d_f32"})


def test_an_image_of_any_size_is_normalized():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), moved(nn.GroupNorm(8, 32)), nn.SiLU()).eval()
    dims = ({0: "batch", 2: "height", 3: "width"},)
    artifact = mcc.compile(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=dims, **QUICK)
    for shape in ((1, 3, 5, 40), (7, 3, 16, 16), (1, 3, 1, 3)):
        x = torch.randn(shape)
        torch.testing.assert_close(artifact(x), model(x).detach(), rtol=1e-4, atol=1e-4)


def test_a_norm_that_others_read_gives_its_floats():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 16, 1), moved(nn.GroupNorm(4, 16))

        def forward(self, x):
            y = self.norm(self.conv(x))
            return torch.nn.functional.silu(y) + y, y

    model, x = Twice().eval(), torch.randn(2, 3, 6, 6)
    for found, expected in zip(mcc.compile(model, (x,), **QUICK)(x), model(x), strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)
