"""Running artifacts: inputs of every kind, threads, processes without torch, errors in words."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from networks import Branches, mlp

import mcc
from mcc.errors import ArtifactError


def compiled(model, inputs, **options):
    return mcc.compile(model.eval(), inputs, measure="never", tuning="model", **options)


@pytest.fixture(scope="module")
def artifact():
    torch.manual_seed(0)
    return compiled(mlp(12, 32, 4), (torch.randn(2, 12),), dynamic_shapes={"input": {0: "batch"}})


@pytest.fixture(scope="module")
def saved(artifact, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "mlp.mcc"
    artifact.save(path)
    return path


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_mcc_and_the_runtime_loads_neither_torch_nor_tvm():
    code = "import sys, mcc, mcc.runtime; print([m for m in ('torch', 'tvm', 'onnx') if m in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_an_artifact_runs_where_torch_cannot_be_imported(saved, artifact):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np, mcc\n"
        "y = mcc.load(sys.argv[1])(np.ones((3, 12), np.float32))\n"
        "print(type(y).__name__, y.tolist(), 'tvm' in sys.modules)"
    )
    expected = artifact(np.ones((3, 12), np.float32))
    assert run_python(code, str(saved)).strip() == f"ndarray {expected.tolist()} False"


def test_torch_may_be_imported_after_an_artifact_ran(saved):
    code = (
        "import sys, numpy as np, mcc\n"
        "artifact = mcc.load(sys.argv[1])\n"
        "a = artifact(np.ones((3, 12), np.float32))\n"
        "import torch\n"
        "b = artifact(torch.ones(3, 12))\n"
        "print(type(b).__name__, bool((b.numpy() == a).all()))"
    )
    assert run_python(code, str(saved)).strip() == "Tensor True"


def test_outputs_are_of_the_inputs_kind(artifact):
    assert isinstance(artifact(torch.randn(2, 12)), torch.Tensor)
    assert isinstance(artifact(np.zeros((2, 12), np.float32)), np.ndarray)
    assert artifact(torch.randn(2, 12, requires_grad=True)).requires_grad is False


@pytest.mark.parametrize("make", [
    lambda x: np.asfortranarray(x), lambda x: np.concatenate([x, x], 1)[:, ::2] * 0 + x, lambda x: x[::-1][::-1],
    lambda x: np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape),
], ids=["fortran", "strided", "reversed", "unaligned and read-only"])  # fmt: skip
def test_arrays_of_any_layout_give_the_same_answer(artifact, make):
    x = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)
    assert np.array_equal(artifact(make(x)), artifact(x))


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_any_batch_runs(artifact, batch):
    assert artifact(np.zeros((batch, 12), np.float32)).shape == (batch, 4)
    assert artifact(torch.zeros(batch, 12)).shape == (batch, 4)


def test_nested_outputs_and_named_inputs_keep_their_structure():
    model, x, scale = Branches().eval(), torch.randn(4, 6), torch.rand(5)
    artifact = compiled(model, (x, scale))
    with torch.no_grad():
        expected = model(x, scale)
    for found in (artifact(x, scale), artifact(x, scale=scale), artifact(scale=scale, x=x)):
        assert list(found) == ["z", "rest"]
        assert isinstance(found["rest"], tuple)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("inputs", "named", "message"), [
    ((np.zeros((2, 5), np.float32),), {}, "input input is float32[2, 5], the artifact takes float32[batch, 12]"),
    ((np.zeros((2, 12)),), {}, "input input is float64[2, 12], the artifact takes float32[batch, 12]"),
    ((np.zeros(12, np.float32),), {}, "input input is float32[12], the artifact takes float32[batch, 12]"),
    ((), {}, "0 inputs given, 1 needed\n  remedy  the inputs are input"),
    ((), {"y": 1}, "unexpected input 'y'\n  remedy  the inputs are input"),
    ((np.zeros((2, 12), np.float32),) * 2, {}, "2 inputs given, 1 needed"),
])  # fmt: skip
def test_wrong_inputs_are_refused_in_words(artifact, inputs, named, message):
    with pytest.raises(ArtifactError) as caught:
        artifact(*inputs, **named)
    assert str(caught.value).startswith(message)


def test_two_threads_may_call_one_artifact(artifact):
    random = np.random.default_rng(0)
    inputs = [random.standard_normal((n, 12)).astype(np.float32) for n in range(1, 40)]
    expected = [artifact(x) for x in inputs]
    wrong: list[int] = []

    def call() -> None:
        for _ in range(20):
            wrong.extend(i for i, x in enumerate(inputs) if not np.array_equal(artifact(x), expected[i]))

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_results_do_not_depend_on_the_number_of_threads_and_affinity_is_kept(saved):
    x = np.random.default_rng(0).standard_normal((600, 12)).astype(np.float32)
    before = os.sched_getaffinity(0)
    one, two = (mcc.load(saved, threads=n) for n in (1, 2))
    for _ in range(3):
        assert np.array_equal(one(x), two(x))
    assert os.sched_getaffinity(0) == before
    with pytest.raises(ArtifactError, match="threads=0"):
        mcc.load(saved, threads=0)


def test_a_forked_child_can_call_an_artifact(saved):
    code = (
        "import os, sys, numpy as np, mcc\n"
        "artifact, x = mcc.load(sys.argv[1], threads=2), np.ones((600, 12), np.float32)\n"
        "expected = artifact(x)\n"
        "pid = os.fork()\n"
        "if pid == 0: os._exit(0 if (artifact(x) == expected).all() else 1)\n"
        "print(os.waitpid(pid, 0)[1])"
    )
    assert run_python(code, str(saved)).strip() == "0"


def test_an_artifact_tells_of_itself(artifact, saved):
    loaded = mcc.load(saved)
    assert [(s.name, s.shape) for s in loaded.inputs] == [("input", ("batch", 12))]
    assert loaded.report == artifact.report
    assert loaded.memory.weights == artifact.memory.weights > 12 * 32 * 4
    assert repr(loaded).startswith("Artifact(input: float32['batch', 12]; cpu:")
    assert "dense_f32" in loaded.report.layers_text()
    assert "encode and lower" in str(loaded.report)


def test_the_input_whose_size_no_dim_can_be_is_named():
    class Folded(torch.nn.Module):
        def forward(self, a, b):
            return a.reshape(1, 2, -1).sum(1) + b.reshape(1, 3, -1).sum(1)

    size = torch.export.Dim("size", min=2, max=100)
    artifact = compiled(
        Folded(), (torch.randn(1, 8), torch.randn(1, 12)), dynamic_shapes=({1: 2 * size}, {1: 3 * size})
    )
    with pytest.raises(ArtifactError, match=r"input b is float32\[1, 14\], the artifact takes float32\[1, 3\*"):
        artifact(torch.randn(1, 8), torch.randn(1, 14))
