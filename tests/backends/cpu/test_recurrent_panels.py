"""Weights of recurrences in panels: every weight where a tile reads it, and the layers that read them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mcc
from mcc.artifact import read_artifact
from mcc.backends.cpu.kernels.recurrent import panel_units
from mcc.backends.cpu.recurrent_panels import in_panels
from mcc.target import parse_target

QUICK = {"verify": False, "measure": "never", "tuning": "model", "target": "cpu:avx2"}


@given(hidden=st.integers(1, 40), gates=st.sampled_from([3, 4]), units=st.integers(1, 16))
def test_a_panel_has_the_weights_of_its_units_and_the_last_one_ends_with_the_last(hidden, gates, units):
    units = min(units, hidden)
    weight = torch.arange(hidden * gates * hidden, dtype=torch.float32).reshape(hidden, gates * hidden)
    panels = in_panels(weight, units)
    assert panels.shape == (-(-hidden // units), hidden, gates, units)
    for number, panel in enumerate(panels):
        first = min(number * units, hidden - units)
        for gate in range(gates):
            assert torch.equal(panel[:, gate], weight[:, gate * hidden + first : gate * hidden + first + units])


@pytest.mark.parametrize(("target", "hidden", "rows", "units"), [
    ("cpu:avx2", 256, 1, 16), ("cpu:avx2", 256, 8, 8), ("cpu:avx2", 9, 1, 8), ("cpu:avx2", 5, 1, 4),
    ("cpu:avx512", 256, 1, 32), ("cpu:avx512", 256, 8, 32), ("cpu:avx512", 31, 1, 16), ("cpu:neon", 256, 8, 8),
])  # fmt: skip
def test_a_single_row_has_the_sums_of_two_vectors_in_flight(target, hidden, rows, units):
    assert panel_units(parse_target(target), hidden, rows) == units


class Twice(nn.Module):
    """One recurrence that is called twice, of states that it is given."""

    def __init__(self, kind: type[nn.RNNBase], hidden: int) -> None:
        super().__init__()
        self.layer = kind(input_size=hidden, hidden_size=hidden)

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.layer(x)
        return self.layer(y.tanh(), state)[0]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("kind", "hidden"), [(nn.LSTM, 16), (nn.LSTM, 37), (nn.GRU, 24), (nn.GRU, 7)])
def test_a_shared_recurrence_is_stored_once_and_right(tmp_path, kind, hidden, batch):
    torch.manual_seed(0)
    model, x = Twice(kind, hidden).eval(), torch.randn(5, batch, hidden)
    mcc.compile(model, (x,), **QUICK).save(tmp_path / "a.mcc")
    panels = [name for name in read_artifact(tmp_path / "a.mcc").weights if name.endswith("_in_panels")]
    assert len(panels) == 1
    with torch.no_grad():
        expected = Twice.forward(model.double(), x.double())
    torch.testing.assert_close(mcc.load(tmp_path / "a.mcc")(x).double(), expected, rtol=1e-4, atol=1e-5)


def test_a_weight_that_is_an_input_is_read_as_it_is():
    class Given(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            zeros = x.new_zeros(2, 8)
            return torch.ops.mcc.lstm(x, zeros, zeros, weight, None, False, False)[0]

    torch.manual_seed(0)
    x, weight = torch.randn(4, 2, 32), torch.randn(8, 32)
    artifact = mcc.compile(Given(), (x, weight), **QUICK)
    np.testing.assert_allclose(artifact(x, weight), Given()(x, weight), rtol=1e-5, atol=1e-5)
