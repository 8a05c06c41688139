"""rigl: a fixed number of weights, whose places go where the loss wants them."""

from __future__ import annotations

import pytest
import torch
from networks import mlp
from torch import nn

import mcc
from mcc.data import Data
from mcc.errors import PassError, SpecError
from mcc.passes import FineTune, Quantize, Rigl
from mcc.passes.rigl import _moved
from mcc.pipeline import Pipeline
from mcc.target import parse_target


def run(model, x, *steps, data):
    graph = mcc.capture(model.eval(), (x,), dynamic_shapes=({0: "batch"},))
    return Pipeline(steps, parse_target("cpu:avx2"), data).run(graph, (x,))[0]


def batches(count=20, inputs=12):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, inputs, generator=generator), torch.randint(0, 3, (16,), generator=generator))
        for _ in range(count)
    ]


def test_the_graph_gets_masks():
    graph = mcc.capture(nn.Linear(4, 3), (torch.randn(2, 4),))
    step = Rigl(ratio=0.5)
    made = Pipeline((step, FineTune()), parse_target("cpu"), Data(train=batches(1, 4)))
    assert "%weight_masked: f32[3, 4] = mul.Tensor(@weight, @weight_mask)" in str(
        made.run(graph, (torch.randn(2, 4),))[0]
    )


def test_the_least_weights_leave_and_those_of_the_largest_gradients_enter():
    weight = torch.tensor([5.0, 1.0, 3.0, 0.0, 0.0, 0.0])
    gradient = torch.tensor([9.0, 9.0, 9.0, 1.0, -4.0, 2.0])
    kept, grown = _moved(weight, gradient, torch.tensor([True, True, True, False, False, False]), 0.4)
    assert kept.tolist() == [True, False, True, False, False, False]
    assert grown.tolist() == [False, False, False, False, True, False]


def test_the_number_of_weights_stays_and_their_places_do_not():
    torch.manual_seed(0)
    model, x = mlp(12, 20, 3), torch.randn(2, 12)
    before = run(model, x, Rigl(ratio=0.8), FineTune(learning_rate=1e-9), data=Data(train=batches(1)))
    after = run(model, x, Rigl(ratio=0.8), FineTune(epochs=2), data=Data(train=batches()))
    for name in ("0.weight_mask", "2.weight_mask"):
        old, new = before.tensor(name), after.tensor(name)
        assert old.sum() == new.sum()
        assert (old != new).any()
    assert sum(int(after.tensor(f"{n}.weight_mask").sum()) for n in (0, 2)) == round(0.2 * (12 * 20 + 20 * 3))
    assert sorted(name for name, _ in after.module.named_buffers()) == ["0.weight_mask", "2.weight_mask"]


def test_weights_are_found_that_the_first_mask_left_out():
    """Of 40 inputs the last 20 count, and begin masked."""
    model = nn.Linear(40, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5] * 20 + [0.1] * 20]))
    generator = torch.Generator().manual_seed(1)
    data = [(x, x[:, 20:].sum(1, keepdim=True)) for x in torch.randn(64, 64, 40, generator=generator)]
    steps = Rigl(ratio=0.5, scope="layer", updates=15), FineTune(epochs=4, optimizer="sgd", learning_rate=0.02)
    graph = run(model, torch.randn(2, 40), *steps, data=Data(train=data, loss=nn.functional.mse_loss))
    assert graph.tensor("weight_mask").sum() == 20
    assert graph.tensor("weight_mask")[0, 20:].sum() >= 18


def test_an_interrupted_training_ends_where_a_whole_one_does(tmp_path):
    class Interrupted(list):
        def __iter__(self):
            yield from list.__iter__(self)
            raise KeyboardInterrupt

    torch.manual_seed(0)
    model, x = mlp(12, 20, 3), torch.randn(2, 12)
    tune = FineTune(epochs=2, checkpoint=str(tmp_path / "run.safetensors"))
    whole = run(model, x, Rigl(ratio=0.8), FineTune(epochs=2), data=Data(train=batches()))
    halves = batches()
    rest = iter([halves, Interrupted(halves)])

    class Twice(list):
        def __iter__(self):
            return iter(next(rest))

    with pytest.raises(KeyboardInterrupt):
        run(model, x, Rigl(ratio=0.8), tune, data=Data(train=Twice(halves)))
    resumed = run(model, x, Rigl(ratio=0.8), tune, data=Data(train=halves))
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(tensor, resumed.tensor(name)), name


def test_a_frozen_layer_keeps_its_mask():
    torch.manual_seed(0)
    model, x = mlp(12, 20, 3), torch.randn(2, 12)
    model[0].weight.requires_grad_(False)
    before = run(model, x, Rigl(ratio=0.8), FineTune(learning_rate=1e-9), data=Data(train=batches(1)))
    after = run(model, x, Rigl(ratio=0.8), FineTune(), data=Data(train=batches()))
    assert torch.equal(before.tensor("0.weight_mask"), after.tensor("0.weight_mask"))
    assert not torch.equal(before.tensor("2.weight_mask"), after.tensor("2.weight_mask"))


def test_zeros_stay_zero_in_codes():
    torch.manual_seed(0)
    model, x = mlp(12, 20, 3), torch.randn(16, 12)
    data = Data(train=batches(), calibration=[x])
    graph = run(model, x, Rigl(ratio=0.8), FineTune(), Quantize(), data=data)
    assert graph(x).isfinite().all()
    mask = graph.tensor("0.weight_mask")
    assert int(mask.sum()) > 0


def test_it_needs_a_fine_tune_and_sound_numbers():
    with pytest.raises(PassError, match="needs one of fine-tune after it"):
        run(mlp(12, 20, 3), torch.randn(2, 12), Rigl(), data=Data())
    for options in ({"ratio": 1.0}, {"share": 0.0}, {"updates": 0}, {"scope": "all"}):
        with pytest.raises(SpecError, match="rigl: "):
            Rigl(**options)
