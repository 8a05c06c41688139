"""Concatenation as copies of whole runs, taking in nearest-neighbour upsampling, in float and in codes."""

from __future__ import annotations

import pytest
import torch
from regions import TARGETS
from torch import nn
from torch.nn import functional as F

import mcc


class Decoder(nn.Module):
    """A step of a U-Net: what was made smaller is made larger and joined to what it came from."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.first, self.down = nn.Conv2d(3, 37, 3, padding=1), nn.Conv2d(37, 64, 3, factor, padding=1)
        self.up = nn.Conv2d(101, 16, 3, padding=1)

    def forward(self, x):
        a = F.relu(self.first(x))
        b = F.interpolate(F.relu(self.down(a)), scale_factor=self.factor)
        return self.up(torch.cat([b, a], 1))


class Tokens(nn.Module):
    """A class token before tokens of any number, and features side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.token = nn.Linear(20, 24), nn.Parameter(torch.randn(1, 1, 24))

    def forward(self, x):
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), self.first(x)], 1)
        return torch.cat([y, y, y * 2], -1)


@pytest.mark.parametrize("target", map(str, TARGETS))
@pytest.mark.parametrize(("model", "shape"), [
    (Decoder(2), (3, 12, 14)), (Decoder(3), (3, 9, 6)), (Tokens(), (7, 20)),
], ids=["by 2", "by 3", "tokens"])  # fmt: skip
@pytest.mark.parametrize("passes", ["", "quantize"])
def test_concatenation(target, model, shape, passes):
    torch.manual_seed(0)
    x = torch.randn(4, *shape)
    artifact = mcc.compile(
        model.eval(), (x,), passes=passes, data=mcc.Data(calibration=[x]), target=target, tuning="model",
        dynamic_shapes=({0: "batch"},),
    )  # fmt: skip
    for batch in (4, 1, 7, 0):
        fresh = x[:batch] if batch < 4 else torch.cat([x, x])[:batch]
        with torch.no_grad():
            expected, found = model.double()(fresh.double()), artifact(fresh)
        model.float()
        assert found.shape == expected.shape
        limit = 0.03 if passes else 1e-6
        assert (found - expected).norm() <= limit * max(expected.norm(), 1)


class Grows(nn.Module):
    """What a decoder keeps, with a token more; of any batch and length."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, past, new):
        return torch.cat([past, new, past], self.dim)


@pytest.mark.parametrize("kind", [torch.float32, torch.int8, torch.uint8])
@pytest.mark.parametrize(("dim", "inner"), [(2, (16,)), (2, (1,)), (1, (3, 5)), (1, ())])
def test_parts_of_any_length_are_copied_in_runs(kind, dim, inner):
    outer = {2: (3,), 1: ()}[dim]

    def made(batch, length):
        return (torch.randn(batch, *outer, length, *inner) * 50).to(kind)

    names = {0: "batch", dim: "past"}, {0: "batch"}
    artifact = mcc.compile(
        Grows(dim), (made(2, 6), made(2, 1)), dynamic_shapes=names, measure="never", tuning="model", verify=False
    )
    for batch, length in ((2, 6), (1, 0), (3, 1), (1, 131), (0, 4)):
        inputs = made(batch, length), made(batch, 1)
        assert torch.equal(artifact(*inputs), torch.cat([*inputs, inputs[0]], dim))
