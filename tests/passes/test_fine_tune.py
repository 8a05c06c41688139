"""fine-tune: learns, with quantizers too, repeats itself, resumes, and leaves the process as it was."""

from __future__ import annotations

import pytest
import torch
from networks import Residual, mlp

import mcc
from mcc.data import Data
from mcc.errors import DataError, SpecError
from mcc.passes import FineTune, Quantize
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


@pytest.mark.parametrize("before", [(), (Quantize(weights="int4"),)])
def test_an_interrupted_training_goes_on_where_it_stopped(tmp_path, before):
    class Interrupted(list):
        """Data that fails in the third epoch."""

        epochs = 0

        def __iter__(self):
            Interrupted.epochs += 1
            if Interrupted.epochs == 3:
                raise KeyboardInterrupt
            return super().__iter__()

    model, Interrupted.epochs = mlp(8, 16, 2), 0
    step = FineTune(epochs=4, checkpoint=str(tmp_path / "training.safetensors"))
    other = FineTune(epochs=4, checkpoint=str(tmp_path / "other.safetensors"))
    calibration = [x for x, _ in spirals()]
    whole = run(model, *before, other, data=Data(train=spirals(), calibration=calibration))
    with pytest.raises(KeyboardInterrupt):
        run(model, *before, step, data=Data(train=Interrupted(spirals()), calibration=calibration))
    resumed = run(model, *before, step, data=Data(train=spirals(), calibration=calibration))
    tensors = dict(whole.module.state_dict())
    assert (len(tensors) > 4) == bool(before)
    torch.testing.assert_close(dict(resumed.module.state_dict()), tensors)


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
    ([(torch.randn(4, 5), torch.zeros(4))], r"a training batch with inputs \[4, 5\] does not fit the graph"),
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


def quantized(step, **options):
    """A trained network whose weights have two bits, then trained again."""
    data = Data(train=spirals(), calibration=[x for x, _ in spirals()])
    start = (FineTune(epochs=25, learning_rate=0.05), Quantize(weights="int2", activations="int4"))
    return run(mlp(8, 16, 2), *start, *step, data=data, **options), data


def mean_loss(graph, data):
    with torch.no_grad():
        return float(sum(torch.nn.functional.cross_entropy(graph(x), y) for x, y in data.train)) / len(data.train)


def test_weights_of_two_bits_and_their_scales_are_learned_together():
    (rounded, data), (learned, _) = quantized(()), quantized((FineTune(epochs=25, learning_rate=0.01),))
    assert mean_loss(learned, data) < 0.5 * mean_loss(rounded, data)
    scales = [n for n in dict(rounded.module.named_buffers()) if n.endswith("_scale")]
    assert len(scales) == 4
    for name in scales:
        assert not torch.equal(learned.tensor(name), rounded.tensor(name))
        assert bool((learned.tensor(name) > 0).all())
        assert not learned.tensor(name).requires_grad


def test_scales_of_groups_stay_float16():
    step = Quantize(weights="int3", activations=None, group_size=32)
    data = Data(train=[(torch.randn(16, 64), torch.randint(0, 4, (16,))) for _ in range(3)])
    x = torch.randn(2, 64)
    graph = mcc.capture(mlp(64, 4), (x,), dynamic_shapes=({0: "batch"},))
    before, _ = Pipeline((step,), parse_target("cpu:avx2"), data).run(graph, (x,))
    after, _ = Pipeline((step, FineTune(epochs=2)), parse_target("cpu:avx2"), data).run(graph, (x,))
    assert after.tensor("0.weight_scale").dtype is torch.float16
    assert not torch.equal(after.tensor("0.weight_scale"), before.tensor("0.weight_scale"))


def test_distillation_alone_follows_the_float_network_whatever_the_labels_say():
    """With distill=1 the labels do not count: those given here are wrong ones."""
    data, wrong = Data(train=spirals(), calibration=[x for x, _ in spirals()]), [(x, 1 - y) for x, y in spirals()]
    start = (FineTune(epochs=25, learning_rate=0.05),)
    teacher = run(mlp(8, 16, 2), *start, data=data)
    torch.manual_seed(0)
    before = run(mlp(8, 16, 2), *start, Quantize(weights="int2"), data=data)
    step = FineTune(epochs=25, learning_rate=0.01, distill=1.0)
    student, _ = Pipeline((step,), parse_target("cpu:avx2"), Data(train=wrong)).run(before, (torch.randn(2, 8),))
    assert mean_loss(student, data) < mean_loss(before, data)
    assert mean_loss(student, data) < 2 * mean_loss(teacher, data)


def test_distillation_of_a_network_without_quantizers_starts_at_no_loss():
    model = mlp(8, 16, 2)
    step = FineTune(distill=1.0, learning_rate=1e-9)
    graph = mcc.capture(model.eval(), (torch.randn(2, 8),), dynamic_shapes=({0: "batch"},))
    _, rows = Pipeline((step,), parse_target("cpu:avx2"), Data(train=spirals())).run(graph, (torch.randn(2, 8),))
    assert rows[1].notes == ("mean loss 0.0000 in the first epoch, 0.0000 in the last",)


@pytest.mark.parametrize(("share", "moves"), [(0.0, False), (0.5, True), (1.0, True)])
def test_frozen_batch_norms_keep_their_statistics(share, moves):
    x = torch.randn(4, 3, 8, 8)
    graph = mcc.capture(Residual(), (x,), dynamic_shapes=({0: "batch"},))
    data = Data(train=[(x + 3, torch.zeros(4, dtype=torch.long))])
    step = FineTune(epochs=2, freeze_batch_norm=share)
    tuned, _ = Pipeline((step,), parse_target("cpu:avx2"), data).run(graph, (x,))
    assert torch.equal(tuned.tensor("b1.running_mean"), graph.tensor("b1.running_mean")) is not moves


def test_shares_beyond_the_whole_are_refused():
    with pytest.raises(SpecError, match="fine-tune: distill=2.0, freeze_batch_norm=1.0"):
        FineTune(distill=2.0)
