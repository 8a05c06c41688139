"""reestimate-batch-norm: statistics of the calibration data, norm behind norm, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mcc
from mcc.data import Data
from mcc.errors import DataError, PassError
from mcc.passes import FoldBatchNorm, PruneChannels, ReestimateBatchNorm
from mcc.pipeline import Pipeline
from mcc.target import parse_target

STEP = ReestimateBatchNorm()


def run(model, x, *steps, calibration=None):
    graph = mcc.capture(model.eval(), (x,), dynamic_shapes=({0: "batch"},))
    data = Data(calibration=[(x,)] if calibration is None else calibration)
    return Pipeline(steps, parse_target("cpu:avx2"), data).run(graph, (x,))


def moved(*shape: int) -> Tensor:
    """Channels of different means and variances, none of them what a new batch norm takes for granted."""
    channels = torch.arange(shape[1], dtype=torch.float32).reshape(1, -1, *[1] * (len(shape) - 2))
    return torch.randn(shape) * (1 + channels) + 3 * channels


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (lambda: nn.BatchNorm1d(5), (7, 5)),
        (lambda: nn.BatchNorm1d(5), (3, 5, 11)),
        (lambda: nn.BatchNorm2d(5), (2, 5, 3, 7)),
        (lambda: nn.BatchNorm3d(5), (2, 5, 3, 2, 5)),
        (lambda: nn.BatchNorm2d(5, affine=False), (2, 5, 3, 7)),
    ],
)
def test_statistics_are_those_of_training_over_all_data(norm, shape):
    x, model = moved(*shape), norm()
    changed, rows = run(model, x, STEP)
    trained = norm()
    trained.momentum = None  # the plain mean over what it has seen
    trained.train()(x)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(changed.tensor(name), getattr(trained, name))
    assert rows[-1].edits == 1


def test_batches_count_by_their_rows():
    x = moved(40, 6)
    whole, _ = run(nn.BatchNorm1d(6), x, STEP)
    batches = [(part,) for part in (x[:1], x[1:1], x[1:8], x[8:])]
    cut, _ = run(nn.BatchNorm1d(6), x, STEP, calibration=batches)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(cut.tensor(name), whole.tensor(name))


def test_each_norm_sees_what_those_before_it_give():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2), nn.BatchNorm2d(5)
    )
    x = moved(16, 3, 9, 11)
    before, after = str(mcc.capture(model.eval(), (x,), dynamic_shapes=({0: "batch"},))), run(model, x, STEP)[0]
    assert str(after) == before
    with torch.no_grad():
        given = after(x)
    torch.testing.assert_close(given.mean((0, 2, 3)), torch.zeros(5), rtol=0, atol=1e-5)
    # epsilon, 1e-5, is added to variances of a tenth
    torch.testing.assert_close(given.var((0, 2, 3)), torch.ones(5), rtol=1e-3, atol=0)


def test_pruned_channels_leave_norms_that_fit_again():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.second(self.first(x).relu()))

    model, x = Net(), moved(32, 3, 8, 8)
    model.train()(x)
    prune = PruneChannels(ratio=0.5)
    pruned, again = run(model, x, prune)[0], run(model, x, prune, STEP)[0]
    with torch.no_grad():
        apart, near = ((g(x).var((0, 2, 3)) - 1).abs().max() for g in (pruned, again))
    assert near < 1e-4 < apart


def test_folding_afterwards_takes_the_new_statistics():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), moved(16, 3, 9, 9)
    plain, folded = run(model, x, STEP)[0], run(model, x, STEP, FoldBatchNorm())[0]
    with torch.no_grad():
        torch.testing.assert_close(folded(x), plain(x), rtol=1e-4, atol=1e-4)


def test_norms_without_statistics_of_their_own_stay():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
            self.c = nn.BatchNorm1d(4, track_running_stats=False)
            self.b.running_mean = self.a.running_mean

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)))

    with pytest.raises(PassError, match=r"no batch norm to change: a: its running statistics are shared; b: .* shared"):
        run(Two(), moved(9, 4), STEP)


def test_a_graph_without_norms_is_refused():
    with pytest.raises(PassError, match="there is no batch norm to change"):
        run(nn.Linear(4, 4), torch.randn(9, 4), STEP)


@pytest.mark.parametrize("bad", [torch.zeros(1, 4), torch.zeros(0, 4), torch.full((9, 4), torch.inf)])
def test_data_that_has_no_variance_is_refused(bad):
    with pytest.raises(DataError, match="gives .* fewer than two rows, or some are not finite"):
        run(nn.BatchNorm1d(4), moved(9, 4), STEP, calibration=[(bad,)])
