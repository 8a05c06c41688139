"""Convolutions of volumes run as those of images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mcc

QUICK = {"measure": "never", "tuning": "model"}


def network(*options):
    first = nn.Conv3d(3, 8, 3, padding=1)
    return nn.Sequential(first, nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 16, *options), nn.ReLU6()).eval()


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    (3, 1, 1), (3, 2, 1), ((1, 3, 3), (1, 2, 1), (0, 1, 1)), ((3, 1, 1), 1, (1, 0, 0)), ((2, 3, 1), (2, 1, 3), (1, 0, 2)),
    (3, 1, (2, 2, 2), (2, 2, 2)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("passes", ["fold-batch-norm", "fold-batch-norm; quantize"])
def test_the_answers_are_those_of_conv3d(options, passes):
    model, x = network(*options), torch.randn(2, 3, 5, 7, 6)
    artifact = mcc.compile(model, (x,), passes=passes, data=mcc.Data(calibration=[x]), **QUICK)
    assert all(row.kernel.startswith("conv2d") for row in artifact.report.layers)
    with torch.no_grad():
        expected = model(x)
    apart = (artifact(x) - expected).norm() / expected.norm()
    assert apart < (0.03 if "quantize" in passes else 1e-6)


def test_a_varying_batch_stays_so():
    model = network(3, 1, 1)
    artifact = mcc.compile(model, (torch.randn(2, 3, 4, 6, 5),), dynamic_shapes=({0: "batch"},), **QUICK)
    for batch in (1, 3, 0):
        x = torch.randn(batch, 3, 4, 6, 5)
        with torch.no_grad():
            torch.testing.assert_close(artifact(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("why", ["groups", "varying depth"])
def test_what_has_no_such_form_is_left_to_the_op_library(why):
    model = nn.Conv3d(4, 8, 3, padding=1, groups=2 if why == "groups" else 1).eval()
    shapes = ({2: "depth"},) if why == "varying depth" else None
    x = torch.randn(1, 4, 5, 6, 7)
    artifact = mcc.compile(model, (x,), dynamic_shapes=shapes, **QUICK)
    assert [row.kernel for row in artifact.report.layers] == ["op library"]
    with torch.no_grad():
        torch.testing.assert_close(artifact(x), model(x), rtol=1e-4, atol=1e-5)
