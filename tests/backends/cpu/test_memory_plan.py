"""Where activations lie."""

from __future__ import annotations

import itertools
import random
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import mcc
from mcc.backends.cpu.memory_plan import _ORDERS, _placed, _Tensor

QUICK = {"measure": "never", "tuning": "model"}
FLOAT = 4  # bytes


def plan_of(artifact: mcc.Artifact) -> tuple[int, int]:
    """Bytes planned, and alive at once, as the report says."""
    (note,) = [n for p in artifact.report.passes for n in p.notes if n.startswith("activations between kernels")]
    planned, alive = (int(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", note))
    return planned, alive


def compiled(model: nn.Module, x: torch.Tensor, **options: object) -> mcc.Artifact:
    artifact = mcc.compile(model.eval(), (x,), **QUICK, **options)
    for _ in range(2):  # the second call finds what the first has left
        y = torch.randn_like(x)
        with torch.no_grad():
            torch.testing.assert_close(artifact(y), model(y), rtol=1e-4, atol=1e-4)
    return artifact


def test_a_chain_takes_what_two_neighbours_do():
    widths = [16, 48, 16, 32, 48, 8, 48, 16]
    layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
    artifact = compiled(nn.Sequential(*layers), torch.randn(5, 16))
    # 48, 16, 32, 48, 8, 48, from each end in turn
    assert plan_of(artifact) == (5 * (48 + 32) * FLOAT, 5 * (48 + 32) * FLOAT)


class Net(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.layers, self.how = nn.ModuleList(nn.Linear(16, 16) for _ in range(6)), how

    def forward(self, x):
        return self.how(self.layers, x)


def dense(layers, x):
    """Each layer reads the sum of all before."""
    seen = [x]
    for layer in layers:
        seen.append(torch.tanh(layer(sum(seen))))
    return torch.stack(seen).sum(0)


def viewed(layers, x):
    """A view of an early value is read late."""
    y = layers[0](x)
    turned = y.reshape(-1, 4, 4)
    for layer in layers[1:]:
        y = layer(y)
    return y + turned.cumsum(1).reshape(x.shape)


def returned_early(layers, x):
    y = layers[0](x)
    z = layers[1](y)
    for layer in layers[2:]:
        z = layer(z.relu())
    return torch.cat([y, z, y.sort(-1)[0]])


def parted(layers, x):
    """Parts of a value, and several results of one call."""
    a, b = layers[0](x).cumsum(-1).chunk(2, -1)
    values, places = layers[1](x).topk(3, -1)
    return torch.cat([a * b, values, places.float(), layers[2](x)], -1)


@pytest.mark.parametrize("how", [dense, viewed, returned_early, parted])
def test_what_is_read_later_is_not_overwritten(how):
    planned, alive = plan_of(compiled(Net(how), torch.randn(5, 16)))
    assert planned >= alive > 0


def test_codes_and_floats_share():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 8, 1), nn.Flatten(), nn.Linear(8 * 64, 4),
    )  # fmt: skip
    x = torch.randn(1, 3, 16, 16)
    artifact = mcc.compile(model.eval(), (x,), passes="quantize", data=mcc.Data(calibration=[x]), **QUICK)
    planned, alive = plan_of(artifact)
    assert planned <= 1.1 * alive
    assert artifact.memory.workspace <= planned


def test_calls_at_once_have_a_workspace_each():
    model, x = Net(dense).eval(), torch.randn(5, 16)
    artifact = compiled(model, x)
    inputs = [torch.randn(5, 16) for _ in range(64)]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        expected = [model(y) for y in inputs]
        for found, wanted in zip(pool.map(artifact, inputs * 4), expected * 4, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_what_a_caller_has_got_is_not_computed_in():
    artifact = compiled(Net(returned_early), torch.randn(5, 16))
    first = artifact(torch.randn(5, 16))
    kept = first.clone()
    artifact(torch.randn(5, 16))
    assert torch.equal(first, kept)


def overlapping(places):
    def random_tensor(at):
        first = draw.randint(0, 40)
        return _Tensor(at, (1,), "float32", draw.randint(0, 5000), first, first + draw.randint(0, 8))

    draw = random.Random(places)
    return [random_tensor(i) for i in range(places)]


@pytest.mark.parametrize("count", [1, 2, 7, 40, 150])
def test_nothing_alive_lies_on_something_alive(count):
    tensors = overlapping(count)
    for order in _ORDERS:
        offsets = _placed(sorted(tensors, key=order))
        assert all(o % 64 == 0 for o in offsets.values())
        for a, b in itertools.combinations(tensors, 2):
            apart = offsets[a] + a.size <= offsets[b] or offsets[b] + b.size <= offsets[a]
            assert apart or not a.beside(b) or not a.size or not b.size


def test_of_sizes_that_vary_nothing_is_planned():
    artifact = compiled(Net(dense), torch.randn(5, 16), dynamic_shapes=({0: "batch"},))
    assert not [n for p in artifact.report.passes for n in p.notes if n.startswith("activations between kernels")]


def test_types_that_numpy_lacks_stay_outside():
    class Rounded(nn.Module):
        def forward(self, x):
            return (x > 0).bfloat16().cumsum(1).amax(1).float() * 2

    compiled(Rounded(), torch.randn(4, 8))
