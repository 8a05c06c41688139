"""fine-tune: learns, repeats itself, resumes, and leaves the process as it was."""

from __future__ import annotations

import pytest
import torch
from networks import Residual, mlp

import mcc
from mcc.data import Data
from mcc.errors import DataError
from mcc.passes import FineTune
from mcc.pipeline import Pipeline
from mcc.target import parse_target


def spirals(count=6):
    """Batches of a task with a linear answer."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(count):
        x = torch.randn(32, 8, generator=generator)
        made.append((x, (x[:, 0] > x[:, 1]).long()))
    return made


def run(model, *steps, data, seed=0):
    graph = mcc.capture(model.eval(), (torch.randn(2, 8),), dynamic_shapes=({0: "batch"},))
    return Pipeline(steps, parse_target("cpu:avx2"), data, seed).run(graph, (torch.randn(2, 8),))[0]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_lowers_the_loss(optimizer):
    data = spirals()
    model = mlp(8, 16, 2)
    before = torch.nn.functional.cross_entropy(model(data[0][0]), data[0][1])
    graph = run(model, FineTune(epochs=25, optimizer=optimizer, learning_rate=0.05), data=Data(train=data))
    assert torch.nn.functional.cross_entropy(graph(data[0][0]), data[0][1]) < before / 2


def test_the_same_seed_gives_the_same_weights_and_the_process_keeps_its_random_state():
    model = mlp(8, 16, 2)
    state = torch.random.get_rng_state()
    a, b = (run(model, FineTune(epochs=2), data=Data(train=spirals())) for _ in range(2))
    assert torch.equal(a.tensor("0.weight"), b.tensor("0.weight"))
    torch.random.set_rng_state(state)
    first = torch.rand(1)
    torch.random.set_rng_state(state)
    x = torch.randn(2, 8)
    del x
    torch.random.set_rng_state(state)
    assert torch.equal(first, torch.rand(1))


def test_an_interrupted_training_goes_on_where_it_stopped(tmp_path):
    class Interrupted(list):
        """Data that fails in the third epoch."""

        epochs = 0

        def __iter__(self):
            Interrupted.epochs += 1
            if Interrupted.epochs == 3:
                raise KeyboardInterrupt
            return super().__iter__()

    model = mlp(8, 16, 2)
    step = FineTune(epochs=4, checkpoint=str(tmp_path / "training.safetensors"))
    whole = run(model, FineTune(epochs=4, checkpoint=str(tmp_path / "other.safetensors")), data=Data(train=spirals()))
    with pytest.raises(KeyboardInterrupt):
        run(model, step, data=Data(train=Interrupted(spirals())))
    resumed = run(model, step, data=Data(train=spirals()))
    torch.testing.assert_close(resumed.tensor("0.weight"), whole.tensor("0.weight"))


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    path = str(tmp_path / "training.safetensors")
    run(mlp(8, 16, 2), FineTune(checkpoint=path), data=Data(train=spirals()))
    with pytest.raises(DataError, match="belongs to another training run"):
        run(mlp(8, 12, 2), FineTune(checkpoint=path), data=Data(train=spirals()))


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "training.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(DataError, match="cannot read the checkpoint"):
        run(mlp(8, 16, 2), FineTune(checkpoint=str(path)), data=Data(train=spirals()))


@pytest.mark.parametrize(("train", "message"), [
    ([], "the training data is empty or has no length"),
    ((b for b in spirals()), "the training data is empty or has no length"),
    ([torch.randn(4, 8)], r"a training batch is not \(\*inputs, labels\)"),
])  # fmt: skip
def test_data_that_cannot_train_is_refused(train, message):
    with pytest.raises(DataError, match=message):
        run(mlp(8, 16, 2), FineTune(), data=Data(train=train))


def test_a_users_loss_is_used():
    data = Data(train=[(torch.randn(4, 8), torch.zeros(4, 2))] * 4, loss=torch.nn.functional.mse_loss)
    graph = run(mlp(8, 2), FineTune(epochs=30, learning_rate=0.05), data=data)
    assert graph(data.train[0][0]).abs().mean() < 0.2


def test_batch_norm_statistics_move_only_while_training():
    x = torch.randn(4, 3, 8, 8)
    graph = mcc.capture(Residual(), (x,), dynamic_shapes=({0: "batch"},))
    before = graph.tensor("b1.running_mean").clone()
    graph(x)
    assert torch.equal(graph.tensor("b1.running_mean"), before)
    data = Data(train=[(x + 3, torch.zeros(4, dtype=torch.long))])
    tuned, _ = Pipeline((FineTune(),), parse_target("cpu:avx2"), data).run(graph, (x,))
    assert not torch.equal(tuned.tensor("b1.running_mean"), before)
    assert torch.equal(graph.tensor("b1.running_mean"), before)
